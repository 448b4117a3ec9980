"""The sequential loop in plain PyTorch: the truth that everything else is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def loop(
    cell: nn.Module,
    x: Tensor,
    state: Any,
    resets: Tensor | None = None,
    reset_state: Any = None,
) -> tuple[Tensor, Any]:
    """Evaluate a cell step by step.

    Args:
        cell: `forward(x, state) -> state`.
        x: (batch, time, *features).
        state: (batch, hidden_size), or a tuple of them.
        resets: Boolean (batch, time): where true, the state before this step is `reset_state`.
        reset_state: Like `state`; zeros when None.

    Returns:
        The first components at all times, (batch, time, hidden_size), and the last state.
    """
    outputs = []
    if reset_state is None:
        parts = state if isinstance(state, tuple) else (state,)
        zeros = tuple(map(torch.zeros_like, parts))
        reset_state = zeros if isinstance(state, tuple) else zeros[0]
    for t, x_t in enumerate(x.unbind(1)):
        if resets is not None:
            now = resets[:, t].unsqueeze(1)
            if isinstance(state, tuple):
                pairs = zip(reset_state, state, strict=True)
                state = tuple(torch.where(now, f, s) for f, s in pairs)
            else:
                state = torch.where(now, reset_state, state)
        state = cell(x_t, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs, 1), state
