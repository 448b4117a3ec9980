"""How Triton's kernels are launched: chunks, blocks and warm-up from the step, shape and device."""

from __future__ import annotations

from dataclasses import dataclass

_WARP = 32
_MOST_UNROLL = 8
_MOST_AHEAD = 48  # 32-bit registers of a thread for inputs that are loaded ahead
_MOST_OPERATIONS = 512  # in an unrolled loop: Triton's compile time grows faster than their number
_FORWARD_PROGRAMS = 16  # per multiprocessor: enough loads in flight to keep its memory busy
_ADJOINT_PROGRAMS = 8  # which load, and store, more each
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
        warps: Warps of a program of `sweep`; `refine` has as many for every chunk of its group.
    """

    chunk: int
    chunks: int
    block: int
    unroll: int
    warm: int
    group: int
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
    warm-up. The constants were measured (docs/benchmarks/gpu.md).

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
    if chunk is None:
        programs = batch * -(-hidden // block)
        wanted = processors * (_ADJOINT_PROGRAMS if adjoint else _FORWARD_PROGRAMS) / programs
        chunks = max(1, min(round(wanted), time // (2 * warm)))
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
    return Launch(chunk, chunks, block, unroll, warm, _power_of_two(min(chunks, _GROUP)))
