r"""M2RNN, a nonlinear RNN with a matrix state (Mishra et al. 2026, arXiv 2603.14360).

    H' = f H + (1 - f) tanh(H W + k v^T)
    f  = exp(-exp(A) softplus(a + b))           one number per head and time
    y  = H'^T q + D v

`q`, `k`, `v` and `a` are products of x. `W` (values x values) starts as the identity, `D` (one
number per head and value) as ones. The short convolution, the gate and the norm that the authors
put around it are layers of their own. They clip gradients within the recurrence; here the gradient
is the exact one.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pararnn.cells.matrix_memory import MatrixMemoryCell


class M2RNNCell(MatrixMemoryCell):
    """One step of an M2RNN: each row of its matrices is the state of a gated RNN.

    Good for tasks that update what they remember: it tracks states as a nonlinear RNN does, in a
    memory as large as that of linear attention. In a head the values of a row mix, rows do not.

    Arguments and shapes are those of `MatrixMemoryCell`.
    """

    def make_parameters(self, **options: Any) -> None:  # noqa: D102
        values = self.value_size
        self.recurrent = nn.Parameter(torch.empty(self.num_heads, values, values, **options))
        if self.projects:
            self.skip = nn.Parameter(torch.empty(self.num_heads, values, **options))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as published: with `W` the identity a new memory adds up what it is given."""
        super().reset_parameters()
        values = self.value_size
        self.recurrent.copy_(torch.eye(values).expand(self.num_heads, values, values))
        if self.projects:
            self.skip.fill_(1.0)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        h = state
        _, k, v, a = self.project(x)
        f = self.keep(a)
        mixed = torch.einsum("nhkv,hvw->nhkw", h, self.recurrent)
        new = self.squash(mixed + k.unsqueeze(-1) * v.unsqueeze(-2))
        return (f * h + (1 - f) * new).to(h.dtype)

    def readout(self, x: Tensor, state: Tensor) -> Tensor:
        """`H'^T q + D v`, from the state after the step; of a memory alone, `H'^T q`."""
        q, _, v, _ = self.project(x)
        found = torch.einsum("nhkv,nhk->nhv", state, q)
        return (found + self.skip * v if self.projects else found).flatten(-2)
