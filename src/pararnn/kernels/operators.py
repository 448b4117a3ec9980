"""`torch.library` operators of elementwise cells: one call for autograd and torch.compile."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pararnn.kernels.c.backend import CBackend
from pararnn.kernels.direct import Operator
from pararnn.kernels.registry import Name, Registry, read_solver, write, write_solver
from pararnn.kernels.triton.backend import TritonBackend
from pararnn.planning.settings import Solver
from pararnn.solvers.problem import Backend, Problem
from pararnn.solvers.report import act_on_failure
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.modes import without_autocast
from pararnn.tracing.structure import Layout
from pararnn.tracing.written import read_recurrence, write_recurrence

BACKENDS: dict[str, Callable[[Recurrence], Backend]] = {
    "c": CBackend,
    "triton": TritonBackend,
}
_backends: weakref.WeakValueDictionary[tuple[str, str], Backend] = weakref.WeakValueDictionary()
_lock = threading.Lock()


@dataclass(frozen=True)
class Plan:
    """How an elementwise recurrence is evaluated.

    Attributes:
        backend: The backend.
        layout: Positions of drives and coefficients in their sources.
        settings: Settings of the solve.
    """

    backend: Backend
    layout: Layout
    settings: Solver

    def text(self) -> str:
        """The plan as text, for another process."""
        return write(
            recurrence=write_recurrence(self.backend.recurrence),
            drives=self.layout.drives,
            coefficients=self.layout.coefficients,
            backend=self.backend.name,
            solver=write_solver(self.settings),
        )


def plan(recurrence: Recurrence, layout: Layout, backend: str, settings: Solver) -> Name:
    """Register how to evaluate a recurrence; equal requests give the same name."""
    key = hashlib.sha256(recurrence.key.encode()).hexdigest()[:16]
    _ = recurrence.vjp  # derived here: autograd does not work inside an operator
    rest = hashlib.sha256(repr((layout, settings)).encode()).hexdigest()[:8]

    def make() -> Plan:
        made = _backends.get((key, backend))
        if made is None:
            made = _backends[key, backend] = BACKENDS[backend](recurrence)
        return Plan(made, layout, settings)

    with _lock:
        return _plans.add(f"{key}-{backend}-{rest}", make)


def plan_of(name: str) -> Plan:
    """A plan by its name or text."""
    return _plans[name]


def _read(content: dict[str, Any]) -> Plan:
    """The plan that `Plan.text` wrote."""
    recurrence = read_recurrence(content["recurrence"])
    places = [
        tuple((int(source), int(slot)) for source, slot in content[kind])
        for kind in ("drives", "coefficients")
    ]
    if [len(p) for p in places] != [recurrence.num_drives, recurrence.num_coefficients]:
        raise ValueError("drives and coefficients are others than those of the recurrence")
    if min((n for p in places for place in p for n in place), default=0) < 0:
        raise ValueError("a drive or coefficient is nowhere")
    settings = read_solver(content["solver"])
    if settings is None or content["backend"] not in BACKENDS:
        raise ValueError("there is no backend or solver")
    found: Plan = plan(recurrence, Layout(*places), content["backend"], settings).plan
    return found


_plans = Registry(_read)


def backend_of(name: str) -> Backend:
    """The backend of a registered plan."""
    return _plans[name].backend


_library = torch.library.Library("pararnn", "DEF")
_library.define(
    "recurrence(Tensor[] drives, Tensor[] coefficients, Tensor initial, Tensor? starts, str plan)"
    " -> Tensor[]"
)
_library.define(
    "recurrence_backward(Tensor[] drives, Tensor[] coefficients, Tensor initial, Tensor? starts, "
    "Tensor[] states, Tensor?[] grad_states, str plan) -> Tensor[]"
)
# In both, `drives` are the sources (batch, time, slots, heads, head_size) and `coefficients` the
# sources (slots, hidden) that the plan's layout refers to; results are the states and the report,
# and the gradients of the sources and of `initial`.


def _problem(
    drives: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    name: str,
) -> Problem:
    """The tensors as a `Problem` for backends."""
    chosen = plan_of(name)
    backend, layout = chosen.backend, chosen.layout
    return Problem(
        backend.recurrence,
        _drives(backend, layout, drives),
        layout.coefficients_of(coefficients),
        initial,
        starts,
        drives[0].shape[1],
    )


def _drives(backend: Backend, layout: Layout, sources: Sequence[Tensor]) -> list[Tensor]:
    return layout.drives_of(sources if backend.takes_heads else [s.flatten(3) for s in sources])


def flat_problem(
    drives: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    name: str,
) -> Problem:
    """The problem in the type of the arithmetic, with all drives (batch, time, hidden)."""
    problem = _problem(drives, coefficients, initial, starts, name)
    return replace(problem, drives=[d.flatten(2) for d in problem.drives]).converted()


def step_by_step(
    drives: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    name: str,
) -> list[Tensor]:
    """The states by PyTorch operations, which support all derivatives."""
    kept_in = _problem(drives, coefficients, initial, starts, name).state_dtype
    with without_autocast(initial.device.type):
        problem = flat_problem(drives, coefficients, initial, starts, name)
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


def gradients_of_loop(
    loop: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients of a loop's inputs, with a graph for second derivatives."""
    # views, so that a tensor given twice has two gradients
    own = [None if i is None else i.view_as(i) for i in inputs]
    pairs = zip(loop(*own), grads, strict=True)
    states, given = zip(*((s, g) for s, g in pairs if g is not None), strict=True)
    wanted = [i for i in own if i is not None and i.requires_grad]
    found = torch.autograd.grad(states, wanted, given, create_graph=True, allow_unused=True)
    remaining = iter(found)
    return [next(remaining) if i is not None and i.requires_grad else None for i in own]


