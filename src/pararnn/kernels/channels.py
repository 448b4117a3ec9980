"""The path through kernels of elementwise cells: one channel is a recurrence of its own."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pararnn.kernels.c.backend import CBackend
from pararnn.kernels.facts import Planner
from pararnn.kernels.triton.backend import TritonBackend
from pararnn.planning.plan import Plan
from pararnn.solvers.problem import Backend, Problem
from pararnn.solvers.report import act_on_failure
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.step import Layout, Step

_MAKERS: dict[str, Callable[[Recurrence], Backend]] = {
    "c": CBackend,
    "triton": TritonBackend,
}
_backends: weakref.WeakValueDictionary[tuple[str, str], Backend] = weakref.WeakValueDictionary()
_lock = threading.Lock()


@dataclass(frozen=True)
class Channels:
    """Solves a recurrence by a backend that takes drives and coefficients; see `operators.Path`.

    Attributes:
        backend: The backend.
        layout: Where drives and coefficients are in the inputs.
        planner: Plans of calls.
    """

    backend: Backend
    layout: Layout
    planner: Planner

    @classmethod
    def of(cls, step: Step, planner: Planner) -> Channels:
        """The path for a step whose channels do not reach each other."""
        assert step.recurrence is not None
        assert step.layout is not None
        _ = step.recurrence.vjp  # derived here: autograd does not work inside an operator
        name = planner.backend.name
        key = step.recurrence.key, name
        with _lock:
            made = _backends.get(key)
            if made is None:
                made = _backends[key] = _MAKERS[name](step.recurrence)
        return cls(made, step.layout, planner)

    def _plan(self, problem: Problem, gradients: int = 1) -> Plan:
        device, sizes = problem.initial.device, (problem.batch, problem.time, problem.hidden)
        return self.planner.plan(device, *sizes, *_kinds(problem), gradients)

    def kinds(self, inputs: Sequence[Tensor], initial: Tensor) -> tuple[torch.dtype, int]:
        """See `operators.Path`."""
        return _kinds(self.problem(inputs, initial, None))

    def problem(self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None) -> Problem:
        """The tensors as a problem for the backend."""
        drives, recurrence = self._drives(inputs), self.backend.recurrence
        coefficients = self.layout.coefficients_of(inputs)
        return Problem(recurrence, drives, coefficients, initial, starts)

    def _drives(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        first = inputs[: self.layout.num_drive_inputs]
        return self.layout.drives_of(
            first if self.backend.takes_heads else [i.flatten(3) for i in first]
        )

    def flat_problem(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> Problem:
        """The problem in the type of the arithmetic, with all drives (batch, time, hidden)."""
        problem = self.problem(inputs, initial, starts)
        return replace(problem, drives=[d.flatten(2) for d in problem.drives]).converted()

    def solve(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """See `operators.Path`."""
        problem = self.problem(inputs, initial, starts)
        way = self._plan(problem).forward
        states, report = self.backend.solve(problem, way)
        act_on_failure(report, way.solver, way.tolerance)
        return [*states, report]

    def adjoint(
        self,
        inputs: Sequence[Tensor],
        initial: Tensor,
        starts: Tensor | None,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """See `operators.Path`."""
        problem = self.problem(inputs, initial, starts)
        count = self.layout.num_drive_inputs
        found = [self._gradient_like(i, n) for n, i in enumerate(inputs[:count])]
        way = self._plan(problem, sum(g is not None for g in grad_states)).adjoint
        sums, of_initial = self.backend.solve_adjoint(
            problem, way, states, grad_states, self._drives(found)
        )
        found += [self._to_slots(sums, i, n) for n, i in enumerate(inputs[count:])]
        return [*found, of_initial.to(initial.dtype)]

    def like_states(self, inputs: Sequence[Tensor], initial: Tensor) -> list[Tensor]:
        """See `operators.Path`."""
        problem = self.problem(inputs, initial, None)
        shape = (problem.batch, problem.time, problem.hidden)
        states = [
            initial.new_empty(shape, dtype=problem.state_dtype) for _ in range(initial.shape[1])
        ]
        return [*states, initial.new_empty((self.backend.parts(problem), 4), dtype=torch.float64)]

    def like_gradients(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """See `operators.Path`."""
        count = self.layout.num_drive_inputs
        found = [self._gradient_like(i, n) for n, i in enumerate(inputs[:count])]
        return [*found, *(i.new_empty(i.shape) for i in inputs[count:])]

    def loop(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """See `operators.Path`; for any number of channels."""
        kept_in = self.problem(inputs, initial, starts).state_dtype
        problem = self.flat_problem(inputs, initial, starts)
        now: Sequence[Tensor] = problem.first_states().unbind(1)
        history = []
        steps = zip(*(d.unbind(1) for d in problem.drives), strict=True)
        for t, given in enumerate(steps):
            if starts is not None:
                fresh = problem.initial[starts[:, t].long().clamp_min(0)].unbind(1)
                begins = (starts[:, t] >= 0).unsqueeze(-1)
                now = [torch.where(begins, f, n) for f, n in zip(fresh, now, strict=True)]
            now = problem.recurrence.function(*now, *given, *problem.coefficients)
            history.append(now)
        return [torch.stack(h, 1).to(kept_in) for h in zip(*history, strict=True)]

    def _gradient_like(self, drives: Tensor, number: int) -> Tensor:
        """Memory for the gradient of an input with drives: zeros if some slots are not used."""
        used = {slot for n, slot in self.layout.drives if n == number}
        make = torch.empty_like if len(used) == drives.shape[2] else torch.zeros_like
        apart = self.backend.takes_heads
        kept = torch.preserve_format if apart else torch.contiguous_format
        return make(drives, memory_format=kept)

    def _to_slots(self, sums: Tensor, like: Tensor, number: int) -> Tensor:
        """The gradient of an input with coefficients, from those of the coefficients."""
        places = enumerate(self.layout.coefficients)
        of = {slot: i for i, (n, slot) in places if n == number}
        first, slots = next(iter(of.values())), like.shape[0]
        if of == {slot: first + slot for slot in range(slots)}:
            return sums[first : first + slots].to(like.dtype)
        gradient = like.new_zeros(like.shape)
        for slot, i in of.items():
            gradient[slot] = sums[i]
        return gradient


def _kinds(problem: Problem) -> tuple[torch.dtype, int]:
    return problem.state_dtype, problem.drives[0].itemsize
