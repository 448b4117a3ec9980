"""The names of `pararnn reproduce`, with what each shows and how long it takes."""

from __future__ import annotations

import difflib
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A figure or table of the paper.

    Attributes:
        shows: In words.
        takes: Time, by preset.
    """

    shows: str
    takes: str


CATALOGUE: dict[str, Entry] = {
    "figure-1": Entry(
        "forward pass of ParaGRU and ParaLSTM against one step after another, 2^2 to 2^9 steps",
        "under a minute on a GPU (an estimate)",
    ),
    "figure-4": Entry(
        "residuals of Newton's iterations, at initialisation and after training",
        "about a minute on a GPU (an estimate), with a short training of two small models",
    ),
    "figure-5": Entry(
        "forward pass against length, 2^2 to 2^17 steps, by the library's methods and by others",
        "about a minute on a GPU (an estimate)",
    ),
    "figure-6": Entry(
        "forward and backward pass likewise",
        "about a minute on a GPU (an estimate)",
    ),
    "table-3": Entry(
        "train steps of language models of 400M, 1B, 2.9B and 7B parameters on one GPU",
        "about a minute for each of 16 models on a GPU (an estimate), most of it compiling",
    ),
    "table-6": Entry(
        "accuracy on the five synthetic tasks, best of 3 seeds",
        "up to an hour on a GPU (an estimate)",
    ),
}
ALL = "all"


def names_of(name: str) -> list[str]:
    """The one name, or all.

    Raises:
        ValueError: There is none; the message has the nearest name.
    """
    if name == ALL:
        return list(CATALOGUE)
    if name not in CATALOGUE:
        known = [*CATALOGUE, ALL]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no {name!r}; perhaps you meant {nearest!r}. There are: {', '.join(known)}."
        )
    return [name]
