"""Measured points in one file, written after every one, so that a stopped run loses none."""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import pararnn
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import read_json, write_atomically
from pararnn.lm.data.signals import StopSignals
from pararnn.lm.data.words import say
from pararnn.reproduce.settings import PRESETS, Preset, ReproduceConfig

Values = dict[str, Any]
"""What was measured at one point; the one key "left_out" with a reason where nothing was."""
FILE = "points.json"


class Stopped(Exception):
    """A signal asked to stop.

    Attributes:
        signal: Its number.
    """

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal


class Points:
    """The points of a folder, by name.

    Args:
        folder: Where they are kept.
        preset: Its points only.

    Raises:
        RunError: The folder holds points of another preset, or its file is damaged.
    """

    def __init__(self, folder: Path, preset: str) -> None:
        self.path = folder / FILE
        self.preset = preset
        self.runs: list[dict[str, str]] = []
        self.values: dict[str, Values] = {}
        if not self.path.exists():
            return
        try:
            stored = read_json(self.path)
            found = stored["preset"]
            self.runs, self.values = list(stored["runs"]), dict(stored["points"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.path} is damaged ({error}); delete it, or choose another --out."
            ) from error
        if found != preset:
            raise RunError(
                f"{folder} holds points of preset {found!r}, but now it is {preset!r}; choose "
                "another --out, or that preset."
            )

    def begin(self, facts: dict[str, str]) -> None:
        """Points from now on are measured under these facts.

        Raises:
            RunError: Others were measured on another device.
        """
        devices = {run["device"] for run in self.runs}
        if devices - {facts["device"]}:
            raise RunError(
                f"{self.path} holds points from {', '.join(sorted(devices))}, but this is "
                f"{facts['device']}; choose another --out."
            )
        if facts not in self.runs:
            self.runs.append(facts)
        self._run = self.runs.index(facts)

    def add(self, name: str, values: Values) -> None:
        """Store one point at once."""
        self.values[name] = values | {"run": self._run}
        stored = {"preset": self.preset, "runs": self.runs, "points": self.values}
        # many points take less time than a disk takes to be written to
        write_atomically(self.path, (json.dumps(stored, indent=1) + "\n").encode(), sync=False)

    def measured(self, name: str) -> Values | None:
        """A point that was measured, or None."""
        values = self.values.get(name)
        return None if values is None or "left_out" in values else values

    def left_out(self, prefix: str) -> dict[str, str]:
        """Points without a measurement whose name begins so: name and reason."""
        return {
            name: values["left_out"]
            for name, values in self.values.items()
            if name.startswith(prefix) and "left_out" in values
        }


@dataclass
class Session:
    """One call: what is asked for, where, and what is known so far.

    Attributes:
        config: What is asked for.
        preset: Its sizes.
        points: Of the folder.
        device: Where to measure; None to measure nothing.
        stop: Signals.
        command: How it was asked for.
    """

    config: ReproduceConfig
    points: Points
    device: torch.device | None
    stop: StopSignals
    command: str
    preset: Preset = field(init=False)

    def __post_init__(self) -> None:
        self.preset = PRESETS[self.config.preset]

    @property
    def place(self) -> torch.device:
        """The device, where there must be one."""
        assert self.device is not None
        return self.device

    def check(self) -> None:
        """Raise `Stopped` after a signal."""
        if self.stop.received is not None:
            raise Stopped(self.stop.received)

    def point(self, name: str, measure: Callable[[], Values]) -> None:
        """Measure a point that is not there yet, and store it.

        An error is stored as the reason why it was left out, and the next call tries again: the
        other points must still be measured.
        """
        if self.points.measured(name) is not None:
            return
        self.check()
        begin = time.perf_counter()
        try:
            values = measure()
        except torch.OutOfMemoryError:
            values = {"left_out": "out of memory"}
            gc.collect()
        except Stopped:
            raise
        except Exception as error:
            values = {"left_out": f"{type(error).__name__}: {_first_line(error)}"}
        self.points.add(name, values)
        shown = ", ".join(f"{k} {_short(v)}" for k, v in values.items() if _is_short(v))
        say(f"{name}: {shown} ({time.perf_counter() - begin:.1f} s)")


def facts_of(device: torch.device, command: str) -> dict[str, str]:
    """What measurements depend on."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} CPU"
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "pararnn": pararnn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _is_short(value: Any) -> bool:
    return isinstance(value, (int, float, str))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
