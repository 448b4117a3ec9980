"""Calls of small layers as CUDA graphs: new inputs, weights, streams and modes."""

import gc
import threading

import pytest
import torch
from torch import nn

from pararnn import RNN
from pararnn.cells import ParaGRUCell, ParaLSTMCell
from pararnn.kernels import graphs
from pararnn.layers import replayed
from pararnn.testing import assert_close, loop

pytestmark = pytest.mark.gpu

CELLS = {"gru": nn.GRUCell, "lstm": nn.LSTMCell, "paragru": ParaGRUCell, "paralstm": ParaLSTMCell}


@pytest.fixture
def replays(monkeypatch):
    """The directions of all calls that a graph has served."""
    seen = []
    call, serve = graphs.Graphs.call, graphs._Graph.__call__

    def noted_call(self, form, function, tensors):
        noted_call.direction = form[0]
        return call(self, form, function, tensors)

    def noted_serve(self, tensors):
        seen.append(noted_call.direction)
        return serve(self, tensors)

    monkeypatch.setattr(graphs.Graphs, "call", noted_call)
    monkeypatch.setattr(graphs._Graph, "__call__", noted_serve)
    return seen


def compare(rnn, x, resets=None, rtol=3e-5):
    """Values and gradients against the loop in float64."""
    cell = rnn.cell
    exact = type(cell)(cell.input_size, cell.hidden_size).double().to(x.device)
    exact.load_state_dict(cell.state_dict())
    zeros = torch.zeros(len(x), cell.hidden_size, dtype=torch.float64, device=x.device)
    state = zeros if rnn.num_components == 1 else (zeros,) * rnn.num_components
    x64 = x.detach().double().requires_grad_()
    y, _ = rnn(x, None, resets)
    expected, _ = loop(exact, x64, state, resets)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad(y, [x, *cell.parameters()], cotangent.to(y))
    theirs = torch.autograd.grad(expected, [x64, *exact.parameters()], cotangent)
    for i, (actual, reference) in enumerate(zip((y, *ours), (expected, *theirs), strict=True)):
        assert_close(f"tensor {i}", actual.double(), reference, rtol=rtol)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_new_inputs_and_weights(replays, name, begins):
    rnn = RNN(CELLS[name](6, 16)).cuda()
    for _ in range(5):
        x = torch.randn(2, 300, 6, device="cuda", requires_grad=True)
        compare(rnn, x, torch.rand(2, 300, device="cuda") < 0.02 if begins else None)
        with torch.no_grad():
            for parameter in rnn.parameters():
                parameter.mul_(1.02)
    assert replays.count("forward") >= 3
    assert replays.count("backward") >= 3


def test_several_calls_before_their_backward():
    """What one call returned is not written to by the next."""
    rnn = RNN(nn.GRUCell(6, 16)).cuda()
    for _ in range(3):
        compare(rnn, torch.randn(2, 300, 6, device="cuda", requires_grad=True))
    xs = [torch.randn(2, 300, 6, device="cuda", requires_grad=True) for _ in range(3)]
    ys = [rnn(x)[0] for x in xs]
    kept = [y.detach().clone() for y in ys]
    gradients = torch.autograd.grad([y.sum() for y in ys], xs)
    for x, y, k, gradient in zip(xs, ys, kept, gradients, strict=True):
        assert torch.equal(y, k)
        again = rnn(x)[0]
        assert torch.equal(again, y)
        assert torch.equal(torch.autograd.grad(again.sum(), x)[0], gradient)


@pytest.mark.parametrize("name", CELLS)
def test_autocast(name):
    """Weights that autocast makes while a graph is captured are not used outside of it."""
    rnn, x = RNN(CELLS[name](6, 16)).cuda(), torch.randn(2, 300, 6, device="cuda")
    plain, _ = rnn(x)
    for _ in range(4):
        with torch.autocast("cuda", torch.bfloat16):
            y, _ = rnn(x)
            y.square().sum().backward()
        assert_close("y", y.float(), plain, rtol=3e-2)


def test_inference_mode_and_training_mix():
    rnn = RNN(nn.GRUCell(6, 16)).cuda()
    x = torch.randn(2, 300, 6, device="cuda", requires_grad=True)
    for _ in range(4):
        with torch.inference_mode():
            rnn(x)
        with torch.no_grad():
            rnn(x)
        compare(rnn, x)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # weights of all streams
def test_streams_and_threads():
    rnn = RNN(nn.GRUCell(6, 16)).cuda()
    x = torch.randn(2, 300, 6, device="cuda", requires_grad=True)
    compare(rnn, x)
    failures = []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(5):
                    compare(rnn, torch.randn(2, 300, 6, device="cuda", requires_grad=True))
                torch.cuda.current_stream().synchronize()
        except Exception as error:  # shown below
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_many_shapes_are_not_captured():
    """Only a form that comes back is worth a graph."""
    rnn = RNN(nn.GRUCell(6, 16)).cuda()
    replayed._graphs.clear()
    for steps in range(200, 230):
        x = torch.randn(2, steps, 6, device="cuda", requires_grad=True)
        rnn(x)[0].sum().backward()
    (cached,) = replayed._graphs.values()
    assert cached._met
    assert not cached._known


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
@pytest.mark.parametrize("name", CELLS)
def test_another_device_than_the_current_one(replays, name):
    rnn = RNN(CELLS[name](6, 16)).to("cuda:1")
    for _ in range(5):
        compare(rnn, torch.randn(2, 300, 6, device="cuda:1", requires_grad=True))
    assert replays.count("backward") >= 3


def test_a_capture_that_fails_leaves_nothing_behind():
    """Random numbers and memory are as ever after it, and the error names its cause."""
    x, stream = torch.ones(3, device="cuda"), torch.cuda.current_stream()

    def waits():
        return (torch.rand(3, device="cuda") * x).sum().item()

    with pytest.raises(RuntimeError, match="synchronizing"):
        graphs.rehearsed(waits, strict=True)
    with pytest.raises(RuntimeError, match="captur"):
        graphs.captured(waits)
    assert torch.cuda.current_stream() == stream
    torch.manual_seed(0)
    first = torch.rand(3, device="cuda")
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    before = torch.cuda.memory_reserved()
    for _ in range(20):  # each would be allocated anew, if it went to the pool of the graph
        torch.empty(2**26, device="cuda")
    assert torch.cuda.memory_reserved() <= before + 2**29
    replay = graphs.captured(lambda: x + torch.rand(3, device="cuda"))
    replay()
    assert (replay.kept >= 1).all()

    def takes_memory():
        y = torch.ones(2**28, device="cuda")  # 1 GiB
        torch.cuda.synchronize()
        return y

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for beside in (None, replay.graph):
        with pytest.raises(RuntimeError, match="captur"):
            graphs.captured(takes_memory, beside)
        gc.collect()
        torch.cuda.empty_cache()
        if beside is None:  # else it stays with the other graph
            assert torch.cuda.memory_reserved() <= before + 2**28
        replay()
        assert (replay.kept >= 1).all()
