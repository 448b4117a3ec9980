r"""Closed-form continuous-time cell for irregular times (Hasani et al. 2022, arXiv 2106.13898).

    f  = a_f * h + B_f x + b_f
    g  = tanh(a_g * h + B_g x + b_g)
    k  = tanh(a_k * h + B_k x + b_k)
    h' = sigmoid(-f * t) * g + (1 - sigmoid(-f * t)) * k

`t` is the time since the step before.
"""

import torch
from torch import Tensor

from pararnn.cells.diagonal import DiagonalCell


class ClosedFormContinuousCell(DiagonalCell):
    """One step of a CfC; the last feature of `x` is the time since the step before.

    Args:
        input_size: Features of `x` without the time.
        hidden_size: This and the others as in `DiagonalCell`.
        bias: See there.
        num_heads: See there.
        max_recurrent_weight: See there.
        device: See there.
        dtype: See there.
        max_timescale: See there.

    Shapes: `x` (N, input_size + 1), `state` (N, hidden_size), result (N, hidden_size).
    """

    num_gates = num_diagonals = 3

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
        self.input_size = input_size + 1

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        h = state
        elapsed = x[:, -1:]
        x_f, x_g, x_k = self.inputs(x[:, :-1])
        a_f, a_g, a_k = self.diagonal
        near = torch.sigmoid(-(a_f * h + x_f) * elapsed)
        return near * torch.tanh(a_g * h + x_g) + (1 - near) * torch.tanh(a_k * h + x_k)
