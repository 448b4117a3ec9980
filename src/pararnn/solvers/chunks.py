"""Chunks of time side by side: all chunks of all sequences step together, as rows of one batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pararnn.planning.rows_plan import rows_at_once
from pararnn.tracing.step import Step


@dataclass(frozen=True)
class Cut:
    """How time is cut. Rows are (chunk, sequence) pairs; the rows of one chunk are neighbours.

    Attributes:
        batch: Sequences.
        time: Steps.
        chunk: Steps per chunk; the last chunk repeats its last step where time ends before it.
        backwards: Whether time runs from the last step to the first.
    """

    batch: int
    time: int
    chunk: int
    backwards: bool = False

    @property
    def chunks(self) -> int:
        """Chunks of time."""
        return -(-self.time // self.chunk)

    def split(self, x: Tensor) -> Tensor:
        """(batch, time, ...) as (chunk, chunks * batch, ...); a single chunk is not reversed."""
        x = x.transpose(0, 1)
        if self.chunks == 1:
            return x
        if x.stride(0) == 0:  # the same at all times: one copy is enough
            return (
                torch.cat([x[0]] * self.chunks).unsqueeze(0).expand(self.chunk, *[-1] * x[0].dim())
            )
        at = torch.arange(self.chunks * self.chunk, device=x.device).clamp_max(self.time - 1)
        at = at.view(self.chunks, self.chunk).T.flatten()
        at = self.time - 1 - at if self.backwards else at
        return x.index_select(0, at).view(self.chunk, self.chunks * self.batch, *x.shape[2:])

    def join(self, x: Tensor) -> Tensor:
        """(chunk, chunks * batch, hidden) as (batch, time, hidden), contiguous."""
        x = x.unflatten(1, (self.chunks, self.batch)).permute(2, 1, 0, 3).flatten(1, 2)
        x = x[:, : self.time]
        return (x.flip(1) if self.backwards else x).contiguous()


@dataclass(frozen=True)
class Groups:
    """States of rows as vectors of groups, (batch, chunks, n, groups), to couple chunks by.

    `n` is the number of entries that influence each other: all components of a group's channels.

    Attributes:
        batch: Sequences.
        components: Tensors in the state.
        size: Channels of a group.
    """

    batch: int
    components: int
    size: int

    def vectors(self, state: Sequence[Tensor]) -> Tensor:
        """From components (rows, hidden)."""
        x = torch.stack(list(state), 1).unflatten(2, (-1, self.size))
        x = x.unflatten(0, (-1, self.batch))
        return x.permute(1, 0, 2, 4, 3).flatten(2, 3)

    def rows(self, vectors: Tensor) -> list[Tensor]:
        """Back to components (rows, hidden)."""
        x = vectors.unflatten(2, (self.components, self.size)).permute(1, 0, 2, 4, 3)
        return [c.contiguous() for c in x.flatten(3).flatten(0, 1).unbind(1)]

    def basis(self, like: Tensor) -> list[Tensor]:
        """Unit vectors of all groups at once: components (n * rows, hidden) for (rows, hidden)."""
        count = self.components * self.size
        eye = torch.eye(count, dtype=like.dtype, device=like.device)
        eye = eye.view(count, 1, self.components, 1, self.size)
        shape = (count, like.shape[0], self.components, like.shape[1] // self.size, self.size)
        return [c.contiguous() for c in eye.expand(shape).flatten(3).flatten(0, 1).unbind(1)]

    def images(self, state: Sequence[Tensor]) -> Tensor:
        """The images of the unit vectors: (batch, chunks, unit vector, n, groups)."""
        count = self.components * self.size
        x = torch.stack(list(state), 1).unflatten(2, (-1, self.size))
        x = x.unflatten(0, (count, -1, self.batch))
        return x.permute(2, 1, 0, 3, 5, 4).flatten(3, 4)


@dataclass(frozen=True)
class Chunks:
    """A step, the tensors that it reads over time, and the cut of time.

    Attributes:
        step: The step.
        cut: The chunks.
        inputs: Inputs of the step; those with rows are (batch, time, ...).
        resets: Boolean (batch, time, 1): where to replace the state before a step; None: nowhere.
        reset_states: The replacement, components (batch, time, hidden); none without `resets`.
        reverse: Whether every chunk runs from its last step to its first.
    """

    step: Step
    cut: Cut
    inputs: Sequence[Tensor]
    resets: Tensor | None
    reset_states: Sequence[Tensor]
    reverse: bool = False

    @functools.cached_property
    def rows(self) -> BatchedChunks:
        """The same as rows of a batch."""
        cut = self.cut
        return BatchedChunks(
            self.step,
            cut.time if cut.chunks == 1 else cut.chunk,
            [cut.split(i) if r else i for i, r in zip(self.inputs, self.step.by_rows, strict=True)],
            None if self.resets is None else cut.split(self.resets),
            [cut.split(f) for f in self.reset_states],
            self.reverse != (cut.backwards and cut.chunks == 1),
        )


@dataclass(frozen=True)
class BatchedChunks:
    """Chunks as the rows of a batch, see `Chunks`.

    Attributes:
        step: The step.
        steps: Number of steps.
        inputs: Inputs of the step; those with rows are (steps, rows, ...).
        resets: Boolean (steps, rows, 1) or None.
        reset_states: Components (steps, rows, hidden).
        reverse: Whether the last step runs first.
    """

    step: Step
    steps: int
    inputs: Sequence[Tensor]
    resets: Tensor | None
    reset_states: Sequence[Tensor]
    reverse: bool = False

    def tensors(self) -> list[Tensor]:
        """All tensors that the steps read."""
        return [*self.inputs, *([] if self.resets is None else [self.resets]), *self.reset_states]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> BatchedChunks:
        """The same with other tensors, in the order of `tensors`."""
        inputs = [change(i) for i in self.inputs]
        resets = None if self.resets is None else change(self.resets)
        return replace(
            self, inputs=inputs, resets=resets, reset_states=[change(f) for f in self.reset_states]
        )

    def piece(self, begin: int, end: int) -> BatchedChunks:
        """Steps `begin` to `end`, counted in the order of the run."""
        if self.reverse:
            begin, end = self.steps - end, self.steps - begin
        return replace(
            self,
            steps=end - begin,
            inputs=[
                i[begin:end] if by_rows else i
                for i, by_rows in zip(self.inputs, self.step.by_rows, strict=True)
            ],
            resets=None if self.resets is None else self.resets[begin:end],
            reset_states=[f[begin:end] for f in self.reset_states],
        )


def states_before(
    first: Sequence[Tensor],
    after: Sequence[Tensor],
    resets: Tensor | None,
    reset_states: Sequence[Tensor],
    cut: Cut,
) -> list[Tensor]:
    """The states before all steps, components (batch, time, hidden).

    Args:
        first: States before the first step of every chunk, components (rows, hidden).
        after: States after every step, like the result.
        resets: Where the state is replaced.
        reset_states: The replacement.
        cut: The chunks.
    """
    shifted = [a.roll(1, 1) for a in after]
    for s, f in zip(shifted, first, strict=True):
        s[:, :: cut.chunk] = f.unflatten(0, (cut.chunks, cut.batch)).transpose(0, 1)
    if resets is None:
        return shifted
    return [torch.where(resets, f, s) for f, s in zip(reset_states, shifted, strict=True)]


def in_blocks(tensors: Sequence[Tensor], moves: Sequence[bool]) -> Iterator[list[Tensor]]:
    """Tensors (a, b, ...) as blocks of rows (rows, ...), see `rows_at_once`.

    Args:
        tensors: Tensors; the first has rows.
        moves: Whether each has rows; the others are in every block, unchanged.
    """
    flat = [t.flatten(0, 1) if by_rows else t for t, by_rows in zip(tensors, moves, strict=True)]
    rows, width = flat[0].shape
    size = rows_at_once(rows, width, flat[0].device.type)
    for begin in range(0, rows, size):
        yield [
            f[begin : begin + size] if by_rows else f
            for f, by_rows in zip(flat, moves, strict=True)
        ]


Swept = tuple[list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Redo:
    """Run some sequences again, step by step.

    Attributes:
        states: States so far, components (batch, time, hidden); they are overwritten.
        settled: Boolean (batch,): sequences whose states are kept.
    """

    states: Sequence[Tensor]
    settled: Tensor


@dataclass(frozen=True)
class Sweep:
    """Which steps of chunks to run, and which states to return.

    Attributes:
        first: Number of steps to skip at the start of every chunk.
        copies: How many times to run every row, each time from another state.
        keep: Whether to return the states after all steps; requires `first=0` and `copies=1`.
        redo: Run only these sequences, in one chunk.
    """

    first: int = 0
    copies: int = 1
    keep: bool = True
    redo: Redo | None = None


WHOLE = Sweep()
Run = Callable[[Chunks, Sequence[Tensor], Sweep], Swept]
"""Runs steps of all chunks from the states before them, components (copies * rows, hidden).

