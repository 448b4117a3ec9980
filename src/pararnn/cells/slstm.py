r"""sLSTM of xLSTM (Beck et al. 2024, arXiv 2405.04517, eq. 8 to 17), diagonal.

    i~, f~, z~, o~ = a * h + B x + b        for each gate
    m' = max(log sigmoid(f~) + m, i~)       the stabiliser: c and n are kept divided by exp(m)
    i  = exp(i~ - m'),  f = exp(log sigmoid(f~) + m - m')
    c' = f * c + i * tanh(z~)
    n' = f * n + i
    h' = sigmoid(o~) * c' / n'

Every `a` is a vector, every `B` a matrix.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pararnn.cells.diagonal import DiagonalCell

State = tuple[Tensor, Tensor, Tensor, Tensor]
_SMALLEST = 1e-30  # of the normaliser, which is 0 before the first step


class SLSTMCell(DiagonalCell):
    """One step of an sLSTM; the state is `(h, c, n, m)`, the output first.

    Arguments and shapes are those of `DiagonalCell`.
    """

    num_components = 4
    num_gates = num_diagonals = 4
    keeps = (1, 1)

    def forward(self, x: Tensor, state: State) -> State:  # noqa: D102
        h, c, n, m = state
        x_i, x_f, x_z, x_o = self.inputs(x)
        a_i, a_f, a_z, a_o = self.diagonal
        i, f, z, o = a_i * h + x_i, a_f * h + x_f, a_z * h + x_z, a_o * h + x_o
        return remember(i, f, z, o, c, n, m)


def remember(i: Tensor, f: Tensor, z: Tensor, o: Tensor, c: Tensor, n: Tensor, m: Tensor) -> State:
    """The new state from the gates before their nonlinearities and the old memory, all alike."""
    forget = F.logsigmoid(f) + m
    m = torch.maximum(forget, i)
    i, f = torch.exp(i - m), torch.exp(forget - m)
    c = f * c + i * torch.tanh(z)
    n = f * n + i
    return torch.sigmoid(o) * c / n.clamp_min(_SMALLEST), c, n, m
