"""Weights that parametrisations compute: once per call, with gradients and what they write."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from pararnn import RNN, Newton, TraceError
from pararnn.testing import loop
from pararnn.tracing.watch import Watched

from .compare import assert_same, outcome, random_state


class Noisy(nn.Module):
    """Counts its calls in a buffer, and does what cannot be traced."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, weight):
        if self.training:
            self.calls += 1
        return weight * 0.5 if float(weight.detach().norm()) > 0 else weight


class Cell(nn.Module):
    input_size, hidden_size = 3, 4

    def __init__(self, change):
        super().__init__()
        self.lin, self.rec = nn.Linear(3, 4), change(nn.Linear(4, 4, bias=False))

    def forward(self, x, h):
        return torch.tanh(self.lin(x) + self.rec(h) - 0.1 * self.rec(h * h))


CHANGES = {
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda m: own(m),
}


def own(module):
    parametrize.register_parametrization(module, "weight", Noisy())
    module.parametrizations.weight[0].calls.zero_()
    return module


def once(run):
    """As PyTorch computes the weights if it is told to do so once for all steps."""

    def cached(*inputs):
        with parametrize.cached():
            return run(*inputs)

    return cached


@pytest.mark.parametrize("solver", [None, Newton(chunk=5)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CHANGES)
def test_equals_the_loop(name, training, solver):
    torch.manual_seed(1)
    cell = Cell(CHANGES[name]).double().train(training)
    written = {n: b.clone() for n, b in cell.named_buffers()}
    rnn = RNN(cell, solver=solver)
    assert all(torch.equal(b, written[n]) for n, b in cell.named_buffers()), "making writes nothing"
    x, state = torch.randn(2, 23, 3, dtype=torch.float64), random_state(1, 2, 4)
    expected = outcome(once(functools.partial(loop, cell)), cell, x, state)
    after = {n: b.clone() for n, b in cell.named_buffers()}
    for buffer_name, buffer in cell.named_buffers():
        buffer.copy_(written[buffer_name])
    assert_same(outcome(rnn, cell, x, state), expected, 1e-10)
    for n, buffer in cell.named_buffers():
        torch.testing.assert_close(buffer, after[n], rtol=1e-12, atol=0)
    changes = training and name in ("spectral norm", "own")
    assert changes == any(not torch.equal(b, written[n]) for n, b in cell.named_buffers())


@pytest.mark.parametrize("steps", [1, 40])
def test_buffers_are_written_once_per_call(steps):
    cell = Cell(CHANGES["own"])
    rnn, x = RNN(cell), torch.randn(1, steps, 3)
    for call in range(1, 4):
        rnn(x)
        assert cell.rec.parametrizations.weight[0].calls == call


def test_other_weights_are_not_traced_again(monkeypatch):
    cell = Cell(CHANGES["spectral norm"])
    rnn, x = RNN(cell), torch.randn(2, 9, 3)
    rnn(x)
    monkeypatch.setattr(Watched, "change", lambda *a: pytest.fail("looked at again"))
    with torch.no_grad():
        cell.rec.parametrizations.weight.original.mul_(0.5)
    expected = loop(cell.eval(), x, torch.zeros(2, 4))[0]
    monkeypatch.undo()
    torch.testing.assert_close(rnn(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_spectral_norm_by_hooks():
    cell = Cell(lambda module: nn.utils.spectral_norm(module))
    with pytest.raises(TraceError, match=r"self\.rec of Cell has the older .* Use .*parametriz"):
        RNN(cell)
    x, state = torch.randn(2, 9, 3), torch.zeros(2, 4)
    expected = loop(cell.eval(), x, state)[0]
    torch.testing.assert_close(RNN(cell)(x, state)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_users_cache_is_left_alone():
    cell = Cell(CHANGES["weight norm"])
    with parametrize.cached():
        weight = cell.rec.weight
        RNN(cell)(torch.randn(2, 9, 3))
        assert cell.rec.weight is weight


def test_threads_trace_side_by_side():
    cells = [Cell(CHANGES["weight norm"]) for _ in range(8)] + [nn.GRUCell(3, 4) for _ in range(8)]
    x = torch.randn(2, 40, 3)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda cell: RNN(cell, solver=Newton(chunk=5))(x)[0], cells))
    for cell, y in zip(cells, found, strict=True):
        expected = loop(cell, x, torch.zeros(2, 4))[0]
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_a_thread_without_gradients_takes_none_from_another():
    cell, x, done = nn.GRUCell(3, 4), torch.randn(3, 2, 3), threading.Event()
    parametrizations.weight_norm(cell, "weight_hh")
    rnn = RNN(cell)
    rnn(x)

    def evaluate():
        while not done.is_set():
            with torch.no_grad():
                rnn(x)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(evaluate)
        try:
            for _ in range(100):
                total = rnn(x)[0].square().sum()
                assert torch.autograd.grad(total, list(cell.parameters()))
        finally:
            done.set()


def test_sizes_are_found_without_writing():
    cell = Cell(CHANGES["own"])
    cell.input_size = None
    rnn = RNN(cell)
    rnn(torch.randn(2, 40, 3))
    assert cell.rec.parametrizations.weight[0].calls == 1
