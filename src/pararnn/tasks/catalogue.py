"""All tasks by name."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pararnn.tasks.task import Task

_NAMES = (
    "keep-nth",
    "parity",
    "mqar",
    "1-hop",
    "2-hop",
    "s3",
    "s5",
    "s5-swaps",
    "modular-counting",
    "automaton",
    "dyck-2",
    "needle",
    "selective-copying",
)


@functools.cache
def _made() -> dict[str, Task]:
    """The tasks; only here PyTorch is imported, which `--help` need not wait for."""
    from pararnn.tasks.automaton import FiniteAutomaton
    from pararnn.tasks.dyck import Dyck2
    from pararnn.tasks.groups import WordProblem
    from pararnn.tasks.k_hop import KHop
    from pararnn.tasks.keep_nth import KeepNth
    from pararnn.tasks.modular_counting import ModularCounting
    from pararnn.tasks.mqar import AssociativeRecall
    from pararnn.tasks.needle import Needle
    from pararnn.tasks.parity import Parity
    from pararnn.tasks.selective_copying import SelectiveCopying

    tasks = (
        KeepNth(),
        Parity(),
        AssociativeRecall(),
        KHop(hops=1, values=10),
        KHop(hops=2, values=5),
        WordProblem(degree=3),
        WordProblem(degree=5),
        WordProblem(degree=5, by_swaps=True),
        ModularCounting(),
        FiniteAutomaton(),
        Dyck2(),
        Needle(),
        SelectiveCopying(),
    )
    return dict(zip(_NAMES, tasks, strict=True))


class _Tasks(Mapping[str, "Task"]):
    """All tasks by name; the names alone need no PyTorch."""

    def __getitem__(self, name: str) -> Task:
        return _made()[name]

    def __contains__(self, name: object) -> bool:
        return name in _NAMES

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)


TASKS: Mapping[str, Task] = _Tasks()
"""The tasks of `pararnn tasks`; the first five are those of Danieli et al. 2025, Table 6."""


def check_task(name: str) -> None:
    """Refuse a name that no task has.

    Raises:
        ValueError: There is none; the message has the nearest name.
    """
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no task {name!r}; perhaps you meant {nearest!r}. There are: "
            f"{', '.join(TASKS)}."
        )


def find_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: There is none; the message has the nearest name.
    """
    check_task(name)
    return TASKS[name]
