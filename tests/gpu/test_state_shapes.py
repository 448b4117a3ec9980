"""States of any shape and readouts on a CUDA device, against the loop in float64 on the CPU."""

import copy

import pytest
import torch
from layers.test_state_shapes import CELLS, FEATURES, mapped, states

from pararnn import RNN
from pararnn.cells import DeltaMemoryCell, M2RNNCell, OuterMemoryCell
from pararnn.testing import assert_close, loop

pytestmark = [
    pytest.mark.gpu,
    # PyTorch's own, when it compiles
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]

MEMORIES = [M2RNNCell, DeltaMemoryCell, OuterMemoryCell]


def tuple_of(state):
    return state if isinstance(state, tuple) else (state,)


def outcome(run, cell, x, state, resets):
    """Outputs, final state and gradients of x, the state and all parameters, as float64."""
    x = x.detach().requires_grad_()
    state = mapped(lambda s: s.detach().requires_grad_(), state)
    y, last = run(x, state, resets)
    values = [y, *tuple_of(last)]
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(v.shape, generator=generator).to(v) for v in values]
    inputs = [x, *tuple_of(state), *cell.parameters()]
    total = sum((v * c).sum() for v, c in zip(values, cotangents, strict=True))
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    gradients = [
        torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)
    ]
    return [v.detach().double().cpu() for v in (*values, *gradients)]


def compare(cell, time, rtol, calls=1, autocast=False):
    """Every call, the later ones of which may be replayed by a graph."""
    exact, rnn = copy.deepcopy(cell).double(), RNN(cell.cuda())
    for call in range(calls):
        torch.manual_seed(call)
        x = torch.randn(3, time, cell.input_size, dtype=torch.float64)
        state = mapped(lambda s: s.detach(), states(exact, 3))
        resets = torch.rand(3, time) < 0.1 if call % 2 else None
        expected = outcome(lambda *a: loop(exact, *a), exact, x, state, resets)
        on_gpu = [x.float().cuda(), mapped(lambda s: s.float().cuda(), state)]
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            found = outcome(rnn, cell, *on_gpu, None if resets is None else resets.cuda())
        for i, (actual, reference) in enumerate(zip(found, expected, strict=True)):
            if reference.any():
                assert_close(f"value {i} of call {call}", actual, reference, rtol=rtol)
    return rnn


@pytest.mark.parametrize("name", CELLS)
def test_equals_the_loop(name):
    torch.manual_seed(0)
    compare(CELLS[name][0](), 40, 2e-5, calls=4)


@pytest.mark.parametrize("make", MEMORIES)
def test_memories(make):
    torch.manual_seed(0)
    compare(make(FEATURES, 16, 8, num_heads=2), 300, 5e-5, calls=2)


@pytest.mark.parametrize("make", MEMORIES)
def test_memories_under_autocast(make):
    torch.manual_seed(0)
    compare(make(FEATURES, 16, 8, num_heads=2), 60, 5e-2, autocast=True)


@pytest.mark.parametrize("make", MEMORIES)
def test_compiled(make):
    rnn = RNN(make(FEATURES, 4, 8, num_heads=2)).cuda()
    x = torch.randn(2, 30, FEATURES, device="cuda")
    found, expected = torch.compile(rnn, fullgraph=True)(x), rnn(x)
    for actual, reference in zip(found, expected, strict=True):
        assert_close("value", actual, reference, rtol=1e-4)
