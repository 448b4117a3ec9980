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

from pararnn.tracing.capture import Subject
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
            flat.append(part.reshape(len(part), self.blocks, width))
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

        def given(components: Sequence[Tensor]) -> Any:
            parts = tuple(part.contiguous() for part in self.split(components))
            return parts if is_tuple else parts[0]

        def step(own: dict[str, Tensor], inputs: tuple[Tensor, ...], state: Any) -> Any:
            new = subject.step(own, inputs, given(state))
            self._check(new, subject.name, is_tuple, len(inputs[0]))
            parts = tuple(new) if is_tuple else (new,)
            return tuple(self.join(parts).unbind(1))

        def readout(own: dict[str, Tensor], inputs: tuple[Tensor, ...], state: Any) -> Any:
            assert subject.readout is not None
            return subject.readout(own, inputs, given(state))

        return replace(subject, step=step, readout=None if subject.readout is None else readout)

    def _check(self, new: Any, name: str, is_tuple: bool, rows: int) -> None:
        """Refuse what is not a state of these shapes."""
        count = len(self.shapes)
        if isinstance(new, (tuple, list)) != is_tuple or (is_tuple and len(new) != count):
            given = f"a state of {count} tensors" if is_tuple else "one tensor as state"
            seen = f"{len(new)} tensors" if isinstance(new, (tuple, list)) else type(new).__name__
            raise TraceError(
                f"{name} was given {given} but returned {seen}; it must return the new state in "
                "the same form."
            )
        parts = new if is_tuple else (new,)
        for i, (part, shape) in enumerate(zip(parts, self.shapes, strict=True)):
            if not isinstance(part, Tensor) or tuple(part.shape) != (rows, *shape):
                found = tuple(part.shape) if isinstance(part, Tensor) else part
                which = f"component {i}" if is_tuple else "a state"
                raise TraceError(
                    f"{name} returned {which} of shape {found} for one of shape "
                    f"{(rows, *shape)}; the state must keep its shape (N, "
                    f"{', '.join(map(str, shape))})."
                )


def _moves(order: tuple[int, ...]) -> bool:
    """Whether an order of axes is not the user's."""
    return order != tuple(range(len(order)))
