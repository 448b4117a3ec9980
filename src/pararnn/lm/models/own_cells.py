"""Cells in a file of the user: imported from it, and named by its content."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.metadata
import inspect
import json
import sys
import sysconfig
import traceback
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from pararnn.lm.catalogue import CELLS, OwnName, register_cell


@dataclass(frozen=True)
class OwnCell:
    """Makes cells of a class in a user's file.

    Attributes:
        name: "FILE.py:CLASS@DIGEST".
        path: Of the file that was imported.
        kind: The class.
        source: The file.
    """

    name: str
    path: Path
    kind: type[nn.Module]
    source: bytes = field(repr=False)

    def __call__(
        self, input_size: int, hidden_size: int, num_heads: int, **options: Any
    ) -> nn.Module:
        """A cell, called with the number of heads only if the class takes it."""
        if self._takes("num_heads"):
            options["num_heads"] = num_heads
        if unknown := [name for name in options if not self._takes(name)]:
            known = [p for p in inspect.signature(self.kind).parameters if p != "num_heads"][2:]
            raise ValueError(
                f"{self.kind.__name__} has no option {unknown[0]!r}; it has "
                f"{', '.join(known) or 'none'} (arguments of its __init__ after input_size and "
                "hidden_size)."
            )
        cell = self.kind(input_size, hidden_size, **options)
        if not any(hasattr(cell, name) for name in ("hidden_size", "state_shape")):
            cell.hidden_size = hidden_size  # type: ignore[assignment] # a number for the layer
        return cell

    def _takes(self, option: str) -> bool:
        parameters = inspect.signature(self.kind).parameters
        return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @property
    def keeps(self) -> Any:
        """As of a `DiagonalCell`: which gate forgets; None without the option for its memory."""
        return getattr(self.kind, "keeps", None) if self._takes("max_timescale") else None


def import_cell(place: str) -> str:
    """Run a Python file and make a cell in it available to `ParaRNNConfig(cell=...)`.

    Args:
        place: "FILE.py:CLASS". The class is called as `CLASS(input_size, hidden_size, **options)`,
            with `num_heads` among them if it takes that; it is a cell for `pararnn.RNN`, whose
            outputs have `hidden_size` numbers.

    Returns:
        The name of the cell: "FILE.py:CLASS@DIGEST". The digest is that of the file, so a model is
        not opened with another version of its cell.

    Raises:
        ValueError: There is no such file or class, the file cannot be run, or its digest is not
            the one in `place`.
    """
    own = OwnName.of(place)
    if own is None:
        raise ValueError(f"{place!r} names no cell in a file; write FILE.py:CLASS.")
    try:
        source = own.path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {own.path}: {error.strerror or error}.") from error
    digest = hashlib.sha256(source).hexdigest()[: OwnName.DIGITS]
    if own.digest not in ("", digest):
        raise ValueError(
            f"{own.path} is not the file of this model (its digest is {digest}, not {own.digest}); "
            "restore it from a copy."
        )
    name = f"{own.path.name}:{own.kind}@{digest}"
    if name not in CELLS:
        kind = _class(_run(own.path, source, f"pararnn_cell_{digest}"), own)
        register_cell(name, OwnCell(name, own.path, kind, source))
    return name


def own_cells(folder: Path) -> list[str]:
    """Cells in files that the model in a folder has, and that are not imported yet.

    Raises:
        ValueError: Its `config.json` is damaged.
    """
    stored = json.loads((folder / "config.json").read_bytes())
    names = [str(n) for n in (stored.get("cell"), *(stored.get("mixers") or ()))]
    return [n for n in dict.fromkeys(names) if n not in CELLS and OwnName.stored(n)]


def import_cells(folder: str | Path) -> list[str]:
    """Run the Python files in a model's folder that hold its cells, so that it can be opened.

    Args:
        folder: As `pararnn train` or `save_pretrained` wrote it, with the files of the cells.

    Returns:
        The names of the cells that were imported.

    Raises:
        ValueError: A file is missing, cannot be run, or is not the one of the model.
    """
    names = own_cells(Path(folder))
    return [import_cell(str(Path(folder) / name)) for name in names]


def files_of(names: list[str]) -> dict[str, bytes]:
    """The files of those cells that were imported from one, by name."""
    cells = [CELLS[name] for name in names if name in CELLS]
    found = [cell for cell in cells if isinstance(cell, OwnCell)]
    return {cell.name.partition(":")[0]: cell.source for cell in found}


def not_kept(name: str) -> list[str]:
    """Files that the file of a cell imports and that are no installed packages: no run has them.

    Args:
        name: Of an imported cell.
    """
    cell = CELLS[name]
    found: dict[str, None] = {}
    if isinstance(cell, OwnCell):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [node.module or ""]
            else:
                continue
            for module in imported:
                place = getattr(sys.modules.get(module), "__file__", None)
                if place is not None and not _is_installed(module.partition(".")[0], place):
                    found[place] = None
    return list(found)


def _is_installed(package: str, place: str) -> bool:
    """Whether a file belongs to Python or to an installed package, maybe in a folder of its own."""
    paths = sysconfig.get_paths()
    if place.startswith(tuple(paths[kind] for kind in ("stdlib", "purelib", "platlib"))):
        return True
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return package in ("pararnn", *importlib.metadata.packages_distributions())
    return True


def _run(path: Path, source: bytes, name: str) -> types.ModuleType:
    """Import a file alone, without the folder that it lies in."""
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses and pickles look there
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{path} cannot be imported: {told(error, path)}") from error
    return module


def told(error: BaseException, path: Path) -> str:
    """An error in one line, with the line of a file where it came from."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    where = f" (line {lines[-1]})" if lines else ""
    hint = ""
    if isinstance(error, ModuleNotFoundError):
        hint = " A run keeps this one file: what else a cell needs must be an installed package."
    return f"{type(error).__name__}: {str(error).rstrip('.')}{where}.{hint}"


def _class(module: types.ModuleType, own: OwnName) -> type[nn.Module]:
    kinds = {
        name: kind
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, nn.Module)
    }
    if own.kind not in kinds:
        here = [name for name, kind in kinds.items() if kind.__module__ == module.__name__]
        nearest = difflib.get_close_matches(own.kind, here, n=1, cutoff=0.0)
        perhaps = f"; perhaps you meant {own.path}:{nearest[0]}" if nearest else ""
        raise ValueError(f"{own.path} has no nn.Module called {own.kind}{perhaps}.")
    return kinds[own.kind]
