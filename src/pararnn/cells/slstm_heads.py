r"""sLSTM of xLSTM with heads (Beck et al. 2024, arXiv 2405.04517, eq. 8 to 17 and section 2.2).

    i~, f~, z~, o~ = R h + B x + b          for each gate
    m' = max(log sigmoid(f~) + m, i~)       the stabiliser: c and n are kept divided by exp(m)
    i  = exp(i~ - m'),  f = exp(log sigmoid(f~) + m - m')
    c' = f * c + i * tanh(z~)
    n' = f * n + i
    h' = sigmoid(o~) * c' / n'

Every `R` and `B` has one full block per head: memories mix within a head, not across heads.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pararnn.cells._input import check_sizes, init_projection_, project
from pararnn.cells.slstm import State, remember

_GATES = 4


class HeadSLSTMCell(nn.Module):
    """One step of an sLSTM with heads; the state is `(h, c, n, m)`, the output first.

    Args:
        input_size: Size of `x`.
        hidden_size: Size of every component of the state.
        bias: Learn a bias for every gate.
        num_heads: Blocks of the recurrent weights and of the input projection; must divide both
            sizes. One mixes all channels; `SLSTMCell` mixes none.
        device: Where to make the parameters.
        dtype: Their type.

    Shapes: `x` (N, input_size); the state, and the result like it, four tensors (N, hidden_size).

    Raises:
        TypeError: A size is no whole number.
        ValueError: The heads do not divide a size.
    """

    num_components = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        num_heads: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(input_size, hidden_size, num_heads)
        self.input_size, self.hidden_size, self.num_heads = input_size, hidden_size, num_heads
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        size, inputs = hidden_size // num_heads, input_size // num_heads
        self.weight = nn.Parameter(torch.empty(num_heads, _GATES, size, inputs, **options))
        self.recurrent = nn.Parameter(torch.empty(num_heads, _GATES, size, size, **options))
        self.bias = nn.Parameter(torch.empty(_GATES, hidden_size, **options)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as `DiagonalCell` does: Xavier Gaussian blocks where that has a diagonal."""
        init_projection_(self.weight, self.bias)
        nn.init.normal_(self.recurrent, std=1.0 / math.sqrt(self.recurrent.shape[-1]))

    def forward(self, x: Tensor, state: State) -> State:  # noqa: D102
        h, c, n, m = state
        x_i, x_f, x_z, x_o = project(x, self.weight, self.bias)
        r_i, r_f, r_z, r_o = project(h, self.recurrent, None)
        return remember(r_i + x_i, r_f + x_f, r_z + x_z, r_o + x_o, c, n, m)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.input_size}, {self.hidden_size}, num_heads={self.num_heads}"
