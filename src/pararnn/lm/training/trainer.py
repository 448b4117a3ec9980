"""The training loop: steps, measurements and checkpoints."""

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.signals import StopSignals
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.models.flops import peak_flops
from pararnn.lm.training.averaging import AverageWeights
from pararnn.lm.training.checkpoints import Checkpoint, CheckpointError
from pararnn.lm.training.config import TrainConfig
from pararnn.lm.training.data import Batches, ReadAhead
from pararnn.lm.training.metrics import StepLog
from pararnn.lm.training.moment import Moment
from pararnn.lm.training.optimizer import learning_rate, named_state
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.passes import Passes
from pararnn.lm.training.profiling import record_steps
from pararnn.lm.training.random_state import random_state, set_random_state
from pararnn.lm.training.run_folder import RunFolder
from pararnn.lm.training.saving import CheckpointWriter, root_cause
from pararnn.lm.training.sharding import may_recompute
from pararnn.lm.training.state_index import StateReader
from pararnn.lm.training.step import Measurement, StepResult, train_step
from pararnn.lm.training.text import open_codec
from pararnn.lm.training.trackers import tracker
from pararnn.lm.training.validation import Validator


@dataclass(frozen=True)
class _Unread:
    """A step that was started, and may still run."""

    step: int
    learning_rate: float
    num_tokens: int
    measured: Measurement


