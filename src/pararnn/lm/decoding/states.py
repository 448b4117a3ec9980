"""The states of all blocks in tensors that are made once, which steps of generation write into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pararnn.lm.models.attention import AttentionState
from pararnn.lm.models.cache import LayerState
from pararnn.lm.models.convolution import advance_windows

Layer = LayerState | AttentionState


class StaticStates:
    """States in place. Windows of convolutions that have one shape lie in one tensor.

    Args:
        layers: States of all blocks, from the model; copied.
        room: Steps that attention has room for.

    Attributes:
        layers: The same states in place; a step reads them.
    """

    def __init__(self, layers: Sequence[Layer], room: int) -> None:
        self.room = room
        alike: dict[torch.Size, list[int]] = {}
        for place, layer in enumerate(layers):
            if isinstance(layer, LayerState):
                alike.setdefault(layer.window.shape, []).append(place)
        self._places = list(alike.values())
        self.windows = [_windows(layers, places) for places in self._places]
        self.layers = [
            layer.with_room(room) if isinstance(layer, AttentionState) else layer.map(Tensor.clone)
            for layer in layers
        ]
        for windows, places in zip(self.windows, self._places, strict=True):
            for window, place in zip(windows, places, strict=True):
                self.layers[place] = replace(self.layers[place], window=window)

    @property
    def nbytes(self) -> int:
        """Size of all states, of attention with its room."""
        grown = [t for a in self.layers if isinstance(a, AttentionState) for t in _grown(a)]
        return sum(t.nbytes for t in (*self.windows, *cells(self.layers), *grown))

    def load(self, layers: Sequence[Layer]) -> None:
        """Copy states, those of attention without room, into the tensors."""
        for windows, places in zip(self.windows, self._places, strict=True):
            windows.copy_(_windows(layers, places))
        _copy(cells(self.layers), cells(layers))
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

    def newest(self, layers: Sequence[Layer]) -> list[list[Tensor]]:
        """What the states after a step have that the windows before it lack."""
        return [[_window(layers[p])[:, -1:] for p in places] for places in self._places]

    def advance(self, newest: Sequence[list[Tensor]], moved: Sequence[Tensor]) -> None:
        """Take over what a step has computed. One call copies the states of all blocks.

        Args:
            newest: As the method returns it.
            moved: As `moved_by_a_step` does.
        """
        for windows, new in zip(self.windows, newest, strict=True):
            advance_windows(windows, new)
        _copy(moved_by_a_step(self.layers), moved)


def cells(layers: Sequence[Layer]) -> list[Tensor]:
    """The states of the cells of all blocks."""
    recurrent = [layer.recurrent for layer in layers if isinstance(layer, LayerState)]
    return [t for state in recurrent for t in ((state,) if isinstance(state, Tensor) else state)]


def moved_by_a_step(layers: Sequence[Layer]) -> list[Tensor]:
    """What a step replaces as a whole: states of cells, and how far attention has come."""
    used = [layer.used for layer in layers if isinstance(layer, AttentionState)]
    return cells(layers) + [u for u in used if u is not None]


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


def _window(layer: Layer) -> Tensor:
    assert isinstance(layer, LayerState)
    return layer.window


def _windows(layers: Sequence[Layer], places: Sequence[int]) -> Tensor:
    return torch.stack([_window(layers[place]) for place in places])


def _copy(held: list[Tensor], new: Sequence[Tensor]) -> None:
    if held:
        torch._foreach_copy_(held, list(new))
