"""Table 6: the paper's five synthetic tasks, as a suite of `pararnn tasks`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from pararnn.lm.data.files import read_json
from pararnn.reproduce import quoted
from pararnn.reproduce.points import Session, Stopped
from pararnn.reproduce.report import Column, Line, Panel, Report, Table
from pararnn.tasks.report import accuracies, grouped
from pararnn.tasks.settings import PAPER_TASKS, SuiteConfig
from pararnn.tasks.suite import run_suite

ARCHITECTURES = {
    "transformer": "Transformer",
    "mamba2": "Mamba2",
    "paragru": "ParaGRU",
    "paralstm": "ParaLSTM",
}


def suite_config(session: Session) -> SuiteConfig:
    """The suite that Table 6 is."""
    return SuiteConfig(
        tasks=PAPER_TASKS,
        architectures=tuple(ARCHITECTURES),
        out=_folder(session),
        device=str(session.place),
        **session.preset.tasks,
    )


def measure(session: Session) -> None:
    """Train and test what is missing.

    Raises:
        Stopped: A signal ended it; checkpoints are kept.
    """
    session.check()
    result = run_suite(suite_config(session), session.command)
    if result.stopped_by is not None:
        raise Stopped(result.stopped_by)


def _folder(session: Session) -> Path:
    return session.config.out / "table-6"


def report(session: Session) -> Report:
    """Table 6 from the models that there are."""
    path = _folder(session) / "results.json"
    stored: dict[str, Any] = read_json(path) if path.exists() else {"results": [], "failed": {}}
    groups, said = grouped(stored["results"]), quoted.task_accuracy()
    rows, panels = [], []
    for task in PAPER_TASKS:
        best: list[float | None] = []
        for architecture, words in ARCHITECTURES.items():
            group = groups.get((architecture, task), [])
            found = accuracies(group, 0)
            best.append(max(found, default=None))
            median = statistics.median(found) if len(found) > 1 else None
            steps = max((r["steps"] for r in group), default=None)
            rows.append(
                (task, words, best[-1], median, len(found) or None, steps, said[task, architecture])
            )
        lines = [
            Line("here", "measured", None, best, 0),
            Line("the paper", "quoted", None, [said[task, a] for a in ARCHITECTURES], 1),
        ]
        names = list(ARCHITECTURES.values())
        panels.append(Panel(task, "", "accuracy in %", lines, names))
    columns = (
        *(Column("task"), Column("model")),
        Column("best of the seeds", "measured", ".2f"),
        *(Column("median", "measured", ".2f"), Column("seeds"), Column("steps", None, ",")),
        Column("best of 3 seeds", "quoted", "g"),
    )
    table = Table("Accuracy in % at the length of training", columns, rows)
    return Report(
        "table-6",
        "Table 6: synthetic tasks",
        [table],
        panels,
        quoted.TABLE_6,
        _notes(stored),
        _runs(stored),
        columns=3,
    )


def _runs(stored: dict[str, Any]) -> list[dict[str, str]]:
    if not stored["results"]:
        return []
    devices = ", ".join(sorted({r["device"] for r in stored["results"]}))
    return [stored["facts"] | {"device": devices}]


def _notes(stored: dict[str, Any]) -> list[str]:
    notes = [
        "Trained with new samples at every step, larger batches and a higher rate, in place of "
        "3,000 epochs over 10,000 samples; settings and reasons are in the page on synthetic "
        "tasks. Models have two layers in 2-hop, where the paper's have one. `pararnn tasks "
        "--preset paper` has the paper's training and its one layer.",
        "The folder table-6 has all results, at longer sequences too.",
    ]
    return notes + [f"Left out: {name}: {why}." for name, why in stored["failed"].items()]
