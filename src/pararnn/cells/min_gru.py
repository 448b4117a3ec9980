r"""minGRU (Feng et al. 2024, arXiv 2410.01201): linear in the state, so one iteration is exact.

    z  = sigmoid(B_z x + b_z)
    h' = (1 - z) * h + z * (B_h x + b_h)

Every `B` is a matrix.
"""

import torch
from torch import Tensor

from pararnn.cells.diagonal import DiagonalCell


class MinGRUCell(DiagonalCell):
    """One step of a minGRU; arguments and shapes are those of `DiagonalCell`.

    It has no recurrent weights, so `max_recurrent_weight` bounds nothing.
    """

    num_gates, num_diagonals = 2, 0
    keeps = (0, -1)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        x_z, x_h = self.inputs(x)
        z = torch.sigmoid(x_z)
        return (1 - z) * state + z * x_h
