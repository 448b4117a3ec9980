"""The state that a model carries from one call to the next."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

State = Tensor | tuple[Tensor, ...]


def map_state(function: Callable[..., Tensor], *states: State) -> State:
    """Apply a function to every component of states of equal structure."""
    if isinstance(states[0], Tensor):
        return function(*states)
    return tuple(function(*components) for components in zip(*states, strict=True))


@dataclass(frozen=True)
class LayerState:
    """State of one block.

    Attributes:
        window: The last inputs of the convolution, shape (batch, conv_kernel - 1, inner_size);
            zero where they belong to an earlier document.
        recurrent: The cell's state, a tensor (batch, *state_shape) or a tuple of them.
    """

    window: Tensor
    recurrent: State

    def map(self, function: Callable[[Tensor], Tensor]) -> "LayerState":
        """The same state with a function applied to every tensor."""
        return LayerState(function(self.window), map_state(function, self.recurrent))


@dataclass
class ParaRNNCache:
    """States of all blocks after the tokens seen so far.

    Its size does not grow with the tokens, but for blocks of attention.

    The tensors are replaced, never written to, so gradients flow through a cache, and a
    `copy.copy` of it is a snapshot.

    Attributes:
        layers: One `LayerState` or `AttentionState` per block; empty before the first token.
        num_tokens: Tokens seen per sequence, padding included.
    """

    layers: list[LayerState] = field(default_factory=list)
    num_tokens: int = 0
    is_compileable: bool = False

    def __copy__(self) -> "ParaRNNCache":
        return ParaRNNCache(list(self.layers), self.num_tokens)

    def update(self, layers: list[LayerState], num_tokens: int) -> None:
        """Replace the states after `num_tokens` more tokens."""
        self.layers = layers
        self.num_tokens += num_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens seen, under the name that transformers calls."""
        return self.num_tokens

    def reset(self) -> None:
        """Forget everything."""
        self.layers, self.num_tokens = [], 0

    def detach(self) -> "ParaRNNCache":
        """The same states, detached from the autograd graph."""
        return ParaRNNCache([layer.map(Tensor.detach) for layer in self.layers], self.num_tokens)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the sequences that beam search continues, shape (batch,)."""
        self._select(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these sequences of the batch."""
        self._select(lambda tensor: tensor[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self._select(lambda tensor: torch.repeat_interleave(tensor, repeats, dim=0))

    def _select(self, function: Callable[[Tensor], Tensor]) -> None:
        self.layers = [layer.map(function) for layer in self.layers]
