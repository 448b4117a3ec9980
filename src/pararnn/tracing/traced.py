"""A traced cell."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pararnn.tracing.capture import Capture, Subject
from pararnn.tracing.modes import autocasts
from pararnn.tracing.packed import Packing
from pararnn.tracing.partition import InputPart, Partition
from pararnn.tracing.step import Input, Step


@dataclass(frozen=True)
class Readout:
    """What a cell hands out, computed from the states after the steps, for all times at once.

    Attributes:
        module: `(*components, *inputs) -> (y,)`, all with the rows first.
        components: The components of the state that it takes, by their numbers.
        inputs: What it takes from the input part, whose last results they are.
        shared: For each of them the number of the step's input that is the same; None for none.
        shape: Of y, without the rows.
        is_random: Whether it draws random numbers.
        dtype: The type of the states with which it was traced.
    """

    module: fx.GraphModule
    components: tuple[int, ...]
    inputs: tuple[Input, ...]
    shared: tuple[int | None, ...]
    shape: tuple[int, ...]
    is_random: bool
    dtype: torch.dtype

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The types of what it takes, as it was traced: it may rely on them to be these."""
        return [self.dtype] * len(self.components) + [i.dtype for i in self.inputs]

    @functools.cached_property
    def key(self) -> str:
        """Equal keys, equal functions."""
        sizes = f"{self.components} {self.inputs} {self.shared} {self.shape} {self.dtype}"
        return f"{self.module.code}{sizes} {self.is_random}"

    def __call__(self, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """What is handed out, (batch, time, *shape).

        Args:
            states: All components, (batch, time, hidden).
            inputs: Those with rows (batch, time, ...).
        """
        batch, time = states[0].shape[:2]
        by_rows = [True] * len(self.components) + [i.by_rows for i in self.inputs]
        given = [*(states[i] for i in self.components), *inputs]
        as_traced = [t.dtype for t in given] == self.dtypes
        if not (as_traced or autocasts(states[0].device.type)):
            floats = [t.dtype for t in given if t.is_floating_point()]
            wide = functools.reduce(torch.promote_types, floats)
            given = [t.to(wide) if t.is_floating_point() else t for t in given]
        rows = [
            t.flatten(0, 1).contiguous() if r else t for t, r in zip(given, by_rows, strict=True)
        ]
        (y,) = self.module(*rows)
        return y.unflatten(0, (batch, time))


@dataclass
class Traced:
    """A cell, traced.

    Attributes:
        subject: What was traced.
        given: What differs over time, as the cell takes it.
        packing: Where the entries of the cell's state lie in the components of the step.
        parts: The split graph.
        input_part: Computes the inputs of the step, then those of the readout, for all times.
        step: The recurrent part.
        readout: What the cell hands out; None for the first tensor of its state.
        reason: The reason for the structure, in words.
        device: Where it was traced.
        make_small: Makes `small` of it; None for vectors of channels which do not mix.
    """

    subject: Subject
    given: tuple[Input, ...]
    packing: Packing
    parts: Partition
    input_part: InputPart
    step: Step
    readout: Readout | None
    reason: str
    device: torch.device
    make_small: Callable[[Traced], Traced] | None = None

    @functools.cached_property
    def small(self) -> Traced | None:
        """The same with few and small inputs over time, for kernels of tiles."""
        return None if self.make_small is None else self.make_small(self)

    @property
    def capture(self) -> Capture:
        """The whole graph."""
        return self.parts.capture

    @property
    def forgets_all(self) -> bool:
        """Whether nothing is computed from the state, nor is it handed on."""
        return not any(node.users for node in self.parts.states)

    @property
    def by_rows(self) -> tuple[bool, ...]:
        """Which results of the input part have one row per sample."""
        read = self.readout.inputs if self.readout else ()
        return (*self.step.by_rows, *(i.by_rows for i in read))

    @property
    def structure(self) -> str:
        """Elementwise, heads (with their size) or dense."""
        group = self.step.group
        if self.step.recurrence is not None or group == 1:
            return "elementwise"
        return "dense" if group == self.step.hidden else f"heads (size {group})"
