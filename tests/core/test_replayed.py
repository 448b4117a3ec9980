"""A layer's call as one function of tensors in each direction, as CUDA graphs replay it."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pararnn
from pararnn.cells import M2RNNCell, OuterMemoryCell, ParaLSTMCell
from pararnn.kernels.graphs import Graphs
from pararnn.layers import runner
from pararnn.testing import assert_close, loop

from .compare import assert_same, twice

CELLS = {
    "gru": lambda: nn.GRUCell(5, 6),
    "lstm": lambda: nn.LSTMCell(5, 6),
    "paralstm": lambda: ParaLSTMCell(5, 6),
    "m2rnn": lambda: M2RNNCell(5, 3, 4, num_heads=2),
    "outer": lambda: OuterMemoryCell(5, 3, 4),
}


class Noisy(nn.Module):
    """Draws random numbers in its input part."""

    input_size = hidden_size = 4

    def forward(self, x, h):
        return torch.tanh(0.5 * h + nn.functional.dropout(x, 0.5))


class Scaled(nn.Module):
    """Has a list of numbers that is neither parameter nor buffer."""

    input_size = hidden_size = 4

    def __init__(self, factor):
        super().__init__()
        self.factors = [torch.full((4,), factor)]

    def forward(self, x, h):
        return torch.tanh(0.5 * h + x * self.factors[0])


@pytest.fixture
def calls(monkeypatch):
    """Calls go the way of CUDA graphs, without graphs; the forms of all of them."""
    seen = []

    def call(self, form, function, tensors):
        seen.append(form)
        with torch.no_grad():
            return function([None if t is None else t.detach().clone() for t in tensors])

    monkeypatch.setattr(Graphs, "call", call)
    monkeypatch.setattr(runner, "DEVICE", "cpu")
    monkeypatch.setattr(runner.Runner, "_in_graph", lambda *_: True)
    monkeypatch.setattr(pararnn.RNN, "_path", lambda *_: None)
    return seen


def results(rnn, x, state, inputs, resets=None):
    torch.manual_seed(1)
    y, last = rnn(x, state, resets)
    outputs = [y, *(last if isinstance(last, tuple) else (last,))]
    cotangents = [torch.randn_like(o) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, cotangents)]


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_values_and_gradients(request, name, frozen, begins):
    torch.manual_seed(0)
    rnn = pararnn.RNN(CELLS[name]().double())
    x = torch.randn(3, 40, 5, dtype=torch.float64, requires_grad=not frozen)
    parts = [
        torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
        for shape in rnn.state_shapes
    ]
    state = parts[0] if len(parts) == 1 else tuple(parts)
    inputs = [*parts, *([] if frozen else [x]), *rnn.parameters()]
    resets = torch.rand(3, 40) < 0.1 if begins else None
    expected = results(rnn, x, state, inputs, resets)
    calls = request.getfixturevalue("calls")
    found = results(rnn, x, state, inputs, resets)
    assert [form[0] for form in calls] == ["forward", "backward"]
    for i, (actual, reference) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"tensor {i}", actual, reference, rtol=1e-10)


def test_only_the_state_has_a_gradient(request):
    rnn = pararnn.RNN(nn.GRUCell(5, 6)).requires_grad_(False)
    x, state = torch.randn(2, 30, 5), torch.randn(2, 6, requires_grad=True)
    expected = results(rnn, x, state, [state])
    calls = request.getfixturevalue("calls")
    for actual, reference in zip(results(rnn, x, state, [state]), expected, strict=True):
        assert_close("tensor", actual, reference, rtol=1e-5)
    assert [form[0] for form in calls] == ["forward", "backward"]


def test_constants_are_those_of_the_layer(calls):
    """Also where another layer does the same with others."""
    layers = [pararnn.RNN(Scaled(factor)) for factor in (2.0, 3.0)]
    x, zeros = torch.randn(2, 30, 4), torch.zeros(2, 4)
    for layer in layers:
        assert_close("y", layer(x)[0], loop(layer.cell, x, zeros)[0], rtol=1e-5)
    assert len(calls) == 2


def test_autocast_holds_in_both_directions(request):
    rnn = pararnn.RNN(ParaLSTMCell(5, 6))
    x, inputs = torch.randn(2, 30, 5, requires_grad=True), list(rnn.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(rnn, x, None, [x, *inputs])
        calls = request.getfixturevalue("calls")
        found = results(rnn, x, None, [x, *inputs])
    assert calls
    for i, (actual, reference) in enumerate(zip(found, expected, strict=True)):
        assert actual.dtype is reference.dtype
        assert_close(f"tensor {i}", actual, reference, rtol=1e-2)


@pytest.mark.parametrize("name", ["gru", "m2rnn"])
def test_gradients_of_gradients_equal_loop(calls, name):
    rnn = pararnn.RNN(CELLS[name]()).double()
    x, state = torch.randn(2, 30, 5).double(), torch.zeros(2, *rnn.state_shapes[0]).double()
    expected = twice(functools.partial(loop, rnn.cell), x, state)
    assert_same(twice(rnn, x, state), expected, 1e-10)
    assert [form[0] for form in calls] == ["forward", "backward"]  # the one of sin'


class NoisyReadout(M2RNNCell):
    """Draws random numbers in its readout."""

    def readout(self, x, state):
        return nn.functional.dropout(super().readout(x, state), 0.5)


@pytest.mark.parametrize("make", [Noisy, lambda: NoisyReadout(4, 2, 3)])
def test_random_numbers_are_not_drawn_twice(calls, make):
    pararnn.RNN(make())(torch.randn(2, 30, 4))
    assert not calls


def test_the_readout_alone_or_the_last_state_alone(calls):
    """What has no gradient from outside is not there for the graph either."""
    rnn = pararnn.RNN(CELLS["m2rnn"]().double())
    x = torch.randn(2, 30, 5, dtype=torch.float64, requires_grad=True)
    found, expected = rnn(x), loop(rnn.cell, x, torch.zeros(2, 2, 3, 4, dtype=torch.float64))
    for actual, reference in zip(found, expected, strict=True):
        cotangent = torch.randn_like(reference)
        pair = [
            torch.autograd.grad(y, x, cotangent, retain_graph=True)[0] for y in (actual, reference)
        ]
        assert_close("gradient", *pair, rtol=1e-9)


def test_a_recording_sees_everything(calls):
    """As when a cell that is traced has such a layer inside."""
    rnn = pararnn.RNN(nn.GRUCell(5, 6))
    with FlopCounterMode(display=False):
        rnn(torch.randn(2, 30, 5))
    assert not calls
