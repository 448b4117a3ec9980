r"""Gated delta rule, a linear memory (Gated DeltaNet; Yang et al. 2024, arXiv 2412.06464).

    H' = d H + b k (v - d H^T k)^T
    d  = exp(-exp(A) softplus(a + b_a))         one number per head and time
    b  = sigmoid(x_b)                           one number per head and time
    y  = H'^T q

`q`, `k`, `v`, `a` and `x_b` are products of x; `silu` is applied to `q`, `k` and `v`, and `q` and
`k` are then divided by their L2 norms.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pararnn.cells.matrix_memory import MatrixMemoryCell


class GatedDeltaCell(MatrixMemoryCell):
    """One step of a gated delta rule: a value replaces, in part, what is stored under its key.

    The step is linear in the state, so kernels for linear attention compute it over all times at
    once (the language models' mixer `gated-deltanet` uses them where they are installed); with
    `nonlinearity="tanh"` all of the new memory is squashed. Good for looking things up.

    Arguments and shapes are those of `MatrixMemoryCell`.
    """

    num_head_gates = 1
    published = "linear"
    usual_sizes = (128, 64)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """As `MatrixMemoryCell.project`, with queries and keys of length one; last the gate `b`."""
        q, k, v, a, b = super().project(x)
        q, k = (F.normalize(self.activate(keys), dim=-1) for keys in (q, k))
        return q, k, self.activate(v), a, torch.sigmoid(b)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        h = state
        _, k, v, a, b = self.project(x)
        d = self.keep(a)
        missing = b.unsqueeze(-1) * (v - d.squeeze(-1) * torch.einsum("nhkv,nhk->nhv", h, k))
        return self.squash(d * h + k.unsqueeze(-1) * missing.unsqueeze(-2)).to(h.dtype)

    def readout(self, x: Tensor, state: Tensor) -> Tensor:
        """`H'^T q`, from the state after the step."""
        q, *_ = self.project(x)
        return torch.einsum("nhkv,nhk->nhv", state, q).flatten(-2)
