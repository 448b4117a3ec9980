r"""Elman's network (1990), diagonal; with relu IndRNN (Li et al. 2018, arXiv 1803.04831).

    h' = tanh(a * h + B x + b)      or relu, as IndRNN has it

Every channel is a network of its own; layers mix them.
"""

from typing import Literal

import torch
from torch import Tensor

from pararnn.cells.diagonal import DiagonalCell

_FUNCTIONS = {"tanh": torch.tanh, "relu": torch.relu}


class DiagonalElmanCell(DiagonalCell):
    """One step of a diagonal Elman network.

    Args:
        input_size: This and the others as in `DiagonalCell`.
        hidden_size: See there.
        bias: See there.
        num_heads: See there.
        max_recurrent_weight: See there.
        device: See there.
        dtype: See there.
        max_timescale: See there.
        nonlinearity: "tanh" or "relu".

    Raises:
        ValueError: There is no such nonlinearity.
    """

    num_gates = num_diagonals = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        num_heads: int = 1,
        max_recurrent_weight: float | None = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_timescale: float | None = None,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            bias,
            num_heads,
            max_recurrent_weight,
            device,
            dtype,
            max_timescale=max_timescale,
        )
        if nonlinearity not in _FUNCTIONS:
            raise ValueError(f"nonlinearity is {nonlinearity!r}; it must be 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        (x_h,) = self.inputs(x)
        return _FUNCTIONS[self.nonlinearity](self.diagonal[0] * state + x_h)
