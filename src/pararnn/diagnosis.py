"""`diagnose`: whether parallel evaluation pays for a cell, and how its iterations converge."""

from __future__ import annotations

import base64
import contextlib
import copy
import functools
import importlib.util
import io
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from pararnn._notebook import Made, Report, show, table
from pararnn._words import counted
from pararnn.layers.arguments import batched, by_row, map_state
from pararnn.layers.rnn import RNN
from pararnn.layers.runner import Runner
from pararnn.planning.costs import COSTS
from pararnn.planning.plan import BackendChoice, Plan
from pararnn.planning.settings import Solver
from pararnn.solvers.report import ConvergenceError, SolveReport
from pararnn.solvers.shooting import noted_residuals
from pararnn.testing.loop import loop
from pararnn.tracing.capture import resolve, snapshot

_MOST_ITERATIONS = 10  # whose residuals are shown
_MOST_TO_COUNT = 50
"""Iterations until the tolerance are counted up to here: those of a cell that does not forget are
as many as chunks, and take the square of the length."""
_CHUNKS = (1, 8, 64)  # steps per chunk
_FEW = 5  # iterations
_SMALLEST = 1e-300

Solve = Callable[[Solver], SolveReport]


@dataclass(frozen=True, repr=False)
class Diagnosis(Report):
    """Results of `diagnose`; `str()` gives the report, which a notebook shows with a plot.

    Attributes:
        cell: Name of the cell's class.
        structure: "elementwise", "heads (size n)" or "dense".
        steps: Length of the sequence.
        lyapunov_exponent: Mean growth of a small difference of states, in nats per step, in the
            sequence where it grows fastest. Below 0 the cell forgets: the number of iterations
            hardly depends on the length. Above 0 it is chaotic, unless its step is linear in the
            state: iterations grow with the length.
        method: Name of the layer's solver, or of the one chosen for the cell.
        contraction: Largest growth of a tangent over one chunk, a factor, by steps per chunk. It
            is about the largest norm of a chunk's Jacobian.
        residuals: Residuals after 1, 2, ... iterations (`SolveReport.residual`), by steps per
            chunk; empty if the sequence has one step.
        iterations: Iterations to the tolerance of the layer, by steps per chunk; 51 for more than
            50, which are not counted.
        value_error: Largest difference of the layer's outputs from those of the loop, relative to
            the largest output.
        gradient_error: The same for gradients of x and the parameters, with random cotangents; the
            largest over these tensors.
        chunks_pay: Whether cutting time into chunks pays for this cell, in calls on such inputs on
            this device (`RNN.plan`).
        chunks_reason: Why, in words. What counts is how many steps follow one after another: those
            of the warm-up and of a chunk in every iteration, from the second iteration on twice if
            tangents are computed, against all steps of the sequence.
        recommendation: Advice, in words.
    """

    cell: str
    structure: str
    steps: int
    lyapunov_exponent: float
    method: str
    contraction: dict[int, float]
    residuals: dict[int, list[float]]
    iterations: dict[int, int]
    value_error: float
    gradient_error: float
    chunks_pay: bool = field(default=False)
    chunks_reason: str = field(default="")
    recommendation: str = field(default="")

    def __repr__(self) -> str:
        return f"<Diagnosis of {self.cell}: {self.recommendation}>"

    def __str__(self) -> str:
        lines = [
            f"{self.cell}: {self.structure}, {counted(self.steps, 'step')}, {self.method}",
            f"  Lyapunov exponent  {self.lyapunov_exponent:+.3f} nats per step",
        ]
        for chunk, residuals in self.residuals.items():
            shown = ", ".join(f"{r:.0e}" for r in residuals)
            needed = (
                f"{_iterated(self.iterations[chunk])}; tangents up to "
                f"{self.contraction[chunk]:.0e}; residuals {shown}"
            )
            lines.append(f"  chunks of {chunk:<4d}     {needed}")
        lines += [
            f"  chunks {'pay         ' if self.chunks_pay else 'do not pay  '}{self.chunks_reason}",
            f"  against the loop   values {self.value_error:.0e}, gradients "
            f"{self.gradient_error:.0e}",
            f"  {self.recommendation}",
        ]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [
            ("Lyapunov exponent", f"{self.lyapunov_exponent:+.3f} nats per step"),
            *(
                (
                    f"chunks of {chunk}",
                    f"{_iterated(self.iterations[chunk])}; tangents up to "
                    f"{self.contraction[chunk]:.0e}",
                )
                for chunk in self.iterations
            ),
            (f"chunks {'pay' if self.chunks_pay else 'do not pay'}", self.chunks_reason),
            (
                "against the loop",
                f"values {self.value_error:.0e}, gradients {self.gradient_error:.0e}",
            ),
            ("advice", self.recommendation),
        ]
        header = (self.cell, f"{self.structure}, {counted(self.steps, 'step')}, {self.method}")
        return table(rows, header=header) + self._image()

    def _image(self) -> str:
        """The plot in HTML; nothing where there is none, or no matplotlib."""
        if not any(self.residuals.values()) or importlib.util.find_spec("matplotlib") is None:
            return ""
        file = io.BytesIO()
        self.plot(file)
        data = base64.b64encode(file.getvalue()).decode()
        return Made(f'<img alt="residuals over iterations" src="data:image/png;base64,{data}">')

    def plot(self, file: Path | str | BinaryIO) -> None:
        """Draw the residual over iterations, one line per chunk length, with matplotlib.

        Args:
            file: Path of the image; its ending gives the format. Or an open file, for a PNG.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for chunk, residuals in self.residuals.items():
            shown = [max(r, 1e-17) for r in residuals]
            axes.semilogy(range(1, len(shown) + 1), shown, marker="o", label=f"chunks of {chunk}")
        axes.set(
            xlabel="iteration",
            ylabel="residual",
            title=f"{self.cell}, {counted(self.steps, 'step')}",
        )
        axes.legend()
        figure.savefig(file, dpi=120)


def diagnose(rnn: RNN, x: Tensor, state: Any = None) -> Diagnosis:
    """Evaluate a float64 copy of a layer on an input; show the report and return it.

    It is printed; in a notebook it is a table, with a plot if there is matplotlib.

    Args:
        rnn: The layer; unchanged.
        x: Input as the layer takes it, (batch, time, *features) with `batch_first`. A few hundred
            steps of real data tell more than random ones.
        state: State before the first step, as the layer takes it; zeros when None.

    Raises:
        TypeError: `rnn` is not an `RNN`.
        ValueError: The layer refuses the shapes, or x has no sequences.
    """
    if not isinstance(rnn, RNN):
        raise TypeError(
            f"diagnose takes a pararnn.RNN, got {type(rnn).__name__}; wrap a cell as RNN(cell), or "
            "pass one of .layers of a ParaGRU, a ParaLSTM or what parallelize made."
        )
    with contextlib.suppress(ConvergenceError):  # which is what a user may want to understand
        rnn(x, state)  # checks the arguments, and learns sizes that the cell does not declare
    if not x.numel():
        raise ValueError(f"x has shape {tuple(x.shape)}; diagnose needs at least one sequence.")
    with torch.inference_mode(False), torch.enable_grad():
        found = _diagnosed(rnn, x, state)
    show(found)
    return found


def _diagnosed(rnn: RNN, x: Tensor, state: Any) -> Diagnosis:
    cell, solver = copy.deepcopy(rnn.cell).double(), rnn.solver
    if solver is not None and solver.on_failure != "sequential":
        solver = replace(solver, on_failure="sequential")
    tried = RNN(cell, state_shape=rnn.state_shapes, solver=solver)
    plan = rnn.plan(x.shape, x.dtype)
    x, first = _batched(rnn, x, state)
    _say("diagnose: growth of small differences")
    growth = tangent_growth(cell, x, first)
    _say("diagnose: values and gradients of the loop")
    errors = _errors(tried, x, first)
    runner = tried.runner()
    method = runner.method()
    solve = _solving(tried, runner, x, first)
    tolerance = (solver or method()).tolerance_for(snapshot(rnn.cell).dtype)
    found = Diagnosis(
        runner.traced.subject.name,
        runner.traced.structure,
        x.shape[1],
        float(growth.mean(0).max()),
        method.__name__,
        {c: _most_growth(growth, c) for c in _chunks(x.shape[1])},
        *_iterations(solve, method, x.shape[1], tolerance),
        *errors,
    )
    chunk = _planned_chunk(plan, x.shape[1])
    pay, why = _worth(found, plan, chunk, method, solve, growth)
    _say("")
    advice = _recommendation(found, -(-x.shape[1] // chunk), pay)
    return replace(found, chunks_pay=pay, chunks_reason=why, recommendation=advice)


def _say(what: str) -> None:
    """Say on a terminal what is going on, in a line that the next one replaces."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{what}")
        sys.stderr.flush()


