"""How Triton's kernels are launched: chunks, blocks and warm-up from the shape and the device."""

from __future__ import annotations

from dataclasses import dataclass

_WARP = 32
MOST_UNROLL = 8
_GROUP = 16  # chunks that one program of `refine` runs side by side


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
        warps: Warps of a program of `sweep`; `refine` has one for every chunk of its group.
    """

    chunk: int
    chunks: int
    block: int
    unroll: int
    warm: int
    group: int
    warps: int = 1

    @property
    def corrected(self) -> bool:
        """Whether `correct` runs: it reads all boundaries at once, so only for a few chunks."""
        return 1 < self.chunks <= self.group


def block_of(hidden: int) -> int:
    """Channels per program: two for every thread of a warp, fewer where there are not as many."""
    block = 1
    while block < min(hidden, 2 * _WARP):
        block *= 2
    return block


def plan_launch(
    batch: int,
    time: int,
    hidden: int,
    chunk: int | None,
    tolerance: float,
    processors: int,
    adjoint: bool,
) -> Launch:
    """Cut a problem.

    Args:
        batch: Rows.
        time: Steps.
        hidden: Channels.
        chunk: Steps per chunk if they are given.
        tolerance: Of the solve.
        processors: Multiprocessors of the device.
        adjoint: Whether it is the backward pass, which is bound by memory sooner.
    """
    block = block_of(hidden)
    warm = 32 if tolerance > 1e-4 else 64 if tolerance > 1e-8 else 128
    if chunk is None:
        programs = batch * -(-hidden // block)
        wanted = processors * (8 if adjoint else 16) / programs
        chunks = max(1, min(round(wanted), time // (2 * warm)))
        chunk = -(-time // chunks)
        if chunks > 1:
            chunk = -(-chunk // MOST_UNROLL) * MOST_UNROLL
    chunk = min(chunk, time)
    chunks = -(-time // chunk)
    unroll = MOST_UNROLL
    while unroll > time or (chunks > 1 and chunk % unroll):
        unroll //= 2
    group = 1
    while group < min(chunks, _GROUP):
        group *= 2
    warm = -(-min(warm, chunk) // unroll) * unroll
    return Launch(chunk, chunks, block, unroll, warm, group)
