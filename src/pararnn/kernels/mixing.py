"""`torch.library` operators of cells whose channels mix; `operators` has those of the others."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from pararnn.kernels.direct import Operator
from pararnn.kernels.fused import runs as runs_in_one_kernel
from pararnn.kernels.graphs import Graphs, is_capturing, run_operations, run_steps
from pararnn.kernels.operators import gradients_of_loop, no_second_derivative, refuse_tangents
from pararnn.kernels.pointwise import run as run_module
from pararnn.kernels.registry import Name, Registry, read_solver, write, write_solver
from pararnn.planning.automatic import automatic, coupling, free_rows, prefers_cell
from pararnn.planning.costs import COSTS
from pararnn.planning.settings import Sequential, Solver
from pararnn.solvers import rows as plain
from pararnn.solvers.report import act_on_failure
from pararnn.solvers.rows import WHOLE, Chunks, Sweep, Swept
from pararnn.solvers.systems import Backward, Chain, Forward
from pararnn.tracing.mixing import Mixing, Step, arithmetic, in_type
from pararnn.tracing.modes import without_autocast
from pararnn.tracing.products import unfused
from pararnn.tracing.recorder import is_differentiable
from pararnn.tracing.written import read_mixing, write_mixing

_TF32 = 2.0**-11  # half the spacing at 1


@dataclass(frozen=True)
class Plan:
    """How to evaluate a recurrence.

    Attributes:
        mixing: The recurrence.
        group: Channels that mix with each other.
        settings: The user's solver; None to choose.
        generated: Whether generated kernels may be used; if not, only PyTorch operations.
        graphs: CUDA graphs of whole calls of small problems.
    """

    mixing: Mixing
    group: int
    settings: Solver | None
    generated: bool
    graphs: Graphs = field(default_factory=Graphs)

    def text(self) -> str:
        """The plan as text, for another process."""
        return write(
            mixing=write_mixing(self.mixing),
            group=self.group,
            solver=write_solver(self.settings),
            generated=self.generated,
        )

    def forward(
        self,
        edges: Sequence[Tensor],
        initial: Tensor,
        starts: Tensor | None,
        batch: int,
        time: int,
    ) -> Forward:
        """The problem, in the type of the arithmetic."""
        dtype = arithmetic(t.dtype for t in (*edges, initial))
        edges = [in_type(e, dtype) for e in edges]
        initial = initial.to(dtype)
        run = run_module if self.generated else _run_operations
        return Forward(self.mixing, self.group, edges, initial, starts, batch, time, run)

    def state_dtype(self, edges: Sequence[Tensor], initial: Tensor) -> torch.dtype:
        """The type of stored states: that of the edges with rows, which are as large."""
        if arithmetic(t.dtype for t in (*edges, initial)) is torch.float64:
            return torch.float64
        kinds = zip(edges, self.mixing.step.by_rows, strict=True)
        moving = [e.dtype.to_real() for e, r in kinds if r and is_differentiable(e.dtype)]
        return functools.reduce(torch.promote_types, moving or [initial.dtype])

    def chosen(self, batch: int, time: int, device: str) -> Solver:
        """The user's settings; what the user left open, all or the chunks, is chosen here."""
        if self.settings is not None and self.settings.chunk != "auto":
            return self.settings
        found = automatic(self.entries, self.free_rows(device), batch, time)
        if self.settings is None:
            return found
        return replace(self.settings, chunk=found.chunk)

    def prefers_cell(self, batch: int, time: int, device: str, one_call: bool) -> bool:
        """Whether a loop over the cell itself is faster; see `automatic.prefers_cell`."""
        if self.settings is not None:
            return False
        return prefers_cell(self.entries, self.free_rows(device), batch, time, device, one_call)

    @property
    def entries(self) -> int:
        """All components of the channels of one group."""
        return self.mixing.num_components * self.group

    def free_rows(self, device: str) -> float:
        """See `automatic.free_rows`."""
        return free_rows(self.mixing.work, self.mixing.launches, device)

    def describe(self) -> str:
        """The solver, in words."""
        if self.settings is not None:
            return repr(self.settings)
        return (
            f"{coupling(self.entries).__name__}, with chunks chosen for every shape, or step by "
            "step where they do not pay"
        )

    def settles(self, initial: Tensor, with_gradients: bool) -> bool:
        """Whether calls need no host sync, see `Way.settle`."""
        steps = [self.mixing.step, self.mixing.adjoint.step][: 1 + with_gradients]
        return self.settings is None and all(self._is_fast(step, initial) for step in steps)

    def _is_fast(self, step: Step, initial: Tensor) -> bool:
        return self.generated and _is_fast(step, initial)

    def run_steps(self, chunks: Chunks, state: Sequence[Tensor], sweep: Sweep = WHOLE) -> Swept:
        """See `pararnn.solvers.rows.Run`."""
        return (run_steps if self.generated else run_operations)(chunks, state, sweep)

    def call(
        self,
        direction: str,
        run: Callable[[Sequence[Any], Way], list[Tensor]],
        edges: Sequence[Tensor],
        initial: Tensor,
        others: Sequence[Tensor | None],
        batch: int,
        time: int,
    ) -> list[Tensor]:
        """Call `run([*edges, initial, *others], way)` in the way that suits the problem.

        Args:
            direction: "forward" or "backward".
            run: Solves the problem.
            edges: Of the recurrence.
            initial: Initial states.
            others: Further tensors that it reads.
            batch: Sequences.
            time: Steps.
        """
        tensors = [*edges, initial, *others]
        device, settings = initial.device, self.chosen(batch, time, initial.device.type)
        step = self.mixing.step if direction == "forward" else self.mixing.adjoint.step
        if self.settings is not None or isinstance(settings, Sequential):
            return run(tensors, Way(Sequential() if is_capturing(device) else settings))
        if not self._is_fast(step, initial):
            found = run(tensors, Way(Sequential() if is_capturing(device) else settings))
            if not self._is_fast(step, initial):
                return found
        # `run` above may have shown that it is fast: the first call then continues like later ones
        way = Way(replace(settings, max_iterations=1), settle=True)
        if batch * time * initial[0].numel() > COSTS.graph_elements or is_capturing(device):
            return run(tensors, way)
        return self.graphs.call((direction, way), lambda own: run(own, way), tensors)

    def solve(self, chain: Chain, way: Way, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """Solve a problem whose states are kept in `dtype`; see `Chain.solve`."""
        settings = way.settings
        tolerance = settings.tolerance_for(dtype)
        if settings.tolerance is None and _rounds(chain.initial):
            tolerance = max(tolerance, _TF32)
        give_up = self.settings is None and not way.settle
        return chain.solve(settings, tolerance, self.run_steps, give_up, way.settle)


@dataclass(frozen=True)
class Way:
    """How one problem is solved.

    Attributes:
        settings: The settings in force.
        settle: Sweep once; one more kernel then runs the sequences that did not converge step by
            step. The device decides which, so there is no host sync.
    """

    settings: Solver
    settle: bool = False


def _is_fast(step: Step, initial: Tensor) -> bool:
    """Whether steps run in one kernel: then rerunning a sequence costs less than a host sync."""
    double = initial.dtype is torch.float64
    dtype = torch.float64 if double else torch.float32
    on_gpu = initial.device.type == "cuda"
    return on_gpu and runs_in_one_kernel(step.module, initial.shape[-1], dtype)


def _rounds(x: Tensor) -> bool:
    """Whether matrix products round their factors (TF32): sweeps then agree to that only."""
    single = x.dtype is torch.float32 and x.device.type == "cuda"
    return single and torch.get_float32_matmul_precision() != "highest"


def _run_operations(module: fx.GraphModule, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    found: Sequence[Tensor] = module(*(t.contiguous() for t in tensors))
    return found


def plan(mixing: Mixing, group: int, settings: Solver | None, generated: bool = True) -> Name:
    """Register how to evaluate a recurrence; equal requests give the same name."""
    _ = mixing.adjoint  # recorded here: autograd does not work inside an operator
    text = f"{mixing.key} {mixing.device} {group} {settings!r} {generated}"
    name = f"mixing-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    return _plans.add(name, lambda: Plan(mixing, group, settings, generated))


def plan_of(name: str) -> Plan:
    """A plan by its name or text."""
    return _plans[name]


def _read(content: dict[str, Any]) -> Plan:
    """The plan that `Plan.text` wrote."""
    mixing, group = read_mixing(content["mixing"]), int(content["group"])
    if group < 1 or mixing.hidden % group:
        raise ValueError(f"{mixing.hidden} channels are no groups of {group}")
    generated = bool(content["generated"])
    found: Plan = plan(mixing, group, read_solver(content["solver"]), generated).plan
    return found


_plans = Registry(_read)


_library = torch.library.Library("pararnn", "FRAGMENT")
_library.define(
    "mixing(Tensor[] edges, Tensor initial, Tensor? starts, SymInt batch, SymInt time, str plan) "
    "-> Tensor[]"
)
_library.define(
    "mixing_backward(Tensor[] edges, Tensor initial, Tensor? starts, SymInt batch, SymInt time, "
    "Tensor[] states, Tensor?[] grad_states, str plan) -> Tensor[]"
)
# `edges` with rows are (batch, time, ...); results are the states and the report, and the gradients
# of the differentiable edges and of `initial`.


def step_by_step(
    edges: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    batch: int,
    time: int,
    plan: str,
) -> list[Tensor]:
    """The states by PyTorch operations, which support all derivatives."""
    chosen = plan_of(plan)
    with without_autocast(initial.device.type):
        chain = chosen.forward(edges, initial, starts, batch, time)
        own = chain.mixing.step  # whose fused cells no transform knows
        step = replace(own, module=unfused(own.module))
        chain = replace(chain, mixing=replace(chain.mixing, step=step))
        states, _ = chain.solve(Sequential(), 0.0, plain.run_steps)
    return [s.to(chosen.state_dtype(edges, initial)) for s in states]


def _mixing(
    edges: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    batch: int,
    time: int,
    plan: str,
) -> list[Tensor]:
    refuse_tangents()
    chosen, count = plan_of(plan), len(edges)
    if batch == 0:
        return _fake_mixing(edges, initial, starts, batch, time, plan)
    dtype = chosen.state_dtype(edges, initial)

    def run(tensors: Sequence[Any], way: Way) -> list[Tensor]:
        edges, (initial, starts) = tensors[:count], tensors[count:]
        with without_autocast(initial.device.type):
            chain = chosen.forward(edges, initial, starts, batch, time)
            states, report = chosen.solve(chain, way, dtype)
        return [*(s.to(dtype) for s in states), report]

    found = chosen.call("forward", run, edges, initial, [starts], batch, time)
    if chosen.settings is not None:
        act_on_failure(found[-1], chosen.settings, chosen.settings.tolerance_for(dtype))
    return found


def _mixing_backward(
    edges: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    batch: int,
    time: int,
    states: Sequence[Tensor],
    grad_states: Sequence[Tensor | None],
    plan: str,
) -> list[Tensor]:
    refuse_tangents()
    chosen, mixing, count = plan_of(plan), plan_of(plan).mixing, len(edges)
    if batch == 0:
        return [torch.zeros_like(t) for t in (*(edges[i] for i in mixing.differentiable), initial)]
    kept_in, components = chosen.state_dtype(edges, initial), len(states)

    def run(tensors: Sequence[Any], way: Way) -> list[Tensor]:
        edges, (initial, starts) = tensors[:count], tensors[count : count + 2]
        states, grad_states = tensors[count + 2 :][:components], tensors[-components:]
        with without_autocast(initial.device.type):
            forward = chosen.forward(edges, initial, starts, batch, time)
            dtype = forward.initial.dtype
            before = forward.before([s.to(dtype) for s in states])
            grads = [
                b.new_zeros(1, 1, 1).expand_as(b) if g is None else g.to(dtype)
                for b, g in zip(before, grad_states, strict=True)
            ]
            fields = {f.name: getattr(forward, f.name) for f in dataclasses.fields(forward)}
            chain = Backward(**fields, before=before, grad_states=grads)
            if isinstance(way.settings, Sequential):
                of_initial, gradients = chain.solve_in_pieces(chosen.run_steps)
            else:
                found, report = chosen.solve(chain, way, kept_in)
                if chosen.settings is not None:
                    tolerance = chosen.settings.tolerance_for(kept_in)
                    act_on_failure(report, chosen.settings, tolerance, backwards=True)
                of_initial, gradients = chain.initial_gradient(found), chain.gradients(found)
            shaped = [
                g.reshape(edges[i].shape).to(edges[i].dtype)
                for i, g in zip(mixing.differentiable, gradients, strict=True)
            ]
            return [*shaped, of_initial.to(initial.dtype)]

    others = [starts, *states, *grad_states]
    return chosen.call("backward", run, edges, initial, others, batch, time)


def _fake_mixing(
    edges: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    batch: int,
    time: int,
    plan: str,
) -> list[Tensor]:
    dtype = plan_of(plan).state_dtype(edges, initial)
    shape = (batch, time, initial.shape[2])
    states = [initial.new_empty(shape, dtype=dtype) for _ in range(initial.shape[1])]
    return [*states, initial.new_empty((batch, 4), dtype=torch.float64)]


def _fake_backward(
    edges: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    batch: int,
    time: int,
    states: Sequence[Tensor],
    grad_states: Sequence[Tensor | None],
    plan: str,
) -> list[Tensor]:
    wanted = [edges[i] for i in plan_of(plan).mixing.differentiable]
    return [t.new_empty(t.shape) for t in (*wanted, initial)]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    edges, initial, starts, ctx.batch, ctx.time, ctx.plan = inputs
    ctx.kept = plan_of(ctx.plan)  # the plan may outlive its layer
    ctx.count = len(edges)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*edges, initial, starts, *output[:-1])


def _backward(ctx: Any, grads: list[Tensor | None]) -> Any:
    saved = ctx.saved_tensors  # read once: checkpointing recomputes them at every access
    edges, (initial, starts, *states) = saved[: ctx.count], saved[ctx.count :]
    if torch.is_grad_enabled():  # create_graph=True: the gradients need gradients
        given = (starts, ctx.batch, ctx.time, ctx.plan)
        loop = lambda initial, *edges: step_by_step(edges, initial, *given)  # noqa: E731
        of_initial, *of_edges = gradients_of_loop(loop, [initial, *edges], grads[:-1])
        return of_edges, of_initial, None, None, None, None
    *found, initial_gradient = recurrence_backward(
        edges, initial, starts, ctx.batch, ctx.time, states, list(grads[:-1]), ctx.plan
    )
    gradients: list[Tensor | None] = [None] * ctx.count
    for i, gradient in zip(plan_of(ctx.plan).mixing.differentiable, found, strict=True):
        gradients[i] = gradient
    return gradients, initial_gradient, None, None, None, None


recurrence = Operator("mixing", _mixing, _backward, _setup)
recurrence.register(_library, _fake_mixing)
recurrence_backward = Operator("mixing_backward", _mixing_backward, no_second_derivative)
recurrence_backward.register(_library, _fake_backward)
