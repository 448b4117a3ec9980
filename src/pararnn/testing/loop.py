"""The sequential loop in plain PyTorch: the truth that everything else is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pararnn.layers.arguments import by_row
from pararnn.tracing.capture import readout_of


def loop(
    cell: nn.Module,
    x: Tensor,
    state: Any,
    resets: Tensor | None = None,
    reset_state: Any = None,
) -> tuple[Tensor, Any]:
    """Evaluate a cell step by step.

    Args:
        cell: `forward(x, state) -> state`, and maybe `readout(x, state) -> y`.
        x: (batch, time, *features).
        state: (batch, *state_shape), or a tuple of such tensors.
        resets: Boolean (batch, time): where true, the state before this step is `reset_state`.
        reset_state: Like `state`; zeros when None.

    Returns:
        What the readout hands out at all times, (batch, time, ...), or without one the first tensor
        of the state; and the last state.
    """
    outputs, readout = [], readout_of(cell)
    if reset_state is None:
        parts = state if isinstance(state, tuple) else (state,)
        zeros = tuple(map(torch.zeros_like, parts))
        reset_state = zeros if isinstance(state, tuple) else zeros[0]
    for t, x_t in enumerate(x.unbind(1)):
        if resets is not None:
            now = resets[:, t]
            if isinstance(state, tuple):
                pairs = zip(reset_state, state, strict=True)
                state = tuple(torch.where(by_row(now, s), f, s) for f, s in pairs)
            else:
                state = torch.where(by_row(now, state), reset_state, state)
        state = cell(x_t, state)
        first = state[0] if isinstance(state, tuple) else state
        outputs.append(first if readout is None else readout(x_t, state))
    return torch.stack(outputs, 1), state
