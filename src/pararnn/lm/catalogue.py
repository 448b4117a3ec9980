"""What a language model can be built from, by name; without PyTorch, for command lines.

A cell of the library stands here as the place of its class, which is imported when it is looked up.
"""

from __future__ import annotations

import difflib
import importlib
from collections import UserDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    CellFactory = Callable[..., nn.Module]

ATTENTION = "attention"
BASELINES = ("transformer", "mamba2")


class Cells(UserDict[str, Any]):
    """Factories of cells by name. A factory given as "module:name" is imported when looked up."""

    def __getitem__(self, name: str) -> CellFactory:
        """The factory of a name."""
        factory = self.data[name]
        if isinstance(factory, str):
            module, _, attribute = factory.partition(":")
            factory = self.data[name] = getattr(importlib.import_module(module), attribute)
        return factory


CELLS = Cells(
    paragru="pararnn.cells:ParaGRUCell",
    paralstm="pararnn.cells:ParaLSTMCell",
    elman="pararnn.cells:DiagonalElmanCell",
    mgu="pararnn.cells:MinimalGatedCell",
    janet="pararnn.cells:ForgetGateCell",
    lstm="pararnn.cells:DiagonalLSTMCell",
    slstm="pararnn.cells:SLSTMCell",
    mingru="pararnn.cells:MinGRUCell",
)
"""Cells by the names that `ParaRNNConfig(cell=...)` and `pararnn train --model` take."""


def register_cell(name: str, factory: CellFactory) -> None:
    """Make a cell available to `ParaRNNConfig(cell=name)`.

    Args:
        name: A name that no other factory has.
        factory: Called as `factory(input_size, hidden_size, num_heads=..., **cell_options)`;
            returns a cell for `pararnn.RNN`, whose outputs have `hidden_size` numbers. Its state
            may have any shape.

    Raises:
        ValueError: The name belongs to another factory.
    """
    if CELLS.setdefault(name, factory) is not factory:
        raise ValueError(f"cell name {name!r} is taken by {CELLS[name]!r}; choose another name.")


def architectures() -> list[str]:
    """The names that a language model can have: registered cells and baselines."""
    return [*CELLS, *BASELINES]


def check_architecture(name: str) -> None:
    """Raise ValueError, with the nearest name, if there is no such architecture."""
    known = architectures()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"architecture {name!r} is unknown; perhaps you meant {nearest!r}. There are: "
            f"{', '.join(known)}."
        )
