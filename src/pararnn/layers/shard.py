"""What one rank does with its part of the time of a sequence."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pararnn.layers.arguments import State
from pararnn.layers.runner import Runner
from pararnn.planning.ranks_plan import plan_ranks
from pararnn.planning.settings import Solver
from pararnn.solvers.across import AcrossRanks, Own
from pararnn.solvers.chunks import Groups
from pararnn.solvers.ranks import Ranks
from pararnn.solvers.shooting import adjoint_residual, solve, state_residual
from pararnn.tracing.capture import snapshot

Parts = tuple[Tensor, ...]


class Given(NamedTuple):
    """What a call of a layer is given, laid out with batch and time first.

    Attributes:
        runner: The traced cell.
        x: Inputs, (batch, time, *features).
        parts: Components of the state before the first step.
        fresh: Components of what resets restart from; none without resets.
        resets: Boolean (batch, time), or None.
        cu_seqlens: Boundaries of packed sequences, or None.
        is_single: Whether there was no batch.
    """

    runner: Runner
    x: Tensor
    parts: Parts
    fresh: Parts
    resets: Tensor | None
    cu_seqlens: Tensor | None
    is_single: bool


class Made(NamedTuple):
    """Steps that a rank ran.

    Attributes:
        start: The state that came from the rank before; none on the first.
        leaves: x, state and reset state, where recording began.
        y: Outputs.
        ends: The states after the last steps.
    """

    start: Parts
    leaves: Parts
    y: Tensor
    ends: Parts


class Layer(Protocol):
    """What is asked of an `RNN`."""

    cell: nn.Module
    solver: Solver | None
    backend: str

    def laid_out(
        self,
        x: Tensor,
        state: State | None,
        resets: Tensor | None,
        cu_seqlens: Tensor | None,
        reset_state: State | None,
    ) -> Given:
        """The arguments of `forward`, checked."""

    def at_all_times(
        self,
        runner: Runner,
        x: Tensor,
        parts: Parts,
        fresh: Parts,
        resets: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Parts, Tensor | int | None]:
        """Outputs, last state and report, on this device alone."""


def autocast_of(device: str) -> tuple[str, torch.dtype, bool]:
    """The arguments of `torch.autocast` that are in force."""
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


class Shard:
    """One rank's part of a call: its steps, run from any state before them, and back.

    Boundary states are vectors (batch, n, groups), see `Groups`. In a batch of packed sequences it
    is the state of the one that crosses the boundary, if there is one.

    Args:
        layer: The layer.
        ranks: That share the sequence.
        given: What the layer was called with.
        times: Steps of every rank.
        records: Whether gradients are asked for.

    Attributes:
        gradients: Of x, the state, the reset state and the cell's tensors, after `adjoint`.
        report: The values of the report, after `solve`; None with one rank.
    """

    def __init__(
        self, layer: Layer, ranks: Ranks, given: Given, times: Sequence[int], records: bool
    ) -> None:
        self.ranks, self.records, self.number = ranks, records, ranks.next_call()
        self.layer, self.runner = layer, given.runner
        self.take(given.x, given.parts, given.fresh)
        self.resets, self.cu_seqlens = given.resets, given.cu_seqlens
        self.batch = len(given.x)
        self.time, self.begin = times[ranks.position], sum(times[: ranks.position])
        self.is_first, self.is_last = ranks.position == 0, ranks.position == ranks.count - 1
        self.before: slice | None = slice(None)  # rows whose state crosses a boundary
        self.after: slice | None = slice(None)
        if given.cu_seqlens is not None:
            _check(given.cu_seqlens, self.batch, sum(times))
            self.before = _crossing(given.cu_seqlens, self.begin)
            self.after = _crossing(given.cu_seqlens, self.begin + self.time)
        packing, step = given.runner.traced.packing, given.runner.traced.step
        self.groups = Groups(self.batch, packing.num_components, step.group)
        dtype = given.x.dtype if given.x.is_floating_point() else given.parts[0].dtype
        first = [p.new_zeros(self.batch, *p.shape[1:], dtype=dtype) for p in given.parts]
        self.zero = self._vectors(first)
        # inference tensors know no gradients
        couples = given.runner.method().coupling == "tangent"
        couples = couples and not torch.is_inference_mode_enabled()
        has_effect = ranks.count > 2 and not (self.is_first or self.is_last)
        self.needs_tangent = couples and has_effect
        self.autocast = autocast_of(given.x.device.type)
        plan = given.runner.plan(self.batch, self.time, given.x.dtype)
        tolerances = plan.forward.tolerance, plan.adjoint.tolerance
        self.ways = [plan_ranks(self.time, tolerance, couples) for tolerance in tolerances]
        self.shapes = [p.shape for p in given.parts]
        self.start = self.zero
        self.gradients: list[Tensor | None] = []
        self.report: Tensor | None = None
        self._made: Made | None = None

    def take(self, x: Tensor, parts: Parts, fresh: Parts) -> None:
        """The tensors that the layer was called with."""
        self.x, self.parts, self.fresh = x, parts, fresh

    def release(self) -> None:
        """Keep nothing of what `restore` brings back."""
        self.start, self._made = self.zero, None
        self.take(self.zero, (), ())

    def restore(self, tensors: Sequence[Tensor]) -> None:
        """Take back the start, x, the state and the reset state."""
        self.start, x, *rest = tensors
        count = len(self.shapes)
        self.take(x, tuple(rest[:count]), tuple(rest[count:]))

    def solve(self) -> tuple[Tensor, Parts]:
        """The outputs of this part of time, and the state after the last step of all."""
        own = Own(self.run, self.run_last, self.tangent)
        residual = functools.partial(state_residual, size=self.groups.size)
        system = AcrossRanks(own, self.ranks, self.zero, residual)
        _, self.report = solve(system, self.ways[0])
        assert self._made is not None
        y, ends = self._made.y.detach(), self._made.ends
        if self.cu_seqlens is None:
            final = self._parts(system.ends[:, -1])
        else:
            mine = self._final(ends, self.time)
            final = tuple(self.ranks.gather(f).sum(0) for f in mine)
        final = tuple(f.to(e.dtype) for f, e in zip(final, ends, strict=True))
        if not self.records:
            self._made = None
        return y, final

    def run(self, start: Tensor) -> Tensor:
        """The state after this part of time, from the one before it."""
        self._made = None
        self.start = start
        with torch.set_grad_enabled(self.records or self.needs_tangent):
            self._made = self._run(self._parts(start), 0, self.time)
        return self._vectors(self._crossing(self._made.ends)).detach()

    def run_last(self, steps: int) -> Tensor:
        """The state after this part of time, run from the initial state `steps` before."""
        with torch.no_grad():
            ends = self._run(None, self.time - steps, self.time).ends
        return self._vectors(self._crossing(ends)).detach()

    def tangent(self) -> Tensor:
        """d(state after) / d(state before), (batch, n, n, groups), of the last run."""
        rows = [self.zero] * self.zero.shape[1]
        assert self._made is not None
        start, outputs = self._made.start, self._crossing(self._made.ends)
        if self.before is not None and not self.is_first and outputs[0].requires_grad:
            for i in range(len(rows)):
                unit = torch.zeros_like(self.zero)
                unit[:, i] = 1
                found = _gradients(list(outputs), list(start), list(self._parts(unit)))
                rows[i] = self._vectors(_filled(found, start))
        return torch.stack(rows, 1)

    def back(self, adjoint: Tensor, grad_y: Tensor, grad_final: Parts) -> Tensor:
        """All gradients, and that of the state before this part of time.

        Args:
            adjoint: The gradient of the state after it, from later ranks.
            grad_y: Of the outputs.
            grad_final: Of the state after the last step of all.
        """
        assert self._made is not None
        own = [t for t in snapshot(self.layer.cell).tensors.values() if t.requires_grad]
        wanted = [*self._made.leaves, *own]
        of_start, self.gradients = self._back(
            self._made, adjoint, grad_y, self._final(grad_final, self.time), wanted
        )
        return of_start

    def back_first(self, steps: int, grad_y: Tensor, grad_final: Parts) -> Tensor:
        """The gradient of the state before this part of time, by its first steps alone."""
        with torch.enable_grad():
            made = self._run(self._parts(self.start), 0, steps)
        final = self._final(grad_final, steps)
        return self._back(made, None, grad_y[:, :steps], final, [])[0]

    def _back(
        self,
        made: Made,
        adjoint: Tensor | None,
        grad_y: Tensor,
        final: Parts,
        wanted: list[Tensor],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of the state at the start, and of what is wanted."""
        start = made.start
        outputs, grads = [made.y, *made.ends], [grad_y, *final]
        if adjoint is not None:
            outputs += self._crossing(made.ends)
            grads += self._parts(adjoint)
        found = _gradients(outputs, [*start, *wanted], grads)
        of_start, others = found[: len(start)], found[len(start) :]
        return self._vectors(_filled(of_start, start)) if start else self.zero, others

    def _run(self, start: Parts | None, begin: int, end: int) -> Made:
        """Run some of the steps.

        Args:
            start: The state that comes from the rank before; None: start from the initial state.
            begin: The first step.
            end: The step after the last one.

        """
        x, parts, fresh = (
            _leaves(t) if torch.is_grad_enabled() else t
            for t in ((self.x,), self.parts, self.fresh)
        )
        leaves = (*x, *parts, *fresh)
        start = () if start is None or self.is_first else start
        if start and torch.is_grad_enabled():
            start = tuple(s.detach().requires_grad_() for s in start)
        if start and self.before is not None:
            parts = tuple(self._entered(p, s) for p, s in zip(parts, start, strict=True))
        ends = self.cu_seqlens
        if ends is not None:
            ends = (ends - (self.begin + begin)).clamp(0, end - begin)
        resets = None if self.resets is None else self.resets[:, begin:end]
        rest = (x[0][:, begin:end], parts, fresh, resets, ends)
        y, last, _ = self.layer.at_all_times(self.runner, *rest)
        return Made(start, leaves, y, last)

    def _entered(self, part: Tensor, start: Tensor) -> Tensor:
        """The states before the first step, with the one that comes from the rank before."""
        if self.cu_seqlens is None:
            return start.to(part.dtype)
        assert self.before is not None
        row = self.before.start
        return torch.cat([part[:row], start.to(part.dtype), part[row + 1 :]])

    def _crossing(self, ends: Parts) -> Parts:
        """The state that goes on to the next rank; zeros if there is none."""
        if self.after is None:
            return tuple(e.new_zeros(1, *e.shape[1:]) for e in ends)
        with torch.enable_grad():  # also from within a backward pass
            return tuple(e[self.after] for e in ends)

    def _final(self, rows: Parts, steps: int) -> Parts:
        """Of a value for every sequence, those that end in the first steps of this rank; else 0."""
        if self.cu_seqlens is None:
            ends_here = self.is_last and steps == self.time
            return rows if ends_here else tuple(torch.zeros_like(r) for r in rows)
        last = _last_steps(self.cu_seqlens).to(rows[0].device)
        here = (last >= self.begin) & (last < self.begin + steps)
        return tuple(torch.where(here.view(-1, *[1] * (r.dim() - 1)), r, 0) for r in rows)

    def _vectors(self, parts: Sequence[Tensor]) -> Tensor:
        components = self.runner.traced.packing.join(parts).unbind(1)
        return self.groups.vectors(components).squeeze(1)

    def _parts(self, vectors: Tensor) -> Parts:
        components = self.groups.rows(vectors.unsqueeze(1))
        return tuple(p.contiguous() for p in self.runner.traced.packing.split(components))

    def adjoint(self, grad_y: Tensor, grad_final: Sequence[Tensor]) -> None:
        """Find all gradients, see `gradients`."""
        failure = None
        try:
            if self._made is None:
                self.run(self.start)
        except Exception as error:  # told to the others, then raised
            failure = error
        what = {"the call whose gradients are computed": self.number}
        self.ranks.agree(what, [], grad_y.device, failure)
        final = tuple(self.ranks.gather(g).sum(0) for g in grad_final)
        own = Own(
            lambda adjoint: self.back(adjoint, grad_y, final),
            lambda steps: self.back_first(steps, grad_y, final),
            lambda: self.tangent().transpose(1, 2),
        )
        solve(AcrossRanks(own, self.ranks, self.zero, adjoint_residual, True), self.ways[1])
        self._made = None


