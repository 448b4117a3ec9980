"""What is known of a layer goes with it."""

import gc
import weakref

import pytest
import torch
from torch import nn

import pararnn
from pararnn.kernels.operators import request_of
from pararnn.tracing import expressions

CELLS = {
    "elementwise": lambda: pararnn.cells.ParaLSTMCell(3, 5),
    "mixing": lambda: nn.LSTMCell(3, 5),
}


def make(name, chunk=3):
    return pararnn.RNN(CELLS[name](), solver=pararnn.Newton(chunk=chunk))


@pytest.mark.parametrize("name", CELLS)
def test_plans_die_with_their_layer(name):
    layer = make(name, chunk=4)  # compiled programs of other tests keep their plans
    request = weakref.ref(request_of(layer.runner().request))
    text = str(layer.runner().request)
    other = make(name, chunk=4)  # layers that do the same share it
    del layer
    gc.collect()
    assert request() is request_of(text)
    del other
    gc.collect()
    assert request() is None
    with pytest.raises(RuntimeError, match="there is no layer with the request"):
        request_of(text)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_pass_may_outlive_its_layer(name, compiled):
    layer, x = make(name), torch.randn(2, 7, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x)[0].sum(), x)
    run = layer
    if compiled:
        run = torch.compile(layer, backend="aot_eager")
    y = run(x)[0].sum()
    del layer, run
    torch.compiler.reset()
    gc.collect()
    y.backward()
    torch.testing.assert_close(x.grad, expected)


class Odd(nn.Module):
    """Multiplies by a number that no other cell has."""

    input_size = hidden_size = 3

    def forward(self, x, h):
        return torch.tanh(0.123454321 * h + x)


def test_expressions_die_with_what_uses_them():
    find = lambda: [e for e in expressions._interned.values() if 0.123454321 in e.args]  # noqa: E731
    layer = pararnn.RNN(Odd())
    assert find()
    del layer
    gc.collect()
    assert not find()


def test_scan_keeps_the_steps_used_last():
    def scan(step):
        pararnn.scan(step, torch.zeros(2, 3), torch.randn(2, 5, 3))
        return weakref.ref(step)

    def used(h, d):
        return torch.tanh(0.5 * h + d)

    gone = scan(lambda h, d: torch.tanh(0.25 * h + d))
    for factor in range(64):
        scan(lambda h, d, factor=factor: torch.tanh(factor / 100 * h + d))
        kept = scan(used)
    del used
    gc.collect()
    assert gone() is None
    assert kept() is not None
