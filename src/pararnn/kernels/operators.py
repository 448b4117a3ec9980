"""The pair of `torch.library` operators of all cells: one call for autograd and torch.compile.

`pararnn::solve` returns the states at all times and the values of the report. `pararnn::adjoint`
returns the gradients of the inputs that have one, and of the initial states.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pararnn.kernels.channels import Channels
from pararnn.kernels.direct import Operator
from pararnn.kernels.facts import Planner, all_facts, facts_of
from pararnn.kernels.registry import Name, Registry, read_solver, write, write_solver
from pararnn.kernels.rows import Rows
from pararnn.kernels.tiled import Tiled, sizes_of, tiles_of
from pararnn.planning.plan import BACKENDS, BackendChoice, Facts, by_channels, by_tiles
from pararnn.planning.settings import Solver
from pararnn.tracing.modes import without_autocast
from pararnn.tracing.step import Step
from pararnn.tracing.traced import Readout
from pararnn.tracing.written import read_readout, read_step, write_readout, write_step


class Path(Protocol):
    """A way to carry out a step over time.

    In all methods `inputs` are those of the step, with rows (batch, time, ...); `initial` and
    `starts` as in `Problem`.
    """

    def kinds(self, inputs: Sequence[Tensor], initial: Tensor) -> tuple[torch.dtype, int]:
        """The type of the states that are stored, and bytes of an element of a drive."""
        ...

    def solve(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """The states, one (batch, time, hidden) per component, and the values of the report.

        `Tiled` returns something else in place of the states.
        """
        ...

    def adjoint(
        self,
        inputs: Sequence[Tensor],
        initial: Tensor,
        starts: Tensor | None,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """The gradients of the inputs that have one, and of the initial states."""
        ...

    def loop(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """The states by PyTorch operations, which support all derivatives."""
        ...

    def like_states(self, inputs: Sequence[Tensor], initial: Tensor) -> list[Tensor]:
        """Empty tensors like the results of `solve`."""
        ...

    def like_gradients(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Empty tensors like the gradients of the inputs."""
        ...


@dataclass(frozen=True)
class Request:
    """A step that is to be solved, and what was asked for.

    Attributes:
        step: The step.
        backend: The chosen backend: "torch", "c" or "triton".
        solver: The user's settings; None to choose.
        facts: Of the step, for choices.
        readout: What is handed out, if states are not written (`tiled`).
    """

    step: Step
    backend: BackendChoice
    solver: Solver | None
    facts: Facts
    readout: Readout | None = None

    @functools.cached_property
    def planner(self) -> Planner:
        """Plans of its calls."""
        facts = all_facts(self.facts, self.step, self.backend)
        return Planner(facts, self.backend, self.solver)

    @functools.cached_property
    def path(self) -> Path:
        """What carries it out."""
        if self.planner.by_channels:
            return Channels.of(self.step, self.planner)
        if self.is_tiled:
            return Tiled(self.step, self.readout, self.planner)
        _ = self.step.adjoint  # recorded here: autograd does not work inside an operator
        return Rows(self.step, self.planner)

    @property
    def is_tiled(self) -> bool:
        """Whether one kernel runs all steps with the readout, see `Tiled`."""
        return by_tiles(self.facts, self.backend, self.solver)

    @functools.cached_property
    def differentiable(self) -> tuple[int, ...] | None:
        """Which inputs have gradients; None for all."""
        if isinstance(self.path, Tiled):
            return self.path.differentiable
        return None if self.planner.by_channels else self.step.differentiable

    @functools.cached_property
    def drive(self) -> int:
        """The number of an input that differs over time."""
        return 0 if self.planner.by_channels else self.step.by_rows.index(True)

    def text(self) -> str:
        """The request as text, for another process."""
        return write(
            step=write_step(self.step),
            backend=self.backend.name,
            solver=write_solver(self.solver),
            generated=self.backend.generated,
            readout=write_readout(self.step, self.readout) if self.is_tiled else None,
            tiled=self.is_tiled,
        )


def register(
    step: Step,
    backend: BackendChoice,
    solver: Solver | None = None,
    facts: Facts | None = None,
    readout: Readout | None = None,
) -> Name:
    """Register a request, so that operators can be called with its name.

    Equal requests have the same name.
    """
    facts = facts or facts_of(step)
    text = f"{step.key} {step.device} {solver!r} {backend} {facts}"
    if not by_channels(facts, backend):
        # of channels that do not mix, the module knows which values are the same for some of them
        text += step.module.code
    if readout is not None:
        text += f" {readout.key}"
    name = f"{backend.name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    return _requests.add(name, lambda: _made(Request(step, backend, solver, facts, readout)))


def _made(request: Request) -> Request:
    _ = request.path
    return request


def request_of(name: str) -> Request:
    """A request by its name or text."""
    return _requests[name]