def refuse_tangents() -> None:
    """Refuse forward-mode tangents, which an operator would drop."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "pararnn: forward-mode derivatives (torch.func.jvp, jacfwd, forward_ad) do not pass "
            "through an exported or compiled layer; call the layer itself."
        )


def _recurrence(
    drives: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    plan: str,
) -> list[Tensor]:
    refuse_tangents()
    return solve(drives, coefficients, initial, starts, plan)


def _recurrence_backward(
    drives: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    states: Sequence[Tensor],
    grad_states: Sequence[Tensor | None],
    plan: str,
) -> list[Tensor]:
    refuse_tangents()
    return solve_adjoint(drives, coefficients, initial, starts, states, grad_states, plan)


def solve(
    drives: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    name: str,
) -> list[Tensor]:
    """The implementation of `pararnn::recurrence`."""
    chosen = plan_of(name)
    backend, settings = chosen.backend, chosen.settings
    if drives[0].shape[0] == 0:
        return _fake_recurrence(drives, coefficients, initial, starts, name)
    with without_autocast(initial.device.type):
        problem = _problem(drives, coefficients, initial, starts, name)
        states, report = backend.solve(problem, settings)
        act_on_failure(report, settings, settings.tolerance_for(problem.state_dtype))
    return [*states, report]


def solve_adjoint(
    drives: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    states: Sequence[Tensor],
    grad_states: Sequence[Tensor | None],
    name: str,
) -> list[Tensor]:
    """The implementation of `pararnn::recurrence_backward`."""
    chosen = plan_of(name)
    backend, layout, settings = chosen.backend, chosen.layout, chosen.settings
    if drives[0].shape[0] == 0:
        return [torch.zeros_like(t) for t in (*drives, *coefficients, initial)]
    with without_autocast(initial.device.type):
        problem = _problem(drives, coefficients, initial, starts, name)
        grad_drives = [_for_slots(backend, d, i, layout.drives) for i, d in enumerate(drives)]
        targets = _drives(backend, layout, grad_drives)
        sums, grad_initial = backend.solve_adjoint(problem, settings, states, grad_states, targets)
        grad_weights = [
            _to_slots(sums, c, i, layout.coefficients) for i, c in enumerate(coefficients)
        ]
    return [*grad_drives, *grad_weights, grad_initial.to(initial.dtype)]


def _for_slots(
    backend: Backend, source: Tensor, index: int, places: Sequence[tuple[int, int]]
) -> Tensor:
    """Memory for the gradient of a source of drives: zeros if some slots are not used."""
    used = {slot for i, slot in places if i == index}
    make = torch.empty_like if len(used) == source.shape[2] else torch.zeros_like
    apart = backend.takes_heads
    return make(source, memory_format=torch.preserve_format if apart else torch.contiguous_format)


def _to_slots(
    sums: Tensor, source: Tensor, index: int, places: Sequence[tuple[int, int]]
) -> Tensor:
    """The gradient of a source of coefficients, from those of the coefficients."""
    of = {slot: n for n, (i, slot) in enumerate(places) if i == index}
    first, slots = next(iter(of.values())), source.shape[0]
    if of == {slot: first + slot for slot in range(slots)}:
        return sums[first : first + slots].to(source.dtype)
    gradient = source.new_zeros(source.shape)
    for slot, n in of.items():
        gradient[slot] = sums[n]
    return gradient


def _fake_recurrence(
    drives: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    plan: str,
) -> list[Tensor]:
    problem = _problem(drives, coefficients, initial, starts, plan)
    shape = (problem.batch, problem.time, problem.hidden)
    states = [
        drives[0].new_empty(shape, dtype=problem.state_dtype) for _ in range(initial.shape[1])
    ]
    parts = plan_of(plan).backend.parts(problem)
    return [*states, initial.new_empty((parts, 4), dtype=torch.float64)]


def _fake_backward(
    drives: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    states: Sequence[Tensor],
    grad_states: Sequence[Tensor | None],
    plan: str,
) -> list[Tensor]:
    backend, layout = plan_of(plan).backend, plan_of(plan).layout
    grad_drives = [_for_slots(backend, d, i, layout.drives) for i, d in enumerate(drives)]
    return [*grad_drives, *(t.new_empty(t.shape) for t in (*coefficients, initial))]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    drives, coefficients, initial, starts, name = inputs
    ctx.counts = (len(drives), len(coefficients))
    ctx.plan, ctx.kept = name, plan_of(name)  # the plan may outlive its layer
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*drives, *coefficients, initial, starts, *output[:-1])


def _backward(ctx: Any, grads: list[Tensor | None]) -> Any:
    num_drives, num_coefficients = ctx.counts
    saved = list(ctx.saved_tensors)
    drives, saved = saved[:num_drives], saved[num_drives:]
    coefficients, saved = saved[:num_coefficients], saved[num_coefficients:]
    initial, starts, *states = saved
    if torch.is_grad_enabled():  # create_graph=True: the gradients need gradients
        return _differentiable_backward(ctx, drives, coefficients, initial, starts, grads[:-1])
    found = recurrence_backward(
        drives, coefficients, initial, starts, states, list(grads[:-1]), ctx.plan
    )
    split = num_drives + num_coefficients
    return found[:num_drives], found[num_drives:split], found[split], None, None


def _differentiable_backward(
    ctx: Any,
    drives: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    grads: Sequence[Tensor | None],
) -> Any:
    count = len(drives)

    def loop(initial: Tensor, *sources: Tensor) -> list[Tensor]:
        return step_by_step(sources[:count], sources[count:], initial, starts, ctx.plan)

    of_initial, *found = gradients_of_loop(loop, [initial, *drives, *coefficients], grads)
    return found[:count], found[count:], of_initial, None, None


def no_second_derivative(ctx: Any, grads: Any) -> Any:
    """The backward of a backward."""
    raise RuntimeError(
        "pararnn: the gradient of a gradient is not available in a compiled or exported program; "
        "call the layer outside of it, or step through the cell in a loop of your own."
    )


recurrence = Operator("recurrence", _recurrence, _backward, _setup)
recurrence.register(_library, _fake_recurrence)
recurrence_backward = Operator("recurrence_backward", _recurrence_backward, no_second_derivative)
recurrence_backward.register(_library, _fake_backward)
