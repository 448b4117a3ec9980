"""The states of all blocks in tensors that are made once, which steps of generation write into."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pararnn.layers.stepping import move_on
from pararnn.lm.models.attention import AttentionState
from pararnn.lm.models.cache import LayerState

Layer = LayerState | AttentionState


class StaticStates:
    """States in place.

    Args:
        layers: States of all blocks, from the model; copied.
        room: Steps that attention has room for.

    Attributes:
        layers: The same states in place; a step reads them.
    """

    def __init__(self, layers: Sequence[Layer], room: int) -> None:
        self.room = room
        self.layers = [
            layer.with_room(room) if isinstance(layer, AttentionState) else layer.map(_copied)
            for layer in layers
        ]

    @property
    def nbytes(self) -> int:
        """Size of all states, of attention with its room."""
        grown = [t for a in self.layers if isinstance(a, AttentionState) for t in _grown(a)]
        return sum(t.nbytes for t in (*recurrent(self.layers), *grown))

    def load(self, layers: Sequence[Layer]) -> None:
        """Copy states, those of attention without room, into the tensors."""
        tensors = recurrent(self.layers)
        if tensors:
            torch._foreach_copy_(tensors, recurrent(layers))
        for own, layer in zip(self.layers, layers, strict=True):
            if isinstance(own, AttentionState) and isinstance(layer, AttentionState):
                count = layer.keys.shape[1]
                for held, new in zip(_grown(own), _grown(layer), strict=True):
                    held[:, :count] = new
                assert own.used is not None
                own.used.fill_(count)

    def saved(self, num_tokens: int) -> list[Layer]:
        """Copies, those of attention without room, after so many tokens."""
        return [
            layer.cut(num_tokens) if isinstance(layer, AttentionState) else layer.map(Tensor.clone)
            for layer in self.layers
        ]

    def advance(self, newest: Sequence[Tensor]) -> None:
        """Take over what a step has computed, see `newest`: one kernel for all blocks."""
        move_on(_moved(self.layers), newest)


def newest(layers: Sequence[Layer]) -> list[Tensor]:
    """What the states after a step have that those before it lack, each (texts, 1, ...)."""
    return [tensor[:, -1:] for tensor in _moved(layers)]


def _moved(layers: Sequence[Layer]) -> list[Tensor]:
    """What moves on in a step, each (texts, entries, ...): windows, and with one entry the rest."""
    whole = [layer.used for layer in layers if isinstance(layer, AttentionState)]
    windows = [layer.window for layer in layers if isinstance(layer, LayerState)]
    return [
        *(window for window in windows if window.shape[1]),
        *(cell.unsqueeze(1) for cell in _cells(layers)),
        *(used.view(1, 1) for used in whole if used is not None),
    ]


def recurrent(layers: Sequence[Layer]) -> list[Tensor]:
    """The windows and the states of the cells of all blocks."""
    windows = [layer.window for layer in layers if isinstance(layer, LayerState)]
    return [*windows, *_cells(layers)]


def _cells(layers: Sequence[Layer]) -> list[Tensor]:
    states = [layer.recurrent for layer in layers if isinstance(layer, LayerState)]
    return [t for state in states for t in ((state,) if isinstance(state, Tensor) else state)]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def select_rows(layers: Sequence[Layer], rows: Tensor) -> list[Layer]:
    """The states of these texts, in this order; copies."""
    return [layer.map(_picked(rows)) for layer in layers]


def join_rows(parts: Sequence[Sequence[Layer]]) -> list[Layer]:
    """States of several batches as those of one."""
    return [_joined(layers) for layers in zip(*parts, strict=True)]


def _joined(layers: tuple[Layer, ...]) -> Layer:
    tensors: list[list[Tensor]] = []
    for layer in layers:
        found: list[Tensor] = []
        layer.map(lambda tensor, found=found: found.append(tensor) or tensor)  # type: ignore[misc]
        tensors.append(found)
    joined = iter([torch.cat(of_all) for of_all in zip(*tensors, strict=True)])
    return layers[0].map(lambda _: next(joined))


def _picked(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.index_select(0, rows.to(tensor.device))


def _grown(layer: AttentionState) -> tuple[Tensor, Tensor, Tensor]:
    return layer.keys, layer.values, layer.document
