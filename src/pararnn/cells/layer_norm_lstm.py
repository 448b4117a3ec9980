r"""LSTM with layer normalisation (Ba et al. 2016, arXiv 1607.06450, eq. 20 to 22).

    f, i, o, z = LN(W_h h; a_h) + LN(W_x x; a_x, b)    each norm over all gates at once
    c'         = sigmoid(f) * c + sigmoid(i) * tanh(z)
    h'         = sigmoid(o) * tanh(LN(c'; a_c, b_c))

`LN(v; a, b)` is `a * (v - mean v) / std v + b`. The paper adds a bias of its own to each of the
first two norms and one to their sum; only the sum of the three matters, and that is `b`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pararnn._whole import check_whole

_GATES = 4
State = tuple[Tensor, Tensor]


class LayerNormLSTMCell(nn.Module):
    """One step of an LSTM with layer normalisation; the state is `(h, c)`, the output first.

    All channels mix: every weight is full, and so is every norm.

    Args:
        input_size: Size of `x`.
        hidden_size: Size of both components of the state.
        device: Where to make the parameters.
        dtype: Their type.

    Shapes: `x` (N, input_size); the state, and the result like it, two tensors (N, hidden_size).

    Raises:
        TypeError: A size is no whole number.
        ValueError: A size is not positive.
    """

    num_components = 2

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole(input_size=input_size, hidden_size=hidden_size)
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1.")
        self.input_size, self.hidden_size = input_size, hidden_size
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        gates = _GATES * hidden_size
        self.input = nn.Linear(input_size, gates, bias=False, **options)
        self.recurrent = nn.Linear(hidden_size, gates, bias=False, **options)
        self.input_norm = nn.LayerNorm(gates, **options)
        self.recurrent_norm = nn.LayerNorm(gates, bias=False, **options)
        self.cell_norm = nn.LayerNorm(hidden_size, **options)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Begin with a memory that neither explodes nor fades within a few steps.

        The norms make the scale of both weights irrelevant, so that the gain `a_h` is what the
        state weighs in its gates. With 1, as for other norms, the new cell is chaotic (Lyapunov
        exponents of 0.02 to 0.04 per step with 64 to 1,024 channels); 1/2 makes them -0.08 to
        -0.06. The forget gate begins with a bias of 1 (Jozefowicz et al. 2015), all else with 0.
        """
        self.input.reset_parameters()
        self.recurrent.reset_parameters()
        self.input_norm.reset_parameters()
        self.recurrent_norm.reset_parameters()
        self.cell_norm.reset_parameters()
        self.recurrent_norm.weight.fill_(0.5)
        self.input_norm.bias[: self.hidden_size].fill_(1.0)

    def forward(self, x: Tensor, state: State) -> State:  # noqa: D102
        h, c = state
        gates = self.recurrent_norm(self.recurrent(h)) + self.input_norm(self.input(x))
        f, i, o, z = gates.chunk(_GATES, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        return torch.sigmoid(o) * torch.tanh(self.cell_norm(c)), c

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.input_size}, {self.hidden_size}"
