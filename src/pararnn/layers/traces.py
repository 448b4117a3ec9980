"""The latest traces of a cell: what alternates between a few values is traced once for each."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from pararnn.layers.evaluate import Evaluation
from pararnn.tracing.watch import Change, Watched

_MOST = 4


class Kept(NamedTuple):
    """A trace of a cell.

    Attributes:
        signature: Inputs, types, device and settings that it is for.
        sizes: Channels of every component of the state.
        evaluation: What evaluates it.
        watched: What it depends on.
        is_parametrised: Whether weights are computed.
    """

    signature: tuple[Any, ...]
    sizes: tuple[int, ...]
    evaluation: Evaluation
    watched: Watched
    is_parametrised: bool


class Traces:
    """So many that a mode or a setting can be switched back without a new trace."""

    def __init__(self) -> None:
        self._kept: list[Kept] = []  # the latest used comes last

    def add(self, kept: Kept) -> None:
        """Keep one more, in the place of the one that was used the longest ago."""
        self._kept = [*self._kept, kept][-_MOST:]

    def find(self, cell: nn.Module, *settings: Any) -> tuple[Kept | None, Change | None]:
        """The trace that holds for a cell as it is now, or what has changed since the latest.

        Args:
            cell: Which is as it was for one of them, or not.
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
