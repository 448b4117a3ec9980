"""What a language model can be built from, by name; without PyTorch, for command lines.

A cell of the library stands here as the place of its class, which is imported when it is looked up.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

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


@dataclass(frozen=True)
class OwnName:
    """The name of a cell in a user's file: "FILE.py:CLASS", or "FILE.py:CLASS@DIGEST" in a run.

    Attributes:
        path: The file.
        kind: The class.
        digest: The first digits of the SHA-256 of the file; empty where any will do.
    """

    DIGITS: ClassVar[int] = 12

    path: Path
    kind: str
    digest: str = ""

    @classmethod
    def of(cls, name: str) -> OwnName | None:
        """The parts of a name; None if it is that of another architecture."""
        parts = re.fullmatch(rf"(.+\.py):(\w+)(?:@([0-9a-f]{{{cls.DIGITS}}}))?", name)
        return None if parts is None else cls(Path(parts[1]), parts[2], parts[3] or "")

    @classmethod
    def stored(cls, name: str) -> bool:
        """Whether a run or a model may have such a name: a file without a folder, with digest."""
        own = cls.of(name)
        return own is not None and own.digest != "" and own.path.name == str(own.path)


def architectures() -> list[str]:
    """The names that a language model can have: registered cells and baselines."""
    return [*CELLS, *BASELINES]


def check_architecture(name: str) -> None:
    """Raise ValueError, with the nearest name, if there is no such architecture."""
    known = architectures()
    if name.endswith(".py"):
        raise ValueError(f"{name!r} is a file; name the class of the cell too: {name}:CLASS.")
    if own := OwnName.of(name):
        if not own.digest and not own.path.is_file():
            raise ValueError(f"there is no file {str(own.path)!r}, which should hold {own.kind}.")
    elif name not in known:
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"architecture {name!r} is unknown; perhaps you meant {nearest!r}. There are: "
            f"{', '.join(known)}; and FILE.py:CLASS, a cell of your own."
        )
