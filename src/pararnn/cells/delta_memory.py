r"""Nonlinear delta memory (NDM; Garrison 2026, code name E88, github.com/ekg/elman).

    H' = tanh(d H + k (v - H^T k)^T)
    d  = exp(-exp(A) softplus(a + b))           one number per head and time
    y  = silu(g) * (H'^T q)

`q`, `k`, `v`, `g` and `a` are products of x; `silu` is applied to `q` and `k`, and both are then
divided by their L2 norms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pararnn.cells.matrix_memory import MatrixMemoryCell


class DeltaMemoryCell(MatrixMemoryCell):
    """One step of a nonlinear delta memory: what is stored under a key is replaced by a new value.

    Good for looking things up: a value comes back under its key, until another one is written
    there. As keys have length one, a step multiplies differences between two memories by at most
    `d` or `1 - d`: it always forgets. In a head the keys of a column mix, columns do not.

    Arguments and shapes are those of `MatrixMemoryCell`.
    """

    num_value_gates = 1

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        h = state
        _, k, v, a, *_ = self.project(x)
        k = F.normalize(self.activate(k), dim=-1)
        missing = v - torch.einsum("nhkv,nhk->nhv", h, k)
        return self.squash(self.keep(a) * h + k.unsqueeze(-1) * missing.unsqueeze(-2)).to(h.dtype)

    def readout(self, x: Tensor, state: Tensor) -> Tensor:
        """`silu(g) * (H'^T q)`, from the state after the step; of a memory alone, `H'^T q`."""
        q, *_, g = self.project(x)
        q = F.normalize(self.activate(q), dim=-1)
        found = torch.einsum("nhkv,nhk->nhv", state, q)
        return (F.silu(g) * found if self.projects else found).flatten(-2)
