"""Checks of what must be a whole number: sizes, counts, seeds, tokens."""

from __future__ import annotations

import dataclasses
import numbers
import types
import typing
from typing import Any


def check_whole(**values: Any) -> None:
    """Raise TypeError unless all are whole numbers, such as `size` of a shape."""
    for name, value in values.items():
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}.")


def check_whole_fields(config: Any, prefix: str = "") -> None:
    """Raise TypeError where a field of a dataclass should hold whole numbers and does not.

    Args:
        config: The dataclass; the types of its fields say which may be None, or hold several.
        prefix: Before the names in messages.
    """
    try:
        hints = typing.get_type_hints(type(config))
    except NameError:  # a name that only type checkers have, in the class of a user
        return
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        hint = hints[field.name]
        if hint == tuple[int, ...] and isinstance(value, (tuple, list)):
            check_whole(**{f"{prefix}{field.name}[{i}]": v for i, v in enumerate(value)})
        elif hint is int or (_may_be_none(hint) and value is not None):
            check_whole(**{f"{prefix}{field.name}": value})


def _may_be_none(hint: Any) -> bool:
    """Whether it is `int | None`."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return False
    return set(typing.get_args(hint)) == {int, type(None)}
