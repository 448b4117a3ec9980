"""A training run from settings to results: what `pararnn train` does."""

import hashlib
import json
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from pararnn.lm.catalogue import OwnName
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import write_atomically
from pararnn.lm.data.words import say
from pararnn.lm.models.architectures import missing_kernels
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.models.flops import train_flops_per_token
from pararnn.lm.models.own_cells import files_of
from pararnn.lm.training.advice import explained, how_to_resume
from pararnn.lm.training.averaging import AverageWeights
from pararnn.lm.training.carried import CarriedState
from pararnn.lm.training.checkpoints import (
    Checkpoint,
    newest_checkpoint,
    set_aside,
)
from pararnn.lm.training.checks import import_kept, import_own, try_step
from pararnn.lm.training.config import (
    TrainConfig,
    check_new,
    check_resumable,
    identity,
    resolve,
)
from pararnn.lm.training.data import Batches, StreamOrder, WindowOrder, Windows
from pararnn.lm.training.environment import describe_environment
from pararnn.lm.training.evaluation import Evaluation
from pararnn.lm.training.language_model import outline_model
from pararnn.lm.training.lock import alone_in_run
from pararnn.lm.training.optimizer import build_optimizer
from pararnn.lm.training.parallel import Processes, join_processes
from pararnn.lm.training.passes import Passes
from pararnn.lm.training.report import report
from pararnn.lm.training.run_folder import RunFolder
from pararnn.lm.training.sharding import lay_out, start_compilers
from pararnn.lm.training.text import Text, check_tokenizer, open_text
from pararnn.lm.training.trackers import check_tracker
from pararnn.lm.training.trained import load_trained
from pararnn.lm.training.trainer import Trainer
from pararnn.lm.training.validation import Validator


