"""The path of chunks as rows of one batch: every cell, and the reference for the kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from pararnn.kernels import fused
from pararnn.kernels.c.mixing import CSweep
from pararnn.kernels.facts import Planner
from pararnn.kernels.graphs import Graphs, run_operations, run_steps
from pararnn.kernels.pointwise import run as run_module
from pararnn.planning.plan import BackendChoice, BackendError, Facts, Plan, Way
from pararnn.planning.settings import Sequential
from pararnn.solvers import chunks as plain
from pararnn.solvers.chunks import Cut, Run
from pararnn.solvers.report import act_on_failure
from pararnn.solvers.shooting import sequential_report
from pararnn.solvers.systems import Backward, Forward
from pararnn.tracing.products import unfused
from pararnn.tracing.recorder import is_differentiable
from pararnn.tracing.step import Step, arithmetic, in_type


@dataclass(frozen=True)
class Rows:
    """Solves a recurrence with chunks as rows of a batch; see `operators.Path`.

    Attributes:
        step: The step.
        planner: Plans of calls.
        graphs: CUDA graphs of solves of small problems.
    """

    step: Step
    planner: Planner
    graphs: Graphs = field(default_factory=Graphs)

    def forward(self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None) -> Forward:
        """The problem, in the type of the arithmetic."""
        batch, time = self.sizes(inputs)
        dtype = arithmetic(t.dtype for t in (*inputs, initial))
        inputs = [in_type(i, dtype) for i in inputs]
        initial = initial.to(dtype)
        run = run_module if self.planner.backend.generated else _run_operations
        return Forward(self.step, inputs, initial, starts, batch, time, run)

    def sizes(self, inputs: Sequence[Tensor]) -> tuple[int, int]:
        """Sequences and steps."""
        batch, time = inputs[self.step.by_rows.index(True)].shape[:2]
        return batch, time

    def kinds(self, inputs: Sequence[Tensor], initial: Tensor) -> tuple[torch.dtype, int]:
        """See `operators.Path`."""
        kept_in = self.state_dtype(inputs, initial)
        return kept_in, kept_in.itemsize

    def state_dtype(self, inputs: Sequence[Tensor], initial: Tensor) -> torch.dtype:
        """The type of stored states: that of the inputs with rows, which are as large."""
        if arithmetic(t.dtype for t in (*inputs, initial)) is torch.float64:
            return torch.float64
        kinds = zip(inputs, self.step.by_rows, strict=True)
        moving = [e.dtype.to_real() for e, r in kinds if r and is_differentiable(e.dtype)]
        return functools.reduce(torch.promote_types, moving or [initial.dtype])

    def _run(self, way: Way) -> Run:
        """What runs the steps of sweeps."""
        if way.steps == "kernel" and self.planner.backend.name == "c":
            return fused.run_in_c
        if way.settle:  # all in one kernel, or none
            return fused.run_steps
        return run_steps if way.steps == "kernel" else run_operations

    def call(
        self,
        direction: str,
        run: Callable[[Sequence[Any], Way], list[Tensor]],
        inputs: Sequence[Tensor],
        initial: Tensor,
        others: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """Call `run([*inputs, initial, *others], way)` in the way that suits the problem.

        Args:
            direction: "forward" or "backward".
            run: Solves the problem.
            inputs: Of the step.
            initial: Initial states.
            others: Further tensors that it reads.
        """
        tensors, sizes = [*inputs, initial, *others], (*self.sizes(inputs), initial.shape[2])
        plan = self.planner.plan(initial.device, *sizes, *self.kinds(inputs, initial))
        backward = direction == "backward"
        way = plan.adjoint if backward else plan.forward
        try:
            if way.in_graph:
                return self.graphs.call((direction, way), lambda own: run(own, way), tensors)
            return run(tensors, way)
        except fused.NotFused as error:  # of tensors laid out as none that the step was traced with
            backend = self.planner.backend
            if backend.name == "c" and not backend.automatic:
                raise BackendError(f"backend='c' cannot run here: {error}") from error
            planner = self.planner.without_kernel(backward, str(error))
        return replace(self, planner=planner).call(direction, run, inputs, initial, others)

    def solve(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """See `operators.Path`."""
        dtype, count = self.state_dtype(inputs, initial), len(inputs)

        def run(tensors: Sequence[Any], way: Way) -> list[Tensor]:
            inputs, (initial, starts) = tensors[:count], tensors[count:]
            chain = self.forward(inputs, initial, starts)
            states, report = chain.solve(way, self._run(way))
            if report is None:
                report = sequential_report(chain.batch, initial.device)
            return [*(s.to(dtype) for s in states), report]

        found = self.call("forward", run, inputs, initial, [starts])
        solver = self.planner.solver
        if solver is not None:
            act_on_failure(found[-1], solver, solver.tolerance_for(dtype))
        return found

    def adjoint(
        self,
        inputs: Sequence[Tensor],
        initial: Tensor,
        starts: Tensor | None,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """See `operators.Path`."""
        kept_in, components, count = self.state_dtype(inputs, initial), len(states), len(inputs)

        def run(tensors: Sequence[Any], way: Way) -> list[Tensor]:
            inputs, (initial, starts) = tensors[:count], tensors[count : count + 2]
            states, grad_states = tensors[count + 2 :][:components], tensors[-components:]
            forward = self.forward(inputs, initial, starts)
            dtype = forward.initial.dtype
            before = forward.before([s.to(dtype) for s in states])
            grads = [
                b.new_zeros(1, 1, 1).expand_as(b) if g is None else g.to(dtype)
                for b, g in zip(before, grad_states, strict=True)
            ]
            fields = {f.name: getattr(forward, f.name) for f in dataclasses.fields(forward)}
            chain = Backward(**fields, before=before, grad_states=grads)
            if isinstance(way.solver, Sequential):
                of_initial, gradients = chain.solve_in_pieces(way, self._run(way))
            else:
                found, report = chain.solve(way, self._run(way))
                solver = self.planner.solver
                if solver is not None and report is not None:
                    tolerance = solver.tolerance_for(kept_in)
                    act_on_failure(report, solver, tolerance, backwards=True)
                of_initial, gradients = chain.initial_gradient(found), chain.gradients(found)
            shaped = [
                g.reshape(inputs[i].shape).to(inputs[i].dtype)
                for i, g in zip(self.step.differentiable, gradients, strict=True)
            ]
            return [*shaped, of_initial.to(initial.dtype)]

        others = [starts, *states, *grad_states]
        return self.call("backward", run, inputs, initial, others)

    def generated(self, plan: Plan) -> tuple[str, float]:
        """What was generated for steps that run in kernels, forwards and of the adjoint.

        And the seconds that compiling C took.
        """
        if plan.path != "rows":
            return "", 0.0
        both = (plan.forward, self.step), (plan.adjoint, self.step.adjoint.step)
        backend = self.planner.backend.name
        found = [fused.kernel_of(step, backend) for way, step in both if way.steps == "kernel"]
        source = "\n\n".join(kernel.source for kernel in found if kernel)
        return source, sum(k.compile_s for k in found if isinstance(k, CSweep))

    def loop(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """See `operators.Path`."""
        chain = self.forward(inputs, initial, starts)
        module = unfused(self.step.module)  # no transform knows the others
        step = replace(self.step, build=lambda: module)
        states, _ = replace(chain, step=step).solve(Way(Sequential(), 0.0), plain.run_steps)
        return [s.to(self.state_dtype(inputs, initial)) for s in states]

    def like_states(self, inputs: Sequence[Tensor], initial: Tensor) -> list[Tensor]:
        """See `operators.Path`."""
        dtype, (batch, time) = self.state_dtype(inputs, initial), self.sizes(inputs)
        shape = (batch, time, initial.shape[2])
        states = [initial.new_empty(shape, dtype=dtype) for _ in range(initial.shape[1])]
        return [*states, initial.new_empty((batch, 4), dtype=torch.float64)]

    def like_gradients(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """See `operators.Path`."""
        return [inputs[i].new_empty(inputs[i].shape) for i in self.step.differentiable]


def _run_operations(module: fx.GraphModule, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    found: Sequence[Tensor] = module(*(t.contiguous() for t in tensors))
    return found


def kernels_of(
    backend: str, step: Step, inputs: Sequence[Tensor], initial: Tensor
) -> dict[str, Any]:
    """Facts of kernels for all steps: `kernels`, `streams` and `few` of `planning.plan.Facts`.

    Args:
        backend: "c" or "triton".
        step: The step.
        inputs: An example, with rows (batch, time, ...).
        initial: Initial states.
    """
    operations = BackendChoice("torch", "", generated=False)  # an example needs no kernels
    rows = Rows(step, Planner(Facts(), operations, None))
    chain = rows.forward(inputs, initial, None)
    cut, state = Cut(chain.batch, chain.time, chain.time), chain.initial.unbind(1)
    before = [s.unsqueeze(1).expand(-1, chain.time, -1).contiguous() for s in state]
    both = chain.chunks(cut), chain.linear(cut, before)
    forward, backward = (fused.reason(chunks, state, backend) for chunks in both)
    return {
        "kernels": (forward, backward),
        "streams": any(fused.streams(chunks, state, backend) for chunks in both),
        "few": min(fused.few_rows(chunks, state, backend) for chunks in both),
    }
