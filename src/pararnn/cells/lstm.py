r"""ParaLSTM (Danieli et al. 2025, arXiv 2510.21450, eq. 3.1b with 3.3).

    f  = sigmoid(a_f * h + B_f x + p_f * c + b_f)
    z  = tanh(a_z * h + B_z x + b_z)
    c' = f * c + (1 - f) * z
    o  = sigmoid(a_o * h + B_o x + p_o * c' + b_o)
    h' = o * tanh(c')

Input and forget gate are coupled, `p` are the peepholes, every `a` and `p` is a vector (a diagonal
matrix), every `B` is full or has one block per head.
"""

import torch
from torch import Tensor

from pararnn.cells.diagonal import DiagonalCell


class ParaLSTMCell(DiagonalCell):
    """One step of the paper's LSTM; the state is `(h, c)`, the output first.

    Arguments and shapes are those of `DiagonalCell`.
    """

    num_components = 2
    num_gates = num_diagonals = 3
    num_peepholes = 2
    keeps = (0, 1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # noqa: D102
        h, c = state
        x_f, x_z, x_o = self.inputs(x)
        a_f, a_z, a_o = self.diagonal
        p_f, p_o = self.peephole
        f = torch.sigmoid(a_f * h + x_f + p_f * c)
        z = torch.tanh(a_z * h + x_z)
        c = f * c + (1 - f) * z
        o = torch.sigmoid(a_o * h + x_o + p_o * c)
        return o * torch.tanh(c), c
