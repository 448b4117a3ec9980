"""Chunks of time side by side: all chunks of all sequences step together, as rows of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pararnn.tracing.mixing import Step

_BLOCK = 1 << 16  # elements of a tensor in a block


@dataclass(frozen=True)
class Cut:
    """How time is cut: rows are (chunk, sequence) pairs, those of one chunk side by side.

    Attributes:
        batch: Sequences.
        time: Steps.
        chunk: Steps per chunk; the last chunk repeats its last step where time ends before it.
        backwards: Time runs from the last step to the first.
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
        """(batch, time, ...) as (chunk, chunks * batch, ...); one chunk is not turned around."""
        x = x.transpose(0, 1)
        if self.chunks == 1:
            return x
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
    """The states of rows as the vectors that chunks are coupled by: (batch, chunks, n, groups).

    `n` are the entries that influence each other: all components of the channels of one group.

    Attributes:
        cut: Which rows there are.
        components: Tensors in the state.
        size: Channels of a group.
    """

    cut: Cut
    components: int
    size: int

    def vectors(self, state: Sequence[Tensor]) -> Tensor:
        """From components (rows, hidden)."""
        x = torch.stack(list(state), 1).unflatten(2, (-1, self.size))
        x = x.unflatten(0, (self.cut.chunks, self.cut.batch))
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
        """What became of the unit vectors: (batch, chunks, n of them, n, groups)."""
        count = self.components * self.size
        x = torch.stack(list(state), 1).unflatten(2, (-1, self.size))
        x = x.unflatten(0, (count, self.cut.chunks, self.cut.batch))
        return x.permute(2, 1, 0, 3, 5, 4).flatten(3, 4)


@dataclass(frozen=True)
class Chunks:
    """A step and what it reads over time.

    Attributes:
        step: The step.
        steps: How many.
        edges: What it takes besides the state; those with rows are (steps, rows, ...).
        begins: Boolean (steps, rows, 1): the state before a step is replaced; None for nowhere.
        fresh: What it is replaced by, components (steps, rows, hidden); none without `begins`.
        reverse: The last step comes first.
    """

    step: Step
    steps: int
    edges: Sequence[Tensor]
    begins: Tensor | None
    fresh: Sequence[Tensor]
    reverse: bool = False

    def tensors(self) -> list[Tensor]:
        """All that is read."""
        return [*self.edges, *([] if self.begins is None else [self.begins]), *self.fresh]

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Chunks:
        """The same with other tensors."""
        begins = None if self.begins is None else change(self.begins)
        edges, fresh = map(change, self.edges), map(change, self.fresh)
        return replace(self, edges=list(edges), begins=begins, fresh=list(fresh))

    def piece(self, begin: int, end: int) -> Chunks:
        """Some of the steps, counted in the order in which they are run."""
        if self.reverse:
            begin, end = self.steps - end, self.steps - begin
        return replace(
            self,
            steps=end - begin,
            edges=[
                e[begin:end] if by_rows else e
                for e, by_rows in zip(self.edges, self.step.by_rows, strict=True)
            ],
            begins=None if self.begins is None else self.begins[begin:end],
            fresh=[f[begin:end] for f in self.fresh],
        )


def states_before(
    first: Sequence[Tensor],
    after: Sequence[Tensor],
    begins: Tensor | None,
    fresh: Sequence[Tensor],
    axis: int,
) -> list[Tensor]:
    """The states that steps along an axis started from.

    Args:
        first: Before the first step, components.
        after: After every step.
        begins: Where the state is replaced.
        fresh: By what.
        axis: That of time in the last three.
    """
    shifted = [
        torch.cat([f.unsqueeze(axis), a.narrow(axis, 0, a.shape[axis] - 1)], axis)
        for f, a in zip(first, after, strict=True)
    ]
    if begins is None:
        return shifted
    return [torch.where(begins, f, s) for f, s in zip(fresh, shifted, strict=True)]


def in_blocks(tensors: Sequence[Tensor], moves: Sequence[bool]) -> Iterator[list[Tensor]]:
    """Tensors (a, b, ...) as blocks of rows (rows, ...), small enough for a processor's cache.

    On a GPU all rows are one block.

    Args:
        tensors: The first has rows.
        moves: Which have; the others are passed on as they are.
    """
    flat = [t.flatten(0, 1) if by_rows else t for t, by_rows in zip(tensors, moves, strict=True)]
    rows = flat[0].shape[0]
    size = max(1, _BLOCK // flat[0].shape[1]) if flat[0].device.type == "cpu" else rows
    for begin in range(0, rows, size):
        yield [
            f[begin : begin + size] if by_rows else f
            for f, by_rows in zip(flat, moves, strict=True)
        ]


class Run(Protocol):
    """Steps through chunks."""

    def __call__(
        self, chunks: Chunks, state: Sequence[Tensor], first: int = 0, copies: int = 1
    ) -> list[Tensor]:
        """Run the steps from `first` on.

        Args:
            chunks: What to run.
            state: Components (copies * rows, hidden) before the first of these steps.
            first: Steps left out.
            copies: Every row is run so many times, from other states.

        Returns:
            The states after these steps, components (steps, copies * rows, hidden).
        """
        ...


def run_steps(
    chunks: Chunks, state: Sequence[Tensor], first: int = 0, copies: int = 1
) -> list[Tensor]:
    """See `Run`: one PyTorch operation after the other."""
    module, begins = chunks.step.module.forward, chunks.begins
    moving = chunks.step.by_rows
    edges = [
        e.contiguous().unbind(0) if by_rows else [e] * chunks.steps
        for e, by_rows in zip(chunks.edges, moving, strict=True)
    ]
    history: list[list[Tensor]] = [[] for _ in state]
    order = range(first, chunks.steps)
    for t in reversed(order) if chunks.reverse else order:
        now = [e[t] for e in edges]
        if copies > 1:
            now = [
                e.expand(copies, *e.shape).flatten(0, 1) if by_rows else e
                for e, by_rows in zip(now, moving, strict=True)
            ]
        if begins is not None:
            begin, fresh = begins[t], [f[t] for f in chunks.fresh]
            if copies > 1:
                begin = begin.repeat(copies, 1)
                fresh = [f.repeat(copies, 1) for f in fresh]
            state = [torch.where(begin, f, s) for f, s in zip(fresh, state, strict=True)]
        state = module(*[s.contiguous() for s in state], *now)
        for past, component in zip(history, state, strict=True):
            past.append(component)
    return [torch.stack(past, 1).transpose(0, 1) for past in history]  # as `Cut.join` wants it
