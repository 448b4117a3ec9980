"""Truncated backpropagation through time: the state goes on from sequence to sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from pararnn.lm.models.cache import LayerState, ParaRNNCache
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.sharding import looking, mesh_of


class CarriedState:
    """The states after the last sequences, a row for each sequence of a step in this process.

    No gradient flows through them. They stay where they are in memory, so that a CUDA graph can
    read and write them.

    Args:
        model: As `lay_out` left it; a ParaRNN model without attention.
        rows: Sequences of a step in this process.
        processes: That train together.
        half: Whether the model runs in bfloat16 autocast.
        parts: Processes that share a sequence, and its state.
    """

    def __init__(
        self,
        model: CausalLoss,
        rows: int,
        processes: Processes,
        half: bool,
        parts: int = 1,
    ) -> None:
        self._mesh = None if processes.count == 1 else mesh_of(processes, parts)
        self._layers = _empty(model, rows, processes.device, half)

    def begin(self) -> None:
        """Start anew from states of zero."""
        for tensor in self.tensors():
            tensor.zero_()

    def tensors(self) -> list[Tensor]:
        """All of it."""
        return [tensor for layer in self._layers for tensor in _tensors(layer)]

    def caches(self, num_passes: int) -> list[ParaRNNCache]:
        """The states before the sequences of each of several passes."""
        pieces = [_split(layer, num_passes) for layer in self._layers]
        return [ParaRNNCache(list(layers)) for layers in zip(*pieces, strict=True)]

    def go_on(self, caches: Sequence[ParaRNNCache]) -> None:
        """Keep the states after them: all, or none if memory runs out."""
        layers = zip(*(cache.layers for cache in caches), strict=True)
        columns = [parts for pieces in layers for parts in zip(*map(_tensors, pieces), strict=True)]
        joined = [torch.cat(parts).detach() for parts in columns]
        for kept, tensor in zip(self.tensors(), joined, strict=True):
            kept.copy_(tensor)

    def state(self) -> dict[str, Tensor]:
        """All of it by names, in a form that any number of processes can read."""
        return {
            f"{index}.{number}": self._shared(tensor)
            for index, layer in enumerate(self._layers)
            for number, tensor in enumerate(_tensors(layer))
        }

    def _shared(self, rows: Tensor) -> Tensor:
        mesh = self._mesh
        return rows if mesh is None else DTensor.from_local(rows, mesh, [Shard(0), Replicate()])

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        for index, layer in enumerate(self._layers):
            found = [state[f"{index}.{number}"] for number in range(len(_tensors(layer)))]
            for kept, tensor in zip(_tensors(layer), found, strict=True):
                kept.copy_(tensor.to_local() if isinstance(tensor, DTensor) else tensor)


def _empty(model: CausalLoss, rows: int, device: torch.device, half: bool) -> list[LayerState]:
    """States of zero, of the shapes and types that the model makes."""
    cache = ParaRNNCache()
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with looking(model), torch.autocast(device.type, torch.bfloat16, enabled=half):
        model(token, token, torch.ones_like(token, dtype=torch.bool), cache)
    return [layer.map(lambda t: t.new_zeros(rows, *t.shape[1:])) for layer in cache.layers]


def _tensors(layer: LayerState) -> list[Tensor]:
    recurrent = layer.recurrent
    return [layer.window, *([recurrent] if isinstance(recurrent, Tensor) else recurrent)]


def _like(layer: LayerState, tensors: Sequence[Tensor]) -> LayerState:
    """The inverse of `_tensors`."""
    window, *recurrent = tensors
    whole = isinstance(layer.recurrent, Tensor)
    return LayerState(window, recurrent[0] if whole else tuple(recurrent))


def _split(layer: LayerState, count: int) -> list[LayerState]:
    pieces = zip(*(tensor.chunk(count) for tensor in _tensors(layer)), strict=True)
    return [_like(layer, tensors) for tensors in pieces]
