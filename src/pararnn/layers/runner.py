"""Runs a traced cell over a sequence: the input part for all times, then the recurrence."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from pararnn.kernels import operators, transforms
from pararnn.kernels.c.backend import CBackend
from pararnn.kernels.channels import Channels
from pararnn.kernels.facts import facts_of, machine_of
from pararnn.kernels.rows import kernels_of
from pararnn.kernels.tiled import sizes_of, tiles_of
from pararnn.layers.replayed import DEVICE, Replay, can_replay
from pararnn.planning.plan import (
    BackendChoice,
    Plan,
    by_tiles,
    choose_backend,
    without_kernels,
)
from pararnn.planning.plan import BackendError as BackendError
from pararnn.planning.plan import check_name as check_name
from pararnn.planning.rows_plan import coupling
from pararnn.planning.settings import Newton, Sequential, Solver
from pararnn.tracing.modes import autocasts, stand_in, transformed, untransformed
from pararnn.tracing.products import unfused
from pararnn.tracing.step import arithmetic, in_type
from pararnn.tracing.tiles import Tiles
from pararnn.tracing.traced import Traced


@functools.lru_cache(maxsize=8)
def _warn_slow(why: str) -> None:
    warnings.warn(
        f"pararnn evaluates with PyTorch operations, several times slower than generated kernels: "
        f"{why}\nInstall or mend what that needs, or pass backend='torch' to agree.",
        stacklevel=2,
    )


class Runner:
    """A traced cell, and the backend that solves for its states.

    Attributes:
        traced: The cell.
        input_part: Its input part.
        features: The shape of one input.
        by_rows: Which results of the input part have one row per sample.
        reads: The code of the readout; empty if there is none.
        is_random: Whether a call draws random numbers.
        facts: Facts of its step.
        request: The name by which operators are called.
        choice: The chosen backend, or PyTorch if the kernels of the chosen one cannot be built.
        solver: The user's solver; None to choose.
        owners: Module and name there of each tensor that the input part reads.
        is_ready: Whether it can be called; if not, call `get_ready` first.
        by_channels: Whether kernels solve for every channel by itself.

    Args:
        traced: The cell.
        backend: What the user asked for, or a choice.
        solver: The user's solver; None to choose.
        tensors: Finds a tensor by its name in the input part.
        owner_of: Finds module and name of a tensor by its name in the input part; None if `owners`
            is not needed.
        one_call: Whether a step of the cell itself is hardly more than one call.
        all_states: Whether all components are asked for at all times.

    Raises:
        BackendError: The named backend cannot run the cell; the message says why.
    """

    def __init__(
        self,
        traced: Traced,
        backend: str | BackendChoice,
        solver: Solver | None,
        tensors: Callable[[str], Tensor],
        owner_of: Callable[[str], tuple[nn.Module, str]] | None = None,
        one_call: bool = False,
        all_states: bool = False,
    ) -> None:
        self.traced, self.input_part, self.solver = traced, traced.input_part, solver
        facts = facts_of(traced.step, traced.subject.name, traced.reason)
        self.facts, self.by_channels, self.is_tiled = (
            replace(facts, one_call=one_call),
            False,
            False,
        )
        device, self.choice = traced.device, BackendChoice("torch", "not chosen yet")
        language = "triton" if device.type == "cuda" else "c"  # of kernels that may be chosen
        language = {"auto": language, "triton": "triton", "c": "c"}.get(str(backend), "")
        own_choice = isinstance(solver, (Sequential, type(None)))
        if language == "triton" and own_choice and not all_states:
            self._cut_into_tiles()
        self._inlined: fx.GraphModule | None = None
        self.reads = self.traced.readout.module.code if self.traced.readout else ""
        self.features = traced.given[0].shape
        self.feature_axes = len(self.features)
        self.is_random = self.input_part.is_random or getattr(
            self.traced.readout, "is_random", False
        )
        self.by_rows = self.traced.by_rows  # here, since torch.compile cannot take its lock
        self.owners = [owner_of(name) for name in self.input_part.names] if owner_of else []
        if language and self.traced.step.recurrence is None and self.facts.tile is None:
            own = [stand_in(tensors(name)) for name in self.input_part.names]
            found = untransformed(lambda: self._kernels(language, own))
            self.facts = replace(self.facts, **found)
        self._take(
            choose_backend(backend, self.facts, machine_of(device), solver)
            if isinstance(backend, str)
            else backend
        )
        self.is_ready = not self.choice.automatic
        if self.choice.missing:
            _warn_slow(self.choice.missing)

    def _take(self, choice: BackendChoice) -> None:
        """Set the backend."""
        self.choice = choice
        self.is_tiled = by_tiles(self.facts, choice, self.solver)
        readout = self.traced.readout if self.is_tiled else None
        self.request = operators.register(
            self.traced.step, choice, self.solver, self.facts, readout
        )
        asked = operators.request_of(self.request)
        self._path, self._planner = asked.path, asked.planner
        self.by_channels = self._planner.by_channels
        self._plain = self.request
        if self.is_tiled:  # transforms need the states
            plain = BackendChoice("torch", "it supports all derivatives", generated=False)
            self._plain = operators.register(self.traced.step, plain, self.solver)

    def _cut_into_tiles(self) -> None:
        """Take the cell with small drives, if a kernel of tiles can run it."""
        machine = machine_of(self.traced.device)
        if dict(machine.obstacles)["triton"] or dict(machine.missing)["triton"]:
            return
        small = untransformed(lambda: self.traced.small)
        if small is None:  # channels that do not mix have kernels of their own
            return
        found = untransformed(lambda: tiles_of(small.step, small.readout))
        if isinstance(found, Tiles):
            facts = facts_of(small.step, small.subject.name, small.reason)
            self.facts = replace(facts, one_call=self.facts.one_call, tile=sizes_of(found))
            self.traced, self.input_part = small, small.input_part

    def _kernels(self, language: str, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Facts of kernels of "c" or "triton" for all steps, see `kernels_of`."""
        with torch.no_grad():
            return kernels_of(language, self.traced.step, *self._example(tensors))

    def _example(
        self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Inputs of the step and initial states, of two times.

        Args:
            tensors: The tensors that the input part reads.
            dtype: Of x; as it was traced when None.
        """
        step, device = self.traced.step, self.traced.device
        devices = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            x, *others = [i.example(2, device).unflatten(0, (1, 2)) for i in self.traced.given]
            given = [x.to(dtype or x.dtype), *others]
            initial = torch.zeros(1, step.num_components, step.hidden, device=device)
            inputs = self.inputs(self.input_part.fixed(tensors, device), given)
            return inputs[: len(step.inputs)], initial.to(step.dtype)

    def plan(
        self,
        batch: int,
        time: int,
        dtype: torch.dtype,
        elements: int = 0,
        tracked: bool = False,
        may_loop: bool = False,
        library: str | None = None,
        shown: bool = False,
    ) -> Plan:
        """How a call is carried out, for x of a type; see `pararnn.planning.plan.Call`.

        To be shown, with the types that autocast leads to. The way of the whole call does not
        depend on them.
        """
        step = self.traced.step
        kept_in = dtype if dtype.is_floating_point else step.dtype
        if self.traced.capture.dtype is torch.float64:
            kept_in = torch.float64
        kinds = kept_in, kept_in.itemsize
        if shown and autocasts(self.traced.device.type):
            tensors = [getattr(owner, name) for owner, name in self.owners]
            kinds = self._path.kinds(*self._example(tensors, dtype))
        readout = self.traced.readout
        outside = 1 if readout is None else len(readout.components)  # with a gradient from there
        sizes = batch, time, step.hidden
        return self._planner.plan(
            self.traced.device, *sizes, *kinds, outside, tracked, elements, may_loop, library
        )

    def method(self) -> type[Solver]:
        """The coupling of chunks: the user's, or the chosen one."""
        if self.solver is not None and not isinstance(self.solver, Sequential):
            return type(self.solver)
        return Newton if self.by_channels else coupling(self.facts.entries)

    def run(
        self,
        tensors: list[Tensor],
        given: Sequence[Tensor],
        initial: Tensor,
        starts: Tensor | None,
    ) -> tuple[Tensor | None, list[Tensor], Tensor | None, Tensor | None]:
        """Evaluate at all times.

        Args:
            tensors: The tensors that the input part reads, in its order.
            given: What differs over time, each (batch, time, ...).
            initial: (rows, components, hidden).
            starts: See `Problem.starts`.

        Returns:
            The result of the readout, (batch, time, ...), None if the cell has none; one (batch,
            time, hidden) per component; the values of the report; and None. Where states are not
            written (`is_tiled`), there are none but the first if there is no readout, and the last
            is the states after the last step of each sequence, (sequences, components, hidden).
            Under transforms the report is None, since each member of an ensemble has its own.
        """
        fixed, count = self.input_part.fixed(tensors, given[0].device), len(self.traced.step.inputs)
        if transformed():
            inputs = self.inputs(fixed, given)
            states = transforms.solve(inputs[:count], initial, starts, self._plain)
            return self.read(states, inputs), states, None, None
        replay = None
        if initial.device.type == DEVICE and not torch.compiler.is_compiling():
            everything = [*fixed, *given, initial, starts]
            if can_replay(everything, self.is_random) and self._in_graph(everything, given[0]):
                replay = Replay.now(self, len(fixed), initial.shape[1], initial.device)
        if replay is not None:
            return (*replay([*fixed, *given, initial, starts]), None)
        inputs = self.inputs(fixed, given)
        in_graph = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        if in_graph and self._inlined is not None and starts is None and given[0].shape[1] == 1:
            states = self._one_step(self._inlined, inputs, initial)
            return self.read(states, inputs), states, None, None
        if self.is_tiled:
            y, last, _, report = operators.solve(inputs, initial, starts, self._written())
            return (
                (None, [y], report, last) if self.traced.readout is None else (y, [], report, last)
            )
        *states, report = self.solve(inputs, initial, starts)
        return self.read(states, inputs), states, report, None

    def inline(self) -> None:
        """From now on a single step without gradients is part of a compiled graph around it.

        The compiler then fuses it with what comes before and after. This holds for steps on each
        element only; others have kernels of their own, or products that read weights.
        """
        if self._inlined is None and self.traced.step.recurrence is not None:
            self._inlined = untransformed(lambda: unfused(self.traced.step.module))

    def _one_step(
        self, module: fx.GraphModule, inputs: Sequence[Tensor], initial: Tensor
    ) -> list[Tensor]:
        """The states after one step, each (batch, 1, hidden), in the type of the drives."""
        step = self.traced.step
        own = inputs[: len(step.inputs)]
        dtype = arithmetic(t.dtype for t in (*own, initial))
        given = [
            in_type(i.squeeze(1).contiguous() if by_rows else i, dtype)
            for i, by_rows in zip(own, step.by_rows, strict=True)
        ]
        states = [s.contiguous() for s in initial.to(dtype).unbind(1)]
        kept_in = torch.float64 if dtype is torch.float64 else own[0].dtype  # drives come first
        return [s.unsqueeze(1).to(kept_in) for s in module.forward(*states, *given)]

    def read(self, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor | None:
        """What the readout makes of the states, (batch, time, ...); None if the cell has none.

        Args:
            states: One (batch, time, hidden) per component.
            inputs: As `inputs` returns them.
        """
        readout = self.traced.readout
        if readout is None:
            return None
        return readout(states, inputs[len(self.traced.step.inputs) :])

    def _in_graph(self, tensors: Sequence[Tensor | None], x: Tensor) -> bool:
        """Whether a call on a GPU is one CUDA graph."""
        there = [t for t in tensors if t is not None]
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in there)
        elements, (batch, time) = max(t.numel() for t in there), x.shape[:2]
        return self.plan(batch, time, x.dtype, elements, tracked).in_graph

    def solve(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """The states, and the values of the report; inputs as `inputs` returns them."""
        own = inputs[: len(self.traced.step.inputs)]
        return operators.solve(own, initial, starts, self._written())

    def _written(self) -> str:
        """The name of the request, or its text in a program that may run without this layer."""
        return self._text() if torch.compiler.is_compiling() else self.request

    def _text(self) -> str:
        return operators.request_of(self.request).text()

    # torch.compile calls `_text` instead of tracing it
    vars(_text)["_dynamo_marked_constant"] = True

    def get_ready(self) -> None:
        """Build the kernels; if that fails, switch to PyTorch operations."""
        self.is_ready = True
        path = self._path
        if isinstance(path, Channels) and isinstance(path.backend, CBackend):
            obstacle = path.backend.obstacle(self.traced.step.dtype is torch.float64)
            if obstacle is not None:
                _warn_slow(obstacle)
                self._take(without_kernels(obstacle))

    def loop(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """The states, by PyTorch operations, which support all derivatives."""
        own = inputs[: len(self.traced.step.inputs)]
        return operators.loop(own, initial, starts, self.request)

    def adjoint(
        self,
        inputs: Sequence[Tensor],
        initial: Tensor,
        starts: Tensor | None,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
    ) -> tuple[list[Tensor | None], Tensor]:
        """The gradients of the step's inputs, None where there is none, and of initial states."""
        own = inputs[: len(self.traced.step.inputs)]
        *found, of_initial = operators.adjoint(
            own, initial, starts, states, grad_states, self.request
        )
        request = operators.request_of(self.request)
        return operators.by_input(found, request, len(own)), of_initial

    def inputs(self, fixed: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of the step and then of the readout.

        Args:
            fixed: Tensors and constants that the input part reads.
            given: What differs over time.
        """
        x = given[0]
        batch, time, *_ = x.shape
        time_first = x.stride(0) < x.stride(1)
        if not self.by_channels and x.device.type == "cpu":
            time_first = self.choice.name != "c"  # steps read all rows of a time
        if time_first:
            given = [g.transpose(0, 1) for g in given]
        flat = [g.flatten(0, 1) for g in given]
        if torch.compiler.is_exporting():  # views of x would exclude some of its sizes
            flat = [f.clone(memory_format=torch.contiguous_format) for f in flat]
        values = self.input_part.module.forward(*fixed, *flat)
        sizes = (time, batch) if time_first else (batch, time)
        inputs = []
        for value, by_rows in zip(values, self.by_rows, strict=True):
            if by_rows:
                value = value.view(*sizes, *value.shape[1:])
                value = value.transpose(0, 1) if time_first else value
            inputs.append(value)
        return inputs
