"""Initial weights, one part of a model after another: no process needs room for all of them.

A model is first made without values, on the meta device. Its blocks, and then what is around them,
get theirs from random numbers of their own, which the seed and the part decide: they are the same
whether a process makes all parts to keep them or to keep a shard of each.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pararnn.lm.models import ParaRNNConfig
from pararnn.lm.models.architectures import make_model
from pararnn.lm.models.recurrence import initialises_itself

_AROUND = 0  # number of the layers around the blocks; the blocks' numbers follow


def outline(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without values."""
    with torch.device("meta"):
        return make_model(config)


def is_empty(module: nn.Module) -> bool:
    """Whether a module or a part of it is without values."""
    tensors = (*module.parameters(), *module.buffers())
    return any(tensor.is_meta for tensor in tensors)


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated parts of a model, which transformers keeps on one device each."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def start(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Give all of an outline its values, on the CPU."""
    parts = blocks(model)
    for index in range(len(parts)):
        start_block(model, index, seed)
    start_around(model, blocks(model), seed)
    return model


def start_block(model: PreTrainedModel, index: int, seed: int) -> nn.Module:
    """Replace a block of an outline by one with values, on the CPU.

    It is made anew, since a cell's values are those that its constructor gives it.
    """
    layers: Any = model.base_model.layers
    config = model.config
    _draw_from(seed, 1 + index)
    kind = config.mixers[index] if isinstance(config, ParaRNNConfig) else index
    block: nn.Module = type(layers[index])(config, kind)
    _initialise(model, block.modules())
    layers[index] = block
    return block


def start_around(model: PreTrainedModel, parts: list[nn.Module], seed: int) -> None:
    """Give the layers around the blocks their values, on the CPU."""
    _draw_from(seed, _AROUND)
    modules = [module for module in around(model, parts) if _has_tensors(module)]
    for module in modules:
        module.to_empty(device="cpu", recurse=False)
    _initialise(model, iter(modules))


def around(module: nn.Module, parts: list[nn.Module]) -> Iterator[nn.Module]:
    """All modules but those of some parts, outer ones first."""
    if any(module is part for part in parts):
        return
    yield module
    for child in module.children():
        yield from around(child, parts)


def _draw_from(seed: int, part: int) -> None:
    """Begin the random numbers of a part."""
    state = np.random.SeedSequence([seed, part]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state >> 1))


@torch.no_grad()
def _initialise(model: PreTrainedModel, modules: Iterator[nn.Module]) -> None:
    """As transformers does, inner modules first; cells keep what they were made with."""
    for module in reversed(list(modules)):
        if not initialises_itself(module):
            model._init_weights(module)


def _has_tensors(module: nn.Module) -> bool:
    return any(
        tensor is not None for tensor in (*module._parameters.values(), *module._buffers.values())
    )
