"""Batches without a row, as `nn.GRU` takes them."""

import pytest
import torch
from core.conftest import needs_triton
from torch import nn

import pararnn

LAYERS = {
    "RNN of nn.GRUCell": lambda: pararnn.RNN(nn.GRUCell(3, 4)),
    "Newton": lambda: pararnn.RNN(nn.RNNCell(3, 4), solver=pararnn.Newton(chunk=3)),
    "parallelize": lambda: pararnn.parallelize(nn.LSTM(3, 4, 2, batch_first=True)),
    "directions": lambda: pararnn.parallelize(nn.GRU(3, 4, bidirectional=True, batch_first=True)),
    "C": lambda: pararnn.ParaGRU(3, 4, batch_first=True),
    "PyTorch": lambda: pararnn.RNN(pararnn.cells.ParaLSTMCell(3, 4), backend="torch"),
    "Triton": lambda: pararnn.RNN(pararnn.cells.ParaLSTMCell(3, 4), backend="triton"),
}


MARKS = {"Triton": needs_triton}


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, ())) for name in LAYERS])
def layer(request):
    return LAYERS[request.param]()


@pytest.mark.parametrize("time", [5, 300])
@pytest.mark.parametrize("with_resets", [False, True])
def test_shapes_and_zero_gradients(layer, time, with_resets):
    x = torch.randn(0, time, 3, requires_grad=True)
    resets = torch.zeros(0, time, dtype=torch.bool) if with_resets else None
    y, state = layer(x, None, resets)
    full, full_state = layer(torch.randn(2, time, 3))
    assert y.shape == (0, *full.shape[1:])
    pairs = (
        [(state, full_state)]
        if isinstance(state, torch.Tensor)
        else zip(state, full_state, strict=True)
    )
    for one, other in pairs:
        assert one.shape == (*other.shape[:-2], 0, other.shape[-1])
    y.sum().backward()
    assert x.grad.shape == x.shape
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_step_and_report():
    rnn = pararnn.RNN(nn.GRUCell(3, 4))
    assert rnn.step(torch.randn(0, 3))[0].shape == (0, 4)
    rnn(torch.randn(2, 5, 3))
    rnn(torch.randn(0, 5, 3))
    assert rnn.report is None


def test_scan():
    states, last = pararnn.scan(
        lambda h, d: torch.tanh(0.5 * h + d), torch.zeros(0, 4), torch.randn(0, 7, 4)
    )
    assert (states.shape, last.shape) == ((0, 7, 4), (0, 4))


@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 0, 3), (0, 3)])
def test_no_time_is_refused(shape):
    with pytest.raises(ValueError, match="time must be at least 1"):
        pararnn.RNN(nn.GRUCell(3, 4))(torch.zeros(shape))