def tangent_growth(cell: nn.Module, x: Tensor, state: Any) -> Tensor:
    """Growth of a small difference of states in every step.

    The exact Jacobian carries a random tangent along the trajectory; each step rescales it to
    length 1. Where a step forgets the state entirely, a new random tangent goes on.

    Args:
        cell: `forward(x, state) -> state`.
        x: Inputs, (batch, time, *features).
        state: State before the first step, (batch, *state_shape), or a tuple of such tensors.

    Returns:
        Logarithms of the growth factors, in nats, (steps, batch), without the first tenth of steps.

    Source: Benettin et al. 1980.
    """
    parts = state if isinstance(state, tuple) else (state,)
    generator = torch.Generator(x.device).manual_seed(0)
    drawn = [torch.randn(p.shape, generator=generator, device=x.device).to(p) for p in parts]
    length = _lengths(drawn)
    start = tangents = tuple(d / by_row(length, d) for d in drawn)
    growth = []
    for x_t in x.unbind(1):

        def step(*now: Tensor, x_t: Tensor = x_t) -> Any:
            return cell(x_t, now if isinstance(state, tuple) else now[0])

        new, moved = torch.autograd.functional.jvp(step, parts, tangents)
        parts, moved = (v if isinstance(v, tuple) else (v,) for v in (new, moved))
        length = _lengths(moved)
        growth.append(length.clamp_min(_SMALLEST).log())
        gone = length < _SMALLEST
        pairs = zip(start, moved, strict=True)
        tangents = tuple(torch.where(by_row(gone, s), s, m / by_row(length, m)) for s, m in pairs)
    return torch.stack(growth[len(growth) // 10 :])


def _lengths(parts: Sequence[Tensor]) -> Tensor:
    """The length of each row, (batch,), over all tensors."""
    return torch.cat([part.reshape(len(part), -1) for part in parts], -1).norm(dim=-1)


def _most_growth(growth: Tensor, steps: int) -> float:
    """The largest growth factor over `steps` successive steps."""
    sums = torch.cat([torch.zeros_like(growth[:1]), growth.cumsum(0)])
    steps = min(steps, len(growth))
    return float((sums[steps:] - sums[:-steps]).max().exp())


def _chunks(time: int) -> list[int]:
    return [c for c in _CHUNKS if c < time]


def _batched(rnn: RNN, x: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Copies of the input (batch, time, ...) and of the first state, in float64."""
    single = x.dim() == rnn.runner().feature_axes + 1
    x = x.detach().to(torch.float64 if x.is_floating_point() else x.dtype, copy=True)
    x = x.unsqueeze(0) if single else x if rnn.batch_first else x.transpose(0, 1)
    count = rnn.num_components
    if state is None:
        zeros = tuple(
            torch.zeros(len(x), *s, dtype=torch.float64, device=x.device) for s in rnn.state_shapes
        )
        return x, zeros if count > 1 else zeros[0]
    state = batched(state, rnn.state_shapes)
    return x, map_state(state, lambda s: s.detach().to(torch.float64, copy=True))


def _solving(rnn: RNN, runner: Runner, x: Tensor, state: Any) -> Solve:
    """A function that solves for the states as a solver says, and returns its report."""
    parts = state if isinstance(state, tuple) else (state,)
    first = runner.traced.packing.join(parts)
    tensors = [resolve(rnn.cell, name) for name in runner.traced.input_part.names]
    choice = BackendChoice("torch", "")

    def solve(solver: Solver) -> SolveReport:
        tried = Runner(runner.traced, choice, solver, functools.partial(resolve, rnn.cell))
        with torch.no_grad():
            _, _, values, _ = tried.run(tensors, [x], first, None)
        assert values is not None
        return SolveReport(values)

    return solve


def _iterations(
    solve: Solve, method: type[Solver], time: int, tolerance: float
) -> tuple[dict[int, list[float]], dict[int, int]]:
    """Residuals after each iteration, and iterations to a tolerance, by chunk length."""
    residuals, needed = {}, {}
    for chunk in _chunks(time):
        _say(f"diagnose: iterations of chunks of {chunk}")
        with noted_residuals() as found:
            solve(method(tolerance=_SMALLEST, max_iterations=_MOST_ITERATIONS, chunk=chunk))
        residuals[chunk] = [math.inf if math.isnan(r) else r for r in found]
        needed[chunk] = _needed(residuals[chunk], tolerance, -(-time // chunk))
        if not needed[chunk]:
            limit = method(tolerance=tolerance, max_iterations=_MOST_TO_COUNT, chunk=chunk)
            with noted_residuals() as found:
                solve(limit)
            needed[chunk] = _needed(found, tolerance, -(-time // chunk)) or _MOST_TO_COUNT + 1
    return residuals, needed


def _needed(residuals: list[float], tolerance: float, chunks: int) -> int:
    """Iterations until the tolerance, or until every chunk is exact; 0 if these are not enough."""
    for iteration, residual in enumerate(residuals, 1):
        if residual <= tolerance or iteration == chunks:
            return iteration
    return 0


def _iterated(iterations: int) -> str:
    """Iterations to the tolerance, in words."""
    if iterations > _MOST_TO_COUNT:
        return f"more than {_MOST_TO_COUNT} iterations"
    return counted(iterations, "iteration")


def _planned_chunk(plan: Plan, time: int) -> int:
    """Steps of a chunk in calls of the layer."""
    if plan.path in ("loop", "pytorch"):
        return time
    return min(int(plan.forward.solver.chunk), time)


def _worth(
    found: Diagnosis, plan: Plan, chunk: int, method: type[Solver], solve: Solve, growth: Tensor
) -> tuple[bool, str]:
    """Whether chunks pay, and why.

    Args:
        found: What is known so far.
        plan: How calls of the layer are carried out.
        chunk: Steps of a chunk in these calls.
        method: How chunks are coupled where there are some.
        solve: Solves for the states as a solver says.
        growth: See `tangent_growth`.
    """
    way, time = plan.forward, found.steps
    chunks = -(-time // chunk)
    if chunks == 1:
        what = {"kernel": "chunks", "tiles": "chunks", "rows": "method"}.get(plan.path, "path")
        because = next(c.because for c in plan.choices if c.what.startswith(what))
        reason = f"the plan has one chunk ({because})"
        if found.iterations:
            chunk = max(found.iterations)
            needed, first = found.iterations[chunk], min(chunk, COSTS.warm_up)
            steps = _in_a_row(chunk, first, needed, method)
            reason += (
                f"; on a device with processors to spare, chunks of {chunk} would take "
                f"{_iterated(needed)}, {counted(steps, 'step')} one after another "
                f"instead of {time}"
            )
        return False, reason
    fully = replace(
        way.solver, max_iterations=None, tolerance=way.tolerance, on_failure="sequential"
    )
    needed = solve(fully).iterations
    reason = f"the plan's {counted(chunks, 'chunk')} of {chunk} take {counted(needed, 'iteration')}"
    allowed = min(way.solver.max_iterations or chunks, needed)
    steps = _in_a_row(chunk, way.warm_up, allowed, type(way.solver))
    if allowed < needed:
        steps += time
        reason += f" but get {allowed}, after which all goes step by step"
    reason += f": {counted(steps, 'step')} one after another instead of {time}"
    return steps < time, f"{reason}; tangents up to {_most_growth(growth, chunk):.0e}"


def _in_a_row(chunk: int, warm_up: int, iterations: int, method: type[Solver]) -> int:
    """Steps that follow one after another."""
    again = 2 if method.coupling in ("tangent", "diagonal") else 1
    return warm_up + chunk * (1 + again * (iterations - 1))


def _errors(rnn: RNN, x: Tensor, state: Any) -> tuple[float, float]:
    """Largest relative differences from the loop: of outputs, and of gradients."""
    x = x.requires_grad_(x.is_floating_point())
    wanted = [t for t in (x, *rnn.cell.parameters()) if t.requires_grad]
    ours, theirs = rnn(x, state)[0], loop(rnn.cell, x, state)[0]
    generator = torch.Generator(x.device).manual_seed(0)
    cotangent = torch.randn(ours.shape, generator=generator, device=x.device).to(ours)
    gradients = [
        torch.autograd.grad(y, wanted, cotangent, allow_unused=True) if y.requires_grad else ()
        for y in (ours, theirs)  # outputs may depend on nothing: one step of a cell that delays
    ]
    pairs = [(a, e) for a, e in zip(*gradients, strict=False) if a is not None and e is not None]
    return _apart(ours, theirs), max((_apart(a, e) for a, e in pairs), default=0.0)


def _apart(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(_SMALLEST))


def _recommendation(found: Diagnosis, chunks: int, pay: bool) -> str:
    """Advice for the user, in words; calls of the layer have so many chunks, which pay or not."""
    if not found.residuals:
        return "The sequence has one step; nothing can be evaluated in parallel."
    if not math.isfinite(found.lyapunov_exponent + found.value_error):
        return "The states or their derivatives are not finite: look at x and at the loop's states."
    grown = found.lyapunov_exponent * found.steps  # in nats
    most, best = (f(found.iterations, key=found.iterations.__getitem__) for f in (max, min))
    few = found.iterations[most] <= _FEW
    if grown > 1 and not few:
        return (
            "The cell is chaotic: small differences grow, so iterations grow with the length. "
            "Rounding errors grow as well: any two evaluations agree to rounding times "
            "exp(exponent * steps). Sequential() costs no more than the loop. Smaller recurrent "
            "weights would make the cell forget."
        )
    words = "The cell forgets" if grown < -1 else "Small differences keep their size"
    words = "Small differences grow" if grown > 1 else words
    if few:
        but = "but" if grown > 1 else "and"
        advice = ": leave chunk='auto'."
        if chunks > 1 and not pay:
            advice = f", but the plan's {chunks} chunks do not pay here. Pass solver=Sequential()."
        return f"{words}, {but} a few iterations suffice{advice}"
    planned = "one chunk" if chunks == 1 else counted(chunks, "chunk")
    if chunks > 1 and not pay:
        return (
            f"{words}, but chunks of {most} take {_iterated(found.iterations[most])}, and the "
            f"plan's {planned} do not pay here. Pass solver=Sequential()."
        )
    return (
        f"{words}, but chunks of {most} take {_iterated(found.iterations[most])}; "
        f"chunks of {best} take {_iterated(found.iterations[best])}. So do not set shorter chunks "
        f"than the plan's, which has {planned} here."
    )
