"""A training run from settings to results: what `pararnn train` does."""

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from pararnn.models import ParaRNNForCausalLM
from pararnn.training.checkpoints import (
    CheckpointError,
    newest_checkpoint,
    quiet_transformers,
    set_aside,
)
from pararnn.training.comparison import compare_train_steps
from pararnn.training.config import TrainConfig, check_resumable, identity, resolve
from pararnn.training.corpus import Corpus, find_sources, prepare_corpus
from pararnn.training.data import build_loader, map_bytes
from pararnn.training.environment import describe_environment
from pararnn.training.errors import RunError
from pararnn.training.evaluation import Evaluation, evaluate
from pararnn.training.files import write_atomically
from pararnn.training.language_model import build_model, choose_device, generate_text, to_device
from pararnn.training.metrics import MetricsFile, plot_loss
from pararnn.training.optimizer import build_optimizer
from pararnn.training.run_folder import RunFolder
from pararnn.training.trainer import Trainer, train_step

SAMPLE_PROMPT = "def "
SAMPLE_BYTES = 300


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        run: Its folder.
        step: Optimiser steps done.
        stopped_by: Signal that ended it early, None when it ran to its end.
        validation: Of the held-out bytes, None when it was stopped.
    """

    run: RunFolder
    step: int
    stopped_by: int | None
    validation: Evaluation | None


def train(config: TrainConfig, *, resume: bool = False) -> TrainResult:
    """Train a model and report on it.

    Args:
        config: Settings; `out` must be given to resume.
        resume: Continue the run in `config.out` instead of starting one.

    Raises:
        RunError: Something the user can put right.
    """
    config = resolve(config)
    run = _reopen(config) if resume else _start(config)
    config = run.read_config()
    try:
        return _train(config, run, resume)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {how_to_resume(run)}") from error
    except OSError as error:
        raise RunError(
            f"cannot write to {run.path}: {error.strerror or error}. Make room or make it "
            f"writable. {how_to_resume(run)}"
        ) from error


def _train(config: TrainConfig, run: RunFolder, resume: bool) -> TrainResult:
    corpus = _prepare(run, config, fresh=not resume)
    device = choose_device(config.device)
    write_atomically(run.environment, describe_environment(device).encode())
    model = build_model(config, device)
    trainer = _build_trainer(config, run, corpus, model)
    print(_introduction(config, run, corpus, model))
    if resume:
        _load_newest(trainer)
    stopped_by = trainer.fit()
    if stopped_by is not None:
        name = signal.Signals(stopped_by).name
        print(f"{name} at step {trainer.step}: checkpoint saved. {how_to_resume(run)}")
        return TrainResult(run, trainer.step, stopped_by, None)
    return TrainResult(run, trainer.step, None, _report(trainer, model, corpus))


def how_to_resume(run: RunFolder) -> str:
    """One sentence for whoever must continue a run."""
    return f"Continue with: pararnn train --resume --out {run.path}"


def load_trained(run: RunFolder, device: torch.device) -> ParaRNNForCausalLM:
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
        return to_device(ParaRNNForCausalLM.from_pretrained(checkpoint.path), device)


def _start(config: TrainConfig) -> RunFolder:
    find_sources(config.data)
    return RunFolder.create(config)


def _reopen(config: TrainConfig) -> RunFolder:
    if config.out is None:
        raise RunError("name the run to resume with --out.")
    run = RunFolder.open(config.out)
    check_resumable(run.read_config(), config)
    run.write_config(config)
    return run


def _prepare(run: RunFolder, config: TrainConfig, fresh: bool) -> Corpus:
    """The run's data; a new run that has none leaves no folder behind."""
    try:
        return prepare_corpus(config.data, run.data, config.text.held_out)
    except RunError:
        if fresh:
            shutil.rmtree(run.path, ignore_errors=True)
        raise


