"""The recurrence over all times as a set of tensors, and what a backend does with one."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pararnn.planning.plan import Way
from pararnn.solvers.chunks import Cut, states_before
from pararnn.tracing.derivatives import Recurrence


@dataclass(frozen=True)
class Problem:
    """Drives, coefficients and initial states.

    Attributes:
        recurrence: The step.
        drives: Each (batch, time, hidden); (batch, time, heads, head_size) for a backend that
            `takes_heads`.
        coefficients: Each (hidden,).
        initial: Initial states, (rows, components, hidden).
        starts: int32 (batch, time): the row of `initial` that replaces the state before a step, or
            -1; None when row b starts at time 0 from `initial[b]` and nowhere else. Time 0 always
            starts. Either `initial` has two rows for every row b of the batch, and b starts at time
            0 from row b or batch + b, later from batch + b alone, any number of times (resets); or
            the batch is 1 and no row of `initial` starts twice (packed sequences).
    """

    recurrence: Recurrence
    drives: Sequence[Tensor]
    coefficients: Sequence[Tensor]
    initial: Tensor
    starts: Tensor | None

    @property
    def batch(self) -> int:
        """Rows that are evaluated side by side."""
        return self.drives[0].shape[0]

    @property
    def time(self) -> int:
        """Steps."""
        return self.drives[0].shape[1]

    @property
    def hidden(self) -> int:
        """Channels."""
        _, _, *sizes = self.drives[0].shape
        return math.prod(sizes)

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The type of the arithmetic: float64 as soon as anything is, else float32."""
        kinds = [t.dtype for t in (*self.drives, *self.coefficients, self.initial)]
        return torch.float64 if torch.float64 in kinds else torch.float32

    @functools.cached_property
    def state_dtype(self) -> torch.dtype:
        """The type in which states are kept: that of the drives, which are as large."""
        if self.dtype is torch.float64:
            return torch.float64
        return functools.reduce(torch.promote_types, {d.dtype for d in self.drives})

    def first_states(self) -> Tensor:
        """See the function `first_states`."""
        return first_states(self.initial, self.starts)

    def states_before(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The states before all steps, components (batch, time, hidden), from those after."""
        resets = resets_of(self.initial, self.starts, self.batch, self.time)
        whole = Cut(self.batch, self.time, self.time)
        return states_before(self.first_states().unbind(1), states, *resets, whole)

    def converted(self) -> Problem:
        """The same problem with every tensor in the type of the arithmetic, last stride 1."""
        dtype = self.dtype
        return Problem(
            self.recurrence,
            [with_rows(d.to(dtype)) for d in self.drives],
            [c.to(dtype).contiguous() for c in self.coefficients],
            self.initial.to(dtype).contiguous(),
            self.starts,
        )


def first_states(initial: Tensor, starts: Tensor | None) -> Tensor:
    """The states before time 0, (batch, components, hidden); the arguments are as in `Problem`."""
    return initial if starts is None else initial[starts[:, 0].long()]


def has_reset_states(initial: Tensor, batch: int) -> bool:
    """Whether `initial` has two states per row: the first state, and the state of resets.

    Two sequences packed into one row have two states as well. The second is then the state that the
    row restarts from, so both cases are one.
    """
    return initial.shape[0] == 2 * batch  # `len` would make a symbolic size a number


def resets_of(
    initial: Tensor, starts: Tensor | None, batch: int, time: int
) -> tuple[Tensor | None, Sequence[Tensor]]:
    """Where states are replaced after time 0, and by what: `resets`, `reset_states` of `Chunks`."""
    if starts is None:
        return None, ()
    if has_reset_states(initial, batch):
        reset_states = initial[batch:].unsqueeze(1).expand(-1, time, -1, -1)
    else:
        reset_states = initial[starts.long().clamp_min(0)]
    return (starts >= batch).unsqueeze(-1), reset_states.unbind(2)


def with_rows(x: Tensor) -> Tensor:
    """The tensor, copied if channels do not lie side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


class Backend(Protocol):
    """Solves recurrences of one kind.

    Attributes:
        name: What users call it.
        takes_heads: Whether the heads of a drive may lie apart from each other; else they are
            brought together, as far as they are not.
        recurrence: The step.
        compile_s: Seconds spent in this process on compiling and loading kernels.
    """

    name: str
    takes_heads: bool
    recurrence: Recurrence
    compile_s: float

    def source(self) -> str:
        """The generated source."""
        ...

    def parts(self, problem: Problem) -> int:
        """Parts of batch and channels that a report has a row for."""
        ...

    def solve(self, problem: Problem, way: Way) -> tuple[list[Tensor], Tensor]:
        """Evaluate a recurrence.

        Returns:
            The states, one (batch, time, hidden) per component in the problem's `state_dtype`, and
            the values of the report.
        """
        ...

    def solve_adjoint(
        self,
        problem: Problem,
        way: Way,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
        grad_drives: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Gradients of everything that went into a recurrence, from those of its states.

        Those of the drives are written into `grad_drives`, which are laid out like the drives. What
        does not converge is acted on as the settings ask.

        Returns:
            The gradients of the coefficients, (coefficients, hidden), and of the initial states,
            like `problem.initial`, both in a type that loses nothing.
        """
        ...