@dataclass
class Trainer:
    """Takes a model from one step to another and keeps everything that resuming needs.

    Args:
        config: Resolved settings.
        run: Where measurements and checkpoints go.
        identity: Marks the checkpoints as belonging to these settings and this data.
        model: As `lay_out` left it.
        optimizer: Of the model's parameters.
        batches: What this process reads.
        passes: Compute the gradients of a step.
        average: Of the weights; None where there is none.
        validator: Evaluates the model between steps.
        processes: That train together.
        flops_per_token: For model FLOPs utilisation.
        tokens_per_byte: Of the text.
    """

    config: TrainConfig
    run: RunFolder
    identity: str
    model: CausalLoss
    optimizer: torch.optim.Optimizer
    batches: Batches
    passes: Passes
    average: AverageWeights | None
    validator: Validator
    processes: Processes
    flops_per_token: float
    tokens_per_byte: float = 1.0
    step: int = 0
    train_seconds: float = 0.0
    _unread: _Unread | None = field(default=None, init=False)
    _before: Moment = field(init=False)

    def __post_init__(self) -> None:
        folder, keep = self.run.checkpoints, self.config.keep_checkpoints
        tokenizer = open_codec(self.run).tokenizer
        self._writer = CheckpointWriter(folder, self.identity, keep, self.processes, tokenizer)
        self.passes.settle_by(self._writer.wait)
        peak = peak_flops(self.processes.device)
        self._peak = None if peak is None else peak * self.processes.count

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, of any number of processes.

        Raises:
            CheckpointError: It is whole, but not what this trainer wrote.
        """
        device, rank = self.processes.device, self.processes.rank
        try:
            progress = checkpoint.read_progress()
            known = rank < progress["num_processes"] and device.type == progress["device"]
            numbers = random_state(device, rank) if known else {}
            state = self._state() | {"random": numbers}
            dcp.load(state, storage_reader=StateReader(checkpoint.state))
            self.step, self.train_seconds = checkpoint.step, float(progress["train_seconds"])
            if self.passes.carried is not None:
                self.passes.carried.set_state(state["carried"])
            if progress.get("recomputes") and may_recompute(self.config.execution):
                self.passes.recompute()
            set_random_state(device, numbers)
        except (ValueError, KeyError, TypeError, CheckpointException) as error:
            self.processes.on_first(partial(_raise_unusable, checkpoint, error))

    def save(self) -> None:
        """Write a checkpoint in the background, and delete the oldest."""
        progress = {
            "step": self.step,
            "train_seconds": self.train_seconds,
            "num_processes": self.processes.count,
            "device": self.processes.device.type,
            "recomputes": self.passes.recomputes,
        }
        numbers = random_state(self.processes.device, self.processes.rank)
        state = self._state() | {"random": numbers}
        weights = None if self.average is None else self.average.tensors
        best = self.validator.best
        self._writer.save(self.step, self.model.model, state, progress, weights=weights, best=best)

    def _state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors themselves: what is loaded into them is loaded, but for carried states."""
        state = {
            "model": self.model.model.state_dict(),
            "optimizer": named_state(self.model.model, self.optimizer),
        }
        if self.average is not None:
            state["average"] = self.average.tensors
        if self.passes.carried is not None:
            state["carried"] = self.passes.carried.state()
        return state

    def fit(self) -> int | None:
        """Train up to `config.steps`.

        Returns:
            The signal that stopped it before, after a checkpoint was saved; else None.

        Raises:
            RunError: The loss is not finite, or a checkpoint cannot be saved.
        """
        config = self.config
        with ExitStack() as stack:
            # First, so that a signal does not cut off the ends of the others.
            stop = stack.enter_context(StopSignals(by_torchrun=self.processes.count > 1))
            stack.enter_context(self._writer)
            if self.step == 0:
                self.save()
            self.validator.begin(self.step)
            log = self._open_log(stack) if self.processes.is_first else None
            profile = config.execution.profile_steps
            record = record_steps(self.run.profile, profile, self.processes)
            end_step = stack.enter_context(record)
            batches = stack.enter_context(ReadAhead(self.batches, self.processes.device))
            self.model.train()
            while self.step < config.steps:
                self._advance(batches, log)
                end_step()
                signal = self.processes.largest(stop.received or 0)
                done = self.step == config.steps
                improved = self.validator.is_due(self.step) and self._validate(log)
                if done or signal or improved or self.step % config.checkpoint_every == 0:
                    self._note(log)
                    if log is not None:
                        log.sync()
                    self.save()
                if signal and not done:
                    self._writer.wait()
                    return signal
            self._writer.wait()
        return None

    def _open_log(self, stack: ExitStack) -> StepLog:
        send = stack.enter_context(tracker(self.config, self.run))
        return stack.enter_context(StepLog(self.run, self.step, self.config.steps, send))

    def _advance(self, data: ReadAhead, log: StepLog | None) -> None:
        """Start one train step, and note the one before it while this one runs."""
        if self._unread is None:
            self._before = Moment(self.processes.device)
        settings = self.config.optimizer
        rate = learning_rate(self.step, settings.learning_rate, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = data.of_step(self.step)
        if self.passes.carried is not None and self.batches.order.begins(self.step):
            self.passes.carried.begin()
        measured = train_step(
            self.model, self.optimizer, batches, settings, self.processes, self.passes
        )
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        self._note(log)
        num_tokens = self.processes.count * sum(batch[:, 1:].numel() for batch in batches)
        self._unread = _Unread(self.step, rate, num_tokens, measured)

    def _validate(self, log: StepLog | None) -> bool:
        """Predict held-out text; returns whether that went better than ever before."""
        self._note(log)
        result, improved = self.validator(self.step)
        if log is not None:
            log.write_validation(result.record(self.step, self.train_seconds))
        return improved

    def _note(self, log: StepLog | None) -> None:
        """Wait for the step that is not noted yet, if there is one, and note it."""
        if self._unread is None:
            return
        unread, self._unread = self._unread, None
        result = unread.measured.read()
        if not result.is_finite:
            self.processes.on_first(lambda: _raise_not_finite(unread.step, result))
        before, self._before = self._before, unread.measured.end
        seconds = self._before.seconds_since(before)
        self.train_seconds += seconds
        if log is None:
            return
        record = {
            "step": unread.step,
            "loss": result.loss,
            "bits_per_byte": result.loss / math.log(2) * self.tokens_per_byte,
            "z_loss": result.z_loss,
            "grad_norm": result.grad_norm,
            "learning_rate": unread.learning_rate,
            "tokens_per_second": unread.num_tokens / seconds,
        }
        if self._peak is not None:
            record["mfu"] = self.flops_per_token * record["tokens_per_second"] / self._peak
        log.write(record)


def _raise_not_finite(step: int, result: StepResult) -> None:
    where = f", first in {result.culprit}" if result.culprit else ""
    raise RunError(
        f"step {step} gave loss {result.loss} and gradient norm {result.grad_norm}{where}; no "
        "checkpoint holds this step. Start a new run with a lower --optimizer.learning-rate or a "
        "lower --optimizer.max-grad-norm."
    )


def _raise_unusable(checkpoint: Checkpoint, error: BaseException) -> None:
    raise CheckpointError(
        f"{checkpoint.path} cannot be loaded: {root_cause(error)}. Its checksums are right, so "
        "this run did not write it; move it away."
    ) from error
