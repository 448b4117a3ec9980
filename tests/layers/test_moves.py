"""Layers that are moved or converted, and layers on the meta device."""

import pytest
import torch
from torch import nn

import pararnn
from pararnn.testing import assert_close, loop


class Tokens(nn.Module):
    """Takes the numbers of tokens; does not say the size of its input."""

    hidden_size, num_components = 6, 1

    def __init__(self):
        super().__init__()
        self.table, self.decay = nn.Embedding(5, 6), nn.Parameter(torch.rand(6))

    def forward(self, x, h):
        return torch.tanh(self.decay * h + self.table(x))


def test_whole_numbers_stay_the_input_of_a_layer_that_is_converted():
    torch.manual_seed(0)
    rnn, x = pararnn.RNN(Tokens()), torch.randint(5, (2, 30))
    rnn(x)
    rnn.double()
    expected, _ = loop(rnn.cell, x, torch.zeros(2, 6, dtype=torch.float64))
    assert_close("y", rnn(x)[0], expected, rtol=1e-12)


CELLS = {
    "elementwise": lambda: pararnn.cells.ParaLSTMCell(3, 6),
    "mixing": lambda: nn.GRUCell(3, 6),
}


@pytest.mark.parametrize("name", CELLS)
def test_by_way_of_meta(name):
    """As weights that are loaded later."""
    rnn = pararnn.RNN(CELLS[name]())
    x, kept = torch.randn(2, 30, 3), {n: p.clone() for n, p in rnn.state_dict().items()}
    expected, _ = rnn(x)
    rnn.to("meta").to_empty(device="cpu").load_state_dict(kept)
    assert torch.equal(rnn(x)[0], expected)


@pytest.mark.parametrize("time", [5, 300])
@pytest.mark.parametrize("name", CELLS)
def test_shapes_on_meta(name, time):
    rnn, real = pararnn.RNN(CELLS[name]().to("meta")), pararnn.RNN(CELLS[name]())
    y, state = rnn(torch.randn(2, time, 3, device="meta"))
    like, like_state = real(torch.randn(2, time, 3))
    as_tuple = lambda s: s if isinstance(s, tuple) else (s,)  # noqa: E731
    pairs = zip((y, *as_tuple(state)), (like, *as_tuple(like_state)), strict=True)
    assert all(a.is_meta and (a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)
    assert rnn.report is None
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in rnn.parameters())
