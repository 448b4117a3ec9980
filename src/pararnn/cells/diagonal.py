"""What the ready-made cells share: an input projection in heads, vectors as recurrent weights."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pararnn.cells._input import (
    check_sizes,
    init_diagonal_,
    init_projection_,
    init_timescales_,
    project,
)
from pararnn.cells._named import NamedInit


class DiagonalCell(NamedInit, nn.Module):
    """Base of cells whose recurrent matrices are diagonal.

    A subclass says how many of each it has, and has a `forward` of its own: `inputs(x)` is what the
    input adds to every gate, the rows of `diagonal` and `peephole` are the recurrent weights.

    Args:
        input_size: Size of `x`.
        hidden_size: Size of every component of the state.
        bias: Learn a bias for every gate.
        num_heads: Blocks of the input projection; must divide both sizes.
        max_recurrent_weight: Bound that `project_` keeps on the recurrent weights; None for none.
        device: Where to make the parameters.
        dtype: Their type.
        max_timescale: Longest time, in steps, over which a channel forgets at the start, at least
            2: biases of the gate that keeps the state spread the times from 2 steps to this one,
            evenly in their logarithm. None for biases of zero, as in the paper: 2 steps for all.

    Shapes: `x` (N, input_size); the state, and the result like it, one tensor (N, hidden_size) or a
    tuple of `num_components` of them, the output first.

    Raises:
        TypeError: A size is no whole number.
        ValueError: The heads do not divide a size, or there is no such gate or bias.
    """

    num_components = 1
    num_gates: int
    num_diagonals: int
    num_peepholes = 0
    keeps: ClassVar[tuple[int, int] | None] = None
    """The gate that keeps the state: its place among the gates, and -1 if it keeps it when shut."""
    diagonal: Tensor
    peephole: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        num_heads: int = 1,
        max_recurrent_weight: float | None = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        max_timescale: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes(input_size, hidden_size, num_heads)
        self._check_timescale(max_timescale, bias)
        self.input_size, self.hidden_size, self.num_heads = input_size, hidden_size, num_heads
        self.max_recurrent_weight = max_recurrent_weight
        self.max_timescale = max_timescale
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        gates = self.num_gates
        blocks = (num_heads, gates, hidden_size // num_heads, input_size // num_heads)
        self.weight = nn.Parameter(torch.empty(blocks, **options))
        self.bias = nn.Parameter(torch.empty(gates, hidden_size, **options)) if bias else None
        for name, count in (("diagonal", self.num_diagonals), ("peephole", self.num_peepholes)):
            if count:
                setattr(self, name, nn.Parameter(torch.empty(count, hidden_size, **options)))
        self.reset_parameters()

    def _check_timescale(self, max_timescale: float | None, bias: bool) -> None:
        if max_timescale is None:
            return
        name = type(self).__name__
        if self.keeps is None:
            raise ValueError(f"{name} has no gate that keeps the state; leave max_timescale=None.")
        if not bias:
            raise ValueError("max_timescale sets biases, but bias=False; leave out one of them.")
        if max_timescale < 2:
            raise ValueError(f"max_timescale is {max_timescale}; give at least 2 steps, or None.")

    def _recurrent_weights(self) -> list[Tensor]:
        names = ("diagonal", "peephole")
        return [getattr(self, name) for name in names if hasattr(self, name)]

    def reset_parameters(self) -> None:
        """Initialise as the paper does its cells (Danieli et al. 2025, C.1), timescales aside."""
        init_projection_(self.weight, self.bias)
        if self.max_timescale is not None and self.bias is not None and self.keeps is not None:
            gate, sign = self.keeps
            init_timescales_(self.bias[gate], sign, self.max_timescale, self.num_heads)
        for weight in self._recurrent_weights():
            init_diagonal_(weight)
        self.project_()

    @torch.no_grad()
    def project_(self) -> None:
        """Clip the recurrent weights to the bound, in place.

        A layer does so after every step of an optimiser.
        """
        if self.max_recurrent_weight is not None:
            for weight in self._recurrent_weights():
                weight.clamp_(-self.max_recurrent_weight, self.max_recurrent_weight)

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """What x adds to every gate: `B x + b`, one (N, hidden_size) each."""
        return project(x, self.weight, self.bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.input_size}, {self.hidden_size}, num_heads={self.num_heads}"
