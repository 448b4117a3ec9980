r"""ParaLSTM (Danieli et al. 2025, arXiv 2510.21450, eq. 3.1b with 3.3).

    f  = sigmoid(a_f * h + B_f x + p_f * c + b_f)
    z  = tanh(a_z * h + B_z x + b_z)
    c' = f * c + (1 - f) * z
    o  = sigmoid(a_o * h + B_o x + p_o * c' + b_o)
    h' = o * tanh(c')

Input and forget gate are coupled, `p` are the peepholes, every `a` and `p` is a vector (a diagonal
matrix), every `B` is full or has one block per head.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pararnn.cells._input import check_sizes, init_diagonal_, init_projection_, project


class ParaLSTMCell(nn.Module):
    """One step of the paper's LSTM; the state is `(h, c)`, the output first.

    Args:
        input_size: Size of `x`.
        hidden_size: Size of `h` and of `c`.
        bias: Learn `b_f, b_z, b_o`.
        num_heads: Blocks of the input projection; must divide both sizes.
        max_recurrent_weight: Bound that `project_` keeps on the diagonal and peephole weights;
            None for none.
        device: Where to make the parameters.
        dtype: Their type.

    Shapes: `x` (N, input_size), `h` and `c` (N, hidden_size), result a pair of the same.
    """

    num_components = 2

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
        self.peephole = nn.Parameter(torch.empty(2, hidden_size, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the paper does (C.1)."""
        init_projection_(self.weight, self.bias)
        init_diagonal_(self.diagonal)
        init_diagonal_(self.peephole)
        self.project_()

    @torch.no_grad()
    def project_(self) -> None:
        """Clip the diagonal weights to the bound, in place; call it after the optimiser's step."""
        if self.max_recurrent_weight is not None:
            for weight in (self.diagonal, self.peephole):
                weight.clamp_(-self.max_recurrent_weight, self.max_recurrent_weight)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # noqa: D102
        h, c = state
        x_f, x_z, x_o = project(x, self.weight, self.bias)
        a_f, a_z, a_o = self.diagonal
        p_f, p_o = self.peephole
        f = torch.sigmoid(a_f * h + x_f + p_f * c)
        z = torch.tanh(a_z * h + x_z)
        c = f * c + (1 - f) * z
        o = torch.sigmoid(a_o * h + x_o + p_o * c)
        return o * torch.tanh(c), c

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.input_size}, {self.hidden_size}, num_heads={self.num_heads}"
