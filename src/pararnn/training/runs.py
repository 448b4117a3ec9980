"""A training run from settings to results: what `pararnn train` does."""

import hashlib
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pararnn.data.errors import RunError
from pararnn.data.files import write_atomically
from pararnn.models.architectures import missing_kernels
from pararnn.models.causal_loss import CausalLoss
from pararnn.models.flops import train_flops_per_token
from pararnn.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    newest_checkpoint,
    quiet_transformers,
    set_aside,
)
from pararnn.training.config import TrainConfig, check_resumable, identity, resolve
from pararnn.training.data import Batches, WindowOrder, Windows
from pararnn.training.environment import describe_environment
from pararnn.training.evaluation import Evaluation
from pararnn.training.language_model import outline_model, to_device
from pararnn.training.optimizer import build_optimizer
from pararnn.training.parallel import Processes, join_processes, train_command
from pararnn.training.report import report
from pararnn.training.run_folder import RunFolder
from pararnn.training.sharding import lay_out
from pararnn.training.text import Text, check_text, open_text
from pararnn.training.trainer import Trainer


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        run: Its folder.
        step: Optimiser steps done.
        stopped_by: Signal that ended it early, None when it ran to its end.
        validation: Of the held-out bytes; None when it was stopped, and in all processes but the
            first.
    """

    run: RunFolder
    step: int
    stopped_by: int | None
    validation: Evaluation | None


def train(config: TrainConfig, *, resume: bool = False) -> TrainResult:
    """Train a model and report on it, in one process or in those that `torchrun` started.

    Args:
        config: Settings; `out` must be given to resume.
        resume: Continue the run in `config.out` instead of starting one.

    Raises:
        RunError: Something the user can put right.
    """
    with join_processes(config.device) as processes:
        open_run = _reopen if resume else _start
        run, config = processes.on_first(lambda: open_run(resolve(config, processes.count)))
        with _advice(run):
            text, trainer = _prepare(config, run, processes, resume)
            stopped_by = trainer.fit()
        if stopped_by is not None:
            name = signal.Signals(stopped_by).name
            words = f"{name} at step {trainer.step}: checkpoint saved. {how_to_resume(run)}"
            # All wait for it: when one of them ends by a signal, torchrun stops the first.
            processes.on_first(lambda: print(words, flush=True))
    step, seconds = trainer.step, trainer.train_seconds
    del trainer  # its memory, for the model of the report
    if stopped_by is not None or not processes.is_first:
        return TrainResult(run, step, stopped_by, None)
    with _advice(run):
        model = load_trained(run, processes.device)
        validation = report(config, run, text, model, step, seconds, alone=processes.count == 1)
    return TrainResult(run, step, None, validation)


@contextmanager
def _advice(run: RunFolder) -> Iterator[None]:
    """Errors of the disk say how to go on after they are put right."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error} {how_to_resume(run)}") from error
    except OSError as error:
        raise RunError(
            f"cannot write to {run.path}: {error.strerror or error}. Make room or make it "
            f"writable. {how_to_resume(run)}"
        ) from error


def how_to_resume(run: RunFolder) -> str:
    """One sentence for whoever must continue a run."""
    return f"Continue with: {train_command()} --resume --out {run.path}"


def load_trained(run: RunFolder, device: torch.device) -> PreTrainedModel:
    """The model of a run's last good checkpoint.

    Raises:
        RunError: There is none.
    """
    checkpoint, problems = newest_checkpoint(run.checkpoints)
    if checkpoint is None:
        raise RunError(f"{run.path} holds no checkpoint yet. {how_to_resume(run)}")
    for problem in problems:
        print(f"Skipped: {problem}. Using {checkpoint.path.name}.")
    with quiet_transformers():
        return to_device(AutoModelForCausalLM.from_pretrained(checkpoint.path), device)


def _start(config: TrainConfig) -> tuple[RunFolder, TrainConfig]:
    check_text(config.data)
    run = RunFolder.create(config)
    return run, run.read_config()


def _reopen(config: TrainConfig) -> tuple[RunFolder, TrainConfig]:
    if config.out is None:
        raise RunError("name the run to resume with --out.")
    run = RunFolder.open(config.out)
    check_resumable(run.read_config(), config)
    run.write_config(config)
    return run, config


def _prepare(
    config: TrainConfig, run: RunFolder, processes: Processes, resume: bool
) -> tuple[Text, Trainer]:
    """Data, model and what trains it; a new run that has no data leaves no folder behind."""

    def prepare() -> Text:
        try:
            text = open_text(config, run)
        except RunError:
            if not resume:
                shutil.rmtree(run.path, ignore_errors=True)
            raise
        facts = describe_environment(processes.device, processes.count)
        write_atomically(run.environment, facts.encode())
        return text

    text = processes.on_first(prepare)
    model = CausalLoss(outline_model(config, text.codec), config.optimizer.z_loss_weight)
    processes.print(_introduction(config, run, text, model, processes))
    trainer = _build_trainer(config, run, text, model, processes)
    if resume:
        _load_newest(trainer)
    return text, trainer


def _build_trainer(
    config: TrainConfig, run: RunFolder, text: Text, model: CausalLoss, processes: Processes
) -> Trainer:
    batch_size, length = config.text.batch_size, config.text.sequence_length
    windows = Windows(text.train, length)
    order = WindowOrder(len(windows), config.text.global_batch_size or batch_size, config.seed)
    batches = Batches(windows, order, batch_size, processes.rank, processes.count)
    settings = json.dumps([identity(config), text.sha256], sort_keys=True)
    owner = hashlib.sha256(settings.encode()).hexdigest()
    flops = train_flops_per_token(model.model, length)
    per_byte = text.codec.tokens_per_byte(text.train)
    lay_out(model, config.execution, processes, config.seed)
    optimizer = build_optimizer(model.model, config.optimizer)
    torch.manual_seed(config.seed + processes.rank)  # each draws numbers of its own
    return Trainer(config, run, owner, model, optimizer, batches, processes, flops, per_byte)


def _load_newest(trainer: Trainer) -> None:
    processes, folder = trainer.processes, trainer.run.checkpoints

    def find() -> Checkpoint | None:
        checkpoint, problems = newest_checkpoint(folder, trainer.identity)
        if checkpoint is not None:
            for problem in problems:
                print(f"Set aside: {problem}.")
            set_aside(folder, checkpoint)
        return checkpoint

    checkpoint = processes.on_first(find)
    if checkpoint is None:
        processes.print("No checkpoint was saved yet; starting from step 0.")
        return
    trainer.load(checkpoint)
    processes.print(f"Resumed at step {trainer.step} from {checkpoint.path}.")
    if trainer.step >= trainer.config.steps:
        processes.print("All steps are done; raise --steps to train further.")


def _introduction(
    config: TrainConfig, run: RunFolder, text: Text, model: CausalLoss, processes: Processes
) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    together = f", in parts on {processes.count} processes" if processes.count > 1 else ""
    lines = [
        f"Text: {text.description}",
        f"Model: {config.model}, {parameters:,} parameters{together}",
        f"Run: {run.path}",
    ]
    if missing := missing_kernels(config.model):
        lines.append(f"Note: {config.model} takes {missing}.")
    if not model.separates_documents:
        lines.append(
            f"Note: {config.model} cannot keep documents apart; those of one sequence see each "
            "other."
        )
    length = config.schedule.length
    if length is not None and config.steps > length:
        lines.append(
            f"Note: the learning rate is zero after step {length}, where the schedule of this run "
            "ends; a longer one needs a new run with --schedule.length."
        )
    return "\n".join(lines)
