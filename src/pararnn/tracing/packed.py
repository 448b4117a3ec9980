"""A state of tensors of any shape, as the components of equal size that solvers take.

Axes of the tensors along which no entry reaches another come first in memory, so that entries which
reach each other are neighbours: the groups that `group_size` finds. Tensors that do not have the
same number of entries lie side by side in one component, for each index of those axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pararnn.tracing.capture import StepFunction, Subject, checked_state
from pararnn.tracing.recorder import TraceError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """Where the entries of a state lie.

    Attributes:
        shapes: Of the tensors, without the rows.
        apart: For each tensor, the axes along which no entry reaches another. They have the same
            sizes in all tensors.
        orders: For each tensor, its axes as they lie in memory.
        blocks: Blocks of memory that do not reach each other, one for each index of these axes.
        widths: Entries of each tensor in a block.
        num_components: Components that solvers take.
        is_plain: Whether these are the tensors themselves.
    """

    shapes: tuple[Shape, ...]
    apart: tuple[tuple[int, ...], ...] = ()
    # not cached properties, which torch.compile cannot follow
    orders: tuple[tuple[int, ...], ...] = field(init=False, repr=False)
    blocks: int = field(init=False)
    widths: tuple[int, ...] = field(init=False, repr=False)
    num_components: int = field(init=False)
    is_plain: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        first = self.apart or ((),) * len(self.shapes)
        pairs = list(zip(self.shapes, first, strict=True))
        orders = tuple((*f, *(a for a in range(len(s)) if a not in f)) for s, f in pairs)
        blocks = math.prod(self.shapes[0][a] for a in first[0])
        widths = tuple(math.prod(shape) // blocks for shape in self.shapes)
        alike = len(set(widths)) == 1
        found: dict[str, Any] = {"orders": orders, "blocks": blocks, "widths": widths}
        found["num_components"] = len(self.shapes) if alike else 1
        found["is_plain"] = len(set(self.shapes)) == 1 and len(self.shapes[0]) == 1
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def hidden_size(self) -> int:
        """Channels of each component."""
        return self.blocks * sum(self.widths) // self.num_components

    def lies_like(self, other: Packing) -> bool:
        """Whether entries lie where they lie in another packing of the same shapes."""
        alike = self.orders == other.orders and self.num_components == other.num_components
        beside = len(self.shapes) > self.num_components
        return alike and (not beside or self.widths == other.widths)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensors, each (rows, *shape), as components (rows, components, channels)."""
        if self.is_plain:
            return torch.stack(tuple(parts), 1) if len(parts) > 1 else parts[0].unsqueeze(1)
        flat = []
        for part, order, width in zip(parts, self.orders, self.widths, strict=True):
            if _moves(order):
                part = part.permute(0, *(1 + a for a in order))
            flat.append(part.reshape(part.shape[0], self.blocks, width))
        if self.num_components == 1:
            return (torch.cat(flat, -1) if len(flat) > 1 else flat[0]).flatten(1).unsqueeze(1)
        return torch.stack(flat, 1).flatten(2)

    def split(self, components: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Components (..., channels) as the tensors, each (..., *shape)."""
        if self.is_plain:
            return tuple(components)
        lead = components[0].shape[:-1]
        blocks = [c.unflatten(-1, (self.blocks, -1)) for c in components]
        if len(components) < len(self.shapes):
            blocks = list(blocks[0].split(self.widths, -1))
        parts, axes = [], range(len(lead))
        for block, shape, order in zip(blocks, self.shapes, self.orders, strict=True):
            part = block.reshape(*lead, *(shape[a] for a in order))
            if _moves(order):
                back = [len(lead) + order.index(a) for a in range(len(shape))]
                part = part.permute(*axes, *back)
            parts.append(part)
        return tuple(parts)

    def packed(self, subject: Subject, is_tuple: bool) -> Subject:
        """The same step on a tuple of components.

        Args:
            subject: A step on the tensors.
            is_tuple: Whether it takes them as a tuple.
        """

        def call(
            function: StepFunction, name: str, own: dict[str, Tensor], inputs: Any, state: Any
        ) -> Any:
            parts = tuple(part.contiguous() for part in self.split(state))
            before = [part._version for part in parts]
            result = function(own, inputs, parts if is_tuple else parts[0])
            if before != [part._version for part in parts]:  # they may be copies
                raise TraceError(
                    f"{name} writes into its state in place; compute a new tensor instead (all "
                    "times are evaluated at once, so there is no order for such writes)."
                )
            return result

        def step(own: dict[str, Tensor], inputs: tuple[Tensor, ...], state: Any) -> Any:
            new = call(subject.step, subject.name, own, inputs, state)
            rows = len(inputs[0])
            shapes = [(rows, *shape) for shape in self.shapes]
            parts = checked_state(new, subject.name, shapes, is_tuple)
            joined = self.join(parts)
            return tuple(joined.unbind(1)) if self.num_components > 1 else (joined.squeeze(1),)

        def readout(own: dict[str, Tensor], inputs: tuple[Tensor, ...], state: Any) -> Any:
            assert subject.readout is not None
            return call(subject.readout, f"{subject.name}.readout", own, inputs, state)

        return replace(subject, step=step, readout=None if subject.readout is None else readout)


def _moves(order: tuple[int, ...]) -> bool:
    """Whether an order of axes is not the user's."""
    return order != tuple(range(len(order)))
