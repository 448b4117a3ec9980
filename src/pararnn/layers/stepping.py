"""Support for programs that run a step of a whole model again and again: generation, training."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pararnn.kernels.graphs import Captured as Captured
from pararnn.kernels.graphs import captured as captured
from pararnn.kernels.graphs import rehearsed as rehearsed
from pararnn.kernels.moving import move_on as move_on  # which a step ends with
from pararnn.layers.rnn import RNN
from pararnn.tracing.ran import Ran
from pararnn.tracing.watch import Watched


class Form:
    """What a captured or compiled step of a model depends on, to notice when it has changed.

    Args:
        model: Any module; its `RNN` layers are traced.
    """

    def __init__(self, model: nn.Module) -> None:
        everything = Ran()
        everything.computes_names = True
        self._model = model
        self._watched = Watched(model, everything, lambda _: {})
        self._layers = self._now()

    def _now(self) -> tuple[list[object], list[int]]:
        """How the layers are traced, and where the weights are."""
        layers = [m for m in self._model.modules() if isinstance(m, RNN)]
        tensors = [*self._model.parameters(), *self._model.buffers()]
        return [layer.runner() for layer in layers], [t.data_ptr() for t in tensors]

    def has_changed(self) -> bool:
        """Whether the model, its layers or the place of its weights differ from the beginning."""
        return self._now() != self._layers or self._watched.change(self._model) is not None


def captured_step(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """On a GPU, the work of `step` as a CUDA graph; elsewhere `step` itself.

    Args:
        step: Reads and writes the same tensors every time. It runs twice before the capture.
        device: Where it runs.
    """
    if device.type != "cuda":
        return step
    with torch.cuda.device(device):
        return captured(step)


def inline_steps(model: nn.Module) -> None:
    """Let steps on each element become part of a compiled step of a model, see `Runner.inline`."""
    for layer in model.modules():
        if isinstance(layer, RNN):
            layer.runner().inline()


def compile_options() -> dict[str, Any]:
    """Options for `torch.compile` of a step: products with one vector in our kernels, if they run.

    A step of one text multiplies each weight with one vector (`kernels/matvec.py`).
    """
    if importlib.util.find_spec("triton") is None:
        return {}
    from pararnn.kernels.matvec_fusion import FuseMatvecs

    return {"post_grad_custom_post_pass": FuseMatvecs()}
