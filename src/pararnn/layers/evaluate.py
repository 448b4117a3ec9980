"""Runs a traced step over a sequence: input part for all times, then the recurrence."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pararnn.kernels import operators, transforms
from pararnn.kernels.c.backend import CBackend
from pararnn.kernels.c.build import find_compiler
from pararnn.kernels.channels import BACKENDS, Channels
from pararnn.kernels.lowering import NotLowered, lower
from pararnn.kernels.rows import Rows
from pararnn.kernels.triton.build import interpreted
from pararnn.kernels.triton.build import missing as triton_missing
from pararnn.layers.replayed import Call
from pararnn.planning.automatic import coupling
from pararnn.planning.settings import Newton, Sequential, Solver
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.modes import transformed
from pararnn.tracing.structure import Traced

NAMES = ("auto", "torch", *BACKENDS)


class BackendError(ValueError):
    """The named backend does not exist or cannot run the cell."""


@dataclass(frozen=True)
class BackendChoice:
    """The chosen backend, and the reason.

    Attributes:
        name: Name of the backend.
        reason: Reason in words.
        automatic: Whether PyTorch operations replace the backend if its kernels cannot be built.
        generated: Whether the call may use generated kernels.
    """

    name: str
    reason: str
    automatic: bool = False
    generated: bool = True


def choose_backend(
    name: str,
    traced: Traced | None = None,
    device: torch.device | None = None,
    solver: Solver | None = None,
) -> BackendChoice:
    """Choose the backend for a traced step; without a step, only check the name.

    Args:
        name: A backend, or "auto".
        traced: The step.
        device: Device of the tensors.
        solver: The user's solver; None to choose.

    Raises:
        BackendError: The name is unknown, or the named backend cannot run the step; the message
            says why.
    """
    if name not in NAMES:
        raise BackendError(f"backend={name!r} is not known; choose one of {', '.join(NAMES)}.")
    if traced is None or device is None:
        return BackendChoice(name, "")
    if traced.step.recurrence is None:
        if name in _OBSTACLES:
            raise BackendError(
                f"backend={name!r} evaluates elementwise cells and {traced.subject.name} is not "
                f"one ({traced.reason}). Use backend='torch', or backend='auto' to choose."
            )
        reason = f"channels mix ({traced.reason})"
        return BackendChoice("torch", reason, generated=name != "torch")
    if name == "torch":
        return BackendChoice("torch", "asked for", generated=False)
    chosen = name if name != "auto" else "triton" if device.type == "cuda" else "c"
    obstacle = (
        _solver_obstacle(chosen, solver)
        or _lowering_obstacle(traced.step.recurrence)
        or _OBSTACLES[chosen](device)
    )
    missing = None if obstacle else _missing(chosen, device)
    if obstacle is None and missing is None:
        if name == chosen:
            return BackendChoice(chosen, "asked for")
        return BackendChoice(chosen, _REASONS[chosen], automatic=True)
    if name == chosen:
        raise BackendError(
            f"backend={name!r} cannot run {traced.subject.name} here: {obstacle or missing}. Use "
            "backend='torch', or backend='auto' to choose."
        )
    if missing:
        _warn_slow(missing)
    return _without_kernels(str(obstacle or missing))


def _without_kernels(why: str) -> BackendChoice:
    reason = f"generated kernels are not possible: {why.splitlines()[0]}"
    return BackendChoice("torch", reason, generated=False)


def _solver_obstacle(backend: str, solver: Solver | None) -> str | None:
    if backend != "triton" or solver is None or isinstance(solver, (Newton, Sequential)):
        return None
    return f"it solves by Newton's method, not by {type(solver).__name__}"


def _lowering_obstacle(recurrence: Recurrence) -> str | None:
    try:
        lower([*recurrence.step, *recurrence.vjp])
    except NotLowered as error:
        return str(error)
    return None


def _c_obstacle(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device}"
    return None


def _triton_obstacle(device: torch.device) -> str | None:
    if device.type == "cpu" and not interpreted():
        return "the tensors are on the CPU, where Triton runs with TRITON_INTERPRET=1 only"
    if device.type not in ("cpu", "cuda"):
        return f"the tensors are on {device}"
    return None


def _missing(backend: str, device: torch.device) -> str | None:
    """The reason why this machine cannot build kernels of a backend; None if it can."""
    if backend == "triton":
        return triton_missing(device.type)
    return None if find_compiler() else "no C compiler was found (looked for $CC, cc, gcc, clang)"


_OBSTACLES = {"c": _c_obstacle, "triton": _triton_obstacle}
_REASONS = {
    "c": "generated C is the fastest on a CPU",
    "triton": "generated Triton is the fastest on a GPU",
}


@functools.lru_cache(maxsize=8)
def _warn_slow(why: str) -> None:
    warnings.warn(
        f"pararnn evaluates with PyTorch operations, several times slower than generated kernels: "
        f"{why}\nInstall or mend what that needs, or pass backend='torch' to agree.",
        stacklevel=2,
    )


class Evaluation:
    """A traced step and the backend that evaluates it.

    Attributes:
        traced: The step, as the backend takes it.
        choice: The chosen backend, or PyTorch if the kernels of the chosen one cannot be built.
        owners: Module and name there of each tensor that the input part reads.
        is_ready: Whether it can be called; if not, call `get_ready` first.

    Args:
        traced: The step.
        choice: The backend.
        solver: The user's solver; None to choose.
        features: Shape of one input.
        owner_of: Finds a tensor by its name in the input part; None if `owners` is not needed.
    """

    def __init__(
        self,
        traced: Traced,
        choice: BackendChoice,
        solver: Solver | None,
        features: tuple[int, ...],
        owner_of: Callable[[str], tuple[nn.Module, str]] | None = None,
    ) -> None:
        self.solver = solver
        self._owner_of = owner_of
        self.features = features
        self.feature_axes = len(features)
        self._take(traced, choice)
        self.is_ready = not choice.automatic

    def _take(self, traced: Traced, choice: BackendChoice) -> None:
        """Set the step and its backend."""
        self.traced, self.choice, self.input_part = traced, choice, traced.input_part
        find = self._owner_of
        self.owners = [find(name) for name in self.input_part.names] if find else []
        self.plan = operators.register(traced.step, choice.name, self.solver, choice.generated)
        path = operators.request_of(self.plan).path
        self.mixing_plan = path if isinstance(path, Rows) else None

    def method(self) -> type[Solver]:
        """The coupling of chunks: the user's, or the chosen one."""
        if self.solver is not None and not isinstance(self.solver, Sequential):
            return type(self.solver)
        if self.mixing_plan is None:
            return Newton
        return coupling(self.traced.step.num_components * self.traced.step.group)

    def describe(self) -> str:
        """The solver, in words."""
        if self.mixing_plan is None:
            return (
                repr(self.solver) if self.solver else "Newton, with chunks chosen for every shape"
            )
        return self.mixing_plan.describe()

    def prefers_cell(self, batch: int, time: int, device: str, one_call: bool) -> bool:
        """Whether a loop over the cell itself is faster; see `automatic.prefers_cell`."""
        plan = self.mixing_plan
        return plan is not None and plan.prefers_cell(batch, time, device, one_call)

    def run(
        self,
        tensors: list[Tensor],
        inputs: Sequence[Tensor],
        initial: Tensor,
        starts: Tensor | None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Evaluate at all times.

        Args:
            tensors: The tensors that the input part reads, in its order.
            inputs: Each (batch, time, ...).
            initial: (rows, components, hidden).
            starts: See `Problem.starts`.

        Returns:
            One (batch, time, hidden) per component, and the values of the report. Under
            transforms the report is None, since each member of an ensemble has its own.
        """
        fixed = [*tensors, *self.input_part.constants]
        time = inputs[0].shape[1]
        if transformed():
            return transforms.solve(self.inputs(fixed, inputs), initial, starts, self.plan), None
        given = [*fixed, *inputs, initial, starts]
        call = None
        if not torch.compiler.is_compiling() and time > 1 and self._never_waits(given, initial):
            call = Call.now(self, len(fixed), given)
        if call is not None:
            *states, report = call(given)
        else:
            *states, report = self.solve(self.inputs(fixed, inputs), initial, starts)
        return states, report

    def solve(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """The states, and the values of the report."""
        return operators.solve(inputs, initial, starts, self._written())

    def _written(self) -> str:
        """The name of the request, or its text in a program that may run without this layer."""
        return self._text() if torch.compiler.is_compiling() else self.plan

    def _text(self) -> str:
        return operators.request_of(self.plan).text()

    def get_ready(self) -> None:
        """Build the kernels; if that fails, switch to PyTorch operations."""
        self.is_ready = True
        path = operators.request_of(self.plan).path
        if isinstance(path, Channels) and isinstance(path.backend, CBackend):
            obstacle = path.backend.obstacle(self.traced.step.dtype is torch.float64)
            if obstacle is not None:
                _warn_slow(obstacle)
                self._take(self.traced, _without_kernels(obstacle))

    # torch.compile calls `_text` instead of tracing it
    vars(_text)["_dynamo_marked_constant"] = True

    def loop(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """The states, by PyTorch operations, which support all derivatives."""
        return operators.loop(inputs, initial, starts, self.plan)

    def adjoint(
        self,
        inputs: Sequence[Tensor],
        initial: Tensor,
        starts: Tensor | None,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
    ) -> tuple[list[Tensor | None], Tensor]:
        """The gradients of the inputs, None where there is none, and of the initial states."""
        *found, of_initial = operators.adjoint(
            inputs, initial, starts, states, grad_states, self.plan
        )
        request = operators.request_of(self.plan)
        return operators.by_input(found, request, len(inputs)), of_initial

    def _never_waits(self, given: Sequence[Tensor | None], initial: Tensor) -> bool:
        """Whether a call needs no host sync."""
        if self.solver is not None:
            return False
        if self.mixing_plan is None:
            return self.choice.name == "triton"
        tracked = any(t is not None and t.requires_grad for t in given)
        return self.mixing_plan.settles(initial, tracked and torch.is_grad_enabled())

    def inputs(self, fixed: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of the step, from tensors and constants (`fixed`) and x (`given`)."""
        x = given[0]
        batch, time, *_ = x.shape
        time_first = x.stride(0) < x.stride(1)
        if self.mixing_plan is not None and x.device.type == "cpu":
            time_first = True  # steps read all rows of a time
        if time_first:
            given = [g.transpose(0, 1) for g in given]
        values = self.input_part.module(*fixed, *[g.flatten(0, 1) for g in given])
        sizes = (time, batch) if time_first else (batch, time)
        inputs = []
        for value, by_rows in zip(values, self.traced.step.by_rows, strict=True):
            if by_rows:
                value = value.view(*sizes, *value.shape[1:])
                value = value.transpose(0, 1) if time_first else value
            inputs.append(value)
        return inputs
