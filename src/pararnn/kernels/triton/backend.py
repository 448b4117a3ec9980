"""Evaluates recurrences with generated Triton, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pararnn.kernels.lowering import lower
from pararnn.kernels.triton.build import compile_together, load
from pararnn.kernels.triton_module import Precision, Starts, Variant
from pararnn.kernels.triton_plan import Launch, Work, block_of, plan_launch
from pararnn.kernels.triton_source import adjoint_source, forward_source
from pararnn.solvers.problem import Problem, with_rows
from pararnn.solvers.settings import Solver, act_on_failure
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.expressions import topological


@dataclass(frozen=True)
class Call:
    """A launch of a kernel.

    Attributes:
        kernel: Which one.
        programs: Their number.
        warps: Of each.
        arguments: By name.
        constants: Those that are compiled in.
        follows: Whether it waits by itself for the kernel launched before.
    """

    kernel: Any
    programs: int
    warps: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    follows: bool = False

    def launch(self, overlap: bool, warmup: bool = False) -> None:
        """Run it, or only compile it; with `overlap` before the kernel before it has ended."""
        more = {"launch_pdl": True} if overlap and self.follows else {}
        given = self.arguments | self.constants | {"PDL": overlap, "num_warps": self.warps} | more
        if warmup:
            self.kernel.warmup(**given, grid=(self.programs,))
        else:
            self.kernel[(self.programs,)](**given)


class TritonBackend:
    """One instance per recurrence; modules are generated for the variants that are used."""

    name = "triton"
    takes_heads = True

    def __init__(self, recurrence: Recurrence) -> None:
        self.recurrence = recurrence
        self._modules: dict[tuple[str, Variant], ModuleType] = {}
        self._compiled: set[tuple[object, ...]] = set()
        self.compile_s = 0.0

    @functools.cached_property
    def _operations(self) -> tuple[int, int]:
        """Arithmetic operations of a step with its Jacobian, forward and adjoint."""
        recurrence = self.recurrence
        jacobian = [entry for row in recurrence.jacobian for entry in row]
        adjoint = [*recurrence.vjp[: recurrence.num_components], *jacobian]
        forward = len(topological(lower([*recurrence.step, *jacobian])))
        return forward, max(len(topological(lower(v))) for v in (adjoint, recurrence.vjp))

    def source(self) -> str:
        """The generated Triton for results in float32, forward and adjoint."""
        gradients = (True,) + (False,) * (self.recurrence.num_components - 1)
        variant = Variant("single", "none", 1, gradients=gradients)
        both = (forward_source(self.recurrence, variant), adjoint_source(self.recurrence, variant))
        return "\n\n".join(both)

    def parts(self, problem: Problem) -> int:
        """See `Backend.parts`."""
        return problem.batch * -(-problem.hidden // block_of(problem.hidden))

    def solve(self, problem: Problem, settings: Solver) -> tuple[list[Tensor], Tensor]:
        """See `Backend.solve`."""
        tolerance = settings.tolerance_for(problem.state_dtype)
        work = Work(len(problem.drives), problem.drives[0].itemsize, self._operations[0])
        launch = _launch(problem, settings, work, adjoint=False)
        fixed = _batch_first(problem.drives)
        unroll = (launch.unroll, launch.wide_unroll)
        variant = Variant(_precision(problem), _starts(problem), *unroll, fixed)
        module = self._module("forward", variant)
        drive, components = problem.drives[0], self.recurrence.num_components
        shape = (problem.batch, problem.time, problem.hidden)
        states = [drive.new_empty(shape, dtype=problem.state_dtype) for _ in range(components)]
        arguments = self._inputs(problem, states) | _boundaries(
            problem, launch, ("guess", "ends", "tangents")
        )
        report = drive.new_empty((self.parts(problem), 4), dtype=torch.float64)
        arguments |= {"report": report} | _sizes(problem, launch)
        most = min(settings.max_iterations or launch.chunks, launch.chunks)
        more = {"tolerance": tolerance, "damping": settings.damping}
        with on_device(drive):
            sweep = self._sweep(module, problem, launch, arguments, {"limit": tolerance})
            rest = self._finish(
                module, problem, launch, arguments, more, most, refine={"most": most}
            )
            self._run(problem, [sweep, *rest])
        return states, report

    def solve_adjoint(
        self,
        problem: Problem,
        settings: Solver,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
        grad_drives: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.solve_adjoint`."""
        tolerance = settings.tolerance_for(problem.state_dtype)
        given = tuple(g is not None for g in grad_states)
        loads = len(problem.drives) + len(states) + sum(given)
        work = Work(loads, problem.drives[0].itemsize, self._operations[1])
        launch = _launch(problem, settings, work, adjoint=True)
        starts = _starts(problem)
        strided = [*problem.drives, *grad_drives, *(g for g in grad_states if g is not None)]
        fixed = _batch_first(strided)
        unroll = (launch.unroll, launch.wide_unroll)
        reports = settings.on_failure != "sequential" and launch.chunks > 1
        variant = Variant(_precision(problem), starts, *unroll, fixed, given, reports)
        module = self._module("adjoint", variant)
        drive, components = problem.drives[0], self.recurrence.num_components
        batch, hidden, chunks = problem.batch, problem.hidden, launch.chunks
        arguments = self._inputs(problem, [s.contiguous() for s in states])
        for i, gradient in enumerate(grad_states):
            if gradient is not None:
                arguments |= _strided("grad_states", i, with_rows(gradient))
        for m, gradient in enumerate(grad_drives):
            arguments |= _in_heads("grad_drive", m, gradient)
        make = functools.partial(drive.new_empty, dtype=problem.dtype)
        rows = batch * (1 + chunks) if starts == "resets" else problem.initial.shape[0]
        grad_initial = make((rows, components, hidden))
        if starts == "packed":  # a sequence without steps starts nowhere
            grad_initial.zero_()
        sums = drive.new_empty(
            (batch, chunks, self.recurrence.num_coefficients, hidden), dtype=torch.float64
        )
        arguments |= {"grad_initial": grad_initial, "sums": sums}
        arguments |= _boundaries(problem, launch, ("incoming", "outgoing", "products"))
        arguments |= _sizes(problem, launch)
        with on_device(drive):
            sweep = self._sweep(module, problem, launch, arguments, {"limit": tolerance})
            more, report = {"tolerance": tolerance}, None
            if reports:
                report = drive.new_empty((self.parts(problem), 4), dtype=torch.float64)
            refine = {"report": report, "most": min(settings.max_iterations or chunks, chunks)}
            refine = refine if reports else {}
            rest = self._finish(module, problem, launch, arguments, more, chunks, refine)
            self._run(problem, [sweep, *rest])
            if report is not None:
                act_on_failure(report, settings, tolerance, backwards=True)
            grad_coefficients = self._total(problem, sums)
        if starts == "resets":  # of first states, then of what chunks restarted from
            restarts = grad_initial[batch:].unflatten(0, (batch, chunks)).sum(1)
            grad_initial = torch.cat([grad_initial[:batch], restarts])
        return grad_coefficients, grad_initial

    def _sweep(
        self,
        module: ModuleType,
        problem: Problem,
        launch: Launch,
        arguments: dict[str, Any],
        more: dict[str, Any],
    ) -> Call:
        """First guesses, and most of the results."""
        constants = {"MANY": launch.chunks > 1, "BLOCK": launch.block, "DISTANCE": launch.distance}
        given = arguments | more | {"warm": launch.warm}
        programs = self.parts(problem) * launch.chunks
        return Call(module.sweep, programs, launch.warps, given, constants)

    def _finish(
        self,
        module: ModuleType,
        problem: Problem,
        launch: Launch,
        arguments: dict[str, Any],
        more: dict[str, Any],
        most: int,
        refine: dict[str, Any] | None = None,
    ) -> Iterator[Call]:
        """The kernels that return at once where nothing is wrong."""
        if launch.chunks == 1:
            return
        parts, corrected = self.parts(problem), launch.corrected and most > 1
        report = {"report": arguments.pop("report")} if "report" in arguments else {}
        guess, ends = (n for n in ("guess", "ends", "incoming", "outgoing") if n in arguments)
        given = arguments | more
        given |= {f"{n}2": torch.empty_like(arguments[n]) for n in (guess, ends)}
        shape = {"GROUP": launch.group, "BLOCK": launch.block}
        if corrected:
            constants = shape | {"DISTANCE": launch.distance}
            programs = parts * launch.chunks
            yield Call(module.correct, programs, launch.warps, given, constants, follows=True)
        given = given | report | (refine or {}) | {"target": torch.empty_like(arguments[guess])}
        constants = shape | {"CORRECTED": corrected, "ROWS": launch.rows}
        warps = launch.group * launch.warps
        yield Call(module.refine, parts, warps, given, constants, follows=True)

    def _total(self, problem: Problem, sums: Tensor) -> Tensor:
        """Gradients of coefficients, summed over rows and chunks."""
        from pararnn.kernels.triton.functions import (
            total,  # needs Triton, which this module does not
        )

        result = sums.new_empty(sums.shape[2:], dtype=problem.dtype)
        rows, width = sums.shape[0] * sums.shape[1], result.numel()
        if width:
            given = {"sums": sums, "result": result, "rows": rows, "width": width}
            constants = {"ROWS": 32, "BLOCK": 32}
            programs = -(-width // 32)
            self._run(problem, [Call(total, programs, 4, given, constants, follows=True)])
        return result

    def _run(self, problem: Problem, calls: Sequence[Call]) -> None:
        """Launch kernels one after another; those of a new kind are compiled before, together."""
        kinds = [(c.kernel, problem.hidden, *c.constants.values()) for c in calls]
        overlap = overlaps(problem.initial.device)
        launches = [functools.partial(call.launch, overlap) for call in calls]
        new = [run for run, kind in zip(launches, kinds, strict=True) if kind not in self._compiled]
        begin = time.perf_counter()
        compile_together(new)
        for launch in launches:
            launch()
        if new:
            self._compiled.update(kinds)
            self.compile_s += time.perf_counter() - begin

    def _module(self, direction: str, variant: Variant) -> ModuleType:
        key = (direction, variant)
        if key not in self._modules:
            make = forward_source if direction == "forward" else adjoint_source
            self._modules[key] = load(make(self.recurrence, variant))
        return self._modules[key]

    def _inputs(self, problem: Problem, states: Sequence[Tensor]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        for m, drive in enumerate(problem.drives):
            arguments |= _in_heads("drive", m, with_rows(drive))
        for c, weight in enumerate(problem.coefficients):
            arguments[f"coefficient{c}"] = weight.contiguous()
        arguments["initial"] = problem.initial.contiguous()
        if problem.starts is not None:
            arguments["starts"] = problem.starts
        return arguments | {f"states{i}": s for i, s in enumerate(states)}


def _launch(problem: Problem, settings: Solver, work: Work, adjoint: bool) -> Launch:
    device = problem.drives[0].device
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )
    return plan_launch(
        problem.batch,
        problem.time,
        problem.hidden,
        None if settings.chunk == "auto" else int(settings.chunk),
        work,
        settings.tolerance_for(problem.state_dtype),
        processors,
        adjoint,
    )


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start before the one that it depends on has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _precision(problem: Problem) -> Precision:
    if problem.dtype is torch.float64:
        return "double"
    return "single" if problem.state_dtype is torch.float32 else "half"


def _starts(problem: Problem) -> Starts:
    if problem.starts is None:
        return "none"
    return "resets" if problem.initial.shape[0] == 2 * problem.batch else "packed"


def _batch_first(tensors: Sequence[Tensor]) -> bool:
    """Whether strides over time do not depend on the size of the batch."""
    return all(t.stride(1) <= t.stride(0) or t.shape[0] == 1 for t in tensors)


def _strided(name: str, index: int, tensor: Tensor) -> dict[str, Any]:
    """A tensor over time with its strides."""
    return {
        f"{name}{index}": tensor,
        f"{name}_batch{index}": tensor.stride(0),
        f"{name}_time{index}": tensor.stride(1),
    }


def _in_heads(name: str, index: int, tensor: Tensor) -> dict[str, Any]:
    """A tensor (batch, time, heads, head_size) with its strides and the size of its heads."""
    heads = {f"{name}_head{index}": tensor.stride(2), f"{name}_size{index}": tensor.shape[3]}
    return _strided(name, index, tensor) | heads


def _boundaries(problem: Problem, launch: Launch, names: Sequence[str]) -> dict[str, Tensor]:
    """What is known of every chunk: its first guess, its end, and what couples them."""
    drive, components = problem.drives[0], problem.recurrence.num_components
    chunks = launch.chunks if launch.chunks > 1 else 0
    make = functools.partial(drive.new_empty, dtype=problem.dtype)
    shape = (problem.batch, chunks, components, problem.hidden)
    square = (problem.batch, chunks, components * components, problem.hidden)
    tiles = -(-problem.hidden // launch.block)
    stored = drive.new_empty((problem.batch, chunks, tiles), dtype=torch.int32)
    guess, ends, coupling = names
    return {guess: make(shape), ends: make(shape), coupling: make(square), "stored": stored}


def _sizes(problem: Problem, launch: Launch) -> dict[str, int]:
    return {
        "batch": problem.batch,
        "time": problem.time,
        "hidden": problem.hidden,
        "chunks": launch.chunks,
        "chunk": launch.chunk,
    }


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """The device of a tensor as the current one; Triton launches there."""
    if tensor.is_cuda:
        return torch.cuda.device_of(tensor)
    import numpy as np  # the interpreter's: floating point is to behave as on a GPU

    return np.errstate(all="ignore")
