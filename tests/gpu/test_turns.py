"""Kernels whose programs wait for each other, on several streams at once."""

import pytest
import torch
from torch import nn

from pararnn import RNN
from pararnn.kernels import turns
from pararnn.kernels.graphs import captured
from pararnn.kernels.turns import captured_so_far

pytestmark = pytest.mark.gpu

SHAPES = {"spread": (4, 256), "wide": (512, 1024)}  # rows and channels


@pytest.fixture
def met(monkeypatch):
    """How often a kernel took a turn outside of a capture."""
    seen = []
    events = turns._ends

    class Ends(dict):
        def setdefault(self, device, event):
            seen.append(device)
            return events.setdefault(device, event)

    monkeypatch.setattr(turns, "_ends", Ends())
    return seen


def layers(kind, count):
    rows, size = SHAPES[kind]
    torch.manual_seed(0)
    cells = [nn.GRUCell(size, size, device="cuda") for _ in range(count)]
    made = [RNN(cell, backend="triton") for cell in cells]
    return made, [torch.randn(rows, 32, size, device="cuda") for _ in range(count)]


@pytest.mark.parametrize("kind", SHAPES)
def test_two_streams(kind, met):
    """Values and gradients are those of one stream; calls by graphs, from the second on."""
    rnns, inputs = layers(kind, 3)

    def run(i):
        x = inputs[i].clone().requires_grad_()
        y, _ = rnns[i](x)
        gradients = torch.autograd.grad(y.square().sum(), [x, *rnns[i].parameters()])
        return y.detach(), *gradients  # a graph that lives on belongs to the stream that made it

    expected = [[t.clone() for t in run(i)] for i in range(3)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    found = [None] * 3
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found[i] = run(i)
    torch.cuda.synchronize()
    assert met, "no kernel waited, so that this proves nothing"
    for own, reference in zip(found, expected, strict=True):
        for a, b in zip(own, reference, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", SHAPES)
def test_graphs_of_ones_own(kind, met):
    """`captured` knows of such kernels in it, and takes turns when it is replayed."""
    rnns, inputs = layers(kind, 2)
    expected = [rnns[i](inputs[i])[0].clone() for i in range(2)]
    replays, streams = [], [torch.cuda.Stream() for _ in range(2)]
    before = captured_so_far()
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream), torch.no_grad():
            replays.append(captured(lambda i=i: rnns[i](inputs[i])[0]))
    assert captured_so_far() > before
    assert all(replay.takes_turns == torch.device("cuda", 0) for replay in replays)
    met.clear()
    for _ in range(50):
        for replay, stream in zip(replays, streams, strict=True):
            with torch.cuda.stream(stream):
                replay()
    torch.cuda.synchronize()
    assert len(met) == 100
    for replay, reference in zip(replays, expected, strict=True):
        assert torch.equal(replay.kept, reference)


def test_others_take_none(met):
    rnn = RNN(nn.GRUCell(16, 16, device="cuda"), backend="triton")
    x = torch.randn(4, 32, 16, device="cuda")
    with torch.no_grad():
        replay = captured(lambda: rnn(x)[0])
    replay()
    assert replay.takes_turns is None
    assert met == []
