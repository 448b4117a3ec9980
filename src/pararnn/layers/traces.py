"""The latest traces of a cell: a setting that alternates is traced once for each value."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from pararnn.layers.runner import Runner
from pararnn.tracing.packed import Shape
from pararnn.tracing.watch import Change, Watched

_MOST = 4


class Kept(NamedTuple):
    """A trace of a cell.

    Attributes:
        signature: Inputs, types, device and settings of the trace.
        shapes: Of the tensors in the state.
        runner: Runs the traced cell.
        watched: Everything that the trace depends on.
        is_parametrised: Whether parametrisations compute some weights.
    """

    signature: tuple[Any, ...]
    shapes: tuple[Shape, ...]
    runner: Runner
    watched: Watched
    is_parametrised: bool


class Traces:
    """The latest traces, so that a mode or setting can be switched back without a new trace."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []  # the latest used comes last

    def add(self, kept: Kept) -> None:
        """Keep one more trace; it may replace the least recently used one."""
        self._kept = [*self._kept, kept][-_MOST:]

    def find(self, cell: nn.Module, *settings: Any) -> tuple[Kept | None, Change | None]:
        """The trace that is valid for a cell as it is now, or the change since the latest trace.

        Args:
            cell: The cell, which may have changed.
            settings: The end of the signature.
        """
        fits = [k for k in reversed(self._kept) if k.signature[-len(settings) :] == settings]
        found = next((k for k in fits if k.watched.is_current(cell)), None)
        change = None
        if found is None:
            for kept in fits:  # a slow look
                difference = kept.watched.change(cell)
                if difference is None:
                    found, change = kept, None
                    break
                change = change or difference
        if found is not None:
            self._kept = [*(k for k in self._kept if k is not found), found]
        return found, change
