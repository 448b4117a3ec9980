"""Layers on a CUDA device, chosen automatically: same results."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import pararnn
from pararnn.testing import assert_close, loop

pytestmark = pytest.mark.gpu

CELLS = {
    "ParaGRU": lambda: pararnn.cells.ParaGRUCell(12, 20),
    "ParaLSTM": lambda: pararnn.cells.ParaLSTMCell(12, 20, num_heads=2),
    "nn.GRUCell": lambda: nn.GRUCell(12, 20),
    "nn.LSTMCell": lambda: nn.LSTMCell(12, 20),
}


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("chunk", [1, 7, "auto"])
def test_equals_the_loop(name, chunk):
    cell = CELLS[name]().double().cuda()
    rnn = pararnn.RNN(cell, solver=pararnn.Newton(chunk=chunk))
    x = torch.randn(3, 50, 12, dtype=torch.float64, device="cuda", requires_grad=True)
    resets = torch.rand(3, 50, device="cuda") < 0.1
    zeros = torch.zeros(3, 20, dtype=torch.float64, device="cuda")
    state = zeros if rnn.num_components == 1 else (zeros, zeros)
    y, _ = rnn(x, state, resets)
    expected, _ = loop(cell, x, state, resets)
    assert rnn.runner().choice.name == "triton"
    assert_close("y", y, expected, rtol=1e-12)
    cotangent = torch.randn_like(y)
    inputs = [x, *cell.parameters()]
    ours = torch.autograd.grad((y * cotangent).sum(), inputs)
    theirs = torch.autograd.grad((expected * cotangent).sum(), inputs)
    for i, (actual, reference) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(f"gradient {i}", actual, reference, rtol=1e-11)


def test_moving_a_layer_keeps_its_results():
    rnn = pararnn.RNN(pararnn.cells.ParaGRUCell(12, 20))
    x = torch.randn(2, 30, 12)
    on_cpu, _ = rnn(x)
    on_gpu, _ = rnn.cuda()(x.cuda())
    assert_close("y", on_gpu.cpu(), on_cpu, rtol=1e-5)
    again, _ = rnn.cpu()(x)
    assert torch.equal(again, on_cpu)


@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
def test_autocast_and_compile():
    rnn = pararnn.RNN(pararnn.cells.ParaLSTMCell(12, 20)).cuda()
    x = torch.randn(2, 30, 12, device="cuda", requires_grad=True)
    y, _ = rnn(x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half, _ = rnn(x)
    assert half.dtype is torch.float32
    assert_close("autocast", half, y, rtol=3e-2)
    compiled, _ = torch.compile(rnn, fullgraph=True)(x)
    assert_close("compiled", compiled, y, rtol=1e-5)
    compiled.sum().backward()
    assert x.grad.isfinite().all()


def test_c_backend_refuses_the_device():
    rnn = pararnn.RNN(pararnn.cells.ParaGRUCell(12, 20), backend="c")
    with pytest.raises(ValueError, match=r"backend='c' cannot run .* the tensors are on cuda"):
        rnn.cuda()


@pytest.mark.parametrize("make", [nn.GRU, nn.LSTM])
def test_parallelized_layers(make):
    layer = make(12, 20, 2, bidirectional=True).double()
    ours = pararnn.parallelize(layer).cuda()
    assert {id(p) for p in ours.parameters()} == {id(p) for p in layer.parameters()}
    layer.flatten_parameters()
    x = torch.randn(30, 3, 12, dtype=torch.float64, device="cuda")
    assert_close("y", ours(x)[0], layer(x)[0], rtol=1e-10)
    packed = pack_sequence([x[:n, 0] for n in (5, 9, 1)], enforce_sorted=False)
    assert_close("packed", ours(packed)[0].data, layer(packed)[0].data, rtol=1e-10)


CAPTURED = {
    "nn.GRUCell, cuDNN where captured": (lambda: nn.GRUCell(128, 128), 128, 32),
    "nn.GRUCell, few rows": (lambda: nn.GRUCell(192, 192), 2, 300),
    "nn.LSTMCell, one row": (lambda: nn.LSTMCell(96, 96), 1, 200),
    "ParaGRU": (lambda: pararnn.cells.ParaGRUCell(96, 96), 3, 1000),
}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_capture_may_take_other_kernels_than_its_warm_up(name):
    """A training step in a user's CUDA graph: outputs and gradients of the loop in float64."""
    make, batch, time = CAPTURED[name]
    cell = make().cuda()
    size = cell.input_size
    rnn = pararnn.RNN(cell)
    x = torch.randn(batch, time, size, device="cuda", requires_grad=True)
    cotangent = torch.randn(batch, time, cell.hidden_size, device="cuda")
    inputs = [x, *cell.parameters()]

    def both():
        y = rnn(x)[0]
        return y, *torch.autograd.grad((y * cotangent).sum(), inputs)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    for tensor in captured:
        tensor.detach().fill_(torch.nan)
    graph.replay()
    double, wide = copy.deepcopy(cell).double(), x.detach().double().requires_grad_()
    zeros = torch.zeros(batch, size, dtype=torch.float64, device="cuda")
    y, _ = loop(double, wide, zeros if rnn.num_components == 1 else (zeros, zeros))
    grads = torch.autograd.grad((y * cotangent).sum(), [wide, *double.parameters()])
    for place, (found, expected) in enumerate(zip(captured, (y, *grads), strict=True)):
        assert_close(f"result {place}", found.double(), expected, rtol=1e-4)


def test_numbers_on_the_cpu():
    """PyTorch takes them on every device: written where a mask holds, or read from outside."""
    leak = torch.tensor(0.7)

    class Leaky(nn.Module):
        input_size = hidden_size = 8

        def forward(self, x, h):
            new = torch.tanh(x + leak * h)
            new[h > 0.5] = 0.25
            return new

    x = torch.randn(3, 200, 8, device="cuda", requires_grad=True)
    rnn = pararnn.RNN(Leaky())
    for value in (0.7, -0.4):
        leak.fill_(value)
        y, _ = rnn(x)
        expected, _ = loop(Leaky(), x.detach().double().cpu(), torch.zeros(3, 8).double())
        assert_close("y", y.double().cpu(), expected, rtol=1e-5)
        assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
