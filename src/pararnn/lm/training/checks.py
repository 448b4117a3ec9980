"""What is tried before a run folder is made, so that a wrong setting leaves nothing behind."""

import dataclasses
from pathlib import Path

import torch

from pararnn.layers.runner import BackendError
from pararnn.lm.catalogue import BASELINES, CELLS, OwnName, parts
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.words import warn
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.models.own_cells import import_cell, not_kept, told
from pararnn.lm.training.config import TrainConfig
from pararnn.lm.training.initial import start
from pararnn.lm.training.language_model import outline_model, to_device
from pararnn.lm.training.optimizer import build_optimizer
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.random_state import random_state, set_random_state
from pararnn.lm.training.step import train_step
from pararnn.lm.training.text import Codec

_LONGEST_TRIAL = 256  # tokens


def import_own(config: TrainConfig) -> TrainConfig:
    """Run the file of a cell of the user's own; its model then has the name with the digest.

    Says so if the file needs others that the run will not have.

    Raises:
        RunError: The file cannot be run, or has no such cell.
    """
    if OwnName.of(config.model) is None:
        return config
    try:
        name = import_cell(config.model)
    except ValueError as error:
        raise RunError(str(error)) from error
    for file in not_kept(name):
        warn(
            f"Note: the run keeps a copy of {name.partition(':')[0]}, but not of {file}, which "
            "that imports. It can be opened only where this can be imported too. To keep all, "
            "write it into the one file, or make it an installed package."
        )
    return dataclasses.replace(config, model=name)


def import_kept(names: list[str], folder: Path, *, aloud: bool = True) -> None:
    """Run the files that hold those cells of a run which are not of the library.

    Args:
        names: Of architectures.
        folder: Where the files are.
        aloud: Say before that code is run.

    Raises:
        RunError: A file is missing, was changed, or cannot be run.
    """
    for name in names:
        if name in CELLS or not OwnName.stored(name):
            continue
        file = folder / name.partition(":")[0]
        if aloud:
            warn(f"Note: this runs the code in {file}, the cell of the run.")
        try:
            import_cell(str(folder / name))
        except ValueError as error:
            raise RunError(str(error)) from error


def _one_block_of_each(config: TrainConfig) -> TrainConfig:
    """The same settings with one block of each mixer."""
    model, kinds = config.model, list(dict.fromkeys(parts(config.model)))
    if OwnName.of(model) is None:
        model = "+".join(f"1x{kind}" for kind in kinds)
    few = dataclasses.replace(config.architecture, num_layers=len(kinds), attention_every=0)
    return dataclasses.replace(config, model=model, architecture=few)


def _check_options(config: TrainConfig) -> None:
    """Make the whole model without values.

    Raises:
        RunError: The mixers do not take their options, or are more than the blocks.
    """
    try:
        outline_model(config, Codec())
    except (TypeError, ValueError) as error:
        raise RunError(f"{config.model} cannot be built: {error}") from error


def try_step(config: TrainConfig, device: torch.device) -> None:
    """One train step of a model with one block of each mixer, on one sequence of zeros.

    Raises:
        RunError: The cell, its options or the backend cannot do it; the message says why.
    """
    if config.model in BASELINES:
        return
    small = _one_block_of_each(config)
    if OwnName.of(config.model) is None:  # one in a file is told about below
        _check_options(config)
    length = min(config.text.sequence_length, _LONGEST_TRIAL)
    tokens = torch.zeros(1, length + 1, dtype=torch.int64)
    tokens[:, 1:] = 1
    numbers = random_state(device)
    try:
        model = to_device(start(outline_model(small, Codec()), config.seed), device)
        loss = CausalLoss(model.train(), config.optimizer.z_loss_weight)
        here = Processes(0, 1, device)
        optimizer = build_optimizer(model, config.optimizer)
        train_step(loss, optimizer, [tokens], config.optimizer, here).read()
    except BackendError as error:
        raise RunError(str(error)) from error
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        own = OwnName.of(config.model)
        if own is None or isinstance(error, torch.OutOfMemoryError):
            raise
        path = getattr(CELLS[config.model], "path", own.path)
        raise RunError(
            f"the cell {own.kind} cannot be trained. {told(error, path)} Try it alone: "
            f"pararnn.testing.check_cell({own.kind}(8, 8))."
        ) from error
    finally:
        set_random_state(device, numbers)
