"""How Triton's kernels are launched: chunks, blocks and warm-up from the step, shape and device."""

from __future__ import annotations

from dataclasses import dataclass

from pararnn.planning.costs import COSTS, Costs

_WARP = 32  # threads


@dataclass(frozen=True)
class Launch:
    """How a problem is cut.

    Attributes:
        chunk: Steps per chunk, a multiple of `unroll` unless there is one chunk.
        chunks: Chunks of time.
        block: Channels per program.
        unroll: Steps whose inputs are loaded ahead.
        warm: Steps before a chunk that its first guess looks back.
        group: Chunks that one program of `refine` runs side by side.
        distance: Steps beyond those that are brought into the L2 cache.
        wide_unroll: Steps that `refine` loads ahead: fewer where its programs have many warps.
        rows: Chunks that `refine` looks at in one go.
        corrections: How often `correct` runs, before `refine` goes through the chunks in order.
        looked_at: Chunks that `correct` looks at in one go.
        warps: Warps of a program of `sweep`; `refine` has as many for every chunk of its group.
    """

    chunk: int
    chunks: int
    block: int
    unroll: int
    warm: int
    group: int
    distance: int
    wide_unroll: int
    rows: int
    corrections: int
    looked_at: int
    warps: int = 1

    def busy(self, batch: int, hidden: int, processors: int) -> float:
        """Programs per multiprocessor if time were whole."""
        return batch * -(-hidden // self.block) / processors


@dataclass(frozen=True)
class Work:
    """What one step of one channel takes.

    Attributes:
        loads: Values that it loads.
        itemsize: Bytes of one.
        operations: Its arithmetic operations, with those of its Jacobian.
        components: Tensors in the state.
    """

    loads: int
    itemsize: int
    operations: int
    components: int = 1


def _power_of_two(at_least: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (at_least - 1).bit_length()


def block_of(hidden: int, costs: Costs = COSTS) -> int:
    """Channels per program: those of a warp, fewer where there are not as many."""
    return _power_of_two(min(hidden, costs.channels_of_a_thread * _WARP))


def plan_launch(
    batch: int,
    time: int,
    hidden: int,
    chunk: int | None,
    work: Work,
    tolerance: float,
    processors: int,
    adjoint: bool,
    costs: Costs = COSTS,
) -> Launch:
    """Cut a problem.

    Time is cut only as far as the programs are too few for the device: every chunk costs its
    warm-up, and that chunks fit together has to be found out. More chunks as long as they are long
    keep more loads on their way and, backward, shorten what is done again where gates forget
    slowly. The fewer programs, the further they look ahead.

    Args:
        batch: Rows.
        time: Steps.
        hidden: Channels.
        chunk: Steps per chunk if they are given.
        work: Of a step.
        tolerance: Of the solve.
        processors: Multiprocessors of the device.
        adjoint: Whether it is the backward pass.
        costs: What work costs.
    """
    block = block_of(hidden, costs)
    half, single, double = costs.triton_warm_up
    warm = half if tolerance > 1e-4 else single if tolerance > 1e-8 else double
    busy = batch * -(-hidden // block) / processors
    if chunk is None:
        most = min(costs.most_chunks[adjoint], time // (costs.long_chunk * warm))
        more = min(costs.wanted_programs[adjoint] / busy, most)
        wanted = max(costs.least_programs / busy, more)
        chunks = min(round(wanted), time // (costs.shortest_chunk * warm))
        chunks = 1 if busy >= costs.enough_programs[adjoint] else max(1, chunks)
        chunk = -(-time // chunks)
        if chunks > 1:
            chunk = -(-chunk // costs.most_unroll) * costs.most_unroll
    chunk = min(chunk, time)
    chunks = -(-time // chunk)
    registers = work.loads * max(1, 2 * work.itemsize // 4)
    unroll = costs.most_unroll
    while unroll > 1 and (
        unroll > time
        or (chunks > 1 and chunk % unroll)
        or unroll * registers > costs.most_ahead
        or unroll * work.operations > costs.most_operations
    ):
        unroll //= 2
    warm = -(-min(warm, chunk) // unroll) * unroll
    ahead = costs.in_flight / (max(busy * chunks, 1) * work.loads * work.itemsize * block) - unroll
    distance = next((d for d in costs.distances if d <= min(ahead, chunk - unroll)), 0)
    group = _power_of_two(min(chunks, costs.refine_group))
    wide = unroll if group <= costs.refine_warps else min(unroll, costs.refine_unroll)
    rows = min(_power_of_two(chunks), costs.refine_rows)
    few = chunks <= costs.refine_group or adjoint  # which is linear
    looked_at = costs.looked_at // (work.components**2 + 2 * work.components)
    looked_at = 1 << max(looked_at, 1).bit_length() - 1
    corrections = 0 if chunks == 1 else 1 if few else costs.corrections
    return Launch(
        chunk=chunk,
        chunks=chunks,
        block=block,
        unroll=unroll,
        warm=warm,
        group=group,
        distance=distance,
        wide_unroll=wide,
        rows=rows,
        corrections=corrections,
        looked_at=min(group, looked_at),
    )
