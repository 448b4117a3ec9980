"""What is chosen when nothing is said, for recurrences whose channels mix."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from pararnn.solvers.settings import Jacobi, Newton, Sequential, Solver
from pararnn.solvers.shooting import WARM_UP

_LARGEST_TANGENT = 8  # entries; a tangent costs as many sweeps
# Multiplications that one step can do in the time that it takes to launch its operations.
_FREE_WORK = {"cpu": 1 << 20, "cuda": 1 << 23}
_WORTH = 1.25  # times as fast as the loop by the estimate, or it is not tried
# The same where a step of the cell is one call: launches weigh less, and arithmetic so much more.
_WORTH_AGAINST_ONE, _ARITHMETIC_AGAINST_ONE = 1.3, 4
_PATIENCE = 0.5  # of the loop's time by the estimate is allowed for iterations
_CALL = 32  # steps bound by launches that a call over the recurrent part takes time for
_CALL_AGAINST_ONE = 192  # the same where the cell has all its launches in one call
# On a CPU, from so many rows on, of which every one is so much work (rows times work beside the
# launches), products are bound by arithmetic: one for all times, or for chunks, gains nothing, and
# gates had better be kept than computed again.
_BOUND_ROWS, _BOUND_WORK = 16, 12.0


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
    def of(cls, work: int, batch: int, time: int, device: str) -> _Cut:
        """Arguments as for `automatic`."""
        free = _FREE_WORK.get(device, _FREE_WORK["cuda"]) / work
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


@functools.lru_cache(maxsize=1024)
def automatic(entries: int, work: int, batch: int, time: int, device: str) -> Solver:
    """Chunks and iterations that a recurrence gains from.

    With the launches of a step as the unit of time, a step of r rows takes 1 + r / free, where
    free = _FREE_WORK / work. Evaluation in n chunks takes (WARM_UP + time / n) such steps with
    n * batch rows, least at n = sqrt(time / WARM_UP * free / batch). Iterations are allowed for
    part of the time of the loop, and the loop is taken where one iteration is hardly faster.

    Args:
        entries: All components of the channels of one group.
        work: Multiplications per row and step.
        batch: Sequences.
        time: Steps.
        device: Type of the device.
    """
    cut = _Cut.of(work, batch, time, device)
    if cut.loop < _WORTH * cut.first:
        return Sequential()
    method = coupling(entries)
    tangents = cut.sweep(entries) if method is Newton else 0.0
    most = max(1, 1 + int((_PATIENCE * cut.loop - cut.first) / (cut.sweep() + tangents)))
    return method(chunk=cut.chunk, max_iterations=most)


@functools.lru_cache(maxsize=1024)
def prefers_cell(work: int, batch: int, time: int, device: str, one_call: bool) -> bool:
    """Whether a loop over the cell itself is the fastest.

    Arguments as for `automatic`; `one_call`: a step of the cell is hardly more than one call.
    """
    if device != "cpu":
        return False
    launches = batch * work / _FREE_WORK[device]
    few = time * (1 + launches) < (_CALL_AGAINST_ONE if one_call else _CALL)
    bound = batch >= _BOUND_ROWS and batch * launches >= _BOUND_WORK
    cut = _Cut.of(_ARITHMETIC_AGAINST_ONE * work, batch, time, device)
    return few or bound or (one_call and cut.loop < _WORTH_AGAINST_ONE * cut.first)
