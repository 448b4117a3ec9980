"""A state whose components differ in size, as one component: they lie side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pararnn.tracing.capture import Subject
from pararnn.tracing.recorder import TraceError


def side_by_side(subject: Subject, sizes: tuple[int, ...]) -> Subject:
    """The same step with its components as one tensor.

    Args:
        subject: A step that takes and returns a tuple.
        sizes: Channels of every component.
    """

    def step(own: dict[str, Tensor], inputs: tuple[Tensor, ...], state: Tensor) -> Tensor:
        parts = tuple(part.contiguous() for part in state.split(sizes, -1))
        new = subject.step(own, inputs, parts)
        _check(new, subject.name, sizes)
        return torch.cat(tuple(new), -1)

    return dataclasses.replace(subject, step=step)


def joined(parts: Sequence[Tensor], num_components: int) -> Tensor:
    """Components as solvers take them, (rows, num_components, channels): 1 if sizes differ."""
    if len(parts) > num_components:
        parts = (torch.cat(tuple(parts), -1),)
    return torch.stack(tuple(parts), 1) if len(parts) > 1 else parts[0].unsqueeze(1)


def _check(new: Any, name: str, sizes: tuple[int, ...]) -> None:
    """Refuse what is not a tuple of components of these sizes."""
    if not isinstance(new, (tuple, list)) or len(new) != len(sizes):
        seen = f"{len(new)} tensors" if isinstance(new, (tuple, list)) else type(new).__name__
        raise TraceError(
            f"{name} was given a state of {len(sizes)} tensors but returned {seen}; it must return "
            "the new state in the same form."
        )
    for i, (component, size) in enumerate(zip(new, sizes, strict=True)):
        if component.shape[-1] != size:
            raise TraceError(
                f"{name} returned component {i} with {component.shape[-1]} channels for one of "
                f"{size}; the sizes of its state are {sizes}."
            )
