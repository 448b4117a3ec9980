"""What only a GPU shows: sizes, streams, graphs, compilation, memory, many random cells."""

import functools

import pytest
import torch
from core.cells import CELLS, make_cell
from core.compare import assert_same, outcome, random_state
from core.test_properties import BINARY, UNARY, Random

import pararnn
from pararnn import RNN, Newton
from pararnn.testing import assert_close, loop

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("on_the_gpu"),
    pytest.mark.filterwarnings("ignore:.*determinis"),
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),
    pytest.mark.filterwarnings("ignore:.*Profiler clears events"),
]


def gates(h, drives, weights):
    """ParaGRU's recurrent part."""
    z, r, c = drives.unbind(1)
    a, b, e = weights
    z = torch.sigmoid(z + a * h)
    r = torch.sigmoid(r + b * h)
    return (1 - z) * h + z * torch.tanh(c + e * (h * r))


def problem(batch, time, hidden, dtype, slow=0):
    drives = torch.randn(batch, time, 3, hidden)
    drives[:, :, 0, ::10] -= slow
    weights = torch.randn(3, hidden).clamp(-0.5, 0.5)
    return drives.to(dtype), weights


def run(drives, weights, initial, backend="auto", solver=None):
    return pararnn.scan(gates, initial, drives, weights, backend=backend, solver=solver)


def reference(drives, weights, initial):
    """Step by step in float64."""
    state, states = initial.double(), []
    for t in range(drives.shape[1]):
        state = gates(state, drives[:, t].double(), weights.double())
        states.append(state)
    return torch.stack(states, 1)


@pytest.mark.parametrize("slow", [0, 5], ids=["fast", "slow"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "time", "hidden"), [(4, 1024, 1024), (1, 2048, 512), (1, 8192, 64), (3, 1000, 333)]
)
def test_accuracy(batch, time, hidden, dtype, slow):
    """States and gradients within 1e-2 in half precision, 1e-5 in float32, 1e-11 in float64."""
    drives, weights = problem(batch, time, hidden, dtype, slow)
    weights = weights.double() if dtype is torch.float64 else weights
    initial = torch.randn(batch, hidden) * 0.5
    initial = initial.to(weights.dtype)
    cotangent = torch.randn(batch, time, hidden)
    inputs = [t.requires_grad_() for t in (drives, weights, initial)]
    y = run(*inputs)[0]
    assert y.dtype is dtype
    ours = torch.autograd.grad(y, inputs, cotangent.to(y.dtype))
    expected = reference(*inputs)
    theirs = torch.autograd.grad(expected, inputs, cotangent.to(y.dtype).double())
    rtol = {torch.float32: 1e-5, torch.float64: 1e-11}.get(dtype, 1e-2)
    assert_close("y", y.double(), expected, rtol=rtol)
    for name, a, e in zip(("drives", "weights", "initial"), ours, theirs, strict=True):
        assert_close(name, a.double(), e.double(), rtol=rtol)


@pytest.mark.parametrize("chunk", [40, 300])
@pytest.mark.parametrize(("hidden", "heads"), [(256, 4), (192, 2), (90, 3), (6, 3)])
def test_heads_that_lie_apart(hidden, heads, chunk):
    """Heads larger and smaller than what a program has, and of odd sizes."""
    cell = pararnn.cells.ParaLSTMCell(2 * heads, hidden, num_heads=heads)
    rnn = RNN(cell, solver=Newton(chunk=chunk))
    x, state = torch.randn(3, 300, 2 * heads), random_state(2, 3, hidden, dtype=torch.float32)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-5)


def test_more_than_two_to_the_31_elements():
    batch, time, hidden = 3, 2**19, 512  # 2.4e9 elements of drives
    drives, weights = problem(batch, 1, hidden, torch.bfloat16)
    drives = drives.expand(-1, time, -1, -1).contiguous()
    y, last = run(drives, weights, torch.zeros(batch, hidden))
    again = run(drives[2:, -4096:], weights, torch.zeros(1, hidden))[0]
    assert_close("last rows", y[2:, -2048:].float(), again[:, -2048:].float(), rtol=1e-2)
    assert torch.equal(last, y[:, -1].to(last.dtype))


@pytest.mark.parametrize(("batch", "time", "hidden"), [(70_000, 3, 8), (1, 5, 140_000)])
def test_more_programs_than_a_grid_axis_holds(batch, time, hidden):
    drives, weights = problem(batch, time, hidden, torch.float32)
    initial = torch.zeros(batch, hidden)
    y = run(drives, weights, initial)[0]
    assert_close("y", y.double(), reference(drives, weights, initial), rtol=1e-5)


def test_cuda_graph_replays_with_new_inputs():
    drives, weights = problem(2, 512, 256, torch.bfloat16)
    initial = torch.zeros(2, 256)
    drives.requires_grad_()
    cotangent = torch.randn(2, 512, 256, dtype=torch.bfloat16)

    def both():
        y = run(drives, weights, initial)[0]
        return y, torch.autograd.grad(y, drives, cotangent)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        drives.copy_(torch.randn_like(drives))
    graph.replay()
    for name, a, e in zip(("y", "gradient"), captured, both(), strict=True):
        assert torch.equal(a, e), name


