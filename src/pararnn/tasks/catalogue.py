"""All tasks by name."""

from __future__ import annotations

import difflib

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
from pararnn.tasks.task import Task

TASKS: dict[str, Task] = {
    "keep-nth": KeepNth(),
    "parity": Parity(),
    "mqar": AssociativeRecall(),
    "1-hop": KHop(hops=1, values=10),
    "2-hop": KHop(hops=2, values=5),
    "s3": WordProblem(degree=3),
    "s5": WordProblem(degree=5),
    "s5-swaps": WordProblem(degree=5, by_swaps=True),
    "modular-counting": ModularCounting(),
    "automaton": FiniteAutomaton(),
    "dyck-2": Dyck2(),
    "needle": Needle(),
    "selective-copying": SelectiveCopying(),
}
"""The tasks of `pararnn tasks`; the first five are those of Danieli et al. 2025, Table 6."""


def find_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: There is none; the message has the nearest name.
    """
    if name not in TASKS:
        nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no task {name!r}; perhaps you meant {nearest!r}. There are: "
            f"{', '.join(TASKS)}."
        )
    return TASKS[name]
