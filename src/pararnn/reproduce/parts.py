"""Measures figures and tables, and writes them: what `pararnn reproduce` does."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import read_json
from pararnn.lm.data.signals import StopSignals
from pararnn.lm.data.words import say
from pararnn.lm.training.lock import alone_in_run
from pararnn.lm.training.parallel import choose_device
from pararnn.reproduce import residuals, speed, table_6, train_steps
from pararnn.reproduce.catalogue import names_of
from pararnn.reproduce.points import Points, Session, Stopped, facts_of
from pararnn.reproduce.report import Report, markdown, write
from pararnn.reproduce.settings import PRESETS, ReproduceConfig

PARTS: dict[str, tuple[Callable[[Session], None], Callable[[Session], Report], str]] = {
    "figure-1": (speed.measure_1, speed.report_1, "speed/forward/"),
    "figure-4": (residuals.measure, residuals.report, "residual/"),
    "figure-5": (speed.measure_5, speed.report_5, "speed/forward/"),
    "figure-6": (speed.measure_6, speed.report_6, f"speed/{speed.BOTH}/"),
    "table-3": (train_steps.measure, train_steps.report, "train/"),
    "table-6": (table_6.measure, table_6.report, "tasks/"),
}
"""How each is measured and reported, and how the names of its points begin."""


@dataclass(frozen=True)
class Reproduced:
    """The end of a call.

    Attributes:
        reports: What was written.
        left_out: Points without a measurement, with the reason of each.
        stopped_by: Signal that ended it early; None when it ran to its end.
    """

    reports: list[Report]
    left_out: dict[str, str]
    stopped_by: int | None


def reproduce(name: str, config: ReproduceConfig, command: str) -> Reproduced:
    """Measure what is missing in the folder, and write reports.

    Args:
        name: In `pararnn.reproduce.catalogue.CATALOGUE`, or "all".
        config: What is asked for.
        command: How it was asked for, to be stored with the measurements.

    Raises:
        ValueError: There is no such name.
        RunError: The device cannot be used, or the folder holds other measurements.
    """
    names = names_of(name)
    device = None if config.only_draw else _device(config)
    config.out.mkdir(parents=True, exist_ok=True)
    reports: list[Report] = []
    left_out: dict[str, str] = {}
    with alone_in_run(config.out), StopSignals() as stop:
        points = Points(config.out, config.preset)
        session = Session(config, points, device, stop, command)
        if device is not None:
            points.begin(facts_of(device, command))
        stopped_by = None
        for one in names:
            measure, report, prefix = PARTS[one]
            try:
                if device is not None:
                    measure(session)
            except Stopped as stopped:
                stopped_by = stopped.signal
            reports.append(_written(report(session), points, prefix, config.out))
            left_out |= points.left_out(prefix)
            if stopped_by is not None:
                say("Stopped; what is measured is kept. The same command goes on.")
                break
    return Reproduced(reports, left_out, stopped_by)


def _device(config: ReproduceConfig) -> torch.device:
    device = choose_device(config.device)
    if PRESETS[config.preset].needs_gpu and device.type != "cuda":
        raise RunError(
            f"preset {config.preset!r} measures on a CUDA GPU, and the device is {device.type}. "
            "Take --preset smoke for a look on a CPU, or --only-draw for tables and plots of what "
            "another machine measured."
        )
    return device


def _written(report: Report, points: Points, prefix: str, out: Path) -> Report:
    """Store a report, and draw it where matplotlib is."""
    if not report.runs:
        numbers = {v["run"] for name, v in points.values.items() if name.startswith(prefix)}
        report = dataclasses.replace(report, runs=[points.runs[i] for i in sorted(numbers)])
    path = write(report, out)
    say(markdown(report))
    if importlib.util.find_spec("matplotlib") is None:
        say(
            f"No plot: matplotlib is not installed; {out / report.name}.json has all of it. "
            'Install it with pip install "pararnn[plots]" and give the command again with '
            "--only-draw."
        )
    else:
        from pararnn.reproduce.plots import plot

        plot(read_json(out / f"{report.name}.json"), out / f"{report.name}.png")
    say(f"Written to {path}")
    return report
