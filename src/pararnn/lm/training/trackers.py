"""Measurements sent to wandb, trackio or MLflow, as far as they are installed."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pararnn.lm.data.errors import RunError
from pararnn.lm.training.config import TrainConfig, leaves, to_dict
from pararnn.lm.training.run_folder import RunFolder

PROJECT = "pararnn"
Tracker = Callable[[int, dict[str, float]], None]


def check_tracker(name: str) -> None:
    """Raise RunError where the package is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise RunError(
            f"--log {name} needs the package {name}: pip install {name}, or leave --log out."
        )


@contextmanager
def tracker(config: TrainConfig, run: RunFolder) -> Iterator[Tracker]:
    """Send values of steps to the service of `config.log`, until the end of the block.

    Args:
        config: Resolved settings, which are sent first.
        run: Its folder's name becomes that of the run there.

    Raises:
        RunError: The package is not installed, or does not start.

    Yields:
        Takes a step, and values by their names.
    """
    if config.log == "none":
        yield lambda step, values: None
        return
    check_tracker(config.log)
    service = importlib.import_module(config.log)
    settings, name = leaves(to_dict(config)), run.path.resolve().name
    start = _mlflow if config.log == "mlflow" else _wandb
    try:
        send, end = start(service, settings, name, run)
    except Exception as error:  # what such a package raises is its own
        raise RunError(
            f"--log {config.log} cannot start: {error}. Put that right, or resume with --log none."
        ) from error
    try:
        yield send
    finally:
        end()


def _wandb(
    service: Any, settings: dict[str, Any], name: str, run: RunFolder
) -> tuple[Tracker, Callable[[], None]]:
    """Of wandb, and of trackio, which has its functions."""
    folder = {"dir": str(run.path)} if service.__name__ == "wandb" else {}
    service.init(project=PROJECT, name=name, config=settings, resume="allow", **folder)
    return lambda step, values: service.log(values, step=step), service.finish


def _mlflow(
    service: Any, settings: dict[str, Any], name: str, run: RunFolder
) -> tuple[Tracker, Callable[[], None]]:
    service.set_experiment(PROJECT)
    service.start_run(run_name=name)
    service.log_params(settings)
    return lambda step, values: service.log_metrics(values, step=step), service.end_run
