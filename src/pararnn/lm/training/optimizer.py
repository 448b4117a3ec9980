"""AdamW and its learning-rate schedule."""

import math

import torch
from torch import Tensor, nn

from pararnn.lm.training.config import OptimizerConfig, ScheduleConfig

FUSED_DEVICES = ("cpu", "cuda")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    A matrix is a parameter called `weight` of two dimensions or more: biases, norms and the
    vectors of a cell are left alone, also when a cell stacks several of them in one tensor.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in named if is_matrix(n, p)]
    others = [p for n, p in named if not is_matrix(n, p)]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=all(p.device.type in FUSED_DEVICES for _, p in named),
    )
    _start_state(optimizer)
    return optimizer


def _start_state(optimizer: torch.optim.AdamW) -> None:
    """The state that AdamW makes in its first step: there from the start, it can be loaded into."""
    fused = optimizer.defaults["fused"]
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.zeros((), device=p.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimiser's state by the names of their parameters."""
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies; parametrised weights keep their `weight` within the name."""
    return "weight" in name.split(".") and parameter.dim() >= 2


def learning_rate(step: int, peak: float, schedule: ScheduleConfig) -> float:
    """Rate of the optimiser step after `step` others: linear warm-up, then a cosine to zero."""
    if schedule.length is None:
        raise ValueError("schedule.length is None; pass a configuration through resolve() first.")
    warmup = round(schedule.warmup * schedule.length)
    if step < warmup:
        return peak * (step + 1) / warmup
    if step >= schedule.length:
        return 0.0
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (schedule.length - warmup)))
