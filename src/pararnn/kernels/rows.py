"""The path of chunks as rows of one batch: every cell, and the reference for the kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from pararnn.kernels.fused import runs as runs_in_one_kernel
from pararnn.kernels.graphs import Graphs, is_capturing, run_operations, run_steps
from pararnn.kernels.pointwise import run as run_module
from pararnn.planning.automatic import automatic, coupling, free_rows, prefers_cell
from pararnn.planning.costs import COSTS
from pararnn.planning.settings import Sequential, Solver
from pararnn.solvers import rows as plain
from pararnn.solvers.report import act_on_failure
from pararnn.solvers.rows import WHOLE, Chunks, Sweep, Swept
from pararnn.solvers.shooting import sequential_report
from pararnn.solvers.systems import Backward, Chain, Forward
from pararnn.tracing.products import unfused
from pararnn.tracing.recorder import is_differentiable
from pararnn.tracing.step import Step, arithmetic, in_type

_TF32 = 2.0**-11  # half the spacing at 1


@dataclass(frozen=True)
class Rows:
    """Solves a recurrence with chunks as rows of a batch; see `operators.Path`.

    Attributes:
        step: The step.
        settings: The user's solver; None to choose.
        generated: Whether generated kernels may be used; if not, only PyTorch operations.
        graphs: CUDA graphs of whole calls of small problems.
    """

    step: Step
    settings: Solver | None
    generated: bool
    graphs: Graphs = field(default_factory=Graphs)

    def forward(self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None) -> Forward:
        """The problem, in the type of the arithmetic."""
        batch, time = self.sizes(inputs)
        dtype = arithmetic(t.dtype for t in (*inputs, initial))
        inputs = [in_type(i, dtype) for i in inputs]
        initial = initial.to(dtype)
        run = run_module if self.generated else _run_operations
        return Forward(self.step, inputs, initial, starts, batch, time, run)

    def sizes(self, inputs: Sequence[Tensor]) -> tuple[int, int]:
        """Sequences and steps."""
        batch, time = inputs[self.step.by_rows.index(True)].shape[:2]
        return batch, time

    def state_dtype(self, inputs: Sequence[Tensor], initial: Tensor) -> torch.dtype:
        """The type of stored states: that of the inputs with rows, which are as large."""
        if arithmetic(t.dtype for t in (*inputs, initial)) is torch.float64:
            return torch.float64
        kinds = zip(inputs, self.step.by_rows, strict=True)
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
        return self.step.num_components * self.step.group

    def free_rows(self, device: str) -> float:
        """See `automatic.free_rows`."""
        return free_rows(self.step.work, self.step.launches, device)

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
        steps = [self.step, self.step.adjoint.step][: 1 + with_gradients]
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
        tensors, (batch, time) = [*inputs, initial, *others], self.sizes(inputs)
        device, settings = initial.device, self.chosen(batch, time, initial.device.type)
        step = self.step if direction == "forward" else self.step.adjoint.step
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

    def _solve_chain(
        self, chain: Chain, way: Way, dtype: torch.dtype
    ) -> tuple[list[Tensor], Tensor | None]:
        """Solve a problem whose states are kept in `dtype`; see `Chain.solve`."""
        settings = way.settings
        tolerance = settings.tolerance_for(dtype)
        if settings.tolerance is None and _rounds(chain.initial):
            tolerance = max(tolerance, _TF32)
        give_up = self.settings is None and not way.settle
        return chain.solve(settings, tolerance, self.run_steps, give_up, way.settle)

    def solve(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """See `operators.Path`."""
        dtype, count = self.state_dtype(inputs, initial), len(inputs)

        def run(tensors: Sequence[Any], way: Way) -> list[Tensor]:
            inputs, (initial, starts) = tensors[:count], tensors[count:]
            chain = self.forward(inputs, initial, starts)
            states, report = self._solve_chain(chain, way, dtype)
            if report is None:
                report = sequential_report(chain.batch, initial.device)
            return [*(s.to(dtype) for s in states), report]

        found = self.call("forward", run, inputs, initial, [starts])
        if self.settings is not None:
            act_on_failure(found[-1], self.settings, self.settings.tolerance_for(dtype))
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
            if isinstance(way.settings, Sequential):
                of_initial, gradients = chain.solve_in_pieces(self.run_steps)
            else:
                found, report = self._solve_chain(chain, way, kept_in)
                if self.settings is not None and report is not None:
                    tolerance = self.settings.tolerance_for(kept_in)
                    act_on_failure(report, self.settings, tolerance, backwards=True)
                of_initial, gradients = chain.initial_gradient(found), chain.gradients(found)
            shaped = [
                g.reshape(inputs[i].shape).to(inputs[i].dtype)
                for i, g in zip(self.step.differentiable, gradients, strict=True)
            ]
            return [*shaped, of_initial.to(initial.dtype)]

        others = [starts, *states, *grad_states]
        return self.call("backward", run, inputs, initial, others)

    def loop(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """See `operators.Path`."""
        chain = self.forward(inputs, initial, starts)
        module = unfused(self.step.module)  # no transform knows the others
        step = replace(self.step, build=lambda: module)
        states, _ = replace(chain, step=step).solve(Sequential(), 0.0, plain.run_steps)
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
