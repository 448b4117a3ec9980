"""Before every commit, in 20 seconds: a cell of each structure against the loop."""

import pytest
import torch
from torch import nn

import pararnn

CELLS = {
    "elementwise": lambda: pararnn.cells.ParaLSTMCell(4, 6),
    "heads (size 3)": lambda: pararnn.cells.HeadSLSTMCell(4, 6, num_heads=2),
    "dense": lambda: nn.GRUCell(4, 6),
}


@pytest.mark.parametrize("structure", CELLS)
def test_values_gradients_states_and_resets(structure):
    """All of it is compared by `check_cell`, in float64, on every backend that a CPU has."""
    assert pararnn.testing.check_cell(CELLS[structure]()).structure == structure


@pytest.mark.parametrize("structure", CELLS)
def test_two_halves_with_the_state_carried_equal_the_whole(structure):
    rnn = pararnn.RNN(CELLS[structure]())
    x = torch.randn(2, 41, 4)
    y, last = rnn(x)
    first, state = rnn(x[:, :20])
    second, state = rnn(x[:, 20:], state)
    pararnn.testing.assert_close("output", torch.cat([first, second], 1), y, rtol=1e-5)
    pairs = zip(state, last, strict=True) if isinstance(last, tuple) else [(state, last)]
    for carried, whole in pairs:
        pararnn.testing.assert_close("last state", carried, whole, rtol=1e-5)
