"""Operations on each element in generated kernels, in Triton's interpreter."""

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

from pararnn import RNN, Jacobi
from pararnn.cells import BlockGRUCell, HeadSLSTMCell, LayerNormLSTMCell
from pararnn.kernels import pointwise
from pararnn.kernels import rows as path_of_rows
from pararnn.planning.costs import COSTS
from pararnn.testing import assert_close, loop

from .compare import assert_same, outcome, random_state
from .conftest import needs_triton
from .pretend_gpu import pretend_gpu
from .test_fused import CELLS, INPUT

pytestmark = needs_triton

RTOL = {torch.float64: 1e-12, torch.float32: 3e-5}


class Choosy(nn.Module):
    """Truth values, halves of channels, and rows against channels."""

    input_size, hidden_size, num_components = INPUT, 6, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, 6)
        self.weight = nn.Parameter(torch.randn(6, 6) * 0.4)

    def forward(self, x, h):
        u = self.input(x)
        left, right = (h @ self.weight).chunk(2, 1)
        mixed = torch.cat([torch.where(u[:, :3] > 0, left.tanh(), left * 0.5), right.sigmoid()], 1)
        return mixed * u[:, :1].cos() + 0.1 * h.clamp(-1, 1)


EVERY = {
    **CELLS,
    "choosy": Choosy,
    "block_gru": lambda: BlockGRUCell(INPUT, 6, num_blocks=2),
    "layer_norm_lstm": lambda: LayerNormLSTMCell(INPUT, 6),
}


def make(name, dtype):
    torch.manual_seed(5)
    return EVERY[name]().to(dtype)


def modules(cell):
    """The modules that run for all times at once, with arguments at random: strides too."""
    of = RNN(cell).runner().traced.step
    adjoint, rows, dtype = of.adjoint, 37, of.dtype
    state = lambda: [torch.rand(rows, of.hidden, dtype=dtype) for _ in range(of.num_components)]  # noqa: E731
    inputs = [
        torch.randn(*([rows] if e.by_rows else []), *e.shape).mul(0.5).to(e.dtype)
        for e in of.inputs
    ]
    grads = [g[:1, :1].expand(rows, of.hidden) for g in state()]
    arguments = [apart(t) for t in adjoint.part_arguments(state(), inputs, grads)]
    yield adjoint.part.module, arguments
    found = adjoint.part.module(*(a.contiguous() for a in arguments))
    yield adjoint.gradients, [apart(t) for t in (*state(), *found)]


def apart(x):
    """The same, cut from something larger."""
    if x.dim() < 2 or 0 in x.stride():
        return x
    return torch.cat([x, torch.full_like(x, 3)], -1)[..., : x.shape[-1]]


def nodes(function, name):
    return [n for n in function.graph.nodes if name in str(n.target)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_equals_operations(monkeypatch, name, dtype):
    small = replace(COSTS, long_sum=8, parts_of_a_sum=5)
    monkeypatch.setattr(pointwise, "COSTS", small)
    cell = make(name, dtype)
    for i, (module, arguments) in enumerate(modules(cell)):
        exact = [a.double().contiguous() if a.is_floating_point() else a for a in arguments]
        expected, function = module(*exact), pointwise.fused(module, arguments)
        assert i == 0 or nodes(function, "fused_operations")
        found = function(*arguments)
        for n, (actual, reference) in enumerate(zip(found, expected, strict=True)):
            assert actual.dtype is (dtype if reference.is_floating_point() else reference.dtype)
            if not reference.any():  # what autograd made for a part that has no gradient
                assert not actual.any()
                continue
            assert_close(f"{n} of {i}", actual.double(), reference.double(), rtol=RTOL[dtype])


def test_what_is_joined_is_written_in_place():
    """A GRU: one kernel in each module, none to put gates side by side."""
    for module, arguments in modules(make("gru", torch.float32)):
        function = pointwise.fused(module, arguments)
        assert len(nodes(function, "fused_operations")) == 1
        assert not nodes(function, "cat")
        assert not nodes(function, "sigmoid")


def test_serves_any_number_of_rows():
    for module, arguments in modules(make("lstm", torch.float64)):
        function = pointwise.fused(module, arguments)
        less = [a[:11] if a.shape[0] == 37 else a for a in arguments]
        for actual, expected in zip(function(*less), module(*less), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rows", [1, 8, 300])
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums_of_rows(monkeypatch, rows, keepdim):
    small = replace(COSTS, long_sum=8, parts_of_a_sum=7)
    monkeypatch.setattr(pointwise, "COSTS", small)
    x = torch.randn(rows, 5, dtype=torch.float64)
    found = pointwise.sum_of_rows(x, keepdim)
    assert found.shape == x.sum(0, keepdim).shape
    assert_close("sum", found, x.sum(0, keepdim), rtol=1e-12)


@pytest.mark.parametrize("name", ["gru", "lstm", "slstm", "choosy", "block_gru", "layer_norm_lstm"])
def test_gradients_of_a_layer(monkeypatch, name):
    """All of it, with resets."""
    monkeypatch.setattr(
        path_of_rows, "run_module", lambda m, given: pointwise.fused(m, given)(*given)
    )
    cell = make(name, torch.float64)
    rnn = RNN(cell, solver=Jacobi(chunk=16))
    x = torch.randn(2, 40, cell.input_size, dtype=torch.float64)
    state = random_state(rnn.num_components, 2, rnn.hidden_size)
    resets = torch.rand(2, 40) < 0.1
    expected = outcome(lambda x, s: loop(cell, x, s, resets), cell, x, state)
    assert_same(outcome(lambda x, s: rnn(x, s, resets), cell, x, state), expected, 1e-10)


def test_one_number_for_all_rows():
    """The gradient of a clamp takes a zero that has no axis."""
    cell = HeadSLSTMCell(6, 8, num_heads=2)
    rnn = RNN(cell)
    x, state = torch.randn(2, 5, 6), random_state(4, 2, 8, dtype=torch.float32)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    with pretend_gpu(capability=(8, 0)):
        actual = outcome(rnn, cell, x, state)
    assert_same(actual, expected, 3e-5)
