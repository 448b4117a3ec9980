r"""Multiple shooting for recurrences whose channels mix, and for their adjoints.

The chunks of all sequences step together as one batch: a step is one batched call. Iteration and
coupling are those of `shooting`, with the channels of a group (a head, or all channels) as one
vector.

The adjoint of a chunk's steps, applied to unit vectors, gives the tangent of the chunk:
$D_k^\top e_i$ for every entry $i$ of a group, all groups at once. No Jacobian of a step is formed.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from pararnn.planning.plan import Way
from pararnn.solvers.chunks import (
    WHOLE,
    Chunks,
    Cut,
    Groups,
    Redo,
    Run,
    Sweep,
    in_blocks,
    states_before,
)
from pararnn.solvers.problem import first_states, has_reset_states, resets_of
from pararnn.solvers.shooting import (
    System,
    adjoint_residual,
    solve,
    state_residual,
)
from pararnn.tracing.step import Step

RunModule = Callable[[fx.GraphModule, Sequence[Tensor]], Sequence[Tensor]]
"""Runs a module, recorded on contiguous tensors, on tensors of any strides."""


@dataclass(frozen=True)
class Chain(abc.ABC):
    """A recurrence over time.

    Attributes:
        step: The step.
        inputs: Inputs of the step; those with rows are (batch, time, ...).
        initial: Initial states, (rows, components, hidden).
        starts: As in `Problem`.
        batch: Sequences.
        time: Steps.
        run_module: Runs modules of operations for all times at once.
    """

    step: Step
    inputs: Sequence[Tensor]
    initial: Tensor
    starts: Tensor | None
    batch: int
    time: int
    run_module: RunModule

    backwards = False

    @abc.abstractmethod
    def first(self) -> Tensor:
        """The states to start from, (batch, components, hidden)."""

    def resets(self) -> Tensor:
        """Boolean (batch, time): a sequence starts, but not from the first state of its row."""
        assert self.starts is not None
        return self.starts >= self.batch

    @abc.abstractmethod
    def chunks(self, cut: Cut) -> Chunks:
        """The recurrence, cut into chunks."""

    @abc.abstractmethod
    def residual(self, ends: Tensor, starts: Tensor) -> Tensor:
        """The residual of each sequence, see `System`."""

    @abc.abstractmethod
    def tangents(
        self, cut: Cut, first: Sequence[Tensor], states: Sequence[Tensor], run: Run
    ) -> Tensor:
        """d(end) / d(first state) of every chunk, (batch, chunks, n, n, groups).

        Args:
            cut: How time is cut.
            first: The first states of all chunks, components (rows, hidden).
            states: The states that a sweep from `first` found, components (batch, time, hidden).
            run: Steps through chunks.
        """

    def solve(self, way: Way, run: Run) -> tuple[list[Tensor], Tensor | None]:
        """Evaluate it.

        Args:
            way: The settings in force.
            run: Steps through chunks.

        Returns:
            Components (batch, time, hidden) after every step, and the values of the report; None
            if there is one chunk.
        """
        return solve(_InRows(self, int(way.solver.chunk), run, way.settle), way)

    def _adjoint_inputs(
        self,
        before: Sequence[Tensor],
        inputs: Sequence[Tensor],
        grad_states: Sequence[Tensor] | None,
    ) -> list[Tensor]:
        """The inputs of the adjoint; those with rows are (a, b, ...), like arguments with rows.

        Args:
            before: The states before all steps, components (a, b, hidden).
            inputs: Those of the recurrence.
            grad_states: Components (a, b, hidden); zeros when None.
        """
        adjoint, count = self.step.adjoint, len(before)
        grad_states = _zeros(before) if grad_states is None else grad_states
        moves = [True] * count + list(self.step.by_rows) + [True] * count
        blocks = [
            self.run_module(
                adjoint.part.module,
                adjoint.part_arguments(now[:count], now[count:-count], now[-count:]),
            )
            for now in in_blocks([*before, *inputs, *grad_states], moves)
        ]
        return [
            _joined(parts).unflatten(0, before[0].shape[:2]) if by_rows else parts[0]
            for parts, by_rows in zip(zip(*blocks, strict=True), adjoint.by_rows, strict=True)
        ]

    def _adjoint_chunks(
        self, cut: Cut, inputs: Sequence[Tensor], resets: Tensor | None, reverse: bool = False
    ) -> Chunks:
        """Chunks of the adjoint, from all its inputs; it is zero where a sequence starts."""
        adjoint = self.step.adjoint
        used = [inputs[i] for i in adjoint.step_inputs]
        if resets is None:
            return Chunks(adjoint.step, cut, used, None, [], reverse)
        zero = self.initial.new_zeros(self.step.hidden).expand(*resets.shape[:2], -1)
        reset_states = [zero] * self.step.num_components
        return Chunks(adjoint.step, cut, used, resets, reset_states, reverse)

    def _images(self, linear: Chunks, run: Run) -> Tensor:
        """The adjoint of chunks, applied to unit vectors."""
        cut, groups = linear.cut, self.groups()
        basis = groups.basis(self.first().new_empty(cut.chunks * cut.batch, self.step.hidden))
        every = Sweep(copies=self.step.num_components * self.step.group, keep=False)
        return groups.images(run(linear, basis, every)[1])

    def groups(self) -> Groups:
        """The vectors that couple chunks."""
        return Groups(self.batch, self.step.num_components, self.step.group)


class _InRows(System):
    """A recurrence whose chunks are rows of one batch. Results are (batch, time, hidden)."""

    def __init__(self, chain: Chain, chunk: int, run: Run, settles: bool = False) -> None:
        cut = Cut(chain.batch, chain.time, min(chunk, chain.time), chain.backwards)
        self.chain, self.cut, self.run_steps, self.groups = chain, cut, run, chain.groups()
        self.all = chain.chunks(cut)
        super().__init__(chain.first(), cut.chunk, cut.chunks, chain.residual, settles)

    def everywhere(self) -> Tensor:
        return self.groups.vectors(self.start.unbind(1)).expand(-1, self.chunks, -1, -1)

    def run(self, first: Tensor, last: int | None = None) -> tuple[list[Tensor], Tensor]:
        sweep = WHOLE if last is None else Sweep(first=self.chunk - last, keep=False)
        states, ends = self.run_steps(self.all, self.groups.rows(first), sweep)
        return states, self.groups.vectors(ends)

    def tangents(self, first: Tensor, found: list[Tensor]) -> Tensor:
        return self.chain.tangents(self.cut, self.groups.rows(first), found, self.run_steps)

    def step_by_step(self, sweep: Sweep = WHOLE) -> list[Tensor]:
        whole = self.all
        if self.chunks > 1:
            whole = self.chain.chunks(replace(self.cut, chunk=self.cut.time))
        return self.run_steps(whole, self.start.unbind(1), sweep)[0]

    def complete(self, found: list[Tensor], converged: Tensor) -> list[Tensor]:
        redo = Redo(found, converged) if self.settles else None
        return self.step_by_step(Sweep(redo=redo))


class Forward(Chain):
    """The states."""

    def first(self) -> Tensor:
        """See `Chain.first`."""
        return first_states(self.initial, self.starts)

    def chunks(self, cut: Cut) -> Chunks:
        """See `Chain.chunks`."""
        return Chunks(self.step, cut, self.inputs, *self._resets())

    def residual(self, ends: Tensor, starts: Tensor) -> Tensor:
        """See `Chain.residual`."""
        return state_residual(ends, starts, self.step.group)

    def _resets(self) -> tuple[Tensor | None, Sequence[Tensor]]:
        """`resets` and `reset_states` of `Chunks`."""
        return resets_of(self.initial, self.starts, self.batch, self.time)

    def tangents(
        self, cut: Cut, first: Sequence[Tensor], states: Sequence[Tensor], run: Run
    ) -> Tensor:
        """See `Chain.tangents`."""
        resets, reset_states = self._resets()
        before = states_before(first, states, resets, reset_states, cut)
        inputs = self._adjoint_inputs(before, self.inputs, None)
        if resets is None:
            return self._images(self._adjoint_chunks(cut, inputs, None, reverse=True), run)
        next_resets = resets.roll(-1, 1)
        next_resets[:, cut.chunk - 1 :: cut.chunk] = False  # unit vectors start here
        images = self._images(self._adjoint_chunks(cut, inputs, next_resets, reverse=True), run)
        return torch.where(resets[:, :: cut.chunk, :, None, None], 0.0, images)

    def linear(self, cut: Cut, before: Sequence[Tensor]) -> Chunks:
        """The adjoint of all steps at the states before them, (batch, time, hidden)."""
        return self._adjoint_chunks(cut, self._adjoint_inputs(before, self.inputs, None), None)

    def before(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The states before every step, components (batch, time, hidden), from those after it."""
        whole = Cut(self.batch, self.time, self.time)
        return states_before(self.first().unbind(1), states, *self._resets(), whole)


