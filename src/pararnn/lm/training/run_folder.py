"""The folder of one training run: its paths, its creation and its opening."""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import read_json, write_atomically
from pararnn.lm.data.words import shell_word
from pararnn.lm.training.config import TrainConfig, from_dict, to_dict
from pararnn.lm.training.lock import LOCK, alone_in_run

RUNS = Path("runs")
MANIFEST = "manifest.json"
"""In the folder of every checkpoint."""


class RunFolder:
    """Paths inside a run folder.

    Args:
        path: The folder itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.validation = path / "validation.jsonl"
        self.environment = path / "env.txt"
        self.checkpoints = path / "checkpoints"
        self.data = path / "data"
        self.cell = path / "cell"
        self.tensorboard = path / "tensorboard"
        self.profile = path / "profile"
        self.plot = path / "loss.png"
        self.sample = path / "sample.txt"

    @classmethod
    def create(
        cls, config: TrainConfig, held: ExitStack, files: Mapping[str, bytes] | None = None
    ) -> "RunFolder":
        """Make the folder, lock it and write `config.json`.

        What is left of a start that failed before its first checkpoint is replaced.

        Args:
            config: Resolved settings; without `out`, the next free runs/MODEL-NUMBER is taken.
            held: Holds the lock from now on.
            files: Of a cell of the user's own, by name; kept in `cell`.

        Raises:
            RunError: The folder holds a run or something else, is in use, or cannot be made.
        """
        run = cls(config.out) if config.out is not None else cls(_make_free(config.title))
        with _told(run.path):
            run.check_free()
            run.path.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone_in_run(run.path))
            run.check_free()  # again: another process may just have begun here
            run._clear()
            for name, content in (files or {}).items():
                run.cell.mkdir(exist_ok=True)
                write_atomically(run.cell / name, content)
            run.write_config(dataclasses.replace(config, out=run.path))
        return run

    def discard(self) -> None:
        """Delete the files of a start that failed before its first step."""
        with contextlib.suppress(OSError):
            self._clear()
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink(missing_ok=True)
                self.path.rmdir()  # fails if other files are left

    def check_free(self) -> None:
        """Raise RunError if the start would overwrite a run or other files."""
        if any("\ud800" <= letter <= "\udfff" for letter in str(self.path)):
            raise RunError(f"{str(self.path)!r} is not UTF-8; name another folder with --out.")
        if self.config.is_file() and self._holds_checkpoints():
            raise RunError(
                f"{self.path} already holds a run; continue it with --resume --out "
                f"{shell_word(self.path)}, or name another folder with --out."
            )
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; name a folder with --out.")
        if self.config.is_file():
            self.read_config()  # or it is somebody else's
        elif self.path.is_dir() and any(not name.startswith(".") for name in os.listdir(self.path)):
            raise RunError(
                f"{self.path} is not empty and holds no run; name another folder with --out."
            )

    def _holds_checkpoints(self) -> bool:
        """Whether there is any, good or not."""
        folder = self.checkpoints
        return folder.is_dir() and any(not name.startswith(".") for name in os.listdir(folder))

    def _clear(self) -> None:
        for path in (self.data, self.cell, self.checkpoints, self.tensorboard, self.profile):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.metrics, self.validation, self.environment, self.config):
            path.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """The run in a folder.

        Raises:
            RunError: There is none.
        """
        run = cls(path)
        if (run.path / MANIFEST).is_file():
            raise RunError(f"{path} is a checkpoint; name the folder of its run, two above it.")
        if not run.config.is_file():
            raise RunError(
                f"{path} holds no run (no {run.config.name}); name the folder that "
                "pararnn train wrote."
            )
        return run

    @classmethod
    def find(cls, path: str | Path) -> "tuple[RunFolder | None, Path | None]":
        """The run in a folder; or the run and the folder of one of its checkpoints.

        The run is None where a checkpoint lies away from it.

        Raises:
            RunError: The folder is neither.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            return cls.open(path), None
        run = cls(path.absolute().parent.parent)
        return run if run.config.is_file() else None, path

    def read_config(self) -> TrainConfig:
        """The settings of the run.

        Raises:
            RunError: `config.json` is damaged or of another version.
        """
        try:
            return from_dict(TrainConfig, read_json(self.config))
        except ValueError as error:
            raise RunError(
                f"{self.config} cannot be read ({error}); it is damaged or of another version of "
                "pararnn. Restore it from a copy, or train anew with another --out."
            ) from error

    def write_config(self, config: TrainConfig) -> None:
        """Store the settings."""
        write_atomically(self.config, config_json(config).encode())


def config_json(config: TrainConfig) -> str:
    """Settings as indented JSON."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def latest_run() -> Path:
    """The run folder below runs/ that was used last.

    Raises:
        RunError: There is none.
    """
    configs = list(RUNS.glob("*/config.json"))
    if not configs:
        raise RunError(f"no run to resume in {RUNS}/; name its folder with --out.")
    return max(configs, key=lambda path: path.stat().st_mtime).parent


def _make_free(model: str) -> Path:
    """The next free folder below runs/; made here, so that no other process takes it."""
    for number in itertools.count(1):
        path = RUNS / f"{model}-{number}"
        with _told(path), contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("numbers do not end")


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot make or write to {error.filename or path}: {error.strerror or error}. Put "
            "that right, or name another folder with --out."
        ) from error
