"""Arguments of the written kernels, and their launches."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from pararnn.kernels.triton import adjoint, forward, solve, steps
from pararnn.kernels.triton.build import Launcher, load
from pararnn.kernels.triton.device import overlaps
from pararnn.kernels.triton.functions import total
from pararnn.kernels.triton.tuples import (
    Corrected,
    Edges,
    Given,
    Grads,
    InHeads,
    Kind,
    OverTime,
)
from pararnn.planning.triton_plan import Launch
from pararnn.solvers.problem import Problem, with_rows
from pararnn.solvers.shooting import SMALL
from pararnn.tracing.derivatives import Recurrence


@dataclass(frozen=True)
class Call:
    """A launch of a kernel.

    Attributes:
        kernel: Which one.
        programs: Their number.
        warps: Of each.
        arguments: By name.
        overlap: Whether it starts before the kernel before it has ended, and waits by itself.
    """

    kernel: Any
    programs: int
    warps: int
    arguments: dict[str, Any]
    overlap: bool

    @property
    def compiled_for(self) -> tuple[Any, ...]:
        """What it is compiled for, but for types and strides of tensors."""
        return self.kernel, self.arguments.get("KIND", self.overlap)

    @property
    def given(self) -> dict[str, Any]:
        """Its arguments and options."""
        options = {"num_warps": self.warps} | ({"launch_pdl": True} if self.overlap else {})
        return self.arguments | options

    def compile(self) -> None:
        """Compile it without a launch."""
        self.kernel.warmup(**self.given, grid=(self.programs,))

    def launch(self, launcher: Launcher) -> None:
        """Launch it."""
        launcher.launch(self.kernel, (self.programs,), self.given)


def functions_of(
    recurrence: Recurrence, precision: steps.Precision, backward: bool
) -> dict[str, Any]:
    """The functions of a direction, with what else `Kind` has of them."""
    if backward:
        cell = load(steps.adjoint_source(recurrence, precision))
        found = {"step": cell.adjoint_step, "step_with_jacobian": cell.adjoint_with_jacobian}
    else:
        cell = load(steps.forward_source(recurrence, precision))
        found = {"step": cell.step, "step_with_jacobian": cell.step_with_jacobian}
    system = adjoint if backward else forward
    names = "load_ahead run run_chunk unmeasured measure judge moved verdict"
    found |= {name: getattr(system, name) for name in names.split()}
    # Triton's cache on disk sees only names of functions in tuples; the interpreter has none.
    keys = "".join(getattr(function, "cache_key", "") for function in found.values())
    coupled, count = steps.coupled(recurrence), range(recurrence.num_components)
    entries = [(j, i) if backward else (i, j) for i in count for j in count]
    places = tuple(coupled.index(e) if e in coupled else -1 for e in entries)
    return found | {"version": hashlib.sha256(keys.encode()).hexdigest(), "entries": places}


def kinds(
    functions: dict[str, Any],
    problem: Problem,
    given: Given,
    launch: Launch,
    corrections: int,
    gradients: Sequence[bool] | None,
    reports: bool,
) -> tuple[Kind, Kind, Kind]:
    """What `sweep`, `correct` and `refine` are compiled for.

    Args:
        functions: See `functions_of`.
        problem: The problem.
        given: What the system is given.
        launch: How it is cut.
        corrections: How often `correct` runs.
        gradients: For the adjoint, which components of the states have a gradient.
        reports: Whether `refine` says how it went.
    """
    has, double = gradients or (), problem.dtype is torch.float64
    sweep = Kind(
        **functions,
        real=tl.float64 if double else tl.float32,
        small=SMALL,
        tiny=2.0**-1022 if double else 2.0**-126,
        starts=starts_of(problem),
        hidden=problem.hidden,
        block=launch.block,
        unroll=launch.unroll,
        distance=launch.distance,
        many=launch.chunks > 1,
        group=0,  # what a kernel does not use is the same for all: it need not be compiled again
        rows=0,
        looked_at=0,
        wide=False,
        corrected=0,
        overlap=overlaps(problem.initial.device),
        backward=gradients is not None,
        gradients=tuple(sum(has[:i]) if one else -1 for i, one in enumerate(has)),
        reports=False,
        paired=paired_of(given),
    )
    wide = sweep._replace(group=launch.group, unroll=launch.wide_unroll, distance=0, wide=True)
    wide = wide._replace(paired=None)
    refine = wide._replace(rows=launch.rows, corrected=corrections, reports=reports)
    return sweep, sweep._replace(group=launch.group, looked_at=launch.looked_at), refine


def paired_of(given: Given) -> tl.dtype | None:
    """The type of what is read over time, if neighbours can be loaded together; None if not."""
    dtype = given.states[0].dtype
    if dtype not in _PAIRED:
        return None
    read = [*given.drives, *(given.grads.states if given.grads else ())]
    read += [OverTime(s, s.stride(0), s.stride(1)) for s in given.states]
    if any(t.at.dtype is not dtype or t.at.data_ptr() % 4 for t in read):
        return None
    sizes = [getattr(n, "value", n) for _, *numbers in read for n in numbers]
    return None if any(n % 2 for n in sizes) else _PAIRED[dtype]


_PAIRED = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def starts_of(problem: Problem) -> str:
    """Whether sequences start inside."""
    if problem.starts is None:
        return "none"
    return "resets" if problem.initial.shape[0] == 2 * problem.batch else "packed"


def given_of(problem: Problem, states: Sequence[Tensor], grads: Grads | tuple[()] = ()) -> Given:
    """What a system is given: that of the adjoints with `grads`."""
    return Given(
        _in_heads([with_rows(drive) for drive in problem.drives]),
        tuple(weight.contiguous() for weight in problem.coefficients),
        problem.initial.contiguous(),
        () if problem.starts is None else (problem.starts,),
        tuple(states),
        grads,
    )


def grads_of(
    states: Sequence[Tensor | None], drives: Sequence[Tensor], initial: Tensor, sums: Tensor
) -> Grads:
    """Gradients that are given, and where others go."""
    found = [with_rows(g) for g in states if g is not None]
    strides = _strides(found)
    over_time = tuple(
        OverTime(g, g.stride(0), stride) for g, stride in zip(found, strides, strict=True)
    )
    return Grads(over_time, _in_heads(drives), initial, sums)


def _in_heads(tensors: Sequence[Tensor]) -> tuple[InHeads, ...]:
    """Tensors (batch, time, heads, head_size)."""
    return tuple(
        InHeads(t, t.stride(0), stride, t.stride(2), tl.constexpr(t.shape[3]))
        for t, stride in zip(tensors, _strides(tensors), strict=True)
    )


def _strides(tensors: Sequence[Tensor]) -> list[Any]:
    """Strides over time, compiled in: with them, addresses take far fewer registers.

    But only where none depends on the size of the batch, which may vary.
    """
    if all(t.stride(1) <= t.stride(0) or t.shape[0] == 1 for t in tensors):
        return [tl.constexpr(t.stride(1)) for t in tensors]
    return [t.stride(1) for t in tensors]


def edges_of(problem: Problem, launch: Launch) -> Edges:
    """Room for what is known of every chunk."""
    count, first = problem.recurrence.num_components, problem.drives[0]
    batch, hidden = problem.batch, problem.hidden
    chunks = launch.chunks if launch.chunks > 1 else 0
    guess = first.new_empty((batch, chunks, count, hidden), dtype=problem.dtype)
    coupling = guess.new_empty((batch, chunks, count * count, hidden))
    tiles = -(-hidden // launch.block)
    stored = first.new_empty((batch, chunks, tiles), dtype=torch.int32)
    return Edges(guess, torch.empty_like(guess), coupling, stored)


def _corrected(edges: Edges) -> Corrected:
    """Room for what `correct` finds."""
    guess, ends, target = (torch.empty_like(edges.guess) for _ in range(3))
    residual = torch.empty_like(edges.stored, dtype=edges.guess.dtype)
    return Corrected(guess, ends, residual, target)


def calls(
    kinds: tuple[Kind, Kind, Kind],
    given: Given,
    problem: Problem,
    launch: Launch,
    tolerance: float,
    damping: float | None,
    report: Tensor | None,
    most: int | None,
) -> list[Call]:
    """The kernels of a direction.

    Args:
        kinds: What each is compiled for.
        given: What the system is given.
        problem: The problem.
        launch: How it is cut.
        tolerance: Of the solve.
        damping: Of Newton's method; None for the adjoint.
        report: Where it goes, if anywhere.
        most: How many iterations count, if there is a report.
    """
    sweep, correct, refine = kinds
    parts, edges = problem.batch * -(-problem.hidden // launch.block), edges_of(problem, launch)
    programs, warps = parts * launch.chunks, launch.warps
    arguments = {"given": given, "edges": edges, "batch": problem.batch, "time": problem.time}
    arguments |= {"chunks": launch.chunks, "chunk": launch.chunk}
    first = arguments | {"warm": launch.warm, "limit": tolerance, "KIND": sweep}
    first |= {"report": None if sweep.backward else report}
    found = [Call(solve.sweep, programs, warps, first, overlap=False)]
    if launch.chunks == 1:
        return found
    arguments |= {"tolerance": tolerance, "damping": damping}
    found_by = [_corrected(edges) for _ in range(max(1, refine.corrected))]
    for n, new in enumerate(found_by[: refine.corrected]):
        now = arguments | {"edges": edges, "corrected": new, "iteration": n + 2, "KIND": correct}
        found.append(Call(solve.correct, programs, warps, now, correct.overlap))
        edges = edges._replace(guess=new.guess, ends=new.ends)
    last = arguments | {"corrected": found_by[-1], "report": report, "most": most, "KIND": refine}
    return [*found, Call(solve.refine, parts, launch.group * warps, last, refine.overlap)]


def total_call(sums: Tensor, result: Tensor, overlap: bool) -> Call:
    """The kernel that adds up `sums` (rows, chunks, coefficients, channels) to `result`."""
    width = result.numel()
    sizes = {"rows": sums.shape[0] * sums.shape[1], "width": width, "ROWS": 32, "BLOCK": 32}
    given = {"sums": sums, "result": result, "PDL": overlap} | sizes
    return Call(total, -(-width // 32), 4, given, overlap)
