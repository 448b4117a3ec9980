"""What memories with a matrix state share: one projection of x, and the rate of forgetting."""

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pararnn._whole import check_whole
from pararnn.cells._named import NamedInit

_TIMESCALES = (1.0, 1000.0)  # in steps
_NONLINEARITIES = ("tanh", "linear")


class MatrixMemoryCell(NamedInit, nn.Module):
    """Base of cells whose state is one matrix per head, keys x values.

    A subclass has a `forward` that writes into the memory and a `readout` that reads from it:
    `project(x)` gives what it writes and reads with, `keep(a)` the share of the memory that a step
    keeps. All that comes from x is one product. Weights of its own are made by `make_parameters`.

    With `input_size=None` a cell is the memory alone: x is what it writes and reads with, the parts
    of `widths` side by side. What surrounds a memory, its projection, activations and gates of
    values and what skips it, is then left to the block around it.

    Args:
        input_size: Size of `x`; None if x is what `project` returns.
        key_size: Rows of the matrix of a head.
        value_size: Its columns.
        num_heads: Matrices, which do not reach each other.
        shared_keys: One query and one key for all heads, so that a step reads less and the
            projection is smaller; else each head has its own.
        device: Where to make the parameters.
        dtype: Their type.
        nonlinearity: "tanh" or "linear", what squashes new entries; None for what the cell is
            published with.

    Shapes: `x` (N, input_size); the state, and the result like it, (N, num_heads, key_size,
    value_size); the readout (N, num_heads * value_size).

    Raises:
        TypeError: A size is no whole number, or `shared_keys` is no truth value.
        ValueError: A size is not positive, or there is no such nonlinearity.
    """

    num_head_gates = 0
    """Numbers per head that `project` returns besides the four parts of all memories."""
    num_value_gates = 0
    """Vectors of value_size per head that it returns besides, with a projection of its own."""
    published: ClassVar[Literal["tanh", "linear"]] = "tanh"
    """The nonlinearity that the cell is published with."""
    usual_sizes: ClassVar[tuple[int, int]] = (64, 16)
    """Keys and values of a head in a language model that does not say; M2RNN is published so."""

    def __init__(
        self,
        input_size: int | None,
        key_size: int,
        value_size: int,
        num_heads: int = 1,
        shared_keys: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        nonlinearity: Literal["tanh", "linear"] | None = None,
    ) -> None:
        super().__init__()
        self.nonlinearity = nonlinearity or self.published
        sizes = {"input_size": input_size, "key_size": key_size, "value_size": value_size}
        _check({**sizes, "num_heads": num_heads}, self.nonlinearity)
        if not isinstance(shared_keys, bool):  # a text such as "false" would be true
            raise TypeError(f"shared_keys must be True or False, got {shared_keys!r}.")
        self.key_size, self.value_size = key_size, value_size
        self.num_heads, self.shared_keys = num_heads, shared_keys
        self.state_shape = (num_heads, key_size, value_size)
        keys = key_size if shared_keys else num_heads * key_size
        values = num_heads * value_size
        self.projects = input_size is not None
        self.widths = [keys, keys, values, *[num_heads] * (1 + self.num_head_gates)]
        self.widths += [values] * (self.num_value_gates if self.projects else 0)
        self.input_size = sum(self.widths) if input_size is None else input_size
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.projects:
            self.input = nn.Linear(self.input_size, sum(self.widths), bias=False, **options)
        self.log_rate = nn.Parameter(torch.empty(num_heads, **options))
        self.rate_bias = nn.Parameter(torch.empty(num_heads, **options))
        self.make_parameters(**options)
        self.reset_parameters()

    def make_parameters(self, **options: Any) -> None:
        """Register what a subclass learns besides, before `reset_parameters` gives it values.

        Args:
            **options: Device and type of all parameters.
        """

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the projection as `nn.Linear` does; heads forget over 1 to 1,000 steps.

        These times are spread evenly in the logarithm over the heads. A head learns fast what lies
        within its own time, and hardly anything beyond it; its time itself moves slowly. So every
        order of magnitude gets its share of the heads. Mamba 2 (arXiv 2405.21060) and M2RNN
        (arXiv 2603.14360) draw them at random from about this range, which leaves gaps where
        there are few heads.
        """
        if self.projects:
            self.input.reset_parameters()
        shortest, longest = _TIMESCALES
        place = (torch.arange(self.num_heads, device=self.rate_bias.device) + 0.5) / self.num_heads
        rate = torch.exp(-math.log(longest / shortest) * place) / shortest
        self.log_rate.zero_()
        self.rate_bias.copy_(torch.log(torch.expm1(rate)))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """All that a step takes from x.

        Args:
            x: Inputs, (N, input_size).

        Returns:
            Queries and keys, (N, num_heads, key_size), or (N, 1, key_size) if they are shared;
            values, (N, num_heads, value_size); what `keep` takes, (N, num_heads); gates of heads,
            like it; and gates of values, like values.
        """
        parts = (self.input(x) if self.projects else x).split(self.widths, -1)
        per_head = 4 + self.num_head_gates
        (q, k, v), gates = parts[:3], parts[per_head:]
        keys, values = (-1, self.key_size), (-1, self.value_size)
        q, k, v = q.unflatten(-1, keys), k.unflatten(-1, keys), v.unflatten(-1, values)
        return q, k, v, *parts[3:per_head], *(g.unflatten(-1, values) for g in gates)

    def activate(self, part: Tensor) -> Tensor:
        """`silu` of a part of x, unless the block around the memory has applied it."""
        return F.silu(part) if self.projects else part

    def squash(self, new: Tensor) -> Tensor:
        """The nonlinearity of a step."""
        return torch.tanh(new) if self.nonlinearity == "tanh" else new

    def pace(self, a: Tensor) -> Tensor:
        """`softplus(a + b)`, in float32 at least; (N, num_heads)."""
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        return F.softplus(a + self.rate_bias)

    def keep(self, a: Tensor) -> Tensor:
        """`exp(-exp(A) softplus(a + b))`, the share of the memory that a step keeps.

        It is float32 at least: bfloat16 has no number between 0.996 and 1, which is 250 steps and
        for ever.

        Args:
            a: From `project`, (N, num_heads).

        Returns:
            Shape (N, num_heads, 1, 1), between 0 and 1.
        """
        rate = torch.exp(self.log_rate) * self.pace(a)
        return torch.exp(-rate).unsqueeze(-1).unsqueeze(-1)

    def extra_repr(self) -> str:  # noqa: D102
        first = self.input_size if self.projects else None
        shared = ", shared_keys=True" if self.shared_keys else ""
        other = self.nonlinearity != self.published
        squashed = f", nonlinearity={self.nonlinearity!r}" if other else ""
        sizes = f"{first}, {self.key_size}, {self.value_size}, num_heads={self.num_heads}"
        return f"{sizes}{shared}{squashed}"


def _check(sizes: dict[str, int | None], nonlinearity: str) -> None:
    check_whole(**{name: size for name, size in sizes.items() if size is not None})
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; it must be at least 1.")
    if nonlinearity not in _NONLINEARITIES:
        raise ValueError(f"nonlinearity is {nonlinearity!r}; it must be 'tanh' or 'linear'.")
