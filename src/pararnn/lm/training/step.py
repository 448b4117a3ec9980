"""One optimiser step."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pararnn import project_parameters
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training.config import OptimizerConfig
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
        """Whether the update was made."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    model: CausalLoss,
    optimizer: torch.optim.Optimizer,
    batches: list[Tensor],
    config: OptimizerConfig,
    processes: Processes,
) -> StepResult:
    """One optimiser step over this process's batches of shape (batch, time + 1), int64.

    The model's `bos_token_id` begins every document. No update is made when the loss or the
    gradient is not finite.
    """
    losses = [_backward(model, batch, config, len(batches), processes) for batch in batches]
    cross_entropy, z_loss = processes.mean(torch.stack(losses).double().mean(0).tolist())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = _whole(nn.utils.get_total_norm(gradients))
    result = StepResult(cross_entropy, z_loss, norm.item())
    if result.is_finite:
        limit = config.max_grad_norm or math.inf
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
        optimizer.step()
        project_parameters(model)
    else:
        culprit = _first_not_finite(model.model, processes.largest)
        result = dataclasses.replace(result, culprit=culprit)
    optimizer.zero_grad(set_to_none=True)
    return result


def _backward(
    model: CausalLoss,
    batch: Tensor,
    config: OptimizerConfig,
    num_batches: int,
    processes: Processes,
) -> Tensor:
    inputs, targets = batch[:, :-1], batch[:, 1:]
    resets = inputs == model.model.config.bos_token_id
    # Ours in any case: compiled blocks would be compiled again for the first batch without
    apart = model.knows_resets or (model.separates_documents and bool(resets.any()))
    device = processes.device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        loss, cross_entropy, z_loss = model(
            inputs.to(device), targets.to(device), resets.to(device) if apart else None
        )
    (loss / num_batches).backward()
    return torch.stack([cross_entropy, z_loss])


def _first_not_finite(model: nn.Module, largest: Callable[[int], int]) -> str | None:
    """Name of the first parameter with a gradient that is not finite in some process."""
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    last = len(named)
    bad = (i for i, (_, grad) in enumerate(named) if not _part(grad).isfinite().all())
    first = last - largest(last - next(bad, last))
    return named[first][0] if first < last else None


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
