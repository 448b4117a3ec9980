r"""Multiple shooting across ranks: every rank holds one chunk of time.

The driver is that of all recurrences, `shooting.solve`, which every rank runs on the same boundary
states. So all take the same decisions. A warm-up is the end of a rank's own chunk, run from the
initial state: what the next rank starts from. Nothing but boundary states, and tangents where the
first guess was not good enough, goes from rank to rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pararnn.solvers.ranks import Ranks
from pararnn.solvers.shooting import Residual, System


@dataclass(frozen=True)
class Own:
    """What a rank does with its own chunk, on vectors (batch, n, groups).

    Attributes:
        run: The chunk from the state before it: the state after it. An adjoint runs from the
            adjoint after the chunk to the one before it.
        warm: The last steps of that run, from zero: their number to the state after them.
        tangent: d(end) / d(start) of the last run, (batch, n, n, groups).
    """

    run: Callable[[Tensor], Tensor]
    warm: Callable[[int], Tensor]
    tangent: Callable[[], Tensor]


class AcrossRanks(System):
    """A recurrence, or its adjoint, whose chunks lie on ranks.

    Args:
        own: What this rank does.
        ranks: The ranks.
        zero: A boundary state of zeros, (batch, n, groups).
        residual: See `System`.
        backwards: Whether the run begins with the last time, as that of adjoints.

    Attributes:
        index: Of this rank's chunk, in the order of the run.
        ends: The states after all chunks in the last run, (batch, chunks, n, groups).
    """

    def __init__(
        self, own: Own, ranks: Ranks, zero: Tensor, residual: Residual, backwards: bool = False
    ) -> None:
        super().__init__(zero, 0, ranks.count, residual)
        self.own, self.ranks, self.backwards = own, ranks, backwards
        self.index = ranks.count - 1 - ranks.position if backwards else ranks.position
        self.ends = self.everywhere()
        self._started: Tensor | None = None
        self._ended = zero

    def run(self, first: Tensor, last: int | None = None) -> tuple[list[Tensor], Tensor]:
        """See `System`; there is nothing to hand on."""
        if last is None:
            self.ends = self._gather(lambda: self._run(first[:, self.index]), self.start)
            return [], self.ends
        has_next = self.index < self.chunks - 1
        return [], self._gather(lambda: self.own.warm(last) if has_next else self.start, self.start)

    def _run(self, start: Tensor) -> Tensor:
        """The end of the own chunk, which runs again only from another state."""
        if self._started is None or not torch.equal(start, self._started):  # a host sync
            self._started, self._ended = start.clone(), self.own.run(start)
        return self._ended

    def tangents(self, first: Tensor, found: list[Tensor]) -> Tensor:
        """See `System`; those of the first and of the last chunk have no effect."""
        batch, n, groups = self.start.shape
        zero = self.start.new_zeros(batch, n, n, groups)
        if self.chunks < 3:
            return zero.unsqueeze(1).expand(-1, self.chunks, -1, -1, -1)
        has_effect = 0 < self.index < self.chunks - 1
        return self._gather(lambda: self.own.tangent() if has_effect else zero, zero)

    def step_by_step(self) -> list[Tensor]:
        """See `System`: one rank has all of time."""
        return self.run(self.everywhere())[0]

    def _gather(self, work: Callable[[], Tensor], like: Tensor) -> Tensor:
        """What all ranks make, (batch, chunks, ...); an error of one is an error of all."""
        try:
            made, failure = work(), None
        except Exception as error:  # told to the others, then raised
            made, failure = like, error
        gathered = self.ranks.gather(made.to(like.dtype), failure)
        return (gathered.flip(0) if self.backwards else gathered).transpose(0, 1)
