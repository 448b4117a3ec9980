r"""LSTM with a forget gate alone, JANET (van der Westhuizen and Lasenby 2018, arXiv 1804.04849).

    s  = a_f * h + B_f x + b_f
    c  = tanh(a_c * h + B_c x + b_c)
    h' = sigmoid(s) * h + (1 - sigmoid(s - 1)) * c

What is added is gated a little less than what is forgotten.
"""

import torch
from torch import Tensor

from pararnn.cells.diagonal import DiagonalCell


class ForgetGateCell(DiagonalCell):
    """One step of JANET; arguments and shapes are those of `DiagonalCell`."""

    num_gates = num_diagonals = 2
    keeps = (0, 1)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        h = state
        x_f, x_c = self.inputs(x)
        a_f, a_c = self.diagonal
        s = a_f * h + x_f
        c = torch.tanh(a_c * h + x_c)
        return torch.sigmoid(s) * h + (1 - torch.sigmoid(s - 1)) * c
