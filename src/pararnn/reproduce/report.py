"""A figure or table as data: written as JSON and Markdown, and drawn from the JSON alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pararnn.lm.data.files import write_atomically
from pararnn.reproduce.quoted import PAPER, Quoted

Origin = Literal["measured", "quoted", "estimated"]
"""Measured by this library here; quoted from the paper; or estimated, by a way that is told."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: With the unit.
        origin: Of its numbers; None where it says what they belong to.
        form: Format of its numbers.
    """

    heading: str
    origin: Origin | None = None
    form: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of numbers; None where there is none."""

    heading: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Line:
    """A line of a panel.

    Attributes:
        name: For the legend.
        origin: Of its numbers.
        x: Where; None for places 0, 1, ... of the panel's names.
        y: Numbers, None where there is none.
        color: Number of a colour; lines of one kind share it.
        dashed: Draw it so.
    """

    name: str
    origin: Origin
    x: Sequence[float] | None
    y: Sequence[float | None]
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """A picture.

    Attributes:
        title: Above it.
        x_label: Below it.
        y_label: At its side.
        lines: What it shows.
        names: Of places along x, which are then bars; None for lines over numbers.
        log_x: Logarithmic to the base 2.
        log_y: Logarithmic.
    """

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    names: Sequence[str] | None = None
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Report:
    """All of a figure or table.

    Attributes:
        name: As in the command.
        title: What it shows.
        tables: Numbers.
        panels: Plot.
        quoted: What the paper says of it.
        notes: How it was measured, and what is missing.
        runs: Commands, devices, versions and dates of the measurements.
        columns: Panels side by side.
    """

    name: str
    title: str
    tables: Sequence[Table]
    panels: Sequence[Panel]
    quoted: Sequence[Quoted]
    notes: Sequence[str]
    runs: Sequence[dict[str, str]] = field(default_factory=list)
    columns: int = 2


def write(report: Report, folder: Path) -> Path:
    """Write NAME.json and NAME.md; returns the path of the latter."""
    stored = dataclasses.asdict(report) | {"paper": PAPER}
    text = json.dumps(stored, indent=1) + "\n"
    write_atomically(folder / f"{report.name}.json", text.encode())
    path = folder / f"{report.name}.md"
    write_atomically(path, markdown(report).encode())
    return path


def markdown(report: Report) -> str:
    """The page of a report."""
    parts = [f"# {report.title}", *map(_run_line, report.runs)]
    if not report.runs:
        parts.append("Nothing is measured yet.")
    for table in report.tables:
        if table.rows:
            parts += [_heading(table), _table(table)]
    quoted = Table(
        f"What the paper says ({PAPER})",
        (Column("of"), Column("it says", "quoted"), Column("section, figure or table")),
        [(q.what, q.says, q.where) for q in report.quoted],
    )
    parts += [_heading(quoted), _table(quoted)]
    if report.notes:
        parts.append("\n".join(f"- {note}" for note in report.notes))
    parts.append(f"![{report.title}]({report.name}.png)")
    return "\n\n".join(parts) + "\n"


def _run_line(run: dict[str, str]) -> str:
    return (
        f"`{run['command']}`, {run['date']}, {run['device']}, torch {run['torch']}, "
        f"pararnn {run['pararnn']}, Python {run['python']}."
    )


def _heading(table: Table) -> str:
    origin = _one_origin(table)
    return f"{table.heading}:" if origin is None else f"{table.heading}, {origin}:"


def _table(table: Table) -> str:
    """Markdown whose columns are aligned, so that it reads well on a terminal too."""
    headings = [
        c.heading if c.origin is None or _one_origin(table) else f"{c.heading}, {c.origin}"
        for c in table.columns
    ]
    rows = [headings]
    for row in table.rows:
        rows.append([_cell(v, c.form) for v, c in zip(row, table.columns, strict=True)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(headings))]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in rows
    )


def _one_origin(table: Table) -> Origin | None:
    """The origin of all numbers, where there is one; it is then told in the heading."""
    origins = {column.origin for column in table.columns} - {None}
    return origins.pop() if len(origins) == 1 else None


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return value.replace("|", "\\|") if isinstance(value, str) else format(value, form)
