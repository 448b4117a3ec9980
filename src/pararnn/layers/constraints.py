"""Bounds on parameters that an optimiser does not know of, kept by a projection after its step.

A clamp inside the forward pass would take the gradient of a weight at its bound away.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_layers: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def project_parameters(module: nn.Module) -> None:
    """Bring the parameters of `module` back inside their cells' bounds, in place.

    Calls `project_()` of every submodule that has one; ParaGRU and ParaLSTM clip their diagonal
    weights. Layers do this by themselves after each step of a `torch.optim.Optimizer` that has
    their parameters; call it after any other change of them.
    """
    for submodule in module.modules():
        project = getattr(submodule, "project_", None)
        if callable(project):
            project()


def keep_in_bounds(layer: nn.Module) -> None:
    """Project what is in a layer after every step of an optimiser that has its parameters."""
    _watch_optimizers()
    _layers.add(layer)


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer in list(_layers):
        if any(id(p) in updated for p in layer.parameters()):
            project_parameters(layer)


# For the compiler, which need not know what happens after a compiled step of an optimiser
vars(_after_step)["_torchdynamo_disable"] = True
