"""Figures 1, 5 and 6: times against length."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from pararnn.bench.timing import call_milliseconds
from pararnn.lm.data.words import say
from pararnn.lm.data.workers import Processes
from pararnn.reproduce import quoted
from pararnn.reproduce.methods import CELLS, METHODS, TOLERANCE, Problem, Unavailable, prepared
from pararnn.reproduce.points import Session, Values
from pararnn.reproduce.report import Column, Line, Panel, Report, Table

BOTH = "both"
_FIGURE_1 = ("loop", "loop in a graph", "library")
_MOST_PROCESSES = 32  # each has a context on the device


@dataclass(frozen=True)
class Place:
    """One point of a figure.

    Attributes:
        cell: In `CELLS`.
        method: In `METHODS`.
        way: "forward" or "both".
        batch: Sequences.
        width: Channels.
        time: Steps.
    """

    cell: str
    method: str
    way: str
    batch: int
    width: int
    time: int

    @property
    def name(self) -> str:
        """Of the point."""
        size = f"B{self.batch} D{self.width} T{self.time}"
        return f"speed/{self.way}/{self.cell}/{self.method}/{size}"


def measure_1(session: Session) -> None:
    """Times of Figure 1."""
    _measure(session, _places(session, "forward", session.preset.short, _FIGURE_1))


def measure_5(session: Session) -> None:
    """Times of Figure 5."""
    _measure(session, _places(session, "forward", session.preset.long, METHODS))


def measure_6(session: Session) -> None:
    """Times of Figure 6."""
    _measure(session, _places(session, BOTH, session.preset.long, METHODS))


def _places(
    session: Session, way: str, lengths: Sequence[int], methods: Iterable[str]
) -> list[Place]:
    config, longest = session.config, session.preset.longest
    return [
        Place(cell, method, way, config.batch_size, config.width, time)
        for cell in CELLS
        for time in lengths
        for method in methods
        if time <= longest.get(method, time)
    ]


def _measure(session: Session, places: list[Place]) -> None:
    missing = [p for p in places if session.points.measured(p.name) is None]
    if session.place.type == "cuda" and missing:
        session.check()
        _compile(missing)
    # the methods of a cell and length follow one another: they share one problem
    problem = functools.lru_cache(maxsize=1)(Problem)
    for place in missing:
        session.point(place.name, functools.partial(_time, session, place, problem))


def _time(session: Session, place: Place, problem: Callable[..., Problem]) -> Values:
    try:
        given = problem(*_size(place), session.place)
        call = prepared(given, METHODS[place.method], place.way)
    except Unavailable as error:
        return {"left_out": str(error)}
    preset = session.preset
    times = call_milliseconds(
        call,
        session.place,
        warm_ups=preset.warm_ups,
        repeats=preset.repeats,
        budget_ms=preset.budget_ms,
    )
    return {"ms": min(times), "median_ms": statistics.median(times), "calls": len(times)}


def _size(place: Place) -> tuple[str, int, int, int]:
    return place.cell, place.batch, place.time, place.width


def _compile(places: list[Place]) -> None:
    """Compile kernels in as many processes as there are cores; they stay in Triton's cache."""
    compiled = [p for p in places if METHODS[p.method].kernels]
    count = min(_MOST_PROCESSES, os.cpu_count() or 1, len(compiled))
    if count < 2:
        return
    try:
        with Processes(count) as pool:
            list(pool.map(_run_once, compiled))
    except BrokenProcessPool:  # a script that does not guard its main part; compiled one by one
        say("Note: kernels are compiled one after another, since processes cannot be started.")


def _run_once(place: Place) -> None:
    """Run a point once, whatever comes of it: if it fails, it fails again where it is timed."""
    try:
        problem = Problem(*_size(place), torch.device("cuda"))
        layer = METHODS[place.method].make(problem.cell).to("cuda")
        problem.call(layer, place.way)()
        torch.cuda.synchronize()
    except Exception:
        return


def report_1(session: Session) -> Report:
    """Figure 1: how much faster than one step after another."""
    lengths = session.preset.short
    rows, times, speed_ups = [], [], []
    for number, cell in enumerate(CELLS):
        curves = {m: _curve(session, cell, m, "forward", lengths) for m in _FIGURE_1}
        ours = curves["library"]
        ratios = {
            m: [_ratio(a, b) for a, b in zip(curves[m], ours, strict=True)] for m in _FIGURE_1[:2]
        }
        found = [*curves.values(), *ratios.values()]
        rows += [(cell, *row) for row in zip(lengths, *found, strict=True) if any(row[1:])]
        times += _lines(lengths, curves, f"{cell}, ", bool(number))
        speed_ups += _lines(lengths, ratios, f"{cell}, against the ", bool(number))
    speed_ups += [
        Line("the paper, one cell", "quoted", [quoted.SPEED_UP_LENGTH], [value], 2 + number)
        for number, value in enumerate(quoted.SPEED_UPS)
    ]
    columns = [Column(m, "measured", ".4f") for m in _FIGURE_1]
    columns += [Column(f"library over {m}", "measured", ",.1f") for m in _FIGURE_1[:2]]
    heading = "Forward pass: milliseconds, and how many times as fast"
    table = Table(heading, (Column("cell"), Column("steps", None, ","), *columns), rows)
    return Report(
        "figure-1",
        "Figure 1: forward pass against one step after another",
        [table, _perplexities()],
        [
            _panel("Forward pass", "milliseconds", times),
            _panel("Times as fast as one step after another", "times as fast", speed_ups),
        ],
        quoted.FIGURE_1,
        [
            *_notes(session, "forward", _FIGURE_1),
            "The perplexities of the right half take the paper's training runs; not measured.",
        ],
    )