@dataclass(frozen=True)
class Backward(Chain):
    r"""The adjoints that reach every step from later ones, $c_{t-1} = J_t^\top (c_t + g_t)$.

    Attributes:
        before: The state before every step at the solution, components (batch, time, hidden).
        grad_states: The gradient of the states from outside, likewise.
        incoming: Adjoint after the last step, (batch, components, hidden); zero when None.
    """

    before: Sequence[Tensor]
    grad_states: Sequence[Tensor]
    incoming: Tensor | None = None

    backwards = True

    @functools.cached_property
    def adjoint_inputs(self) -> list[Tensor]:
        """The inputs of the adjoint, those with rows (batch, time, ...)."""
        return self._adjoint_inputs(self.before, self.inputs, self.grad_states)

    def gradients(self, found: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the differentiable inputs, those with rows (batch, time, ...).

        Args:
            found: The solution, components (batch, time, hidden).
        """
        last = self.first().unsqueeze(1).unbind(2)
        after = [torch.cat([f[:, 1:], z], 1) for f, z in zip(found, last, strict=True)]
        if self.starts is not None:
            ends = self._ends().unsqueeze(-1)
            after = [torch.where(ends, 0.0, a) for a in after]
        adjoint = self.step.adjoint
        moves = [True] * len(after) + list(adjoint.by_rows)
        blocks = [
            self.run_module(adjoint.gradients, now)
            for now in in_blocks([*after, *self.adjoint_inputs], moves)
        ]
        by_rows = [self.step.inputs[i].by_rows for i in self.step.differentiable]
        return [
            torch.cat(parts).unflatten(0, (self.batch, self.time)) if moves else _sum(parts)
            for parts, moves in zip(zip(*blocks, strict=True), by_rows, strict=True)
        ]

    def solve_in_pieces(self, way: Way, run: Run) -> tuple[Tensor, list[Tensor]]:
        """Solve step by step, in pieces of time, with little memory besides the result.

        Args:
            way: The settings in force, for one chunk.
            run: Steps through chunks.

        Returns:
            The gradients of the initial states and of the differentiable inputs.
        """
        pieces, incoming, of_initial = [], self.incoming, torch.zeros_like(self.initial)
        for begin in reversed(range(0, self.time, way.piece)):
            piece = self._piece(begin, min(begin + way.piece, self.time), incoming)
            found, _ = piece.solve(way, run)
            pieces.append(piece.gradients(found))
            incoming = torch.stack([f[:, 0] for f in found], 1)
            if begin == 0 or self.starts is not None:
                of_initial += piece.initial_gradient(found)
        by_rows = [self.step.inputs[i].by_rows for i in self.step.differentiable]
        return of_initial, [
            torch.cat(parts, 1) if moves else _sum(parts)
            for parts, moves in zip(zip(*reversed(pieces), strict=True), by_rows, strict=True)
        ]

    def _piece(self, begin: int, end: int, incoming: Tensor | None) -> Backward:
        starts = self.starts
        if starts is not None and incoming is not None and end < self.time:
            incoming = torch.where(self.resets()[:, end, None, None], 0.0, incoming)
        by_rows = self.step.by_rows
        return replace(
            self,
            inputs=[i[:, begin:end] if r else i for i, r in zip(self.inputs, by_rows, strict=True)],
            starts=None if starts is None else starts[:, begin:end],
            time=end - begin,
            before=[b[:, begin:end] for b in self.before],
            grad_states=[g[:, begin:end] for g in self.grad_states],
            incoming=incoming,
        )

    def initial_gradient(self, found: Sequence[Tensor]) -> Tensor:
        """The gradient of the initial states: the adjoint of the solution where they are used."""
        if self.starts is None:
            return torch.stack([f[:, 0] for f in found], 1)
        if has_reset_states(self.initial, self.batch):
            first, resets = self.starts[:, :1], self.resets().unsqueeze(-1)
            carried = (first >= 0) & (first < self.batch)
            rows = [torch.where(carried, f[:, 0], 0.0) for f in found]
            again = [torch.where(resets, f, 0.0).sum(1) for f in found]
            return torch.cat([torch.stack(rows, 1), torch.stack(again, 1)])
        adjoint = torch.stack([f[0] for f in found], 1)
        gradient = adjoint.new_zeros(len(self.initial) + 1, *adjoint.shape[1:])
        gradient[self.starts[0].long()] = adjoint  # -1: the last row
        return gradient[:-1]

    def _ends(self) -> Tensor:
        """Boolean (batch, time): the next step exists and starts a sequence."""
        resets = self.resets()
        return torch.cat([resets[:, 1:], torch.zeros_like(resets[:, :1])], 1)

    def first(self) -> Tensor:
        """See `Chain.first`."""
        if self.incoming is not None:
            return self.incoming
        return self.initial.new_zeros(self.batch, *self.initial.shape[1:])

    def chunks(self, cut: Cut) -> Chunks:
        """See `Chain.chunks`."""
        return self._cut(cut, self.adjoint_inputs)

    def residual(self, ends: Tensor, starts: Tensor) -> Tensor:
        """See `Chain.residual`."""
        return adjoint_residual(ends, starts)

    def _cut(self, cut: Cut, inputs: Sequence[Tensor]) -> Chunks:
        resets = None if self.starts is None else self._ends().unsqueeze(-1)
        return self._adjoint_chunks(cut, inputs, resets)

    def tangents(
        self, cut: Cut, first: Sequence[Tensor], states: Sequence[Tensor], run: Run
    ) -> Tensor:
        """See `Chain.tangents`."""
        linear = self._adjoint_inputs(self.before, self.inputs, None)
        return self._images(self._cut(cut, linear), run).transpose(2, 3)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


def _zeros(like: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_zeros(1, 1, 1).expand_as(x) for x in like]
