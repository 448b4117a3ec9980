"""The states that a model makes, to compare those of a snapshot with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pararnn._words import counted
from pararnn.lm.decoding.states import Layer
from pararnn.lm.models.attention import AttentionState
from pararnn.lm.models.cache import LayerState
from pararnn.lm.models.modeling import ParaRNNForCausalLM


class StateForm:
    """What the states of all blocks look like, from a pass over one token.

    Args:
        model: Makes the states.
    """

    def __init__(self, model: ParaRNNForCausalLM) -> None:
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        output = model(input_ids=token, use_cache=True, logits_to_keep=1)
        self._layers: list[Layer] = list(output.cache_params.layers)

    def taken_over(self, name: str, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        """States of other texts in the types and on the device of the model.

        Args:
            name: What messages call the snapshot.
            layers: Of all its blocks.

        Raises:
            ValueError: They are of another shape.
        """
        other = "make a Decoder of the model that read the text, or read it again with this one."
        if len(layers) != len(self._layers):
            raise ValueError(
                f"{name} is of a model with {counted(len(layers), 'block')} but this one has "
                f"{len(self._layers)}; {other}"
            )
        for block, (own, given) in enumerate(zip(self._layers, layers, strict=True)):
            if (seen := _described(given)) != (wanted := _described(own)):
                raise ValueError(
                    f"{name} is of another model: block {block} has {seen} in it but {wanted} "
                    f"here; {other}"
                )
        return tuple(_like(own, given) for own, given in zip(self._layers, layers, strict=True))


def _described(layer: Layer) -> str:
    """Kind and shapes of a state, without texts and steps."""
    if isinstance(layer, AttentionState):
        heads, channels = layer.keys.shape[2:]
        return f"attention with {counted(heads, 'head')} of {counted(channels, 'channel')}"
    assert isinstance(layer, LayerState)
    parts = layer.recurrent if isinstance(layer.recurrent, tuple) else (layer.recurrent,)
    shapes = " and ".join(str(tuple(part.shape[1:])) for part in parts)
    window = tuple(layer.window.shape[1:])
    return f"a state of shape {shapes} and a window of the convolution of shape {window}"


def _like(own: Layer, given: Layer) -> Layer:
    tensors: list[Tensor] = []
    own.map(lambda tensor: tensors.append(tensor) or tensor)  # type: ignore[func-returns-value]
    types = iter(tensors)
    return given.map(lambda tensor: tensor.to(next(types)))
