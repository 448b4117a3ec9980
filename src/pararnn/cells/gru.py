r"""ParaGRU (Danieli et al. 2025, arXiv 2510.21450, eq. 3.1a with 3.3).

    z  = sigmoid(a_z * h + B_z x + b_z)
    r  = sigmoid(a_r * h + B_r x + b_r)
    c  = tanh(a_c * (h * r) + B_c x + b_c)
    h' = (1 - z) * h + z * c

Every `a` is a vector (a diagonal matrix), every `B` is full or has one block per head.
"""

import torch
from torch import Tensor

from pararnn.cells.diagonal import DiagonalCell


class ParaGRUCell(DiagonalCell):
    """One step of the paper's GRU; arguments and shapes are those of `DiagonalCell`."""

    num_gates = num_diagonals = 3
    keeps = (0, -1)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        h = state
        x_z, x_r, x_c = self.inputs(x)
        a_z, a_r, a_c = self.diagonal
        z = torch.sigmoid(a_z * h + x_z)
        r = torch.sigmoid(a_r * h + x_r)
        c = torch.tanh(a_c * (h * r) + x_c)
        return (1 - z) * h + z * c
