"""Measurements of a run: a line of JSON per step, and a plot of them."""

import importlib.util
import io
import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pararnn._words import counted
from pararnn.lm.data.files import free_name, write_atomically
from pararnn.lm.data.words import bar, say
from pararnn.lm.training.run_folder import RunFolder
from pararnn.lm.training.trackers import Tracker


class MetricsFile:
    """Appends one JSON object per step.

    Args:
        path: The file.
        last_step: Steps that the run goes on from; lines after it are removed, as is a line that
            a crash cut short. Where other lines are no records, the file is kept under another
            name.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        records, broken = _read_lines(path)
        if broken:
            aside = free_name(path.with_name(f"unusable-{path.name}"))
            path.replace(aside)
            say(
                f"Set aside: {path} as {aside.name}, because of "
                f"{counted(len(broken), 'line')}, the first being line {broken[0]}, without a "
                "record of a step; the others are kept."
            )
        kept = [record for record in records if record["step"] <= last_step]
        write_atomically(path, b"".join(_line(record) for record in kept))
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; it survives the end of the process at once."""
        self._file.write(_line(record))

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class StepLog:
    """Notes steps and validations in files, for TensorBoard and as a bar on the screen.

    Args:
        run: Its folder.
        last_step: Steps that the run goes on from.
        steps: Steps that it goes to.
        send: Gets the same values, by names such as "train/loss".
    """

    def __init__(self, run: RunFolder, last_step: int, steps: int, send: Tracker) -> None:
        self.run, self.send = run, send
        self.metrics = MetricsFile(run.metrics, last_step)
        self.validation = MetricsFile(run.validation, last_step)
        self.board = SummaryWriter(str(run.tensorboard), purge_step=last_step + 1)
        self.progress = bar(None, steps, "step", initial=last_step)

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.metrics.close()
        self.validation.close()
        self.board.close()
        self.progress.close()

    def write(self, record: dict[str, Any]) -> None:
        """Note one step."""
        self.metrics.write(record)
        self._show("train", record)
        mfu = f", MFU {record['mfu']:.0%}" if "mfu" in record else ""
        self.progress.set_postfix_str(
            f"loss {record['loss']:.3f}, {record['bits_per_byte']:.3f} bits/byte, "
            f"{record['tokens_per_second']:,.0f} tokens/s{mfu}",
            refresh=False,
        )
        self.progress.update()

    def write_validation(self, record: dict[str, Any]) -> None:
        """Note one validation."""
        self.validation.write(record)
        self._show("validation", record)

    def sync(self) -> None:
        """Wait until all records are on the disk, and draw them."""
        self.metrics.sync()
        self.validation.sync()
        plot_loss(self.run)

    def _show(self, kind: str, record: dict[str, Any]) -> None:
        step = record["step"]
        values = {f"{kind}/{name}": value for name, value in record.items() if name != "step"}
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.send(step, values)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a file; none when it does not exist."""
    return _read_lines(path)[0]


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Records, and the numbers of the lines that are none."""
    records, broken = [], []
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
        else:
            broken.append(number)
    return records, broken


def plot_loss(run: RunFolder) -> bool:
    """Draw bits per byte over steps; False when matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_curve(run.metrics), linewidth=1, label="training")
    axes.plot(*_curve(run.validation), "o-", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="bits per byte", title=run.path.name)
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    write_atomically(run.plot, drawn.getvalue())
    return True


def _curve(path: Path) -> tuple[list[int], list[float]]:
    """Steps and bits per byte of a file."""
    records = [r for r in read_metrics(path) if isinstance(r.get("bits_per_byte"), float)]
    return [r["step"] for r in records], [r["bits_per_byte"] for r in records]


def show_result(
    folder: Path, step: int, values: dict[str, float], settings: dict[str, Any], sample: str
) -> None:
    """Show the end of a run in TensorBoard: validation, settings beside it, generated text.

    Args:
        folder: Of TensorBoard.
        step: Optimiser steps done.
        values: Of the validation, by name.
        settings: By name; what is no number, text or bool is shown as text.
        sample: Generated text.
    """
    plain = {n: v if isinstance(v, (int, float, str)) else str(v) for n, v in settings.items()}
    results = {f"validation/{name}": value for name, value in values.items()}
    with SummaryWriter(str(folder)) as board:
        for name, value in results.items():
            board.add_scalar(name, value, step)
        board.add_text("sample", "".join(f"    {line}\n" for line in sample.splitlines()), step)
        board.add_hparams(plain, results, run_name=".", global_step=step)


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
