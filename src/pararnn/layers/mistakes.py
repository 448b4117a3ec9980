"""Errors about a cell end at the user's line: the frames of this library are left out."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

from pararnn.tracing.ran import is_the_users
from pararnn.tracing.recorder import TraceError

Function = TypeVar("Function", bound=Callable[..., Any])
_PLACE = re.compile(r" at (\S.*?\.py):(\d+)")  # as `show_place` writes it


def ends_at_the_cell(function: Function) -> Function:
    """Let errors about a cell, raised while a function of ours runs it, end at the cell's line.

    What they are caused by is shortened as well. Errors that may be faults of this library keep
    all of their frames.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = sys.exc_info()[1]  # what the user's code handles around this call
        try:
            return function(*args, **kwargs)
        except Exception as error:
            for one in reversed(_linked(error, before)):
                _shorten(one)
            raise error

    return run  # type: ignore[return-value]


def _linked(error: BaseException, before: BaseException | None) -> list[BaseException]:
    """An error and those it came from, each once; without what was handled before."""
    found: list[BaseException] = []
    ahead: list[BaseException | None] = [error]
    while ahead:
        one = ahead.pop()
        if one is None or any(one is other for other in (before, *found)):
            continue
        found.append(one)
        ahead += [one.__context__, one.__cause__]
    return found


def _shorten(error: BaseException) -> None:
    """Leave out all frames but the user's, if the error is about the user's code.

    The errors that it came from are shortened already.
    """
    frames = _frames(error.__traceback__)
    own = _users(frames)
    from_inside = bool(frames) and "pararnn" in frames[-1].tb_frame.f_globals.get("__name__", "")
    if isinstance(error, TraceError):
        place = _PLACE.search(str(error))
        own = own or (_frames(_at(place[1], int(place[2]))) if place else [])
    elif from_inside:  # our words for an error of the cell, or a fault of ours
        own = _users(_frames(error.__cause__.__traceback__)) if error.__cause__ else []
    if own or isinstance(error, TraceError):
        error.__traceback__ = _chained(own)


def _frames(traceback: TracebackType | None) -> list[TracebackType]:
    found = []
    while traceback is not None:
        found.append(traceback)
        traceback = traceback.tb_next
    return found


def _users(frames: list[TracebackType]) -> list[TracebackType]:
    return [f for f in frames if is_the_users(f.tb_frame.f_code.co_filename)]


def _chained(frames: list[TracebackType]) -> TracebackType | None:
    """A traceback of these frames alone."""
    chained = None
    for frame in reversed(frames):
        chained = TracebackType(chained, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return chained


def _at(file: str, line: int) -> TracebackType | None:
    """A traceback that ends at a line of a file, although nothing was raised there."""
    code = compile("\n" * (line - 1) + "raise ValueError", file, "exec")
    try:
        exec(code, {"__name__": "the cell"})
    except ValueError as raised:
        return raised.__traceback__ and raised.__traceback__.tb_next
    return None
