"""Measures figures and tables, and writes them: what `pararnn reproduce` does."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import read_json
from pararnn.lm.data.signals import StopSignals
from pararnn.lm.data.words import say
from pararnn.lm.training.lock import alone_in_run
from pararnn.lm.training.parallel import choose_device
from pararnn.reproduce.catalogue import names_of
from pararnn.reproduce.points import Points, Session, Stopped, facts_of
from pararnn.reproduce.report import Report, markdown, write
from pararnn.reproduce.settings import PRESETS, ReproduceConfig


@dataclass(frozen=True)
class Part:
    """How one figure or table is measured and reported.

    Attributes:
        module: Of this package; loaded when it is used, for each needs other packages.
        measure: Its function that measures what a session lacks.
        report: Its function that makes a report of what there is.
        points: How the names of its points begin.
    """

    module: str
    measure: str
    report: str
    points: str

    def call(self, name: str, session: Session) -> Any:
        """Call one of its functions."""
        module = importlib.import_module(f"pararnn.reproduce.{self.module}")
        return getattr(module, name)(session)


PARTS = {
    "figure-1": Part("speed", "measure_1", "report_1", "speed/forward/"),
    "figure-4": Part("residuals", "measure", "report", "residual/"),
    "figure-5": Part("speed", "measure_5", "report_5", "speed/forward/"),
    "figure-6": Part("speed", "measure_6", "report_6", "speed/both/"),
    "table-3": Part("train_steps", "measure", "report", "train/"),
    "table-6": Part("table_6", "measure", "report", "tasks/"),
}


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
            part = PARTS[one]
            try:
                if device is not None:
                    part.call(part.measure, session)
            except Stopped as stopped:
                stopped_by = stopped.signal
            report = part.call(part.report, session)
            reports.append(_written(report, points, part.points, config.out))
            left_out |= points.left_out(part.points)
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
