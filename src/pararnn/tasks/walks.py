"""Walks through the states of an automaton, for tasks that track a state."""

import torch
from torch import Tensor


def walk(steps: Tensor, letters: Tensor) -> Tensor:
    """The state after every letter, from state 0 before the first.

    Args:
        steps: Where a letter leads from a state, (letters, states), int64.
        letters: Shape (batch, time), int64.

    Returns:
        Shape (batch, time), int64.
    """
    states = torch.empty_like(letters)
    state = torch.zeros_like(letters[:, 0])
    for t, letter in enumerate(letters.unbind(1)):
        state = steps[letter, state]
        states[:, t] = state
    return states
