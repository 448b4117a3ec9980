"""AdamW, or Muon beside it, and their learning-rate schedule."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pararnn.lm.training.config import OptimizerConfig, ScheduleConfig

FUSED_DEVICES = ("cpu", "cuda")


class Together(torch.optim.Optimizer):
    """Several optimisers, each with parameters of its own, as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for o in optimizers for group in o.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override] # read only
        """Of all parameters."""
        return {p: state for o in self.optimizers for p, state in o.state.items()}

    def step(self, closure: None = None) -> None:  # type: ignore[override] # without a closure
        """One step of each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of a configuration, with its state in place.

    Muon takes the weights of linear layers, except that of the output projection.

    Args:
        model: A language model, or its loss.
        config: Says which one.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    chosen = _products(model) if config.algorithm == "muon" else []
    taken = {id(p) for p in chosen}
    adamw = _adamw({n: p for n, p in named.items() if id(p) not in taken}, config)
    if not chosen:
        return adamw
    muon = torch.optim.Muon(
        chosen,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    for p in chosen:
        muon.state[p] = {"momentum_buffer": torch.zeros_like(p)}
    return Together(adamw, muon)


def _products(model: nn.Module) -> list[nn.Parameter]:
    """Weights of linear layers, without that of the output projection."""
    whole = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    head = whole.get_output_embeddings()
    layers = (m for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    weights = (layer._parameters.get("weight") for layer in layers)
    return [w for w in weights if w is not None and w.requires_grad]


def _adamw(named: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    A matrix is a parameter called `weight` of two dimensions or more: biases, norms and the
    vectors of a cell are left alone, also when a cell stacks several of them in one tensor.
    """
    decayed = [p for n, p in named.items() if is_matrix(n, p)]
    others = [p for n, p in named.items() if not is_matrix(n, p)]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=all(p.device.type in FUSED_DEVICES for p in named.values()),
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
