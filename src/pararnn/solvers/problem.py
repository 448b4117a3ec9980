"""The recurrence over all times as a set of tensors, and what a backend does with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from pararnn.tracing.derivatives import Recurrence


@dataclass(frozen=True)
class Problem:
    """Drives, coefficients and initial states, cut into chunks of time.

    Attributes:
        recurrence: The step.
        drives: Each (batch, time, hidden), last stride 1.
        coefficients: Each (hidden,), contiguous.
        initial: Initial states, (rows, components, hidden), contiguous.
        starts: int32 (batch, time): the row of `initial` that replaces the state before a step, or
            -1; None when row b starts at time 0 from `initial[b]` and nowhere else.
        chunk: Steps per chunk.
    """

    recurrence: Recurrence
    drives: Sequence[Tensor]
    coefficients: Sequence[Tensor]
    initial: Tensor
    starts: Tensor | None
    chunk: int

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
        return self.drives[0].shape[2]

    @property
    def chunks(self) -> int:
        """Chunks of time."""
        return -(-self.time // self.chunk)

    def first_states(self) -> Tensor:
        """The state before time 0, (batch, components, hidden)."""
        return self.initial if self.starts is None else self.initial[self.starts[:, 0].long()]

    def in_one_chunk(self) -> Problem:
        """The same problem, sequential in time."""
        return replace(self, chunk=self.time)


class Backend(Protocol):
    """Evaluates chunks.

    `boundary`, `ends`, `incoming` and `outgoing` are (batch, chunks, components, hidden).
    """

    name: str
    recurrence: Recurrence

    def source(self) -> str:
        """The generated source."""
        ...

    def forward(
        self, problem: Problem, boundary: Tensor, states: Sequence[Tensor] | None, limit: int
    ) -> Tensor:
        """Step through the last `limit` steps of every chunk from `boundary`; return the ends.

        With `states`, one (batch, time, hidden) per component, also write every state there.
        """
        ...

    def tangent(self, problem: Problem, boundary: Tensor) -> Tensor:
        """d(end) / d(boundary) of every chunk, (batch, chunks, components, components, hidden)."""
        ...

    def backward(
        self,
        problem: Problem,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
        incoming: Tensor,
        gradients: Gradients | None,
        limit: int,
    ) -> Tensor:
        """Step back through the first `limit` steps of every chunk; return the adjoint before it.

        With `gradients`, also write them.
        """
        ...

    def auto_chunk(self, batch: int, time: int, hidden: int) -> int:
        """The chunk length that `Newton(chunk="auto")` means here."""
        ...


@dataclass(frozen=True)
class Gradients:
    """Where a backward pass writes.

    Attributes:
        drives: One (batch, time, hidden) per drive, last stride 1.
        coefficients: Float64 (batch, chunks, coefficients, hidden), to be summed over the first
            two.
        initial: (chunks, rows, components, hidden), zeros, to be summed over the first.
    """

    drives: Sequence[Tensor]
    coefficients: Tensor
    initial: Tensor
