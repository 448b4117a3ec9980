r"""Elman's network (1990), diagonal; with relu IndRNN (Li et al. 2018, arXiv 1803.04831).

    h' = tanh(a * h + B x + b)      or relu, as IndRNN has it

Every channel is a network of its own; layers mix them.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from pararnn.cells.diagonal import DiagonalCell

_FUNCTIONS = {"tanh": torch.tanh, "relu": torch.relu}


class DiagonalElmanCell(DiagonalCell):
    """One step of a diagonal Elman network.

    Args:
        args: Those of `DiagonalCell`.
        nonlinearity: "tanh" or "relu".
        kwargs: Those of `DiagonalCell`.

    Raises:
        ValueError: There is no such nonlinearity.
    """

    num_gates = num_diagonals = 1

    def __init__(
        self, *args: Any, nonlinearity: Literal["tanh", "relu"] = "tanh", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if nonlinearity not in _FUNCTIONS:
            raise ValueError(f"nonlinearity is {nonlinearity!r}; it must be 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        (x_h,) = self.inputs(x)
        return _FUNCTIONS[self.nonlinearity](self.diagonal[0] * state + x_h)
