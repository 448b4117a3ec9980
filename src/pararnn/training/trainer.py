"""The training loop: steps, measurements, checkpoints; nothing about files of text or models."""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_model
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped] # has none
from tqdm import tqdm  # type: ignore[import-untyped] # has none
from transformers import PreTrainedModel

from pararnn.layers.constraints import project_parameters
from pararnn.training.checkpoints import Checkpoint, prune, save_checkpoint
from pararnn.training.config import OptimizerConfig, TrainConfig
from pararnn.training.corpus import DOCUMENT
from pararnn.training.errors import RunError
from pararnn.training.metrics import MetricsFile
from pararnn.training.optimizer import learning_rate
from pararnn.training.run_folder import RunFolder
from pararnn.training.signals import StopSignals


@dataclass(frozen=True)
class StepResult:
    """Measured in one train step, before its update.

    Attributes:
        loss: Cross-entropy, in nats per byte.
        z_loss: Mean squared log-partition.
        grad_norm: Of all gradients together, before clipping.
    """

    loss: float
    z_loss: float
    grad_norm: float


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Tensor],
    config: OptimizerConfig,
) -> StepResult:
    """One optimiser step over batches of shape (batch, time + 1), int64.

    No update is made when the loss or the gradient is not finite.
    """
    losses = [_backward(model, batch, config, len(batches)) for batch in batches]
    cross_entropy, z_loss = torch.stack(losses).mean(0).tolist()
    limit = config.max_grad_norm or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
    if math.isfinite(cross_entropy) and math.isfinite(grad_norm):
        optimizer.step()
        project_parameters(model)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(cross_entropy, z_loss, grad_norm)


def _backward(model: nn.Module, batch: Tensor, config: OptimizerConfig, num_batches: int) -> Tensor:
    inputs, targets = batch[:, :-1], batch[:, 1:]
    resets = inputs == DOCUMENT
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        output = model(
            input_ids=inputs.to(device),
            resets=resets.to(device) if resets.any() else None,
            shift_labels=targets.to(device),
            use_cache=False,
        )
    (output.loss / num_batches).backward()
    return torch.stack([output.cross_entropy.detach(), output.z_loss.detach()])


class Trainer:
    """Takes a model from one step to another and keeps everything that resuming needs.

    Args:
        config: Resolved settings.
        run: Where measurements and checkpoints go.
        identity: Marks the checkpoints as belonging to these settings and this data.
        model: On its device.
        optimizer: Of the model's parameters.
        loader: Endless batches, (batch, time + 1) int64.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: RunFolder,
        identity: str,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        loader: StatefulDataLoader,
    ) -> None:
        self.config, self.run, self.identity = config, run, identity
        self.model, self.optimizer, self.loader = model, optimizer, loader
        self.step = 0
        self.train_seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything beside the model that decides the next step."""
        state = {
            "step": self.step,
            "train_seconds": self.train_seconds,
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "cpu_rng": torch.get_rng_state(),
        }
        if self.model.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.model.device)
        return state

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""
        load_model(self.model, checkpoint.path / "model.safetensors")
        state = checkpoint.load_state()
        self.step, self.train_seconds = state["step"], state["train_seconds"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["cpu_rng"])
        if self.model.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.model.device)

    def save(self) -> None:
        """Write a checkpoint and delete the oldest."""
        save_checkpoint(
            self.run.checkpoints, self.step, self.identity, self.model, self.state_dict()
        )
        prune(self.run.checkpoints, self.config.keep_checkpoints)

    def fit(self) -> int | None:
        """Train up to `config.steps`.

        Returns:
            The signal that stopped it before, after a checkpoint was saved; else None.

        Raises:
            RunError: The loss is not finite, or a checkpoint cannot be saved.
        """
        if self.step == 0:
            self.save()
        metrics = MetricsFile(self.run.metrics, self.step)
        board = SummaryWriter(str(self.run.tensorboard), purge_step=self.step + 1)
        self.model.train()
        try:
            with StopSignals() as stop, self._progress() as progress:
                for batches in self._batches():
                    self._advance(batches, metrics, board, progress)
                    done = self.step == self.config.steps
                    stopped = stop.received is not None
                    if done or stopped or self.step % self.config.checkpoint_every == 0:
                        metrics.sync()
                        self.save()
                    if stopped and not done:
                        return stop.received
        finally:
            metrics.close()
            board.close()
        return None

    def _batches(self) -> Iterator[list[Tensor]]:
        stream = iter(self.loader)
        while self.step < self.config.steps:
            yield [next(stream) for _ in range(self.config.optimizer.accumulate)]

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.config.steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        )

    def _advance(
        self, batches: list[Tensor], metrics: MetricsFile, board: SummaryWriter, progress: tqdm
    ) -> None:
        """One train step with its measurements."""
        start = time.perf_counter()
        settings = self.config.optimizer
        rate = learning_rate(self.step, settings.learning_rate, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        result = train_step(self.model, self.optimizer, batches, settings)
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise self._not_finite(result)
        self.step += 1
        seconds = time.perf_counter() - start
        self.train_seconds += seconds
        num_tokens = sum(batch[:, 1:].numel() for batch in batches)
        record = {
            "step": self.step,
            "loss": result.loss,
            "bits_per_byte": result.loss / math.log(2),
            "z_loss": result.z_loss,
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "tokens_per_second": num_tokens / seconds,
        }
        metrics.write(record)
        for name, value in record.items():
            if name != "step":
                board.add_scalar(f"train/{name}", value, self.step)
        progress.set_postfix_str(
            f"loss {record['loss']:.3f}, {record['bits_per_byte']:.3f} bits/byte, "
            f"{record['tokens_per_second']:,.0f} tokens/s",
            refresh=False,
        )
        progress.update()

    def _not_finite(self, result: StepResult) -> RunError:
        return RunError(
            f"step {self.step + 1} gave loss {result.loss} and gradient norm {result.grad_norm}; "
            "the weights were not changed and no checkpoint holds this step. Start a new run with "
            "a lower --optimizer.learning-rate or a lower --optimizer.max-grad-norm."
        )
