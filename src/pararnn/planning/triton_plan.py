"""How Triton's kernels are launched: chunks, blocks and warm-up from the step, shape and device."""

from __future__ import annotations

from dataclasses import dataclass

_WARP = 32
_MOST_UNROLL = 8
_MOST_AHEAD = 48  # 32-bit registers of a thread for inputs that are loaded ahead
_MOST_OPERATIONS = 512  # in an unrolled loop: Triton's compile time grows faster than their number
_LEAST_PROGRAMS = 4  # per multiprocessor, where time is cut
_MORE_PROGRAMS = {"forward": 8, "adjoint": 12}  # as long as chunks are long,
_MOST_CHUNKS = {"forward": 2**30, "adjoint": 8}  # and no more than these
_ENOUGH_PROGRAMS = {"forward": 6.0, "adjoint": 3.5}  # per multiprocessor, for time not to be cut
_IN_FLIGHT = 48 * 2**10  # bytes per multiprocessor, so that its memory is busy
_DISTANCES = (32, 16, 8, 4)
_GROUP = 16
_ROWS = 256


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
        warps: Warps of a program of `sweep`; `refine` has as many for every chunk of its group.
    """

    chunk: int
    chunks: int
    block: int
    unroll: int
    warm: int
    group: int
    distance: int
    warps: int = 1

    @property
    def wide_unroll(self) -> int:
        """Steps that `refine` loads ahead: fewer where its programs have many warps."""
        return min(self.unroll, 8 if self.group * self.warps <= 8 else 4)

    @property
    def rows(self) -> int:
        """Chunks that `refine` looks at in one go."""
        return min(_power_of_two(self.chunks), _ROWS)

    @property
    def corrected(self) -> bool:
        """Whether `correct` runs, whose programs go through all chunks before their own."""
        return 1 < self.chunks <= self.group


@dataclass(frozen=True)
class Work:
    """What one step of one channel takes.

    Attributes:
        loads: Values that it loads.
        itemsize: Bytes of one.
        operations: Its arithmetic operations, with those of its Jacobian.
    """

    loads: int
    itemsize: int
    operations: int


def _power_of_two(at_least: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (at_least - 1).bit_length()


def block_of(hidden: int) -> int:
    """Channels per program: two for every thread of a warp, fewer where there are not as many."""
    return _power_of_two(min(hidden, 2 * _WARP))


def plan_launch(
    batch: int,
    time: int,
    hidden: int,
    chunk: int | None,
    work: Work,
    tolerance: float,
    processors: int,
    adjoint: bool,
) -> Launch:
    """Cut a problem.

    Time is cut only as far as the programs are too few for the device: every chunk costs its
    warm-up, and that chunks fit together has to be found out. More chunks as long as they are long
    keep more loads on their way and, backward, shorten what is done again where gates forget
    slowly. The fewer programs, the further they look ahead. The constants were measured
    (docs/gpu.md).

    Args:
        batch: Rows.
        time: Steps.
        hidden: Channels.
        chunk: Steps per chunk if they are given.
        work: Of a step.
        tolerance: Of the solve.
        processors: Multiprocessors of the device.
        adjoint: Whether it is the backward pass.
    """
    block = block_of(hidden)
    warm = 32 if tolerance > 1e-4 else 64 if tolerance > 1e-8 else 128
    busy = batch * -(-hidden // block) / processors
    if chunk is None:
        direction = "adjoint" if adjoint else "forward"
        most = min(_MOST_CHUNKS[direction], time // (4 * warm))
        wanted = max(_LEAST_PROGRAMS / busy, min(_MORE_PROGRAMS[direction] / busy, most))
        chunks = min(round(wanted), time // (2 * warm))
        chunks = 1 if busy >= _ENOUGH_PROGRAMS[direction] else max(1, chunks)
        chunk = -(-time // chunks)
        if chunks > 1:
            chunk = -(-chunk // _MOST_UNROLL) * _MOST_UNROLL
    chunk = min(chunk, time)
    chunks = -(-time // chunk)
    registers = work.loads * max(1, 2 * work.itemsize // 4)
    unroll = _MOST_UNROLL
    while unroll > 1 and (
        unroll > time
        or (chunks > 1 and chunk % unroll)
        or unroll * registers > _MOST_AHEAD
        or unroll * work.operations > _MOST_OPERATIONS
    ):
        unroll //= 2
    warm = -(-min(warm, chunk) // unroll) * unroll
    ahead = _IN_FLIGHT / (max(busy * chunks, 1) * work.loads * work.itemsize * block) - unroll
    distance = next((d for d in _DISTANCES if d <= min(ahead, chunk - unroll)), 0)
    group = _power_of_two(min(chunks, _GROUP))
    return Launch(chunk, chunks, block, unroll, warm, group, distance)
