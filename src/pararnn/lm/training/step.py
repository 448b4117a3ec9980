"""One optimiser step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pararnn.lm.models.cache import ParaRNNCache
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training.config import OptimizerConfig
from pararnn.lm.training.moment import Moment
from pararnn.lm.training.parallel import Processes


@dataclass(frozen=True)
class StepResult:
    """Measured in one train step over all processes, before its update.

    Attributes:
        loss: Cross-entropy, in nats per token.
        z_loss: Mean squared log-partition.
        grad_norm: Of all gradients together, before clipping.
        culprit: First parameter whose gradient is not finite; None when there is none.
    """

    loss: float
    z_loss: float
    grad_norm: float
    culprit: str | None = None

    @property
    def is_finite(self) -> bool:
        """Whether all of it can be used."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Measurement:
    """What a train step measured, on its way from the device: nothing waits until it is read.

    Args:
        losses: Cross-entropy and z-loss of this process, shape (2,).
        norm: Of all gradients together.
        norms: Of the gradient of each parameter.
        names: Of the parameters.
        processes: That take the step together.

    Attributes:
        end: When the step is done.
    """

    def __init__(
        self, losses: Tensor, norm: Tensor, norms: Tensor, names: list[str], processes: Processes
    ) -> None:
        values = torch.cat([losses.double(), norm.double().reshape(1), norms.double()])
        self._values = values.detach().to("cpu", non_blocking=True)
        self.end = Moment(values.device)
        self._names, self._processes = names, processes

    def read(self) -> StepResult:
        """Wait for the step; all processes must read, in the order of their steps."""
        self.end.wait()
        own, (norm, *norms) = self._values[:2].tolist(), self._values[2:].tolist()
        cross_entropy, z_loss = self._processes.mean(own)
        pairs = zip(self._names, norms, strict=True)
        culprit = next((name for name, value in pairs if not math.isfinite(value)), None)
        return StepResult(cross_entropy, z_loss, norm, culprit)


def train_step(
    model: CausalLoss,
    optimizer: torch.optim.Optimizer,
    batches: list[Tensor],
    config: OptimizerConfig,
    processes: Processes,
    passes: Callable[[list[Tensor]], Tensor] | None = None,
) -> Measurement:
    """One optimiser step over this process's batches of shape (batch, time + 1), int64.

    The model's `bos_token_id` begins every document. On a GPU the step has only been started when
    this returns. An update with a gradient that is not finite spoils the weights; what is measured
    tells. `passes` computes gradients and losses of batches, None for `add_gradients`.
    """
    compute = passes or (lambda those: add_gradients(model, those, config, processes))
    losses = compute(batches)
    named = [(name, p.grad) for name, p in model.model.named_parameters() if p.grad is not None]
    norms = _whole(torch.stack(torch._foreach_norm([grad for _, grad in named])))
    norm = torch.linalg.vector_norm(norms)
    limit = config.max_grad_norm or math.inf
    nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    names = [name for name, _ in named]
    return Measurement(losses, norm, norms, names, processes)


def add_gradients(
    model: CausalLoss,
    batches: list[Tensor],
    config: OptimizerConfig,
    processes: Processes,
    caches: Sequence[ParaRNNCache | None] | None = None,
    apart: Sequence[bool] | None = None,
) -> Tensor:
    """Forward and backward passes over batches; returns mean cross-entropy and z-loss, shape (2,).

    `caches` hold the states before the batches, and then those after them, with their graphs.
    `apart` says in which batches documents are separated; None for what `separated` says.
    """
    apart = separated(model, batches) if apart is None else apart
    share = 1 / len(batches)
    parts = zip(batches, caches or [None] * len(batches), apart, strict=True)
    losses = [_backward(model, *part, share, config, processes) for part in parts]
    return torch.stack(losses).mean(0)


def separated(model: CausalLoss, batches: list[Tensor]) -> tuple[bool, ...]:
    """In which batches documents are separated.

    In our models always: compiled blocks would be compiled again for the first batch without any.
    In others where a document begins after the first token; attention without a mask is faster.
    """
    begins = model.model.config.bos_token_id
    return tuple(
        model.knows_resets or (model.separates_documents and bool((batch[:, 1:-1] == begins).any()))
        for batch in batches
    )


def _backward(
    model: CausalLoss,
    batch: Tensor,
    cache: ParaRNNCache | None,
    apart: bool,
    share: float,
    config: OptimizerConfig,
    processes: Processes,
) -> Tensor:
    device = processes.device
    batch = batch.to(device, non_blocking=True)
    inputs, targets = batch[:, :-1], batch[:, 1:]
    resets = inputs == model.model.config.bos_token_id if apart else None
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        loss, cross_entropy, z_loss = model(inputs, targets, resets, cache)
    (loss * share).backward()
    return torch.stack([cross_entropy, z_loss])


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
