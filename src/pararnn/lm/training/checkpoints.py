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
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import (
    digest,
    free_name,
    read_json,
    sync_file,
    sync_folder,
    write_atomically,
)
from pararnn.lm.models.architectures import foreign_fields
from pararnn.lm.training.run_folder import MANIFEST as MANIFEST
from pararnn.lm.training.state_index import INDEX, is_plain, part_names, read_index

FORMAT = "pararnn-checkpoint-2"
CONFIG = "config.json"
PROGRESS = "progress.json"
STATE = "state"
STATE_INDEX = f"{STATE}/{INDEX}"
_SAVING = ".saving-"


class CheckpointError(RunError):
    """A checkpoint that cannot be written or must not be read."""


class OtherRunError(CheckpointError):
    """A checkpoint of other settings or other data."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: Its folder.
        step: Optimiser steps it was taken after.
        files: Checksums of its files, by their names.
    """

    path: Path
    step: int
    files: dict[str, str]

    @property
    def state(self) -> Path:
        """Folder of the files that `torch.distributed.checkpoint` wrote."""
        return self.path / STATE

    def read_progress(self) -> dict[str, Any]:
        """The trainer's values other than tensors."""
        return read_json(self.path / PROGRESS)


def begin(folder: Path, step: int) -> Path:
    """An empty hidden folder to write a checkpoint into; those of killed runs are deleted."""
    for leftover in folder.glob(".*-step-*"):
        _remove(leftover)
    temporary = folder / f"{_SAVING}{folder_name(step)}"
    temporary.mkdir(parents=True)
    return temporary


def complete(temporary: Path, step: int, run: str) -> Checkpoint:
    """Turn a complete folder from `begin` into a checkpoint."""
    paths = sorted(path for path in temporary.rglob("*") if path.is_file())
    for path in paths:
        sync_file(path)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "run": run,
        "files": {path.relative_to(temporary).as_posix(): digest(path) for path in paths},
    }
    write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
    target = temporary.with_name(temporary.name.removeprefix(_SAVING))
    _discard(target)
    temporary.replace(target)
    sync_folder(target.parent)
    return Checkpoint(target, step, manifest["files"])


def prune(folder: Path, keep: int, best: int | None = None) -> None:
    """Delete all but the last checkpoints, and that of the best step."""
    for path in list_checkpoints(folder)[:-keep]:
        if best is None or path != checkpoint_path(folder, best):
            _discard(path)


def verify(path: Path, run: str | None = None) -> Checkpoint:
    """Read the manifest and compare every file with it.

    Args:
        path: Folder of one checkpoint.
        run: Identity that it must have; None for any.

    Raises:
        CheckpointError: Not one of ours, of another run, incomplete or damaged.
    """
    files, step, owner = _read_manifest(path)
    if run is not None and owner != run:
        raise OtherRunError(f"{path.name} belongs to a run with other settings or other data")
    for name, expected in files.items():
        try:
            found = digest(path / name)
        except OSError as error:
            raise CheckpointError(f"{path.name}/{name} is missing or unreadable") from error
        if found != expected:
            raise CheckpointError(f"{path.name}/{name} is damaged (its checksum differs)")
    _check_content(path, files)
    return Checkpoint(path, step, files)


def _check_content(path: Path, files: dict[str, str]) -> None:
    """Refuse content that would make PyTorch or transformers do more than read numbers."""
    try:
        parts = part_names(read_index((path / STATE_INDEX).read_bytes()))
    except ValueError as error:
        raise CheckpointError(f"{path.name}/{STATE_INDEX} {error}") from error
    for part in sorted(f"{STATE}/{part}" for part in parts):
        if part not in files:
            raise CheckpointError(f"{path.name}/{MANIFEST} lacks {part}")
    try:
        foreign = foreign_fields(dict(read_json(path / CONFIG)))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path.name}/{CONFIG} is damaged") from error
    if foreign:
        raise CheckpointError(
            f"{path.name}/{CONFIG} sets {', '.join(foreign)}, which no model made here does"
        )


def _read_manifest(path: Path) -> tuple[dict[str, str], int, str]:
    """Checksums, step and run of a checkpoint, every name in it checked."""
    try:
        manifest = read_json(path / MANIFEST)
        kind, files = manifest["format"], dict(manifest["files"])
        step, owner = manifest["step"], manifest["run"]
        names = [name for name in files if not is_plain(name.removeprefix(f"{STATE}/"))]
        right = type(step) is int and path.name == folder_name(step)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.name} has no {MANIFEST}: not a ParaRNN checkpoint") from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path.name}/{MANIFEST} is damaged") from error
    if kind != FORMAT:
        raise CheckpointError(f"{path.name} has format {kind!r}, not {FORMAT!r}")
    if names:
        raise CheckpointError(f"{path.name}/{MANIFEST} names {names[0]!r}, which is no plain name")
    if not right:
        raise CheckpointError(f"{path.name}/{MANIFEST} is of step {step!r}")
    for name in (CONFIG, PROGRESS, STATE_INDEX):
        if name not in files:
            raise CheckpointError(f"{path.name}/{MANIFEST} lacks {name}")
    return files, step, owner


def newest_checkpoint(
    folder: Path, run: str | None = None
) -> tuple[Checkpoint | None, list[CheckpointError]]:
    """The last good checkpoint, and the problems of those after it.

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
        changed = all(isinstance(problem, OtherRunError) for problem in problems)
        remedy = "config.json and data/ as they were" if changed else "one from a copy"
        raise CheckpointError(
            f"no usable checkpoint in {folder}: {reasons}; restore {remedy}, or train anew with "
            "another --out."
        )
    return None, []


def set_aside(folder: Path, after: Checkpoint) -> None:
    """Rename the checkpoints later than the one in use, so that they are never counted as good."""
    paths = list_checkpoints(folder)
    for path in paths[paths.index(after.path) + 1 :]:
        path.replace(free_name(path.with_name(f"unusable-{path.name}")))


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


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is or would be."""
    return folder / folder_name(step)


def folder_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    steps = [name.removeprefix("step-") for name in names if name.startswith("step-")]
    numbers = sorted(int(step) for step in steps if step.isascii() and step.isdigit())
    return [folder / name for name in map(folder_name, numbers) if name in names]


def _discard(path: Path) -> None:
    """Delete a checkpoint; it vanishes at once, so none is ever found half deleted."""
    if path.exists():
        hidden = path.with_name(f".deleting-{path.name}")
        _remove(hidden)
        path.replace(hidden)
        _remove(hidden)


def _remove(path: Path) -> None:
    """Delete a folder, or a file in its place."""
    if path.is_file() or path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
