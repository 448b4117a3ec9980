"""Sources with a name of their own: the standard library, and datasets with a choice of rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pararnn.lm.data.errors import RunError

STANDARD_LIBRARY = "python-standard-library"
"""The source files of Python's standard library on this machine."""


@dataclass(frozen=True)
class Recipe:
    """A dataset and a choice of rows.

    Attributes:
        dataset: Name, as after `datasets:`.
        keep: Tells for a row whether it is used.
    """

    dataset: str
    keep: Callable[[dict[str, Any]], bool]


def _is_no_book(row: dict[str, Any]) -> bool:
    meta = row.get("meta")
    if not isinstance(meta, dict) or "redpajama_set_name" not in meta:
        raise RunError(
            "a row of the dataset has no meta.redpajama_set_name, so books cannot be recognised; "
            "this is not SlimPajama as its authors published it."
        )
    return meta["redpajama_set_name"] != "RedPajamaBook"


RECIPES = {"slimpajama-no-books": Recipe("cerebras/SlimPajama-627B", _is_no_book)}
"""SlimPajama (Soboleva et al. 2023): 627 billion tokens, of which 4 percent are books."""
