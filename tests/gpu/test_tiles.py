"""Cells whose state fits tiles on a CUDA device, against the loop in float64 on the CPU."""

import copy
import dataclasses
import functools
import math

import pytest
import torch
from core.random_steps import PartsWriter, random_step
from core.tile_cells import TILE_CELLS
from torch.utils._pytree import tree_map

from gpu.test_state_shapes import compare, outcome
from pararnn import RNN, scan
from pararnn.cells import DeltaMemoryCell, M2RNNCell, OuterMemoryCell
from pararnn.kernels import facts
from pararnn.planning.costs import COSTS
from pararnn.planning.plan import decide
from pararnn.testing import assert_close, loop

pytestmark = pytest.mark.gpu

MEMORIES = [M2RNNCell, DeltaMemoryCell, OuterMemoryCell]
SIZES = [(64, 16, 2), (16, 64, 1), (20, 12, 3), (64, 64, 1)]  # keys, values, heads
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""In half precision the projection before the recurrence rounds, too."""


def pair(cell, dtype):
    """A layer on the GPU in a type, and the cell in float64 with the same values."""
    cell = cell.to(dtype)
    return RNN(copy.deepcopy(cell).cuda()), cell.double()


@pytest.mark.parametrize("make", MEMORIES)
@pytest.mark.parametrize(("keys", "values", "heads"), SIZES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_memories_of_any_size(make, keys, values, heads, dtype):
    torch.manual_seed(0)
    cell = make(8, keys, values, num_heads=heads)
    with torch.no_grad():
        for p in cell.parameters():
            p += 0.02 * torch.randn_like(p)
    rnn, exact = pair(cell, dtype)
    x = torch.randn(3, 37, 8).to(dtype).double()
    state = (0.3 * torch.randn(3, heads, keys, values)).to(dtype).double()
    resets = torch.rand(3, 37) < 0.1
    assert rnn.plan(x.shape, dtype).path == "tiles"
    expected = outcome(lambda *a: loop(exact, *a), exact, x, state, resets)
    found = outcome(rnn, rnn.cell, x.to(dtype).cuda(), state.to(dtype).cuda(), resets.cuda())
    for i, (actual, reference) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"value {i}", actual, reference, rtol=TOLERANCES[dtype])


@pytest.mark.parametrize("batch", [1, 40])
def test_tiles_cut_into_parts_or_not(batch):
    torch.manual_seed(0)
    rnn, exact = pair(M2RNNCell(8, 64, 16, num_heads=30), torch.float32)
    x = torch.randn(batch, 20, 8).double()
    assert (rnn.plan(x.shape).forward.tile.parts > 1) == (batch == 1)
    state = 0.3 * torch.randn(batch, 30, 64, 16).double()
    expected = outcome(lambda *a: loop(exact, *a), exact, x, state, None)
    found = outcome(rnn, rnn.cell, x.float().cuda(), state.float().cuda(), None)
    for i, (actual, reference) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"value {i}", actual, reference, rtol=1e-5)


@pytest.mark.parametrize("make", MEMORIES)
def test_results_are_the_same_every_time(make):
    torch.manual_seed(0)
    rnn = RNN(make(8, 64, 16, num_heads=12).bfloat16().cuda())
    x = torch.randn(5, 100, 8).bfloat16().cuda()
    state = torch.zeros(5, 12, 64, 16).bfloat16().cuda()
    first, second = (outcome(rnn, rnn.cell, x, state, None) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def delta(h, q, k, v):
    missing = v - torch.einsum("nhkv,nhk->nhv", h, k)
    return torch.tanh(h + k.unsqueeze(-1) * missing.unsqueeze(-2))


def read(h, q, k, v):
    return torch.einsum("nhkv,nhk->nhv", h, q)


def test_calls_of_one_form_and_of_others():
    """Kernels that were compiled for aligned tensors are for these alone."""
    torch.manual_seed(0)
    shapes = [(2, 40, 3, 16), (2, 40, 3, 16), (2, 40, 3, 8)]
    h = torch.zeros(2, 3, 16, 8, device="cuda")
    for first in (0, 0, 1, 1, 0):
        numbers = [torch.randn(math.prod(s) + first, device="cuda") / 4 for s in shapes]
        drives = [n[first:].view(s) for n, s in zip(numbers, shapes, strict=True)]
        y, last = scan(delta, h, drives, readout=read)
        expected, rows = [], [d.double() for d in drives]
        state = h.double()
        for t in range(40):
            now = [d[:, t] for d in rows]
            state = delta(state, *now)
            expected.append(read(state, *now))
        assert_close("outputs", y, torch.stack(expected, 1).to(y), rtol=1e-5)
        assert_close("last", last, state.to(last), rtol=1e-5)


@pytest.mark.parametrize("make", MEMORIES)
def test_packed_sequences(make):
    torch.manual_seed(0)
    rnn = RNN(make(8, 16, 16, num_heads=2).cuda())
    lengths = [5, 0, 40, 17]
    cu_seqlens = torch.tensor([0, 5, 5, 45, 62], device="cuda")
    x = torch.randn(1, 62, 8, device="cuda")
    state = torch.randn(4, 2, 16, 16, device="cuda")
    y, last = rnn(x, state, cu_seqlens=cu_seqlens)
    begin = 0
    for i, length in enumerate(lengths):
        if length:
            own = x[:, begin : begin + length]
            expected, end = rnn(own, state[i : i + 1])
            assert_close("outputs", y[:, begin : begin + length], expected, rtol=1e-6)
            assert_close("state", last[i : i + 1], end, rtol=1e-6)
        else:
            assert torch.equal(last[i], state[i])
        begin += length


@pytest.mark.parametrize("seed", range(60))
def test_random_steps(seed):
    cell = random_step(seed, torch.float32)
    compare(cell, 20, 1e-4)


@pytest.mark.parametrize("seed", [7, 95, 143, 173, 249, 354, 357, 360])
def test_random_steps_with_parts(seed):
    compare(random_step(seed, torch.float32, PartsWriter), 20, 1e-4)


PARTS = [
    *("LinearAttention", "MatrixLSTM", "MixesWithADenominator", "DeltaWithADenominator"),
    *("ControlledByAVector", "WithNormaliser", "ChunksOfAProduct", "SlicesOfAProduct"),
    *("InterleavedGates", "GatesOfARow", "HalvesOfTheState", "FoundTimesAWeight"),
    *("FoundTimesAWeightOfItsHead", "FoundThroughANetwork", "Logarithms"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 5, 6), (3, 64, 32), (1, 16, 16)], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_states_and_gates_in_parts(name, sizes, dtype):
    torch.manual_seed(0)
    rnn, exact = pair(TILE_CELLS[name](*sizes), dtype)
    x = (0.3 * torch.randn(3, 20, exact.input_size)).to(dtype).double()
    state = tuple((0.1 * torch.randn(3, *s)).to(dtype).double() for s in rnn.state_shapes)
    state = state if len(state) > 1 else state[0]
    own = lambda s: s.to(dtype).cuda()  # noqa: E731
    found = outcome(rnn, rnn.cell, own(x), tree_map(own, state), None)
    assert rnn.plan(x.shape, dtype).path == "tiles"
    expected = outcome(lambda *a: loop(exact, *a), exact, x, state, None)
    for i, (actual, reference) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"value {i}", actual, reference, rtol=TOLERANCES[dtype])


def test_a_call_in_a_graph_of_the_user():
    torch.manual_seed(0)
    rnn = RNN(M2RNNCell(8, 64, 16, num_heads=4).cuda())
    x = torch.randn(2, 50, 8, device="cuda")
    expected = [t.clone() for t in rnn(x)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        rnn(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = rnn(x)
    graph.replay()
    for actual, reference in zip(found, expected, strict=True):
        assert_close("value", actual, reference, rtol=1e-6)


def test_states_as_a_user_has_them():
    """The last state goes on in a second call."""
    torch.manual_seed(0)
    rnn = RNN(DeltaMemoryCell(8, 64, 16, num_heads=4).cuda())
    x = torch.randn(2, 50, 8, device="cuda")
    whole, end = rnn(x)
    first, state = rnn(x[:, :33])
    second, last = rnn(x[:, 33:], state)
    assert_close("outputs", torch.cat([first, second], 1), whole, rtol=1e-6)
    assert_close("state", last, end, rtol=1e-6)


@pytest.fixture
def few_chunks(monkeypatch):
    """Time is cut into few chunks, so that sequences of the tests can be short."""
    costs = dataclasses.replace(COSTS, tile_least_chunks=3)
    monkeypatch.setattr(facts, "decide", functools.partial(decide, costs=costs))


@pytest.mark.usefixtures("few_chunks")
@pytest.mark.parametrize("make", MEMORIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_resets", [False, True])
def test_chunks_of_time(make, dtype, has_resets):
    """Some heads of new cells forget within a chunk, others do not."""
    torch.manual_seed(0)
    cell = make(8, 16, 16, num_heads=6).to(dtype).float()
    rnn, exact = pair(cell, dtype)
    time = 2100
    x = torch.randn(2, time, 8).to(dtype).double()
    state = (0.3 * torch.randn(2, 6, 16, 16)).to(dtype).double()
    resets = torch.rand(2, time) < 0.002 if has_resets else None
    found_plan = rnn.plan(x.shape, dtype)
    assert found_plan.forward.warm_up > 0
    assert found_plan.adjoint.warm_up > 0
    on_gpu = None if resets is None else resets.cuda()
    expected = outcome(lambda *a: loop(exact, *a), exact, x, state, resets)
    found = outcome(rnn, rnn.cell, x.to(dtype).cuda(), state.to(dtype).cuda(), on_gpu)
    assert rnn.report.chunks > 1
    for i, (actual, reference) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"value {i}", actual, reference, rtol=TOLERANCES[dtype])
    again = outcome(rnn, rnn.cell, x.to(dtype).cuda(), state.to(dtype).cuda(), on_gpu)
    for a, b in zip(found, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("few_chunks")
def test_chunks_in_double_precision_and_of_packed_sequences():
    torch.manual_seed(0)
    rnn, exact = pair(DeltaMemoryCell(8, 16, 16, num_heads=3), torch.float64)
    x = torch.randn(1, 4200, 8).double()
    state = 0.3 * torch.randn(1, 3, 16, 16).double()
    assert rnn.plan(x.shape, torch.float64).forward.warm_up > 0
    expected = outcome(lambda *a: loop(exact, *a), exact, x, state, None)
    found = outcome(rnn, rnn.cell, x.cuda(), state.cuda(), None)
    for i, (actual, reference) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"value {i}", actual, reference, rtol=1e-10)
    offsets = torch.tensor([0, 5, 5, 2000, 4200], device="cuda")
    states = torch.randn(4, 3, 16, 16, device="cuda", dtype=torch.float64)
    y, last = rnn(x.cuda(), states, cu_seqlens=offsets)
    for n, (a, b) in enumerate([(0, 5), (5, 2000), (2000, 4200)]):
        row = [0, 2, 3][n]
        alone, end = loop(exact, x[:, a:b], states[row : row + 1].cpu())
        torch.testing.assert_close(y[:, a:b].cpu(), alone)
        torch.testing.assert_close(last[row : row + 1].cpu(), end)


@pytest.mark.parametrize("make", MEMORIES)
def test_sanitized_memories(make):
    """For compute-sanitizer: `compute-sanitizer pytest -m gpu -k sanitized`."""
    torch.manual_seed(0)
    rnn, exact = pair(make(8, 20, 12, num_heads=2), torch.float32)
    x, state = torch.randn(2, 37, 8).double(), 0.3 * torch.randn(2, 2, 20, 12).double()
    expected = outcome(lambda *a: loop(exact, *a), exact, x, state, None)
    found = outcome(rnn, rnn.cell, x.float().cuda(), state.float().cuda(), None)
    for i, (actual, reference) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"value {i}", actual, reference, rtol=1e-4)  # a plain loop has 3e-5


@pytest.mark.usefixtures("few_chunks")
@pytest.mark.parametrize("make", [DeltaMemoryCell, OuterMemoryCell])
def test_sanitized_chunks(make):
    """Jacobi's method over chunks, and Newton's; for compute-sanitizer."""
    torch.manual_seed(0)
    rnn = RNN(make(8, 16, 16, num_heads=2).cuda())
    x = torch.randn(1, 2100, 8, device="cuda", requires_grad=True)
    rnn(x)[0].square().sum().backward()
    assert rnn.report.chunks > 1
