r"""ParaGRU (Danieli et al. 2025, arXiv 2510.21450, eq. 3.1a with 3.3).

    z  = sigmoid(a_z * h + B_z x + b_z)
    r  = sigmoid(a_r * h + B_r x + b_r)
    c  = tanh(a_c * (h * r) + B_c x + b_c)
    h' = (1 - z) * h + z * c

Every `a` is a vector (a diagonal matrix), every `B` is full or has one block per head.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pararnn.cells._input import check_sizes, init_diagonal_, init_projection_, project


class ParaGRUCell(nn.Module):
    """One step of the paper's GRU, with diagonal recurrent weights.

    Args:
        input_size: Size of `x`.
        hidden_size: Size of the state.
        bias: Learn `b_z, b_r, b_c`.
        num_heads: Blocks of the input projection; must divide both sizes.
        max_recurrent_weight: Bound that `project_` keeps on the diagonal weights; None for none.
        device: Where to make the parameters.
        dtype: Their type.

    Shapes: `x` (N, input_size), `state` (N, hidden_size), result (N, hidden_size).
    """

    num_components = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        num_heads: int = 1,
        max_recurrent_weight: float | None = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(input_size, hidden_size, num_heads)
        self.input_size, self.hidden_size, self.num_heads = input_size, hidden_size, num_heads
        self.max_recurrent_weight = max_recurrent_weight
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        blocks = (3, num_heads, hidden_size // num_heads, input_size // num_heads)
        self.weight = nn.Parameter(torch.empty(blocks, **options))
        self.bias = nn.Parameter(torch.empty(3, hidden_size, **options)) if bias else None
        self.diagonal = nn.Parameter(torch.empty(3, hidden_size, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the paper does (C.1)."""
        init_projection_(self.weight, self.bias)
        init_diagonal_(self.diagonal)
        self.project_()

    @torch.no_grad()
    def project_(self) -> None:
        """Clip the diagonal weights to the bound, in place; call it after the optimiser's step."""
        if self.max_recurrent_weight is not None:
            self.diagonal.clamp_(-self.max_recurrent_weight, self.max_recurrent_weight)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        h = state
        x_z, x_r, x_c = project(x, self.weight, self.bias)
        a_z, a_r, a_c = self.diagonal
        z = torch.sigmoid(a_z * h + x_z)
        r = torch.sigmoid(a_r * h + x_r)
        c = torch.tanh(a_c * (h * r) + x_c)
        return (1 - z) * h + z * c

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.input_size}, {self.hidden_size}, num_heads={self.num_heads}"
