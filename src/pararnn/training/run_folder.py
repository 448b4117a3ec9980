"""The folder of one training run: what it holds, how it is made and opened."""

import dataclasses
import json
from pathlib import Path

from pararnn.data.errors import RunError
from pararnn.data.files import write_atomically
from pararnn.training.config import TrainConfig, from_dict, to_dict

RUNS = Path("runs")


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
        self.tensorboard = path / "tensorboard"
        self.profile = path / "profile"
        self.plot = path / "loss.png"
        self.sample = path / "sample.txt"

    @classmethod
    def create(cls, config: TrainConfig) -> "RunFolder":
        """Make the folder and write `config.json`.

        Args:
            config: Resolved settings; without `out`, the next free runs/MODEL-NUMBER is taken.

        Raises:
            RunError: The folder holds a run or something else.
        """
        run = cls(_free_path(config.model) if config.out is None else config.out)
        config = dataclasses.replace(config, out=run.path)
        if run.config.exists():
            raise RunError(
                f"{run.path} already holds a run; continue it with --resume --out {run.path}, or "
                "name another folder with --out."
            )
        if run.path.is_file():
            raise RunError(f"{run.path} is a file; name a folder with --out.")
        if run.path.is_dir() and any(not p.name.startswith(".") for p in run.path.iterdir()):
            raise RunError(
                f"{run.path} is not empty and holds no run; name another folder with --out."
            )
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_config(config)
        return run

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """The run in a folder.

        Raises:
            RunError: There is none.
        """
        run = cls(path)
        if not run.config.is_file():
            raise RunError(
                f"{path} holds no run (no {run.config.name}); name the folder that "
                "pararnn train wrote."
            )
        return run

    def read_config(self) -> TrainConfig:
        """The settings of the run.

        Raises:
            RunError: `config.json` is damaged or of another version.
        """
        try:
            return from_dict(TrainConfig, json.loads(self.config.read_bytes()))
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


def _free_path(model: str) -> Path:
    number = 1
    while (path := RUNS / f"{model}-{number}").exists():
        number += 1
    return path
