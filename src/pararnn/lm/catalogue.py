"""What a language model can be built from, by name; without PyTorch, for command lines.

Mixers are what mixes over time in a block: cells, memories with a matrix state, and attention.
Those of the library stand here as the places of their classes, which are imported when they are
looked up.

A stack of blocks is one line, for language models and for the tasks alike: names joined by `+`,
with a number of times and an `x` before those that follow each other. `3xparagru+m2rnn` has four
parts; a model of more blocks repeats them.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import nn

    from pararnn.cells import MatrixMemoryCell

    CellFactory = Callable[..., nn.Module]
    MemoryFactory = Callable[..., MatrixMemoryCell]

ATTENTION = "attention"
TRANSFORMER, MAMBA2 = "transformer", "mamba2"
BASELINES = (TRANSFORMER, MAMBA2)
"""Whole models of transformers, when one of these names stands alone for an architecture."""


class Table(UserDict[str, Any]):
    """Things by name. What is given as "module:name" is imported when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        """What has a name."""
        factory = self.data[name]
        if isinstance(factory, str):
            module, _, attribute = factory.partition(":")
            factory = self.data[name] = getattr(importlib.import_module(module), attribute)
        return factory


CELLS = Table(
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

MEMORIES = Table(
    {
        "m2rnn": "pararnn.cells:M2RNNCell",
        "delta": "pararnn.cells:DeltaMemoryCell",
        "outer": "pararnn.cells:OuterMemoryCell",
        "gated-deltanet": "pararnn.cells:GatedDeltaCell",
        "mamba2": "pararnn.cells:Mamba2Cell",
    }
)
"""Memories with a matrix state by the names that `ParaRNNConfig(mixers=...)` takes."""

LINEAR = Table(
    {"gated-deltanet": "pararnn.lm.linear:GATED_DELTA", "mamba2": "pararnn.lm.linear:SIMPLE_GLA"}
)
"""Memories whose linear step another package computes over all times at once."""


def register_cell(name: str, factory: CellFactory) -> None:
    """Make a cell available to `ParaRNNConfig(cell=name)`.

    Args:
        name: A name that no other mixer has, of letters, digits, - and _, beginning with a letter.
        factory: Called as `factory(input_size, hidden_size, num_heads=..., **cell_options)`;
            returns a cell for `pararnn.RNN`, whose outputs have `hidden_size` numbers. Its state
            may have any shape.

    Raises:
        ValueError: The name belongs to another mixer or model, or no command line can have it.
    """
    _register(name, factory, CELLS)


def register_memory(name: str, factory: MemoryFactory) -> None:
    """Make a memory with a matrix state available to `ParaRNNConfig(mixers=[..., name, ...])`.

    Its block projects what the memory writes and reads with, and has the convolution, `silu`, the
    gate, the norm and what skips the memory.

    Args:
        name: A name that no other mixer has, of letters, digits, - and _, beginning with a letter.
        factory: Called as `factory(None, key_size, value_size, num_heads=..., shared_keys=...,
            **memory_options)`; returns a `MatrixMemoryCell` that is a memory alone.

    Raises:
        ValueError: The name belongs to another mixer or model, or no command line can have it.
    """
    _register(name, factory, MEMORIES)


def _register(name: str, factory: Callable[..., Any], table: Table) -> None:
    if not (_NAME.fullmatch(name) or OwnName.stored(name)):
        raise ValueError(
            f"mixer name {name!r} cannot be part of a stack such as 3xparagru+m2rnn; choose a name "
            "of letters, digits, - and _ that begins with a letter."
        )
    others = [place[name] for place in (CELLS, MEMORIES) if place is not table and name in place]
    others += [_RESERVED[name]] if name in _RESERVED else []
    if others or table.setdefault(name, factory) is not factory:
        found = (others or [table[name]])[0]
        raise ValueError(f"mixer name {name!r} is taken by {found!r}; choose another name.")


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


def mixers() -> list[str]:
    """The names of all mixers."""
    return [*CELLS, *MEMORIES, ATTENTION]


def architectures() -> list[str]:
    """The names of whole models: cells and memories, in all blocks, and baselines."""
    return [*(n for n in (*CELLS, *MEMORIES) if n not in BASELINES), *BASELINES]


def check_mixer(name: str) -> None:
    """Raise ValueError, with the nearest name, if there is no such mixer."""
    if name not in mixers():
        raise ValueError(_unknown("mixer", name, "", mixers()))


def check_architecture(name: str) -> None:
    """Raise ValueError, with the nearest name, if there is no such baseline, stack or file."""
    if name.endswith(".py"):
        raise ValueError(f"{name!r} is a file; name the class of the cell too: {name}:CLASS.")
    own = OwnName.of(name)
    if own and not own.digest and not own.path.is_file():
        raise ValueError(f"there is no file {str(own.path)!r}, which should hold {own.kind}.")
    if name not in BASELINES:
        parts(name)


def parts(architecture: str) -> list[str]:
    """The mixers of a line such as `3xparagru+m2rnn`, in order; a cell in a file stands alone.

    Raises:
        ValueError: A part is no mixer, or there is nothing but attention.
    """
    if OwnName.of(architecture):
        return [architecture]
    found: list[str] = []
    for part in architecture.split("+"):
        times, name = _TIMES.fullmatch(part).groups()  # type: ignore[union-attr] # matches anything
        alone = name == architecture
        where, known = ("", architectures()) if alone else (f" in {architecture!r}", mixers())
        if name not in known:
            raise ValueError(_unknown("architecture", name, where, known))
        found += [name] * int(times or 1)
    return found


def repeated(stack: list[str], num_layers: int) -> list[str]:
    """The mixers of all blocks: those of a stack from the first on, and over again."""
    return [stack[i % len(stack)] for i in range(num_layers)]


def read_options(field: str, given: Sequence[str]) -> dict[str, Any]:
    """Options of a command line as values of Python; what is none is a text.

    Args:
        field: `cell_options` or `memory_options`.
        given: Each NAME=VALUE.

    Raises:
        ValueError: One is something else, or a name comes twice.
    """
    options: dict[str, Any] = {}
    for option in given:
        name, sign, value = option.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"{field} is {option}; it must be NAME=VALUE.")
        if name in options:
            raise ValueError(f"{field} is {option}; it must be given once for a name.")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def unused_options(mixers: Sequence[str]) -> list[str]:
    """Which of `cell_options` and `memory_options` no block takes; a cell may be one in a file."""
    kinds = {"memory" if n in MEMORIES else "cell" for n in mixers if n != ATTENTION}
    return [field for field, kind in _OPTIONS.items() if kind not in kinds]