def _read(content: dict[str, Any]) -> Request:
    """The request that `Request.text` wrote."""
    step, name = read_step(content["step"]), content["backend"]
    if name not in ("torch", *BACKENDS):
        raise ValueError(f"there is no backend {name!r} for it")
    generated = bool(content["generated"])
    backend = BackendChoice(name, "exported", automatic=True, generated=generated)
    facts, readout = facts_of(step), None
    if content.get("tiled"):
        readout = read_readout(content["readout"])
        found = tiles_of(step, readout)
        if isinstance(found, str):
            raise ValueError(f"it cannot be cut into tiles: {found}")
        facts = replace(facts, tile=sizes_of(found))
    return _made(Request(step, backend, read_solver(content["solver"]), facts, readout))


_requests = Registry(_read)

_library = torch.library.Library("pararnn", "DEF")
_library.define("solve(Tensor[] inputs, Tensor initial, Tensor? starts, str request) -> Tensor[]")
_library.define(
    "adjoint(Tensor[] inputs, Tensor initial, Tensor? starts, Tensor[] states, "
    "Tensor?[] grad_states, str request) -> Tensor[]"
)


def loop(
    inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None, request: str
) -> list[Tensor]:
    """The states step by step, by PyTorch operations, which support all derivatives."""
    with without_autocast(initial.device.type):
        return request_of(request).path.loop(inputs, initial, starts)


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


def _are_sizes(drive: Tensor) -> bool:
    """Whether there is nothing to compute: no sequences, or tensors without values."""
    return drive.is_meta or drive.shape[0] == 0


def run_solve(
    inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None, request: str
) -> list[Tensor]:
    """The implementation of `pararnn::solve`, also under transforms."""
    asked = request_of(request)
    path = asked.path
    if _are_sizes(inputs[asked.drive]):
        return path.like_states(inputs, initial)
    with without_autocast(initial.device.type):
        return path.solve(inputs, initial, starts)


def run_adjoint(
    inputs: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    states: Sequence[Tensor],
    grad_states: Sequence[Tensor | None],
    request: str,
) -> list[Tensor]:
    """The implementation of `pararnn::adjoint`, also under transforms."""
    asked = request_of(request)
    path = asked.path
    if _are_sizes(inputs[asked.drive]):
        return [torch.zeros_like(t) for t in (*path.like_gradients(inputs), initial)]
    with without_autocast(initial.device.type):
        return path.adjoint(inputs, initial, starts, states, grad_states)


def _solve(
    inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None, request: str
) -> list[Tensor]:
    refuse_tangents()
    return run_solve(inputs, initial, starts, request)


def _adjoint(
    inputs: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    states: Sequence[Tensor],
    grad_states: Sequence[Tensor | None],
    request: str,
) -> list[Tensor]:
    refuse_tangents()
    return run_adjoint(inputs, initial, starts, states, grad_states, request)


def _like_solve(
    inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None, request: str
) -> list[Tensor]:
    return request_of(request).path.like_states(inputs, initial)


def _like_adjoint(
    inputs: Sequence[Tensor],
    initial: Tensor,
    starts: Tensor | None,
    states: Sequence[Tensor],
    grad_states: Sequence[Tensor | None],
    request: str,
) -> list[Tensor]:
    of_inputs = request_of(request).path.like_gradients(inputs)
    return [*of_inputs, initial.new_empty(initial.shape)]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    given, initial, starts, ctx.request = inputs
    ctx.kept = request_of(ctx.request)  # the request may outlive its layer
    ctx.count = len(given)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, initial, starts, *output[:-1])


def _backward(ctx: Any, grads: list[Tensor | None]) -> Any:
    saved = ctx.saved_tensors  # read once: checkpointing recomputes them at every access
    inputs, (initial, starts, *states) = saved[: ctx.count], saved[ctx.count :]
    if torch.is_grad_enabled():  # create_graph=True: the gradients need gradients
        again = lambda initial, *inputs: loop(inputs, initial, starts, ctx.request)  # noqa: E731
        of_initial, *of_inputs = gradients_of_loop(again, [initial, *inputs], grads[:-1])
        return of_inputs, of_initial, None, None
    *found, gradient = adjoint(inputs, initial, starts, states, list(grads[:-1]), ctx.request)
    return by_input(found, ctx.kept, ctx.count), gradient, None, None


def by_input(found: Sequence[Tensor], request: Request, count: int) -> list[Tensor | None]:
    """One gradient for each input, None where it has none, from those that have one."""
    numbers = range(count) if request.differentiable is None else request.differentiable
    gradients: list[Tensor | None] = [None] * count
    for number, gradient in zip(numbers, found, strict=True):
        gradients[number] = gradient
    return gradients


def _no_second_derivative(ctx: Any, grads: Any) -> Any:
    raise RuntimeError(
        "pararnn: the gradient of a gradient is not available in a compiled or exported program; "
        "call the layer outside of it, or step through the cell in a loop of your own."
    )


solve = Operator("solve", _solve, _backward, _setup)
solve.register(_library, _like_solve)
adjoint = Operator("adjoint", _adjoint, _no_second_derivative)
adjoint.register(_library, _like_adjoint)
