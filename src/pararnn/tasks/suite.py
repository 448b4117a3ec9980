"""All tasks, architectures and seeds: what `pararnn tasks` does.

A folder holds one subfolder for each model. What is finished is read from there, what was stopped
goes on from its checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pararnn.lm.data.signals import StopSignals
from pararnn.lm.data.words import say
from pararnn.lm.data.workers import Processes
from pararnn.lm.models.architectures import missing_kernels
from pararnn.lm.training.lock import alone_in_run
from pararnn.lm.training.parallel import choose_device
from pararnn.tasks.report import Result, accuracy_line, tables
from pararnn.tasks.results import save_results
from pararnn.tasks.settings import Settings, SuiteConfig, models_at_once
from pararnn.tasks.side_by_side import (
    Inline,
    Outcome,
    Stream,
    more_connections,
    side_by_side,
)
from pararnn.tasks.training import Pieces, Unit, finish, stored_result, train_unit

_STOP = ".stop"  # a file by which workers are told to stop: it reaches any process
_LOOK_EVERY = 0.5  # seconds between two looks at signals while workers work


@dataclass(frozen=True)
class SuiteResult:
    """The end of a suite.

    Attributes:
        results: One for every model that is finished, of this call or another in the folder.
        failed: Models that ended in an error, with its message.
        stopped_by: Signal that ended it early; None when it ran to its end.
    """

    results: list[Result]
    failed: dict[str, str]
    stopped_by: int | None


def run_suite(config: SuiteConfig, command: str = "") -> SuiteResult:
    """Train and test all that is not yet in the folder; print and store tables and plots.

    Args:
        config: What is asked for.
        command: How it was asked for, to be stored with the results.

    Raises:
        RunError: The device cannot be used, or the folder is in use or holds runs of other
            settings.
    """
    more_connections()
    device = choose_device(config.device)
    todo = {
        Unit(task, architecture, seed): config.settings(task)
        for seed in range(config.seeds)
        for task in config.tasks
        for architecture in config.architectures
    }
    config.out.mkdir(parents=True, exist_ok=True)
    for architecture in config.architectures:
        if missing := missing_kernels(architecture):
            say(f"Note: {architecture} takes {missing}.")
    with alone_in_run(config.out):
        (config.out / _STOP).unlink(missing_ok=True)
        finished = {
            unit: result
            for unit, settings in todo.items()
            if (result := stored_result(unit, settings, _folder(config.out, unit), device))
        }
        if finished:
            say(f"{len(finished)} of {len(todo)} models are finished in {config.out}.")
        left = {unit: settings for unit, settings in todo.items() if unit not in finished}
        count, reason = models_at_once(config.side_by_side, len(left), device.type)
        if count > 1:
            say(f"{count} models side by side, {reason}.")
        failed: dict[str, str] = {}
        number = len(finished)
        with StopSignals() as stop:
            for unit, result, error in _train(left, config.out, device, count, stop):
                if error is not None:
                    failed[str(unit)] = error
                    say(f"{unit} failed: {error}")
                elif result is not None:
                    number += 1
                    say(f"[{number}/{len(todo)}] {accuracy_line(result)}")
        results = save_results(config.out, command, failed)
    if results:
        say(tables(results))
    if stop.received is not None and number < len(todo):
        say(f"Stopped with {number} of {len(todo)} models; the same command goes on.")
        return SuiteResult(results, failed, stop.received)
    return SuiteResult(results, failed, None)


def _folder(out: Path, unit: Unit) -> Path:
    return out / "models" / str(unit)


def _train(
    units: dict[Unit, Settings], out: Path, device: torch.device, count: int, stop: StopSignals
) -> Iterator[Outcome]:
    """Results as they come, or what went wrong; neither for a unit that was stopped."""
    on_gpu = device.type == "cuda"
    if count > 1 and not on_gpu:
        return _in_processes(units, out, device, count, stop)

    def is_stopped() -> bool:
        return stop.received is not None

    def start(unit: Unit) -> Pieces:
        return train_unit(unit, units[unit], _folder(out, unit), device, is_stopped)

    lanes = [Stream(device, i) if on_gpu else Inline() for i in range(count)]
    return side_by_side(list(units), start, lanes, is_stopped)


def _in_processes(
    units: dict[Unit, Settings], out: Path, device: torch.device, count: int, stop: StopSignals
) -> Iterator[Outcome]:
    with Processes(count) as workers:
        futures: dict[Future[Any], Unit] = {
            workers.submit(_in_worker, unit, settings, out, str(device)): unit
            for unit, settings in units.items()
        }
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, _LOOK_EVERY, FIRST_COMPLETED)
            for future in done:
                if not future.cancelled():
                    yield _outcome(futures[future], future)
            if stop.received is not None:
                (out / _STOP).touch()
                for future in waiting:
                    future.cancel()


def _outcome(unit: Unit, future: Future[Any]) -> Outcome:
    """One model that fails does not take the others with it; its error is reported."""
    try:
        return unit, future.result(), None
    except Exception as error:
        return unit, None, f"{type(error).__name__}: {error}"


def _in_worker(unit: Unit, settings: Settings, out: Path, device: str) -> Result | None:
    """Train in a process of many."""
    torch.set_num_threads(1)
    path = out / _STOP
    if path.exists():
        return None
    place = torch.device(device)
    return finish(train_unit(unit, settings, _folder(out, unit), place, path.exists))