@dataclass(frozen=True)
class TrainResult:
    """The end of a run.

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


def train(config: TrainConfig, *, resume: bool = False, comparison: bool = True) -> TrainResult:
    """Train a model and report on it, in one process or in those that `torchrun` started.

    Args:
        config: Settings; `out` must be given to resume.
        resume: Continue the run in `config.out` instead of starting one.
        comparison: Time a train step against the same model run step by step, at the end; small
            models in one process only.

    Raises:
        RunError: Something the user can put right.
    """
    with ExitStack() as held:
        with join_processes(config.device) as processes:
            start_compilers(config.execution, processes.device)
            open_run = _reopen if resume else _start
            run, config = processes.on_first(
                lambda: open_run(resolve(config, processes.count), held, processes.device)
            )
            with explained(run), _left_clean(run, processes, resume) as begun:
                text, trainer = _prepare(config, run, processes, resume)
                begun.append(trainer)
                stopped_by = trainer.fit()
            if stopped_by is not None:
                name = signal.Signals(stopped_by).name
                words = f"{name} at step {trainer.step}: checkpoint saved. {how_to_resume(run)}"
                # All wait for it: when one of them ends by a signal, torchrun stops the first.
                processes.on_first(lambda: say(words))
        step, seconds = trainer.step, trainer.train_seconds
        del trainer  # its memory, for the model of the report
        if stopped_by is not None or not processes.is_first:
            return TrainResult(run, step, stopped_by, None)
        with explained(run):
            model = load_trained(run, processes.device)
            alone = comparison and processes.count == 1
            validation = report(config, run, text, model, step, seconds, alone=alone)
        return TrainResult(run, step, None, validation)


def identity_of(config: TrainConfig, text: Text) -> str:
    """The fingerprint of a run in its checkpoints: settings that decide its curve, and data."""
    settings = json.dumps([identity(config), text.sha256], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()


def _start(
    config: TrainConfig, held: ExitStack, device: torch.device
) -> tuple[RunFolder, TrainConfig]:
    """A new run; what can be tried without its folder is tried first."""
    if config.out is not None:
        RunFolder(config.out).check_free()
    check_tracker(config.log)
    try:
        check_new(config)
    except ValueError as error:
        raise RunError(str(error)) from error
    config = import_own(config)
    with explained(None):
        try_step(config, device)
    run = RunFolder.create(config, held, files_of([config.model]))
    return run, run.read_config()


def _reopen(
    config: TrainConfig, held: ExitStack, device: torch.device
) -> tuple[RunFolder, TrainConfig]:
    if config.out is None:
        raise RunError("name the run to resume with --out.")
    run = RunFolder.open(config.out)
    check_tracker(config.log)
    with explained(run):
        held.enter_context(alone_in_run(run.path))
        own = OwnName.of(config.model)
        if own is not None and not own.digest:  # the file is named again
            config = import_own(config)
        check_resumable(run.read_config(), config)
        import_kept([config.model], run.cell)
    return run, config


@contextmanager
def _left_clean(run: RunFolder, processes: Processes, resume: bool) -> Iterator[list[Trainer]]:
    """A new run that fails before its first step is done leaves no folder behind."""
    begun: list[Trainer] = []
    try:
        yield begun
    except BaseException as error:
        failed = not begun or (begun[0].step == 0 and isinstance(error, Exception))
        if failed and not resume and processes.is_first:
            run.discard()
        raise


def _prepare(
    config: TrainConfig, run: RunFolder, processes: Processes, resume: bool
) -> tuple[Text, Trainer]:
    """Data, model and trainer."""

    def prepare() -> tuple[Text, Checkpoint | None]:
        text = open_text(config, run)
        checkpoint = _find_checkpoint(config, run, text) if resume else None
        run.write_config(config)
        facts = describe_environment(processes.device, processes.count)
        write_atomically(run.environment, facts.encode(errors="backslashreplace"))
        return text, checkpoint

    text, checkpoint = processes.on_first(prepare)
    import_kept([config.model], run.cell, aloud=False)  # the first process has said it
    model = CausalLoss(outline_model(config, text.codec), config.optimizer.z_loss_weight)
    processes.print(_introduction(config, run, text, model, processes))
    trainer = _build_trainer(config, run, text, model, processes)
    if checkpoint is not None:
        trainer.load(checkpoint)
        processes.print(f"Resumed at step {trainer.step} from {checkpoint.path}.")
        if trainer.step >= trainer.config.steps:
            processes.print("All steps are done; raise --steps to train further.")
    elif resume:
        processes.print("No checkpoint was saved yet; starting from step 0.")
    return text, trainer


def _find_checkpoint(config: TrainConfig, run: RunFolder, text: Text) -> Checkpoint | None:
    """The last good one of a run; damaged ones after it are renamed."""
    checkpoint, problems = newest_checkpoint(run.checkpoints, identity_of(config, text))
    if checkpoint is not None:
        check_tokenizer(text.codec, checkpoint)
        for problem in problems:
            say(f"Set aside: {problem}.")
        set_aside(run.checkpoints, checkpoint)
    return checkpoint


def _build_trainer(
    config: TrainConfig, run: RunFolder, text: Text, model: CausalLoss, processes: Processes
) -> Trainer:
    batch_size, length = config.text.batch_size, config.text.sequence_length
    windows = Windows(text.train, length)
    rows, settings = config.text.global_batch_size or batch_size, config.optimizer
    make_order = StreamOrder if config.text.carry_state else WindowOrder
    order = make_order(len(windows), rows, config.seed)
    parts = config.execution.sequence_parallel
    batches = Batches(windows, order, batch_size, processes.rank, processes.count, parts)
    owner = identity_of(config, text)
    flops = train_flops_per_token(model.model, length)
    per_byte = text.codec.tokens_per_byte(text.train)
    lay_out(model, config.execution, processes, config.seed)
    optimizer = build_optimizer(model.model, settings)
    average, carried = None, None
    if settings.average_decay:
        average = AverageWeights(model.model, settings.average_decay)
    if config.text.carry_state:
        half = settings.precision == "bfloat16"
        carried = CarriedState(model, batches.share, processes, half, parts)
    torch.manual_seed(config.seed + processes.rank)  # each process draws other numbers
    return Trainer(
        config,
        run,
        owner,
        model,
        optimizer,
        batches,
        Passes(config, model, processes, carried),
        average,
        Validator(config, run, text, model, processes, average),
        processes,
        flops,
        per_byte,
    )


def _introduction(
    config: TrainConfig, run: RunFolder, text: Text, model: CausalLoss, processes: Processes
) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    together = f", in parts on {processes.count} processes" if processes.count > 1 else ""
    parts = config.execution.sequence_parallel
    together += f", {parts} of which share each sequence" if parts > 1 else ""
    lines = [
        f"Text: {text.description}",
        f"Model: {config.title}, {parameters:,} parameters{together}",
        f"Run: {run.path}",
    ]
    if own := OwnName.of(config.model):
        lines.insert(2, f"Cell: {own.kind} of {run.cell / own.path}, a copy that the run keeps")
    if missing := missing_kernels(config.model, config.options_of("memory_options")):
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
