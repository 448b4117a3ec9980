"""What is chosen when nothing is said, for recurrences whose channels mix."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from pararnn.planning.settings import Jacobi, Newton, Sequential, Solver

WARM_UP = 64  # steps that the first guess looks back; gates that forget more slowly need Newton
_LARGEST_TANGENT = 8  # entries; a tangent costs as many sweeps
# Multiplications that can be done in the time that it takes to launch an operation, on a CPU; and
# in the time of a step on a GPU, whose launches are one kernel or one graph.
_FREE_WORK_OF_A_LAUNCH, _FREE_WORK_OF_A_STEP = 1 << 15, 1 << 23
# Times as fast as the loop by the estimate, or it is not tried: what is tried in vain costs the
# loop and this part of it.
_WORTH = 2.0
_ARITHMETIC_OF_ONE = 2  # where a step of the cell is one call: beside launches that weigh less
_PATIENCE = 0.5  # of the loop's time by the estimate is allowed for iterations
_CALL = 32  # steps bound by launches that a call over the recurrent part takes time for
_CALL_AGAINST_ONE = 192  # the same where the cell has all its launches in one call
# From so many rows on, beside those that are free and at least, a step without chunks had better
# keep its gates than compute them again; in small heads gates weigh more, beside their products.
_BOUND, _BOUND_ROWS, _ENTRIES_OF_A_ROW = 0.5, 16, 8


def coupling(entries: int) -> type[Newton | Jacobi]:
    """The method: Newton where the tangent of a group of so many entries is cheap."""
    return Newton if entries <= _LARGEST_TANGENT else Jacobi


@dataclass(frozen=True)
class _Cut:
    """Chunks, and what they are expected to cost, see `automatic`; a step's launches take 1.

    Attributes:
        batch: Sequences.
        time: Steps.
        chunks: Their number; below 2 there is nothing to gain.
        free: Rows for which arithmetic takes as long as launches.
    """

    batch: int
    time: int
    chunks: int
    free: float

    @classmethod
    def of(cls, free: float, batch: int, time: int) -> _Cut:
        """Arguments as for `automatic`."""
        chunks = int(min(math.sqrt(time / WARM_UP * free / batch), time / WARM_UP))
        return cls(batch, time, chunks, free)

    @property
    def chunk(self) -> int:
        """Steps per chunk."""
        return -(-self.time // self.chunks)

    def sweep(self, copies: int = 1) -> float:
        """Time of all chunks once, or of so many copies of them."""
        return self.chunk * (1 + copies * self.chunks * self.batch / self.free)

    @property
    def first(self) -> float:
        """Time of the warm-up and the first sweep."""
        return self.sweep() * (WARM_UP + self.chunk) / self.chunk if self.chunks > 1 else math.inf

    @property
    def loop(self) -> float:
        """Time of the loop."""
        return self.time * (1 + self.batch / self.free)


def free_rows(work: int, launches: int, device: str) -> float:
    """Rows of a step for which arithmetic takes as long as launches.

    Args:
        work: Multiplications per row and step.
        launches: Operations of a step.
        device: Type of the device.
    """
    on_cpu = device == "cpu"
    return (launches * _FREE_WORK_OF_A_LAUNCH if on_cpu else _FREE_WORK_OF_A_STEP) / work


@functools.lru_cache(maxsize=1024)
def automatic(entries: int, free: float, batch: int, time: int) -> Solver:
    """Chunks and iterations that a recurrence gains from.

    With the launches of a step as the unit of time, a step of r rows takes 1 + r / free.
    Evaluation in n chunks takes (WARM_UP + time / n) such steps with n * batch rows, least at
    n = sqrt(time / WARM_UP * free / batch). Iterations are allowed for part of the time of the
    loop, and the loop is taken where one iteration is hardly faster.

    Args:
        entries: All components of the channels of one group.
        free: See `free_rows`.
        batch: Sequences.
        time: Steps.
    """
    cut = _Cut.of(free, batch, time)
    if cut.loop < _WORTH * cut.first:
        return Sequential()
    method = coupling(entries)
    tangents = cut.sweep(entries) if method is Newton else 0.0
    most = max(1, 1 + int((_PATIENCE * cut.loop - cut.first) / (cut.sweep() + tangents)))
    return method(chunk=cut.chunk, max_iterations=most)


@functools.lru_cache(maxsize=1024)
def prefers_cell(
    entries: int, free: float, batch: int, time: int, device: str, one_call: bool
) -> bool:
    """Whether a loop over the cell itself is the fastest.

    Arguments as for `automatic`; `one_call`: a step of the cell is hardly more than one call.
    """
    if device != "cpu":
        return False
    few = time * (1 + batch / free) < (_CALL_AGAINST_ONE if one_call else _CALL)
    least = min(_BOUND_ROWS, entries // _ENTRIES_OF_A_ROW)
    bound = one_call or batch >= max(least, _BOUND * free)
    cut = _Cut.of(free / _ARITHMETIC_OF_ONE if one_call else free, batch, time)
    return few or (bound and cut.loop < _WORTH * cut.first)
