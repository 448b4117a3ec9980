"""Chunks as rows of one batch: their number and the method, or a loop over the cell itself."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from pararnn.planning.costs import COSTS, Costs
from pararnn.planning.settings import Jacobi, Newton, Sequential, Solver


def coupling(entries: int, costs: Costs = COSTS) -> type[Newton | Jacobi]:
    """The method: Newton where the tangent of a group of so many entries is cheap."""
    return Newton if entries <= costs.largest_tangent else Jacobi


@dataclass(frozen=True)
class _Cut:
    """Chunks, and what they are expected to cost, see `plan_rows`; a step's launches take 1.

    Attributes:
        batch: Sequences.
        time: Steps.
        chunks: Their number; below 2 there is nothing to gain.
        free: Rows for which arithmetic takes as long as launches.
        warm_up: Steps that the first guess looks back.
    """

    batch: int
    time: int
    chunks: int
    free: float
    warm_up: int

    @classmethod
    def of(cls, free: float, batch: int, time: int, costs: Costs) -> _Cut:
        """Arguments as for `plan_rows`."""
        most = time / costs.warm_up
        chunks = int(min(math.sqrt(most * free / batch), most))
        return cls(batch, time, chunks, free, costs.warm_up)

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
        if self.chunks < 2:
            return math.inf
        return self.sweep() * (self.warm_up + self.chunk) / self.chunk

    @property
    def loop(self) -> float:
        """Time of the loop."""
        return self.time * (1 + self.batch / self.free)


def free_rows(
    work: int, launches: int, device: str, streams: bool = False, costs: Costs = COSTS
) -> float:
    """Rows of a step for which arithmetic takes as long as launches.

    Args:
        work: Multiplications per row and step.
        launches: Operations of a step; one that only hands on what it is given has none, and counts
            as one.
        device: Type of the device.
        streams: Whether one kernel runs all steps and reads the weights at every one. That takes
            longer than a launch, and as long for many rows as for one.
        costs: What work costs.
    """
    if device == "cpu":
        return max(launches, 1) * costs.launch_work / work
    return (costs.streamed_work if streams else costs.step_work) / work


def steps_at_once(batch: int, hidden: int, device: str, costs: Costs = COSTS) -> int:
    """Steps of a piece of time whose gates a backward pass in one chunk has at a time."""
    elements = costs.piece if device == "cpu" else costs.piece_on_gpu
    return max(costs.shortest_piece, elements // (batch * hidden))


def rows_at_once(rows: int, width: int, device: str, costs: Costs = COSTS) -> int:
    """Rows of a block that is computed for many times at once: on a CPU, what its cache holds.

    Args:
        rows: All rows.
        width: Elements of one.
        device: Type of the device.
        costs: What a cache holds.
    """
    return max(1, costs.cached_block // width) if device == "cpu" else rows


@functools.lru_cache(maxsize=1024)
def plan_rows(
    entries: int,
    free: float,
    batch: int,
    time: int,
    costs: Costs = COSTS,
    quick: bool = False,
) -> Solver:
    """Chunks and iterations that a recurrence gains from.

    With the launches of a step as the unit of time, a step of r rows takes 1 + r / free.
    Evaluation in n chunks takes (warm-up + time / n) such steps with n * batch rows, least at
    n = sqrt(time / warm-up * free / batch). Iterations are allowed for part of the time of the
    loop, and the loop is taken where one iteration is hardly faster.

    Args:
        entries: All components of the channels of one group.
        free: See `free_rows`.
        batch: Sequences.
        time: Steps.
        costs: What work costs.
        quick: Whether a loop of so many sequences keeps weights on the chip which chunks, that are
            more rows, read at every step.
    """
    cut = _Cut.of(free, batch, time, costs)
    loop = cut.loop * (costs.spread_step if quick else 1.0)
    if loop < costs.worth * cut.first:
        return Sequential()
    method = coupling(entries, costs)
    tangents = cut.sweep(entries) if method is Newton else 0.0
    most = max(1, 1 + int((costs.patience * loop - cut.first) / (cut.sweep() + tangents)))
    return method(chunk=cut.chunk, max_iterations=most)


@functools.lru_cache(maxsize=1024)
def prefers_cell(
    entries: int,
    free: float,
    batch: int,
    time: int,
    device: str,
    one_call: bool,
    costs: Costs = COSTS,
) -> bool:
    """Whether a loop over the cell itself is the fastest.

    Arguments as for `plan_rows`; `one_call`: a step of the cell is hardly more than one call.
    """
    if device != "cpu":
        return False
    few = time * (1 + batch / free) < (costs.call_against_one if one_call else costs.call)
    least = min(costs.bound_rows, entries // costs.entries_of_a_row)
    bound = one_call or batch >= max(least, costs.bound * free)
    cut = _Cut.of(free / costs.arithmetic_of_one if one_call else free, batch, time, costs)
    return few or (bound and cut.loop < costs.worth * cut.first)