def _leaves(tensors: Parts) -> Parts:
    """The same tensors, where recording begins."""
    return tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors)


def _gradients(
    outputs: Sequence[Tensor], wanted: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of outputs by what is wanted; None where there is none."""
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    places = [i for i, w in enumerate(wanted) if w.requires_grad]
    found: list[Tensor | None] = [None] * len(wanted)
    if pairs and places:
        made = torch.autograd.grad(
            [o for o, _ in pairs],
            [wanted[i] for i in places],
            [g.to(o.dtype) for o, g in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        for i, gradient in zip(places, made, strict=True):
            found[i] = gradient
    return found


def _filled(found: Sequence[Tensor | None], like: Parts) -> Parts:
    return tuple(torch.zeros_like(x) if f is None else f for f, x in zip(found, like, strict=True))


def _check(cu_seqlens: Tensor, batch: int, time: int) -> None:
    """Refuse boundaries that are not those of the whole sequence."""
    ends = cu_seqlens.tolist()
    if batch != 1 or ends[0] != 0 or ends[-1] != time or ends != sorted(ends):
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of steps of all ranks together, {time}, of "
            f"an x of batch 1 (here {batch}), got {ends}."
        )


def _crossing(cu_seqlens: Tensor, boundary: int) -> slice | None:
    """The row of the sequence that goes on across a boundary between ranks; None: there is none."""
    ends = cu_seqlens.tolist()
    for row, (begin, end) in enumerate(itertools.pairwise(ends)):
        if begin < boundary < end:
            return slice(row, row + 1)
    return None


def _last_steps(cu_seqlens: Tensor) -> Tensor:
    """The step where the state after every sequence is known: one of the rank that returns it."""
    begins, ends = cu_seqlens[:-1], cu_seqlens[1:]
    return torch.where(begins < ends, ends - 1, begins.clamp_max(cu_seqlens[-1] - 1))