Returns the states after all steps, components (batch, time, hidden), or none without `keep`; and
the states after the last step of every chunk, components (copies * rows, hidden). Those of the last
chunk are undefined.
"""


def run_steps(chunks: Chunks, state: Sequence[Tensor], sweep: Sweep = WHOLE) -> Swept:
    """See `Run`: by PyTorch operations, one after another."""
    return swept(chunks, run_rows(chunks.rows, state, sweep.first, sweep.copies), sweep)


def swept(chunks: Chunks, history: Sequence[Tensor], sweep: Sweep) -> Swept:
    """The result of a `Run`, from components (steps, rows, hidden)."""
    states = [chunks.cut.join(h) for h in history] if sweep.keep else []
    if sweep.redo is not None:
        settled = sweep.redo.settled[:, None, None]
        pairs = zip(sweep.redo.states, states, strict=True)
        states = [torch.where(settled, old, new, out=old) for old, new in pairs]
    return states, [h[-1] for h in history]


def run_rows(
    rows: BatchedChunks, state: Sequence[Tensor], first: int = 0, copies: int = 1
) -> list[Tensor]:
    """The states after all steps from `first` on, components (steps, copies * rows, hidden)."""
    module, resets = rows.step.module.forward, rows.resets
    moving = rows.step.by_rows
    inputs = [
        i.contiguous().unbind(0) if by_rows else [i] * rows.steps
        for i, by_rows in zip(rows.inputs, moving, strict=True)
    ]
    history: list[list[Tensor]] = [[] for _ in state]
    order = range(first, rows.steps)
    for t in reversed(order) if rows.reverse else order:
        now = [i[t] for i in inputs]
        if copies > 1:
            now = [
                i.expand(copies, *i.shape).flatten(0, 1) if by_rows else i
                for i, by_rows in zip(now, moving, strict=True)
            ]
        if resets is not None:
            reset, reset_states = resets[t], [f[t] for f in rows.reset_states]
            if copies > 1:
                reset = reset.repeat(copies, 1)
                reset_states = [f.repeat(copies, 1) for f in reset_states]
            state = [torch.where(reset, f, s) for f, s in zip(reset_states, state, strict=True)]
        state = module(*[s.contiguous() for s in state], *now)
        for past, component in zip(history, state, strict=True):
            past.append(component)
    return [torch.stack(past, 1).transpose(0, 1) for past in history]  # as `Cut.join` wants it
