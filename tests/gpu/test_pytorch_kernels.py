"""cuDNN for PyTorch's own cells on a CUDA device: results, and where it is taken."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from pararnn import RNN
from pararnn.kernels import facts
from pararnn.kernels.graphs import captured
from pararnn.layers import pytorch_kernels
from pararnn.planning.costs import COSTS
from pararnn.planning.plan import decide
from pararnn.testing import assert_close, loop

pytestmark = pytest.mark.gpu

CELLS = {
    "tanh": nn.RNNCell,
    "relu": functools.partial(nn.RNNCell, nonlinearity="relu"),
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
}
FREE = ((0.0,) * 7,) * 4


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Calls of cuDNN, which the planner takes to take no time."""
    torch.use_deterministic_algorithms(False)  # cuDNN's make no such promise
    found, run = [], pytorch_kernels.run
    monkeypatch.setattr(pytorch_kernels, "run", lambda *given: found.append(given) or run(*given))
    costs = replace(COSTS, cudnn=FREE, cudnn_kept=FREE)
    monkeypatch.setattr(facts, "decide", functools.partial(decide, costs=costs))
    return found


def given_as(state):
    return tuple(state) if len(state) > 1 else state[0]


def outcome(run, cell, x, state, second=False):
    """Outputs, last states and gradients of all that is given, with random cotangents."""
    y, last = run(x, given_as(state))
    values = [y, *(last if isinstance(last, tuple) else (last,))]
    generator = torch.Generator().manual_seed(1)
    draw = lambda v: torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v)  # noqa: E731
    wanted = [x, *state, *cell.parameters()]
    grads = torch.autograd.grad(values, wanted, [draw(v) for v in values], create_graph=second)
    if second:
        grads = torch.autograd.grad(sum((g * draw(g)).sum() for g in grads), wanted)
    return [v.detach() for v in (*values, *grads)]


def compare(make, dtype, rtol, hidden, time, second=False, bias=True, autocast=False):
    """A layer on the device against the loop in float64 on the CPU."""
    torch.manual_seed(0)
    cell = make(12, hidden, bias=bias, dtype=dtype, device="cuda")
    exact = make(12, hidden, bias=bias, dtype=torch.float64)
    exact.load_state_dict({n: p.double().cpu() for n, p in cell.state_dict().items()})
    kind = {"dtype": dtype, "device": "cuda"}
    x = torch.randn(time, 3, 12, **kind).transpose(0, 1).requires_grad_()
    state = [torch.randn(3, hidden, **kind) for _ in range(1 + isinstance(cell, nn.LSTMCell))]
    state = [s.requires_grad_() for s in state]
    there = [t.detach().double().cpu().requires_grad_() for t in (x, *state)]
    expected = outcome(functools.partial(loop, exact), exact, there[0], there[1:], second)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        actual = outcome(RNN(cell), cell, x, state, second)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype is dtype
        assert_close(f"tensor {i}", a.double().cpu(), e, rtol=rtol)


@pytest.mark.parametrize("tf32", [True, False], ids="tf32={}".format)
@pytest.mark.parametrize("hidden", [10, 64, 256])
@pytest.mark.parametrize("name", CELLS)
def test_equals_the_loop(name, hidden, tf32, calls, monkeypatch):
    """Whatever is set for cuDNN, products are exact to float32; gates of its LSTM only to 6e-6."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    rtol = 2e-5 if name == "lstm" else 1e-5
    compare(CELLS[name], torch.float32, rtol, hidden, 300)
    compare(CELLS[name], torch.float32, rtol, hidden, 31, bias=False)
    assert len(calls) == 2


@pytest.mark.parametrize("name", CELLS)
def test_second_derivatives(name, calls):
    compare(CELLS[name], torch.float32, 1e-4, 10, 20, second=True)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CELLS)
def test_half_precision(name, dtype, calls):
    compare(CELLS[name], dtype, 1e-2, 64, 300)
    assert len(calls) == 1


@pytest.mark.parametrize("name", CELLS)
def test_autocast(name, calls):
    compare(CELLS[name], torch.float32, 1e-2, 64, 300, autocast=True)
    assert len(calls) == 1


def test_more_than_one_backward_pass(calls):
    rnn = RNN(nn.GRUCell(12, 64)).cuda()
    x = torch.randn(3, 100, 12, device="cuda", requires_grad=True)
    y, _ = rnn(x)
    wanted = [x, *rnn.parameters()]
    one = torch.autograd.grad(y.square().sum(), wanted, retain_graph=True)
    two = torch.autograd.grad(y.square().sum(), wanted)
    torch.testing.assert_close(one, two)
    assert len(calls) == 1


def test_inside_a_graph_of_the_user(calls):
    rnn = RNN(nn.LSTMCell(12, 64)).cuda()
    x = torch.randn(3, 100, 12, device="cuda", requires_grad=True)
    wanted = [x, *rnn.parameters()]
    grads = [torch.zeros_like(w) for w in wanted]

    def run():
        y, _ = rnn(x)
        for kept, g in zip(grads, torch.autograd.grad(y.square().sum(), wanted), strict=True):
            kept.copy_(g)

    replay = captured(run)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    replay()
    y, _ = rnn(x)
    torch.testing.assert_close(grads, list(torch.autograd.grad(y.square().sum(), wanted)))
    assert len(calls) >= 2


def test_float64_is_not_taken(calls):
    RNN(nn.GRUCell(12, 64)).cuda().double()(torch.randn(3, 50, 12, device="cuda").double())
    assert not calls