def test_step_is_one_kernel_and_fits_a_graph():
    rnn = RNN(make_cell("paragru", torch.float32), backend="triton")
    x, state = torch.randn(3, 5), torch.randn(3, 7)
    with torch.no_grad():
        rnn.step(x, state)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
            rnn.step(x, state)
            torch.cuda.synchronize()
    sweeps = [e for e in found.events() if e.name == "sweep"]
    assert len(sweeps) == 1
    assert not any(e.name in ("correct", "refine") for e in found.events())
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y, _ = rnn.step(x, state)
    x.copy_(torch.randn(3, 5))
    graph.replay()
    with torch.no_grad():
        assert_close("replayed step", y, rnn.step(x, state)[0], rtol=1e-6)


def test_other_stream_and_determinism():
    drives, weights = problem(4, 777, 300, torch.float32, slow=5)
    initial = torch.zeros(4, 300)
    weights.requires_grad_()
    stream = torch.cuda.Stream()
    results = []
    for _ in range(2):
        with torch.cuda.stream(stream):
            y = run(drives, weights, initial)[0]
            results.append((y, torch.autograd.grad(y.square().sum(), weights)[0]))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_beyond_inputs_outputs_and_gradients():
    drives, weights = problem(8, 2048, 1024, torch.bfloat16)
    drives.requires_grad_()
    weights.requires_grad_()
    initial, cotangent = torch.zeros(8, 1024), torch.randn(8, 2048, 1024, dtype=torch.bfloat16)

    def call():
        y = run(drives, weights, initial)[0]
        torch.autograd.grad(y, [drives, weights], cotangent)

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    one = cotangent.nbytes
    extra = torch.cuda.max_memory_allocated() - before - one - drives.nbytes
    assert extra <= 0.05 * (drives.nbytes * 2 + 2 * one)


def random_tree(draw, leaves, depth):
    if depth == 0 or draw(4) == 0:
        return leaves[draw(len(leaves))]
    names = sorted(UNARY) + sorted(BINARY)
    name = names[draw(len(names))]
    children = [random_tree(draw, leaves, depth - 1) for _ in range(1 if name in UNARY else 2)]
    return (name, *children)


@pytest.mark.parametrize("seed", range(200))
def test_random_cells_sizes_and_scales(seed):
    """Cells, sizes, chunks, resets and weight scales drawn by the seed; values and gradients."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: int(torch.randint(n, (), generator=generator, device="cpu"))  # noqa: E731
    torch.manual_seed(seed)
    components = 1 + draw(4)
    leaves = [("state", i) for i in range(components)]
    leaves += [("drive", 0), ("drive", 1), ("coefficient", 0)]
    hidden = (1, 3, 64, 65, 130)[draw(5)]
    cell = Random([random_tree(draw, leaves, 3) for _ in range(components)], hidden).double()
    with torch.no_grad():
        cell.a.mul_((0.5, 1.0, 3.0)[draw(3)])
    time, chunk = 1 + draw(60), (1, 4, 16, "auto")[draw(4)]
    rnn = RNN(cell, backend="triton", solver=Newton(chunk=chunk))
    x = torch.randn(1 + draw(4), time, cell.input_size, dtype=torch.float64)
    state = random_state(components, x.shape[0], hidden)
    resets = torch.rand(x.shape[:2]) < 0.1 if draw(2) else None
    if resets is not None:
        resets[0, 0] = False
    run_loop = lambda x, s: loop(cell, x, s, resets)  # noqa: E731
    expected = outcome(run_loop, cell, x, state)
    nearby = outcome(run_loop, cell, x * (1 + 1e-13), state)  # some of these cells are chaotic
    actual = outcome(lambda x, s: rnn(x, s, resets), cell, x, state)
    for name, reference in expected.items():
        if not reference.any():
            assert not actual[name].any(), f"seed {seed}: {name} is not zero"
            continue
        moved = (nearby[name] - reference).abs().max() / reference.abs().max()
        rtol = 1e-9 + 1e3 * float(moved)
        assert_close(f"seed {seed}: {name}", actual[name], reference, rtol=rtol)


SANITIZED = {name: CELLS[name] for name in ("paragru", "slow_gates", "exponential")}
SANITIZED["heads"] = lambda: pararnn.cells.ParaLSTMCell(6, 6, num_heads=3)


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitized_subset(name):
    """Small enough for compute-sanitizer: `compute-sanitizer pytest -m gpu -k sanitized`."""
    rnn = RNN(SANITIZED[name]().double(), backend="triton", solver=Newton(chunk=16))
    x = torch.randn(2, 40, rnn.cell.input_size, dtype=torch.float64)
    state = random_state(rnn.num_components, 2, rnn.hidden_size)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    assert_same(outcome(rnn, rnn.cell, x, state), expected, 1e-11)