def _build_trainer(
    config: TrainConfig, run: RunFolder, corpus: Corpus, model: ParaRNNForCausalLM
) -> Trainer:
    text = config.text
    loader = build_loader(corpus.train, text.sequence_length, text.batch_size, config.seed)
    optimizer = build_optimizer(model, config.optimizer)
    settings = json.dumps([identity(config), corpus.sha256], sort_keys=True)
    owner = hashlib.sha256(settings.encode()).hexdigest()
    return Trainer(config, run, owner, model, optimizer, loader)


def _load_newest(trainer: Trainer) -> None:
    folder = trainer.run.checkpoints
    checkpoint, problems = newest_checkpoint(folder, trainer.identity)
    if checkpoint is None:
        print("No checkpoint was saved yet; starting from step 0.")
        return
    for problem in problems:
        print(f"Set aside: {problem}.")
    set_aside(folder, checkpoint)
    trainer.load(checkpoint)
    print(f"Resumed at step {trainer.step} from {checkpoint.path}.")
    if trainer.step >= trainer.config.steps:
        print("All steps are done; raise --steps to train further.")


def _introduction(
    config: TrainConfig, run: RunFolder, corpus: Corpus, model: PreTrainedModel
) -> str:
    source = "Python's standard library" if config.data is None else str(config.data)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    skipped = f" ({corpus.num_skipped} that are not UTF-8 text skipped)" * bool(corpus.num_skipped)
    lines = [
        f"Text: {source}: {corpus.num_files} files{skipped}, {corpus.num_train_bytes:,} bytes to "
        f"train on, {corpus.num_validation_bytes:,} held out",
        f"Model: {config.model}, {parameters:,} parameters",
        f"Run: {run.path}",
    ]
    length = config.schedule.length
    if length is not None and config.steps > length:
        lines.append(
            f"Note: the learning rate is zero after step {length}, where the schedule of this run "
            "ends; a longer one needs a new run with --schedule.length."
        )
    return "\n".join(lines)


def _report(trainer: Trainer, model: ParaRNNForCausalLM, corpus: Corpus) -> Evaluation:
    """Validation, comparison with the step-by-step model, plot and sample."""
    run, config = trainer.run, trainer.config
    limit = config.text.validation_bytes
    validation = evaluate(model, map_bytes(corpus.validation), limit=limit)
    print(
        f"Validation: {validation.bits_per_byte:.3f} bits per byte "
        f"({validation.loss:.4f} nats) on {validation.num_bytes:,} held-out bytes, "
        f"after {trainer.step} steps in {trainer.train_seconds:.0f} s"
    )
    record = {
        "step": trainer.step,
        "loss": validation.loss,
        "bits_per_byte": validation.bits_per_byte,
        "num_bytes": validation.num_bytes,
        "train_seconds": trainer.train_seconds,
    }
    history = MetricsFile(run.validation, last_step=trainer.step - 1)
    history.write(record)
    history.close()
    print(_compare(trainer))
    if plot_loss(run.metrics, run.plot):
        print(f"Plot: {run.plot}")
    sample = generate_text(model, SAMPLE_PROMPT, num_bytes=SAMPLE_BYTES, seed=config.seed)
    write_atomically(run.sample, sample.encode())
    print(f"Sample:\n{sample}")
    return validation


def _compare(trainer: Trainer) -> str:
    settings = trainer.config.optimizer
    batch = next(iter(trainer.loader))

    def prepare(model: nn.Module) -> Callable[[], object]:
        optimizer = build_optimizer(model, settings)
        return lambda: train_step(model.train(), optimizer, [batch], settings)

    times = compare_train_steps(trainer.model, prepare)
    size, length = batch.shape[0], batch.shape[1] - 1
    return (
        f"Train step ({size} x {length} bytes): {times.parallel_s * 1e3:.0f} ms; the same model "
        f"run step by step: {times.sequential_s * 1e3:.0f} ms, {times.ratio:.1f} times as long"
    )
