r"""LSTM with all its gates, and peepholes (Gers and Schmidhuber 2000), diagonal.

    i  = sigmoid(a_i * h + B_i x + p_i * c + b_i)
    f  = sigmoid(a_f * h + B_f x + p_f * c + b_f)
    z  = tanh(a_z * h + B_z x + b_z)
    c' = f * c + i * z
    o  = sigmoid(a_o * h + B_o x + p_o * c' + b_o)
    h' = o * tanh(c')

`p` are the peepholes; every `a` and `p` is a vector, every `B` a matrix.
"""

import torch
from torch import Tensor

from pararnn.cells.diagonal import DiagonalCell


class DiagonalLSTMCell(DiagonalCell):
    """One step of a diagonal LSTM; the state is `(h, c)`, the output first.

    Arguments and shapes are those of `DiagonalCell`.
    """

    num_components = 2
    num_gates = num_diagonals = 4
    num_peepholes = 3
    keeps = (1, 1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # noqa: D102
        h, c = state
        x_i, x_f, x_z, x_o = self.inputs(x)
        a_i, a_f, a_z, a_o = self.diagonal
        p_i, p_f, p_o = self.peephole
        i = torch.sigmoid(a_i * h + x_i + p_i * c)
        f = torch.sigmoid(a_f * h + x_f + p_f * c)
        z = torch.tanh(a_z * h + x_z)
        c = f * c + i * z
        o = torch.sigmoid(a_o * h + x_o + p_o * c)
        return o * torch.tanh(c), c