def _perplexities() -> Table:
    models = ("ParaGRU", "ParaLSTM", "Mamba2", "Transformer")
    columns = (Column("size"), *(Column(model, "quoted", ".2f") for model in models))
    rows = [(s, *(p[model] for model in models)) for s, p in quoted.PERPLEXITY.items()]
    return Table("Right half of the figure: perplexity", columns, rows)


def report_5(session: Session) -> Report:
    """Figure 5: the forward pass by all methods."""
    title = "Figure 5: forward pass by different methods"
    return _report(session, "figure-5", title, "forward", quoted.FIGURE_5)


def report_6(session: Session) -> Report:
    """Figure 6: forward and backward by all methods."""
    title = "Figure 6: forward and backward pass by different methods"
    return _report(session, "figure-6", title, BOTH, quoted.FIGURE_6)


def _report(
    session: Session, name: str, title: str, way: str, said: Sequence[quoted.Quoted]
) -> Report:
    lengths = session.preset.long
    tables, panels = [], []
    for cell in CELLS:
        curves = {m: _curve(session, cell, m, way, lengths) for m in METHODS}
        columns = [Column(method, "measured", ".4f") for method in METHODS]
        rows = [
            (time, *(curves[method][place] for method in METHODS))
            for place, time in enumerate(lengths)
            if any(curves[method][place] is not None for method in METHODS)
        ]
        heading = f"{cell}, milliseconds"
        tables.append(Table(heading, (Column("steps", None, ","), *columns), rows))
        panels.append(_panel(cell, "milliseconds", _lines(lengths, curves, "", False)))
    table = _over_mamba(session, way)
    if way == "forward":
        panels.append(_mamba_panel(table))
    notes = _notes(session, way, METHODS)
    return Report(name, title, [*tables, table], panels, said, notes, columns=len(panels))


def _over_mamba(session: Session, way: str) -> Table:
    """Mamba's time over the cell's where the paper compares them."""
    rows = []
    for cell in CELLS:
        (mamba,) = _curve(session, cell, "Mamba", way, [quoted.SPEED_UP_LENGTH])
        for method in ("Newton in kernels", "library"):
            (ours,) = _curve(session, cell, method, way, [quoted.SPEED_UP_LENGTH])
            said = quoted.OVER_MAMBA[cell, "fused"] if way == "forward" else quoted.NOT_QUOTED
            rows.append((cell, method, _ratio(mamba, ours), said))
    columns = (
        Column("cell"),
        Column("method"),
        Column("times as fast as Mamba", "measured", ".2f"),
        Column("the paper's fused kernel", "quoted", ".1f"),
    )
    return Table(f"At {quoted.SPEED_UP_LENGTH} steps, against Mamba's scan", columns, rows)


def _mamba_panel(table: Table) -> Panel:
    """The same as bars, one group for each cell."""
    methods = dict.fromkeys(row[1] for row in table.rows)
    lines = [
        Line(m, "measured", None, [r[2] for r in table.rows if r[1] == m], list(METHODS).index(m))
        for m in methods
    ]
    said = [quoted.OVER_MAMBA[cell, "fused"] for cell in CELLS]
    lines.append(Line("the paper, fused", "quoted", None, said, 1))
    return Panel(table.heading, "", "times as fast as Mamba", lines, list(CELLS))


def _curve(
    session: Session, cell: str, method: str, way: str, lengths: Sequence[int]
) -> list[float | None]:
    config = session.config
    places = [Place(cell, method, way, config.batch_size, config.width, time) for time in lengths]
    found = [session.points.measured(place.name) for place in places]
    return [None if values is None else values["ms"] for values in found]


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _lines(
    lengths: Sequence[int], curves: dict[str, list[float | None]], before: str, dashed: bool
) -> list[Line]:
    """One for each method that has a number, always in the method's colour."""
    colors = list(METHODS)
    return [
        Line(f"{before}{m}", "measured", list(lengths), values, colors.index(m), dashed)
        for m, values in curves.items()
        if any(value is not None for value in values)
    ]


def _panel(title: str, y_label: str, lines: Sequence[Line]) -> Panel:
    return Panel(title, "steps", y_label, list(lines), log_x=True, log_y=True)


def _notes(session: Session, way: str, methods: Iterable[str]) -> list[str]:
    config, preset, methods = session.config, session.preset, tuple(methods)
    notes = [
        f"Batch {config.batch_size}, {config.width} channels, float32, input projection included. "
        "The paper's sizes are not quoted.",
        f"The fastest of up to {preset.repeats} calls after up to {preset.warm_ups}, fewer where "
        f"they take longer than {preset.budget_ms:g} ms together; on a GPU by events, caches "
        "flushed before each call.",
        f"Outputs and gradients are compared with float64 first: {TOLERANCE:.0e} of the largest "
        "is allowed.",
    ]
    notes += [f"{name}: {METHODS[name].means}." for name in methods]
    notes += [
        f"{name} ends at {length:,} steps: beyond them it takes too long."
        for name, length in preset.longest.items()
        if name in methods
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for point, reason in session.points.left_out(f"speed/{way}/").items():
        _, _, cell, method, size = point.split("/")
        if method in methods and size.startswith(f"B{config.batch_size} D{config.width} "):
            reasons.setdefault((method, reason), []).append(f"{cell} {size}")
    notes += [
        f"Left out: {method} ({len(points)} points, {points[0]} first): {reason}."
        for (method, reason), points in reasons.items()
    ]
    return notes
