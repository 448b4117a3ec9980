"""Evaluates recurrences with generated Triton, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pararnn.kernels.triton.build import Launcher, Launches, compile_together, form_of
from pararnn.kernels.triton.device import on_device, overlaps
from pararnn.kernels.triton.steps import Precision, adjoint_source, forward_source
from pararnn.planning.plan import Way
from pararnn.planning.triton_plan import Launch, block_of
from pararnn.solvers.problem import Problem
from pararnn.solvers.report import act_on_failure
from pararnn.tracing.derivatives import Recurrence

if TYPE_CHECKING:
    from pararnn.kernels.triton.launch import Call


class TritonBackend:
    """One instance per recurrence; modules are generated for the variants that are used."""

    name = "triton"
    takes_heads = True

    def __init__(self, recurrence: Recurrence) -> None:
        self.recurrence = recurrence
        self._functions: dict[tuple[str, bool], Any] = {}
        self._compiled: set[tuple[object, ...]] = set()
        self._launches = Launches()
        self.compile_s = 0.0

    def source(self) -> str:
        """The generated steps for results in float32, forward and adjoint."""
        both = (
            forward_source(self.recurrence, "single"),
            adjoint_source(self.recurrence, "single"),
        )
        return "\n\n".join(both)

    def parts(self, problem: Problem) -> int:
        """See `Backend.parts`."""
        return problem.batch * -(-problem.hidden // block_of(problem.hidden))

    def solve(self, problem: Problem, way: Way) -> tuple[list[Tensor], Tensor]:
        """See `Backend.solve`."""
        settings, launch = way.solver, way.launch
        assert launch is not None
        drive, components = problem.drives[0], self.recurrence.num_components
        shape = (problem.batch, problem.time, problem.hidden)
        states = [drive.new_empty(shape, dtype=problem.state_dtype) for _ in range(components)]
        report = drive.new_empty((self.parts(problem), 4), dtype=torch.float64)
        most = min(settings.max_iterations or launch.chunks, launch.chunks)
        with on_device(drive):
            written = _written()
            given = written.given_of(problem, states)
            kinds = self._kinds(problem, given, launch, most)
            asked = way.tolerance, settings.damping, report, most
            launcher = self._launcher(problem, way)
            self._run(written.calls(kinds, given, problem, launch, *asked), launcher)
        return states, report

    def solve_adjoint(
        self,
        problem: Problem,
        way: Way,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
        grad_drives: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.solve_adjoint`."""
        settings, launch = way.solver, way.launch
        assert launch is not None
        has_gradient = tuple(g is not None for g in grad_states)
        reports = settings.on_failure != "sequential" and launch.chunks > 1
        written = _written()
        drive, components = problem.drives[0], self.recurrence.num_components
        batch, hidden, chunks = problem.batch, problem.hidden, launch.chunks
        starts = written.starts_of(problem)
        rows = batch * (1 + chunks) if starts == "resets" else problem.initial.shape[0]
        grad_initial = drive.new_empty((rows, components, hidden), dtype=problem.dtype)
        if starts == "packed":  # a sequence without steps starts nowhere
            grad_initial.zero_()
        coefficients = self.recurrence.num_coefficients
        sums = drive.new_empty((batch, chunks, coefficients, hidden), dtype=torch.float64)
        report = drive.new_empty((self.parts(problem), 4), dtype=torch.float64) if reports else None
        most = min(settings.max_iterations or chunks, chunks) if reports else None
        with on_device(drive):
            grads = written.grads_of(grad_states, grad_drives, grad_initial, sums)
            given = written.given_of(problem, [s.contiguous() for s in states], grads)
            kinds = self._kinds(problem, given, launch, chunks, has_gradient, reports)
            asked = way.tolerance, None, report, most
            launcher = self._launcher(problem, way, *states, *grad_states, *grad_drives)
            self._run(written.calls(kinds, given, problem, launch, *asked), launcher)
            if report is not None:
                act_on_failure(report, settings, way.tolerance, backwards=True)
            grad_coefficients = sums.new_empty(sums.shape[2:], dtype=problem.dtype)
            if grad_coefficients.numel():
                overlap = overlaps(drive.device)
                self._run([written.total_call(sums, grad_coefficients, overlap)], launcher)
        if starts == "resets":  # of first states, then of what chunks restarted from
            restarts = grad_initial[batch:].unflatten(0, (batch, chunks)).sum(1)
            grad_initial = torch.cat([grad_initial[:batch], restarts])
        return grad_coefficients, grad_initial

    def _kinds(
        self,
        problem: Problem,
        given: Any,
        launch: Launch,
        most: int,
        gradients: Sequence[bool] | None = None,
        reports: bool = True,
    ) -> Any:
        """What the kernels of a direction are compiled for: the adjoint's with `gradients`."""
        written, precision = _written(), _precision(problem)
        key = (precision, gradients is not None)
        if key not in self._functions:
            self._functions[key] = written.functions_of(self.recurrence, *key)
        corrections = min(launch.corrections, most - 1)
        settings = launch, corrections, gradients, reports
        return written.kinds(self._functions[key], problem, given, *settings)

    def _launcher(self, problem: Problem, way: Way, *more: Tensor | None) -> Launcher:
        """Launches of a direction, and of which further tensors it is given."""
        given = (*problem.drives, *problem.coefficients, problem.initial, problem.starts, *more)
        return self._launches.of((way, *form_of(given)))

    def _run(self, calls: Sequence[Call], launcher: Launcher) -> None:
        """Launch kernels one after another; those of a new kind are compiled before, together."""
        known = launcher.knows_next
        new = [] if known else [c for c in calls if c.compiled_for not in self._compiled]
        begin = time.perf_counter()
        compile_together([call.compile for call in new])
        for call in calls:
            call.launch(launcher)
        if new:
            self._compiled.update(call.compiled_for for call in new)
            self.compile_s += time.perf_counter() - begin


def _written() -> ModuleType:
    """Launches of the written kernels, which need Triton; this module does not."""
    from pararnn.kernels.triton import launch

    return launch


def _precision(problem: Problem) -> Precision:
    if problem.dtype is torch.float64:
        return "double"
    return "single" if problem.state_dtype is torch.float32 else "half"
