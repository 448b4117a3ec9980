"""Record the Python code that a step ran, and the names that this code may have read."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch
from torch import Tensor

_PATHS = sysconfig.get_paths()
_FOLDERS = Path(torch.__file__).parent, Path(__file__).parents[1]
LIBRARY = (*(str(folder) + os.sep for folder in _FOLDERS), "<frozen")
_PYTHON = tuple({_PATHS[kind] + os.sep for kind in ("stdlib", "platstdlib")})
_PACKAGES = tuple({_PATHS[kind] + os.sep for kind in ("purelib", "platlib")})
_TAKES = ("tolist", "numpy")  # copy values into Python without an operation
# Code that names one of these may read attributes by names that it computes.
_BY_COMPUTED_NAME = frozenset(
    "getattr vars dir __dict__ __slots__ __getattribute__ attrgetter methodcaller eval exec "
    "globals locals getattr_static __reduce_ex__".split()
)


def unnoted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Hide a function of ours, and what it calls, from `Ran.noting`, which would slow it down."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        notes = sys.getprofile()
        if not isinstance(getattr(notes, "__self__", None), Ran):
            return function(*args, **kwargs)
        sys.setprofile(None)
        try:
            return function(*args, **kwargs)
        finally:
            sys.setprofile(notes)

    return run


class Ran:
    """The user's code that ran, and the functions of Python's standard library that it called.

    Attributes:
        codes: Code objects with their globals, by the `id` of the code.
        names: Names and strings in this code and in all standard-library code that ran: globals,
            attributes, keys.
        computes_names: Whether this code may have read an attribute by a computed name.
        taken: The method (`tolist` or `numpy`) that last copied values of a tensor into Python, and
            the file and line that called it. None if there was no such call.
    """

    def __init__(self) -> None:
        self.codes: dict[int, tuple[CodeType, dict[str, Any]]] = {}
        self.names: set[str] = set()
        self.taken: tuple[str, tuple[str, int]] | None = None
        self._pythons: dict[int, CodeType] = {}
        self._known: dict[int, CodeType] = {}  # code that needs no further note
        self.computes_names = False

    def reads(self, name: str) -> bool:
        """Whether the code may have read an attribute of this name."""
        return self.computes_names or name in self.names

    def globals(self) -> list[tuple[dict[str, Any], list[str]]]:
        """The globals that the user's code names, module by module."""
        found: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
        for code, seen in self.codes.values():
            if is_the_users(code.co_filename):
                named = dict.fromkeys(n for n in _names(code) if n in seen)
                found.setdefault(id(seen), (seen, {}))[1].update(named)
        return [(seen, list(names)) for seen, names in found.values()]

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Note the code that runs in this thread; other profilers and garbage collection pause."""
        before, collects = sys.getprofile(), gc.isenabled()
        gc.disable()
        sys.setprofile(self._note)
        try:
            yield
        finally:
            sys.setprofile(None)
            if collects:
                gc.enable()
            if callable(before):
                sys.setprofile(before)
            elif before is not None:
                before.enable()  # a cProfile.Profile, up to Python 3.11
            names = {n for code, _ in self.codes.values() for n in _names(code)}
            self.computes_names = not names.isdisjoint(_BY_COMPUTED_NAME)
            self.names = names.union(*map(_names, self._pythons.values()))

    def _note(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "call" and id(frame.f_code) not in self._known:
            self._note_call(frame)
        elif event == "c_call" and (way := function.__name__) in _TAKES:
            self._note_taken(frame, way, function.__self__)

    def _note_call(self, frame: FrameType) -> None:
        code, caller = frame.f_code, frame.f_back
        is_noted = is_the_users(code.co_filename)
        if _is_pythons(code.co_filename):
            self._pythons[id(code)] = code
            is_noted = caller is not None and id(caller.f_code) in self.codes
            if not is_noted:
                return  # its next caller may be the user's code
        self._known[id(code)] = code
        if is_noted:
            self.codes[id(code)] = code, frame.f_globals

    def _note_taken(self, frame: FrameType | None, way: str, owner: Any) -> None:
        """Note a method that the user's code called on a tensor, itself or by `np.asarray`.

        Args:
            frame: The caller.
            way: The name of the method.
            owner: The object whose method it is.
        """
        if not isinstance(owner, Tensor):
            return
        while frame is not None and frame.f_code.co_filename.startswith(LIBRARY):
            frame = frame.f_back
        if frame is not None and id(frame.f_code) in self.codes:
            self.taken = way, (frame.f_code.co_filename, frame.f_lineno)


def is_the_users(filename: str) -> bool:
    """Whether code of this file is neither PyTorch's nor Python's nor this package's."""
    return not filename.startswith(LIBRARY) and not _is_pythons(filename)


def _is_pythons(filename: str) -> bool:
    return filename.startswith(_PYTHON) and not filename.startswith(_PACKAGES)


def has_users_code(value: type | ModuleType) -> bool:
    """Whether a class or module is neither PyTorch's nor Python's nor this package's."""
    module = value if isinstance(value, ModuleType) else sys.modules.get(value.__module__)
    file = getattr(module, "__file__", None)
    if file is None:  # built in, or made by hand
        return module is None or module.__name__ not in sys.builtin_module_names
    return is_the_users(file)


def _names(code: CodeType) -> Iterator[str]:
    """Names and strings in a code object and in the functions within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from (c for c in constant if isinstance(c, str))
        elif isinstance(constant, CodeType):
            yield from _names(constant)
