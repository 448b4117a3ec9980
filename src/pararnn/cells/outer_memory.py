r"""Outer-product memory, elementwise: every entry of a matrix is a gated RNN of one channel.

    H' = f H + (1 - f) tanh(A * H + k v^T)      |A| <= 1/2
    f  = exp(-exp(R) softplus(a + b))           one number per head and time
    y  = H'^T q

`q`, `k`, `v` and `a` are products of x. `A` (keys x values) is what each entry feeds back into
itself. It is M2RNN (arXiv 2603.14360) with the product `H W` replaced by an elementwise one, as
ParaGRU (arXiv 2510.21450) does with the recurrent weights of a GRU: entries do not reach each
other, so that all of them are solved as channels of their own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pararnn.cells.matrix_memory import MatrixMemoryCell


class OuterMemoryCell(MatrixMemoryCell):
    """One step of an elementwise outer-product memory.

    Good for long sequences at low cost: it stores as much as the other memories and runs as an
    elementwise cell does. Entries do not mix within the step; a query mixes them as it reads.

    While the bound holds, a step multiplies differences by at most `f + (1 - f) / 2`, which is
    less than 1: it always forgets. Arguments and shapes are those of `MatrixMemoryCell`.
    """

    max_recurrent_weight = 0.5

    def make_parameters(self, **options: Any) -> None:  # noqa: D102
        shape = self.num_heads, self.key_size, self.value_size
        self.recurrent = nn.Parameter(torch.empty(shape, **options))

    def reset_parameters(self) -> None:
        """Draw `A` evenly within its bound, so that no two entries of a head do the same."""
        super().reset_parameters()
        nn.init.uniform_(self.recurrent, -self.max_recurrent_weight, self.max_recurrent_weight)

    @torch.no_grad()
    def project_(self) -> None:
        """Clip `A` to its bound, in place; a layer does so after an optimiser's step."""
        self.recurrent.clamp_(-self.max_recurrent_weight, self.max_recurrent_weight)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        h = state
        _, k, v, a = self.project(x)
        f = self.keep(a)
        new = self.squash(self.recurrent * h + k.unsqueeze(-1) * v.unsqueeze(-2))
        return (f * h + (1 - f) * new).to(h.dtype)

    def readout(self, x: Tensor, state: Tensor) -> Tensor:
        """`H'^T q`, from the state after the step."""
        q, _, _, _ = self.project(x)
        return torch.einsum("nhkv,nhk->nhv", state, q).flatten(-2)
