"""`pararnn tasks`."""

import sys
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from pararnn.cli.arguments import parse
from pararnn.lm.data.words import show
from pararnn.tasks.architectures import ARCHITECTURES
from pararnn.tasks.catalogue import TASKS
from pararnn.tasks.settings import SuiteConfig


@dataclass(kw_only=True)
class TasksArguments:
    """Train small models on synthetic tasks, and test them at longer sequences.

    Call it again to continue a stopped run. --list names all tasks and architectures.
    """

    config: Annotated[SuiteConfig, tyro.conf.arg(name="")] = field(default_factory=SuiteConfig)
    list: bool = False
    """Name all tasks and architectures, and stop."""


def run(arguments: "list[str]") -> int:
    """Train, test, and write table, plots and JSON.

    Returns:
        0; 1 if a model failed; 128 plus the number of the signal that stopped it.
    """
    parsed = parse(TasksArguments, "tasks", arguments)
    if parsed.list:
        width = max(map(len, TASKS))
        show("Tasks:")
        for name, task in TASKS.items():
            text = (sys.modules[type(task).__module__].__doc__ or "").partition("\n\n")[0]
            show(f"  {name:{width}}  {' '.join(text.split())}")
        show(f"Architectures: {', '.join(ARCHITECTURES)}; and stacks such as paragru+attention.")
        return 0
    from pararnn.tasks.suite import run_suite  # transformers is slow to import

    result = run_suite(parsed.config, " ".join(["pararnn tasks", *arguments]))
    show(f"Written to {parsed.config.out}")
    if result.stopped_by is not None:
        return 128 + result.stopped_by
    return 1 if result.failed else 0
