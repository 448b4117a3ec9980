r"""The recurrence of Mamba2, a linear memory (Dao and Gu 2024, arXiv 2405.21060).

    H' = f H + dt k v^T
    dt = softplus(a + b)                        one number per head and time
    f  = exp(-exp(A) dt)
    y  = H'^T q + D v

`q`, `k`, `v` and `a` are products of x, and `silu` is applied to the first three (C, B and x in the
paper). `D` (one number per head and value) starts as ones.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pararnn.cells.matrix_memory import MatrixMemoryCell


class Mamba2Cell(MatrixMemoryCell):
    """One step of the state space model of Mamba2: a memory that fades, and is added to.

    The step is linear in the state, so kernels for linear attention compute it over all times at
    once (the language models' mixer `mamba2` uses them where they are installed); with
    `nonlinearity="tanh"` all of the new memory is squashed.

    Arguments and shapes are those of `MatrixMemoryCell`.
    """

    published = "linear"
    usual_sizes = (128, 64)

    def make_parameters(self, **options: Any) -> None:  # noqa: D102
        if self.projects:
            self.skip = nn.Parameter(torch.ones(self.num_heads, self.value_size, **options))

    @torch.no_grad()
    def reset_parameters(self) -> None:  # noqa: D102
        super().reset_parameters()
        if self.projects:
            self.skip.fill_(1.0)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """As `MatrixMemoryCell.project`, after `silu`."""
        q, k, v, a = super().project(x)
        return *(self.activate(part) for part in (q, k, v)), a

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        h = state
        _, k, v, a = self.project(x)
        written = (self.pace(a).unsqueeze(-1) * v).unsqueeze(-2)
        return self.squash(self.keep(a) * h + k.unsqueeze(-1) * written).to(h.dtype)

    def readout(self, x: Tensor, state: Tensor) -> Tensor:
        """`H'^T q + D v`, from the state after the step; of a memory alone, `H'^T q`."""
        q, _, v, _ = self.project(x)
        found = torch.einsum("nhkv,nhk->nhv", state, q)
        return (found + self.skip * v if self.projects else found).flatten(-2)
