"""Command lines parsed into dataclasses."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import tyro

Arguments = TypeVar("Arguments")


def parse(
    kind: type[Arguments],
    name: str,
    arguments: list[str],
    default: Arguments | None = None,
    description: str | None = None,
) -> Arguments:
    """Parse the arguments of a command; its help begins with the description, or the docstring.

    A misspelt flag ends the process with status 2 and names the nearest right one. A value that a
    configuration refuses ends it with status 2 and the reason.
    """
    with refused(name):
        return tyro.cli(
            kind,
            prog=f"pararnn {name}",
            args=arguments,
            description=description,
            default=tyro.MISSING_NONPROP if default is None else default,
            config=(tyro.conf.FlagCreatePairsOff,),
        )


@contextmanager
def refused(name: str) -> Iterator[None]:
    """A ValueError ends the process with status 2 and the reason."""
    try:
        yield
    except ValueError as error:
        print(f"pararnn {name}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
