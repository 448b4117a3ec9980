"""Cells whose channels mix on a CUDA device: sweeps replayed from graphs, against the loop."""

import pytest
import torch
from torch import nn

import pararnn
from pararnn import RNN, Jacobi, Newton, Sequential
from pararnn.testing import assert_close, loop

pytestmark = pytest.mark.gpu

CELLS = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


def compare(rnn, x, resets=None, rtol=1e-5):
    """Values and gradients against the loop in float64 on the CPU."""
    cell = rnn.cell
    exact = type(cell)(cell.input_size, cell.hidden_size).double()
    exact.load_state_dict({n: p.double().cpu() for n, p in cell.state_dict().items()})
    zeros = torch.zeros(len(x), cell.hidden_size, dtype=torch.float64)
    state = zeros if rnn.num_components == 1 else (zeros, zeros)
    x64 = x.detach().double().cpu().requires_grad_()
    y, _ = rnn(x, None, resets)
    expected, _ = loop(exact, x64, state, None if resets is None else resets.cpu())
    cotangent = torch.randn(expected.shape, dtype=torch.float64)
    ours = torch.autograd.grad(y, [x, *cell.parameters()], cotangent.to(y))
    theirs = torch.autograd.grad(expected, [x64, *exact.parameters()], cotangent)
    for i, (actual, reference) in enumerate(zip((y, *ours), (expected, *theirs), strict=True)):
        assert_close(f"tensor {i}", actual.double().cpu(), reference, rtol=rtol)


@pytest.mark.parametrize("solver", [None, Newton(chunk=20), Jacobi(chunk=64), Sequential()])
@pytest.mark.parametrize("name", CELLS)
def test_equals_the_loop(name, solver):
    rnn = RNN(CELLS[name](6, 10), solver=solver).cuda()
    x = torch.randn(3, 300, 6, device="cuda", requires_grad=True)
    compare(rnn, x)
    compare(rnn, x, torch.rand(3, 300, device="cuda") < 0.02)


def test_graphs_see_new_weights_and_inputs():
    rnn = RNN(nn.GRUCell(6, 64)).cuda()
    for _ in range(3):
        x = torch.randn(2, 2000, 6, device="cuda", requires_grad=True)
        compare(rnn, x, rtol=3e-5)
        assert rnn.report.status == "converged"
        with torch.no_grad():
            for parameter in rnn.parameters():
                parameter.mul_(1.02)


def test_inside_a_graph_of_the_user():
    rnn = RNN(nn.GRUCell(6, 10)).cuda()
    x = torch.randn(2, 30, 6, device="cuda")
    with torch.no_grad():
        expected, _ = rnn(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            rnn(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = rnn(x)
        graph.replay()
    assert_close("y", y, expected, rtol=1e-5)


def test_long_sequences_are_cut():
    rnn = pararnn.RNN(nn.GRUCell(64, 64)).cuda()
    rnn(torch.randn(4, 4096, 64, device="cuda"))
    assert rnn.report.chunks == 64
    assert rnn.report.iterations == 1
