"""The sequential loop in plain PyTorch: the truth that everything else is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def loop(
    cell: nn.Module, x: Tensor, state: Any, resets: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Evaluate a cell step by step.

    Args:
        cell: `forward(x, state) -> state`.
        x: (batch, time, *features).
        state: (batch, hidden_size), or a tuple of them.
        resets: Boolean (batch, time): where true, the state before this step is `state`.

    Returns:
        The first components at all times, (batch, time, hidden_size), and the last state.
    """
    first, outputs = state, []
    for t, x_t in enumerate(x.unbind(1)):
        if resets is not None:
            now = resets[:, t].unsqueeze(1)
            if isinstance(state, tuple):
                pairs = zip(first, state, strict=True)
                state = tuple(torch.where(now, f, s) for f, s in pairs)
            else:
                state = torch.where(now, first, state)
        state = cell(x_t, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs, 1), state
