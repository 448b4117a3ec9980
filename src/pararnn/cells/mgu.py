r"""Minimal gated unit (Zhou et al. 2016, arXiv 1603.09420), diagonal: a GRU with a single gate.

    f  = sigmoid(a_f * h + B_f x + b_f)
    c  = tanh(a_c * (f * h) + B_c x + b_c)
    h' = (1 - f) * h + f * c

Every `a` is a vector, every `B` a matrix.
"""

import torch
from torch import Tensor

from pararnn.cells.diagonal import DiagonalCell


class MinimalGatedCell(DiagonalCell):
    """One step of a minimal gated unit; arguments and shapes are those of `DiagonalCell`."""

    num_gates = num_diagonals = 2
    keeps = (0, -1)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        h = state
        x_f, x_c = self.inputs(x)
        a_f, a_c = self.diagonal
        f = torch.sigmoid(a_f * h + x_f)
        c = torch.tanh(a_c * (f * h) + x_c)
        return (1 - f) * h + f * c
