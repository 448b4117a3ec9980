"""Requests by the names that operators are called with."""

from __future__ import annotations

import json
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Generic, TypeVar

from pararnn.planning.settings import Jacobi, Newton, Picard, QuasiNewton, Sequential, Solver
from pararnn.tracing.modes import apart

_VERSION = 1
_READ = 64  # requests of texts that are kept
_METHODS = {m.__name__: m for m in (Newton, QuasiNewton, Picard, Jacobi, Sequential)}

Request = TypeVar("Request")


class Name(str):
    """A name that keeps its request alive: the request lives as long as a layer holds the name."""

    request: Any


class Registry(Generic[Request]):
    """Finds requests by name, or by text in exported and compiled programs.

    Args:
        read: Makes a request from the content that `write` wrote.
    """

    def __init__(self, read: Callable[[dict[str, Any]], Request]) -> None:
        self._read = read
        self._alive: weakref.WeakValueDictionary[str, Request] = weakref.WeakValueDictionary()
        self._latest: OrderedDict[str, Request] = OrderedDict()

    def add(self, name: str, make: Callable[[], Request]) -> Name:
        """The name of a request; `make` makes the request if none has this name."""
        request = self._alive.get(name)
        if request is None:
            request = self._alive[name] = make()
        kept = Name(name)
        kept.request = request
        return kept

    def __getitem__(self, name: str) -> Request:
        found = self._alive.get(name)
        if found is None:
            found = self._alive[name] = self._latest[name] = apart(lambda: self._made(name))
            if len(self._latest) > _READ:
                self._latest.popitem(last=False)
        return found

    def _made(self, text: str) -> Request:
        if not text.startswith("{"):
            raise RuntimeError(
                f"pararnn: there is no layer with the request {text!r} in this process; call the "
                "layer, or export it by torch.export, which writes the request into the program."
            )
        try:
            content = json.loads(text)
            if content.pop("pararnn") != _VERSION:
                raise ValueError("another version wrote it")
            return self._read(content)
        except Exception as error:  # a damaged text fails anywhere in reading and recording
            raise ValueError(
                f"pararnn: the program has a request that cannot be read ({type(error).__name__}: "
                f"{error}); export it again with this version of pararnn."
            ) from error


def write(**content: Any) -> str:
    """The text of a request."""
    return json.dumps({"pararnn": _VERSION, **content}, separators=(",", ":"))


def write_solver(solver: Solver | None) -> dict[str, Any] | None:
    """Settings as JSON values."""
    if solver is None:
        return None
    given = {f.name: getattr(solver, f.name) for f in fields(solver) if f.init}
    return {"method": type(solver).__name__, **given}


def read_solver(content: dict[str, Any] | None) -> Solver | None:
    """The settings that `write_solver` wrote."""
    if content is None:
        return None
    method = _METHODS[content["method"]]
    return method(**{name: value for name, value in content.items() if name != "method"})