def check_used(mixers: Sequence[str], model: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if there are options of cells, or of memories, that no block takes.

    Args:
        mixers: Of all blocks; none in a baseline.
        model: What the message calls it.
        options: `cell_options` and `memory_options`, as far as they are given.
    """
    for field in unused_options(mixers):
        if given := options.get(field):
            kind = _OPTIONS[field]
            raise ValueError(
                f"{field} is {given}, but no block of {model} has a {kind}; leave it out, or name "
                f"a {kind} for a block."
            )


def check_names(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if a cell or a memory does not take options of such names.

    Args:
        name: Of the mixer.
        options: What its block hands on to it, besides sizes and heads.
    """
    kind, table = ("memory", MEMORIES) if name in MEMORIES else ("cell", CELLS)
    accepted = _accepted(table[name], dict(options))
    if unknown := [option for option in options if option not in accepted]:
        known = [n for n in inspect.signature(table[name]).parameters if n not in _OF_THE_BLOCK]
        raise ValueError(
            f"{kind} {name!r} does not take {kind}_options {', '.join(map(repr, unknown))}. They "
            f"are {', '.join(known) or 'none'}."
        )


def cell_options(stack: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that all cells of a stack take: a model has one set for all of them.

    `max_timescale` is taken by cells with a gate whose bias sets a time. Without a cell there are
    none.
    """
    if "cell_options" in unused_options(stack):
        return {}
    for name in stack:
        if name in CELLS:
            options = _accepted(CELLS[name], options)
            if getattr(CELLS[name], "keeps", None) is None:
                options.pop("max_timescale", None)
    return options


def _accepted(factory: CellFactory, options: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(options)
    names = {p.name for p in parameters}
    return {name: value for name, value in options.items() if name in names}


_OPTIONS = {"cell_options": "cell", "memory_options": "memory"}
_OF_THE_BLOCK = ("input_size", "hidden_size", "num_heads", "device", "dtype")
_TIMES = re.compile(r"(?:([1-9]\d*)x)?(.*)", re.DOTALL)
_NAME = re.compile(r"[^\W\d_][\w-]*")
_RESERVED = {ATTENTION: "attention itself", TRANSFORMER: "a model of that name"}


def _unknown(what: str, name: str, where: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    if name == TRANSFORMER:
        nearest = ATTENTION
    before, _, behind = name.partition(":")
    if before and behind:  # as a Python module is named
        nearest = f"{before}.py:{behind}"
    advice = f"perhaps you meant {nearest!r}" if name else "a name is missing"
    if "=" in behind:
        given = f"--memory-options {behind.replace(',', ' ')}"
        advice = f"options stand apart from names, as in pararnn train {given}"
    return (
        f"there is no {what} {name!r}{where}; {advice}. There are: "
        f"{', '.join(known)}; stacks such as 3xparagru+m2rnn; and FILE.py:CLASS, a cell of your "
        "own. pararnn.lm.models.register_cell and register_memory add names."
    )
