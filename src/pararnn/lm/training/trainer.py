"""The training loop: steps, measurements and checkpoints."""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.signals import StopSignals
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.models.flops import peak_flops
from pararnn.lm.training.checkpoints import Checkpoint, CheckpointError
from pararnn.lm.training.config import TrainConfig
from pararnn.lm.training.data import Batches
from pararnn.lm.training.metrics import StepLog
from pararnn.lm.training.optimizer import learning_rate, named_state
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.profiling import record_steps
from pararnn.lm.training.run_folder import RunFolder
from pararnn.lm.training.saving import CheckpointWriter, root_cause
from pararnn.lm.training.state_index import StateReader
from pararnn.lm.training.step import StepResult, train_step
from pararnn.lm.training.text import open_codec


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
        processes: That train together.
        flops_per_token: For model FLOPs utilisation.
        tokens_per_byte: Of the text.
    """

    config: TrainConfig
    run: RunFolder
    identity: str
    model: CausalLoss
    optimizer: torch.optim.AdamW
    batches: Batches
    processes: Processes
    flops_per_token: float
    tokens_per_byte: float = 1.0
    step: int = 0
    train_seconds: float = 0.0

    def __post_init__(self) -> None:
        folder, keep = self.run.checkpoints, self.config.keep_checkpoints
        tokenizer = open_codec(self.run).tokenizer
        self._writer = CheckpointWriter(folder, self.identity, keep, self.processes, tokenizer)
        peak = peak_flops(self.processes.device)
        self._peak = None if peak is None else peak * self.processes.count

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, of any number of processes.

        Raises:
            CheckpointError: It is whole, but not what this trainer wrote.
        """
        try:
            progress = checkpoint.read_progress()
            known = self.processes.rank < progress["num_processes"]
            same_device = self.processes.device.type == progress["device"]
            random_state = self._random_state() if known and same_device else {}
            state = self._state() | {"random": random_state}
            dcp.load(state, storage_reader=StateReader(checkpoint.state))
            self.step, self.train_seconds = checkpoint.step, float(progress["train_seconds"])
            self._set_random_state(random_state)
        except (ValueError, KeyError, TypeError, CheckpointException) as error:
            self.processes.on_first(partial(_raise_unusable, checkpoint, error))

    def save(self) -> None:
        """Write a checkpoint in the background, and delete the oldest."""
        progress = {
            "step": self.step,
            "train_seconds": self.train_seconds,
            "num_processes": self.processes.count,
            "device": self.processes.device.type,
        }
        state = self._state() | {"random": self._random_state()}
        self._writer.save(self.step, self.model.model, state, progress)

    def _state(self) -> dict[str, dict[str, Tensor]]:
        """The tensors themselves: what is loaded into them is loaded into the model."""
        return {
            "model": self.model.model.state_dict(),
            "optimizer": named_state(self.model.model, self.optimizer),
        }

    def _random_state(self) -> dict[str, Tensor]:
        """The random states of this process, under its own names."""
        rank, device = self.processes.rank, self.processes.device
        state = {f"cpu-{rank}": torch.get_rng_state()}
        if device.type == "cuda":
            state[f"cuda-{rank}"] = torch.cuda.get_rng_state(device)
        return state

    def _set_random_state(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            if name.startswith("cuda"):
                torch.cuda.set_rng_state(value, self.processes.device)
            else:
                torch.set_rng_state(value)

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
            log = stack.enter_context(self._open_log()) if self.processes.is_first else None
            profile = config.execution.profile_steps
            record = record_steps(self.run.profile, profile, self.processes)
            end_step = stack.enter_context(record)
            self.model.train()
            while self.step < config.steps:
                self._advance(log)
                end_step()
                signal = self.processes.largest(stop.received or 0)
                done = self.step == config.steps
                if done or signal or self.step % config.checkpoint_every == 0:
                    if log is not None:
                        log.metrics.sync()
                    self.save()
                if signal and not done:
                    self._writer.wait()
                    return signal
            self._writer.wait()
        return None

    def _open_log(self) -> StepLog:
        return StepLog(self.run.metrics, self.run.tensorboard, self.step, self.config.steps)

    def _advance(self, log: StepLog | None) -> None:
        """One train step with its measurements."""
        start = time.perf_counter()
        settings = self.config.optimizer
        rate = learning_rate(self.step, settings.learning_rate, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = self.batches.of_step(self.step)
        result = train_step(self.model, self.optimizer, batches, settings, self.processes)
        if not result.is_finite:
            self.processes.on_first(lambda: self._raise_not_finite(result))
        self.step += 1
        seconds = time.perf_counter() - start
        self.train_seconds += seconds
        if log is None:
            return
        num_tokens = self.processes.count * sum(batch[:, 1:].numel() for batch in batches)
        record = {
            "step": self.step,
            "loss": result.loss,
            "bits_per_byte": result.loss / math.log(2) * self.tokens_per_byte,
            "z_loss": result.z_loss,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "tokens_per_second": num_tokens / seconds,
        }
        if self._peak is not None:
            record["mfu"] = self.flops_per_token * record["tokens_per_second"] / self._peak
        log.write(record)

    def _raise_not_finite(self, result: StepResult) -> None:
        where = f", first in {result.culprit}" if result.culprit else ""
        raise RunError(
            f"step {self.step + 1} gave loss {result.loss} and gradient norm {result.grad_norm}"
            f"{where}; the weights were not changed and no checkpoint holds this step. Start a "
            "new run with a lower --optimizer.learning-rate or a lower "
            "--optimizer.max-grad-norm."
        )


def _raise_unusable(checkpoint: Checkpoint, error: BaseException) -> None:
    raise CheckpointError(
        f"{checkpoint.path} cannot be loaded: {root_cause(error)}. Its checksums are right, so "
        "this run did not write it; move it away."
    ) from error
