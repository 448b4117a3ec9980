"""A traced cell."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pararnn.tracing.capture import Capture, Subject
from pararnn.tracing.partition import InputPart, Partition
from pararnn.tracing.step import Input, Step


@dataclass
class Traced:
    """A cell, traced.

    Attributes:
        subject: What was traced.
        given: What differs over time, as the cell takes it.
        parts: The split graph.
        input_part: Computes the inputs of the step for all times.
        step: The recurrent part.
        reason: The reason for the structure, in words.
        device: Where it was traced.
    """

    subject: Subject
    given: tuple[Input, ...]
    parts: Partition
    input_part: InputPart
    step: Step
    reason: str
    device: torch.device

    @property
    def capture(self) -> Capture:
        """The whole graph."""
        return self.parts.capture

    @property
    def structure(self) -> str:
        """Elementwise, heads (with their size) or dense."""
        if self.step.recurrence is not None:
            return "elementwise"
        group = self.step.group
        return "dense" if group == self.step.hidden else f"heads (size {group})"
