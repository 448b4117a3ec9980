"""What is chosen when nothing is said, for recurrences whose channels mix."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Hashable

from pararnn.solvers.settings import Jacobi, Newton, Sequential, Solver
from pararnn.solvers.shooting import WARM_UP

_LARGEST_TANGENT = 8  # entries; a tangent costs as many sweeps
# Multiplications that one step can do in the time that it takes to launch its operations.
_FREE_WORK = {"cpu": 1 << 20, "cuda": 1 << 23}
_WORTH = 1.25  # times as fast as the loop by the estimate, or it is not tried
_PATIENCE = 0.5  # of the loop's time by the estimate is allowed for iterations
_CALL = 32  # steps bound by launches that a call over the recurrent part takes time for
_CALL_AGAINST_ONE = 192  # the same where the cell has all its launches in one call
# On a CPU, from so many rows on, of which every one is so much work (rows times work beside the
# launches), products are bound by arithmetic: one for all times, or for chunks, gains nothing, and
# gates had better be kept than computed again.
_BOUND_ROWS, _BOUND_WORK = 16, 12.0
_RETRY_AFTER = 64  # calls step by step before parallel evaluation is tried again
_REMEMBERED = 1024


def coupling(entries: int) -> type[Newton | Jacobi]:
    """The method: Newton where the tangent of a group of so many entries is cheap."""
    return Newton if entries <= _LARGEST_TANGENT else Jacobi


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
    free = _FREE_WORK.get(device, _FREE_WORK["cuda"]) / work
    chunks = int(min(math.sqrt(time / WARM_UP * free / batch), time / WARM_UP))
    if chunks < 2:
        return Sequential()
    chunk = -(-time // chunks)
    method, rows = coupling(entries), chunks * batch
    loop, sweep = time * (1 + batch / free), chunk * (1 + rows / free)
    first = sweep * (WARM_UP + chunk) / chunk
    if loop < _WORTH * first:
        return Sequential()
    tangents = chunk * (1 + entries * rows / free) if method is Newton else 0.0
    most = max(1, 1 + int((_PATIENCE * loop - first) / (sweep + tangents)))
    return method(chunk=chunk, max_iterations=most)


@functools.lru_cache(maxsize=1024)
def prefers_cell(work: int, batch: int, time: int, device: str, one_call: bool) -> bool:
    """Whether a loop over the cell itself is the fastest.

    Arguments as for `automatic`; `one_call`: a step of the cell is hardly more than one call.
    """
    if device != "cpu":
        return False
    launches = batch * work / _FREE_WORK[device]
    few = time * (1 + launches) < (_CALL_AGAINST_ONE if one_call else _CALL)
    return few or (batch >= _BOUND_ROWS and batch * launches >= _BOUND_WORK)


class Memory:
    """Which problems parallel evaluation failed on lately."""

    def __init__(self) -> None:
        self._left: OrderedDict[Hashable, int] = OrderedDict()

    def avoids(self, key: Hashable) -> bool:
        """Whether to go step by step this time."""
        left = self._left.pop(key, 0)
        if left > 1:
            self._left[key] = left - 1
        return left > 0

    def failed(self, key: Hashable) -> None:
        """Parallel evaluation did not converge: avoid it for some calls."""
        self._left[key] = _RETRY_AFTER
        if len(self._left) > _REMEMBERED:
            self._left.popitem(last=False)

    def __len__(self) -> int:
        return len(self._left)
