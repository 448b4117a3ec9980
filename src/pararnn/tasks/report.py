"""Results of a suite as lines and tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from pararnn._words import counted
from pararnn.tasks.architectures import ARCHITECTURES
from pararnn.tasks.catalogue import TASKS

Result = dict[str, Any]
"""What `training.Training` writes about one model."""
Group = dict[tuple[str, str], list[Result]]
"""Results of all seeds by architecture and task."""


def order(result: Result) -> tuple[int, int, str, int]:
    """By task, architecture and seed."""
    tasks, names = list(TASKS), list(ARCHITECTURES)
    name = result["architecture"]
    place = names.index(name) if name in names else len(names)
    return tasks.index(result["task"]), place, name, result["seed"]


def grouped(results: list[Result]) -> Group:
    """Results by architecture and task."""
    groups: Group = {}
    for result in results:
        groups.setdefault((result["architecture"], result["task"]), []).append(result)
    return groups


def accuracies(results: list[Result], place: int) -> list[float]:
    """Accuracy of every seed, in per cent, at one of the lengths: 0 for that of training."""
    return [100 * list(r["tests"].values())[place]["accuracy"] for r in results]


def accuracy_line(result: Result) -> str:
    """One line about a model."""
    tests = ", ".join(
        f"{percent(100 * test['accuracy'])} % at {int(length):,}"
        for length, test in result["tests"].items()
    )
    return (
        f"{result['task']}, {result['architecture']}, seed {result['seed']}: {tests} tokens; "
        f"{result['ended']} after {counted(result['steps'], 'step')}, "
        f"{result['train_seconds']:.0f} s"
    )


def percent(value: float) -> str:
    """One digit; 100 only for what has no mistake."""
    return "100" if value == 100 else f"{min(value, 99.9):.1f}"


def tables(results: list[Result]) -> str:
    """Accuracy in per cent by architecture and task: at the length of training, and at the longest.

    Each entry is the best of the seeds, and their median if there are several.
    """
    lengths = list(results[0]["tests"])
    longest = int(lengths[-1]) // int(lengths[0])
    parts = []
    for place, where in ((0, "the length of training"), (-1, f"{longest} times this length")):
        parts.append(f"Accuracy in % at {where}, best of the seeds (median):")
        parts.append(_table(results, lambda group, p=place: _entry(accuracies(group, p))))  # type: ignore[misc] # bound at once
    return "\n\n".join([*parts, *_published(results)])


def _entry(values: list[float]) -> str:
    best = percent(max(values))
    return best if len(values) == 1 else f"{best} ({percent(statistics.median(values))})"


def _table(results: list[Result], entry: Callable[[list[Result]], str]) -> str:
    """A Markdown table whose columns are aligned, so that it reads well on a terminal too."""
    groups = grouped(results)
    tasks = list(dict.fromkeys(r["task"] for r in results))
    names = sorted({(order(r)[1:3]) for r in results})
    rows = [["", *tasks]]
    for _, name in names:
        found = [groups.get((name, task)) for task in tasks]
        rows.append([name, *(entry(group) if group else "" for group in found)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in rows
    )


def _published(results: list[Result]) -> list[str]:
    """The published figures of the tasks, each with its source."""
    lines = []
    for task in dict.fromkeys(r["task"] for r in results):
        known = TASKS[task].known
        if known:
            figures = ", ".join(f"{k.architecture} {k.accuracy:g}" for k in known)
            lines.append(f"- {task}: {figures} ({known[0].source})")
    return ["Published, in %:", "\n".join(lines)] if lines else []


def page(results: list[Result], facts: dict[str, str]) -> str:
    """A page of Markdown: what was measured how, and the tables."""
    devices = ", ".join(sorted({f"{r['device']} with torch {r['torch']}" for r in results}))
    seconds = sum(r["train_seconds"] + r["test_seconds"] for r in results)
    head = (
        f"`{facts['command']}`, {facts['date']}, {devices}. {counted(len(results), 'model')} took "
        f"{seconds:,.0f} s of training and tests together; those side by side count in full."
    )
    return "\n\n".join(["# Synthetic tasks", head, tables(results)]) + "\n"
