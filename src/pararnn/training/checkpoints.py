"""Checkpoints that are either whole or absent, and known to be unharmed when read.

    checkpoints/step-00000100/
        model.safetensors, config.json, ...   whole, as `from_pretrained` reads them
        state/                                parameters, optimiser, random states: in parts, as
                                              `torch.distributed.checkpoint` writes them
        progress.json                         step, seconds, processes
        manifest.json                         format, step, run, SHA-256 of every file

A checkpoint is written into a hidden folder, flushed to the disk and then renamed. `saving` writes
them, this module knows what lies on the disk.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from pararnn.data.errors import RunError
from pararnn.data.files import digest, sync_file, sync_folder, write_atomically

FORMAT = "pararnn-checkpoint-2"
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
STATE = "state"


class CheckpointError(RunError):
    """A checkpoint that cannot be written or must not be read."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder and the optimiser steps it was taken after."""

    path: Path
    step: int

    @property
    def state(self) -> Path:
        """Folder of what `torch.distributed.checkpoint` wrote."""
        return self.path / STATE

    def read_progress(self) -> dict[str, Any]:
        """What a trainer noted beside its tensors."""
        return json.loads((self.path / PROGRESS).read_bytes())


def begin(folder: Path, step: int) -> Path:
    """An empty hidden folder to write a checkpoint into; those of killed runs are deleted."""
    for leftover in folder.glob(".*-step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder / f".saving-step-{step:08d}"
    temporary.mkdir(parents=True)
    return temporary


def complete(temporary: Path, step: int, run: str) -> Checkpoint:
    """Turn a folder from `begin` in which all is written into a checkpoint."""
    paths = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in paths:
        sync_file(path)
    manifest = {
        "format": FORMAT,
        "step": step,
        "run": run,
        "files": {path.relative_to(temporary).as_posix(): digest(path) for path in paths},
    }
    write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
    target = temporary.with_name(temporary.name.removeprefix(".saving-"))
    _discard(target)
    temporary.replace(target)
    sync_folder(target.parent)
    return Checkpoint(target, step)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the last checkpoints."""
    for path in list_checkpoints(folder)[:-keep]:
        _discard(path)


def verify(path: Path, run: str | None = None) -> Checkpoint:
    """Read the manifest and compare every file with it.

    Args:
        path: Folder of one checkpoint.
        run: Identity that it must have; None for any.

    Raises:
        CheckpointError: Not one of ours, of another run, incomplete or damaged.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files, step, owner = manifest["files"], int(manifest["step"]), manifest["run"]
        ours = manifest["format"] == FORMAT
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} has no {MANIFEST}: not a ParaRNN checkpoint") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path.name}/{MANIFEST} is damaged") from error
    if not ours:
        raise CheckpointError(f"{path.name} has format {manifest['format']!r}, not {FORMAT!r}")
    if run is not None and owner != run:
        raise CheckpointError(f"{path.name} belongs to a run with other settings or other data")
    for name, expected in files.items():
        try:
            found = digest(path / name)
        except OSError as error:
            raise CheckpointError(f"{path.name}/{name} is missing or unreadable") from error
        if found != expected:
            raise CheckpointError(f"{path.name}/{name} is damaged (its checksum differs)")
    return Checkpoint(path, step)


def newest_checkpoint(
    folder: Path, run: str | None = None
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The last good checkpoint, and what is wrong with those after it.

    Raises:
        CheckpointError: There are checkpoints, but none is good.
    """
    problems: list[CheckpointError] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return verify(path, run), problems
        except CheckpointError as error:
            problems.append(error)
    if problems:
        reasons = "; ".join(str(problem) for problem in problems)
        raise CheckpointError(
            f"no usable checkpoint in {folder}: {reasons}. Restore one from a copy, or train anew "
            "with another --out."
        )
    return None, []


def set_aside(folder: Path, after: Checkpoint) -> None:
    """Rename the checkpoints later than the one in use, so that they are never counted as good."""
    for path in list_checkpoints(folder):
        if path.name > after.path.name:
            aside = path.with_name(f"unusable-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.replace(aside)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars off the screen."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(folder.glob("step-*"))


def _discard(path: Path) -> None:
    """Delete a checkpoint; it vanishes at once, so none is ever found half deleted."""
    if path.exists():
        hidden = path.with_name(f".deleting-{path.name}")
        shutil.rmtree(hidden, ignore_errors=True)
        path.replace(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
