"""A layer inside activation checkpointing, also when it is traced there for the first time."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pararnn
from pararnn.testing import assert_close


@pytest.mark.parametrize("reentrant", [False, True], ids="reentrant={}".format)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_traced_inside(backend, reentrant):
    rnn = pararnn.ParaGRU(4, 6, batch_first=True, backend=backend)
    x = torch.randn(2, 9, 4, requires_grad=True)
    rnn(x)[0].sum().backward()
    expected = [parameter.grad.clone() for parameter in rnn.parameters()]
    rnn.zero_grad()
    for module in rnn.modules():
        module.changed = True  # so that the cell is traced anew
    checkpoint(lambda x: rnn(x)[0], x, use_reentrant=reentrant).sum().backward()
    for parameter, gradient in zip(rnn.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


LAYERS = {
    "elementwise": lambda: pararnn.ParaLSTM(3, 4, batch_first=True),
    "mixing, a loop": lambda: pararnn.RNN(nn.GRUCell(3, 4)),
    "mixing, Newton": lambda: pararnn.RNN(nn.RNNCell(3, 4), solver=pararnn.Newton(chunk=7)),
    "parallelize": lambda: pararnn.parallelize(nn.LSTM(3, 4, 2, batch_first=True)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("reentrant", [False, True], ids="reentrant={}".format)
@pytest.mark.parametrize("evaluated", [False, True], ids="evaluated={}".format)
def test_equals_without(name, reentrant, evaluated):
    """Also with resets, and after an evaluation, which may go another way."""
    layer = LAYERS[name]().double()
    x = torch.randn(2, 100, 3, dtype=torch.float64, requires_grad=True)
    resets = torch.rand(2, 100) < 0.1
    cotangent = torch.randn(2, 100, 4, dtype=torch.float64)
    inputs = [x, *layer.parameters()]
    run = lambda x: layer(x, None, resets)[0]  # noqa: E731
    expected = torch.autograd.grad(run(x), inputs, cotangent)
    if evaluated:
        with torch.no_grad():
            layer(x)
    checkpoint(run, x, use_reentrant=reentrant).backward(cotangent)
    for i, (tensor, gradient) in enumerate(zip(inputs, expected, strict=True)):
        assert_close(f"gradient {i}", tensor.grad, gradient, rtol=1e-10)
