"""Cells whose channels mix on a CUDA device: sweeps in one kernel or by graphs, and the loop."""

import copy
import itertools

import pytest
import torch
from core import norm_cells
from core.test_fused import TwoProducts, random_rows, steps_of, with_reset_states
from core.test_fused import compare as compare_steps
from torch import nn

import pararnn
from pararnn import RNN, Jacobi, Newton, Sequential
from pararnn.cells import BlockGRUCell, HeadSLSTMCell, LayerNormLSTMCell
from pararnn.kernels import fused, graphs
from pararnn.solvers.chunks import Chunks, Cut
from pararnn.testing import assert_close, loop

pytestmark = pytest.mark.gpu

CELLS = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


def compare(rnn, x, resets=None, rtol=1e-5):
    """Values and gradients against the loop in float64 on the CPU."""
    cell = rnn.cell
    exact = copy.deepcopy(cell).double().cpu()
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


@pytest.mark.parametrize("graphs_only", [False, True])
def test_sweeps_see_new_weights_and_inputs(graphs_only):
    rnn = RNN(nn.GRUCell(6, 64), backend="torch" if graphs_only else "auto").cuda()
    for _ in range(3):
        x = torch.randn(2, 2000, 6, device="cuda", requires_grad=True)
        compare(rnn, x, rtol=3e-5)
        assert rnn.report.status == "converged"
        with torch.no_grad():
            for parameter in rnn.parameters():
                parameter.mul_(1.02)


def test_graphs_outlive_inference_mode():
    """And serve sequences that one sweep does not suffice for."""
    for hidden, bias in ((64, 0.0), (64, 4.0), (300, 0.0)):
        rnn = RNN(nn.GRUCell(6, hidden)).cuda()
        with torch.no_grad():
            rnn.cell.bias_hh[hidden : 2 * hidden] = bias  # keeps states for long
        x = torch.randn(2, 700, 6, device="cuda", requires_grad=True)
        with torch.inference_mode():
            rnn(x)
        for _ in range(3):
            compare(rnn, x, rtol=3e-5)
        compare(rnn, x, torch.rand(2, 700, device="cuda") < 0.004, rtol=3e-5)


@pytest.mark.parametrize("hidden", [10, 256])
@pytest.mark.parametrize("bias", [0.0, 4.0])
def test_inside_a_graph_of_the_user(bias, hidden):
    """With chunks side by side, after a first call, also where these do not suffice."""
    rnn = RNN(nn.GRUCell(6, hidden)).cuda()
    with torch.no_grad():
        rnn.cell.bias_hh[hidden : 2 * hidden] = bias  # keeps states for long
    x = torch.randn(2, 1000, 6, device="cuda", requires_grad=True)
    inputs = [x, *rnn.parameters()]
    cotangent = torch.randn(2, 1000, hidden, device="cuda")

    def run():
        y, _ = rnn(x)
        return [y.detach(), *torch.autograd.grad(y, inputs, cotangent)]

    expected = run()
    kept = []
    replay = graphs.captured(lambda: kept.append(run()))
    with torch.no_grad():
        x.neg_()
    replay()
    assert rnn.report.chunks > 10
    moved = [k.clone() for k in kept[-1]]
    with torch.no_grad():
        x.neg_()
    replay()
    for i, (a, e) in enumerate(zip(kept[-1], expected, strict=True)):
        assert_close(f"tensor {i}", a, e, rtol=1e-5)
    assert not torch.equal(moved[0], kept[-1][0])
    assert (rnn.report.status == "converged") is (bias == 0.0)


def test_long_sequences_are_cut():
    rnn = pararnn.RNN(nn.GRUCell(64, 64)).cuda()
    rnn(torch.randn(4, 4096, 64, device="cuda"))
    assert rnn.report.chunks == 64
    assert rnn.report.iterations == 1


FUSED = {
    "rnn": lambda: nn.RNNCell(6, 19),
    "gru": lambda: nn.GRUCell(6, 64),
    "lstm": lambda: nn.LSTMCell(6, 64),
    "gru_of_33": lambda: nn.GRUCell(6, 33),
    "slstm": lambda: HeadSLSTMCell(6, 60, num_heads=3),
    "two_products": TwoProducts,
}


@pytest.mark.parametrize("solver", [Newton(chunk=20), Jacobi(chunk=64), Sequential()])
@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_fused_steps_equal_the_loop(name, solver):
    hidden = 6 if isinstance(solver, Newton) else 40
    rnn = RNN(CELLS[name](6, hidden).cuda(), solver=solver, backend="triton")
    assert {c.value for c in rnn.plan((3, 300, 6)).choices if "steps" in c.what} == {"kernel"}
    x = torch.randn(3, 300, 6, device="cuda", requires_grad=True)
    compare(rnn, x)
    compare(rnn, x, torch.rand(3, 300, device="cuda") < 0.02)


def on_device(chunks, state, sweep):
    move = lambda tensors: [t.cuda() for t in tensors]  # noqa: E731
    resets = None if chunks.resets is None else chunks.resets.cuda()
    inputs, reset_states = move(chunks.inputs), move(chunks.reset_states)
    cuda = Chunks(chunks.step, chunks.cut, inputs, resets, reset_states, chunks.reverse)
    return fused.run_steps(cuda, move(state), sweep)


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_fused_steps_equal_operations(name, resets, dtype, direction):
    """Also where states are replaced, rows are copied and the last step comes first."""
    for backwards, reverse in itertools.product((False, True), repeat=2):
        cut = Cut(37, 70, 40, backwards)
        of, chunks = steps_of(FUSED[name]().to(dtype), dtype, direction, cut)
        chunks = Chunks(chunks.step, cut, chunks.inputs, None, (), reverse)
        if resets:
            chunks = with_reset_states(of, chunks, dtype, reverse)
        if not reverse:
            compare_steps(chunks, random_rows(of, cut, dtype), dtype, run=on_device)
        state = random_rows(of, cut, dtype, copies=2)
        compare_steps(chunks, state, dtype, copies=2, run=on_device, keep=False)


WIDE = {
    "gru": lambda: nn.GRUCell(6, 256),
    "gru_of_300": lambda: nn.GRUCell(6, 300),
    "gru_of_512": lambda: nn.GRUCell(6, 512),
    "lstm": lambda: nn.LSTMCell(6, 256),
    "slstm": lambda: HeadSLSTMCell(512, 512, num_heads=2),
    "two_products": lambda: TwoProducts(200),
}


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_wide_steps_equal_operations(name, dtype, direction):
    """With weights that do not fit on the chip."""
    for backwards, reverse in itertools.product((False, True), repeat=2):
        cut = Cut(37, 20, 7, backwards)
        of, chunks = steps_of(WIDE[name]().to(dtype), dtype, direction, cut)
        if not reverse:
            compare_steps(chunks, random_rows(of, cut, dtype), dtype, run=on_device)
        chunks = Chunks(chunks.step, cut, chunks.inputs, None, (), reverse)
        chunks = with_reset_states(of, chunks, dtype, reverse)
        if not reverse:
            compare_steps(chunks, random_rows(of, cut, dtype), dtype, run=on_device)
        state = random_rows(of, cut, dtype, copies=2)
        compare_steps(chunks, state, dtype, copies=2, run=on_device, keep=False)


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
@pytest.mark.parametrize("batch", [1, 100, 300, 1500])
def test_any_number_of_wide_rows(batch, direction):
    """Programs that share channels or have them all, and more of them than run at a time."""
    dtype, cut = torch.float32, Cut(batch, 20, 7)
    of, chunks = steps_of(WIDE["gru"](), dtype, direction, cut)
    compare_steps(chunks, random_rows(of, cut, dtype), dtype, run=on_device)


@pytest.mark.parametrize("hidden", [256, 300, 512])
@pytest.mark.parametrize("name", CELLS)
def test_wide_cells_equal_the_loop(name, hidden):
    rnn = RNN(CELLS[name](6, hidden)).cuda()
    x = torch.randn(3, 700, 6, device="cuda", requires_grad=True)
    assert rnn.plan(x.shape).forward.steps == "kernel"
    compare(rnn, x)
    compare(rnn, x, torch.rand(3, 700, device="cuda") < 0.02)


NORMED = {
    "block_gru": lambda: BlockGRUCell(6, 512),
    "block_gru_of_24": lambda: BlockGRUCell(6, 24, num_blocks=4),
    "layer_norm_lstm": lambda: LayerNormLSTMCell(6, 300),
    "gated_layer": lambda: norm_cells.GatedLayer(200, 300),
    **{n: norm_cells.NORMED[n] for n in ("attending", "normed_heads", "mixed_heads", "extremes")},
}


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NORMED)
def test_normed_steps_equal_operations(name, dtype, direction):
    """With sums over channels, among programs that share these."""
    for batch, backwards, reverse in ((1, False, False), (37, False, True), (300, True, False)):
        cut = Cut(batch, 20, 7, backwards)
        of, chunks = steps_of(NORMED[name]().to(dtype), dtype, direction, cut)
        chunks = Chunks(chunks.step, cut, chunks.inputs, None, (), reverse)
        if not reverse:
            compare_steps(chunks, random_rows(of, cut, dtype), dtype, run=on_device)
        chunks = with_reset_states(of, chunks, dtype, reverse)
        state = random_rows(of, cut, dtype, copies=2)
        compare_steps(chunks, state, dtype, copies=2, run=on_device, keep=False)


@pytest.mark.parametrize("solver", [None, Sequential()], ids=["chosen", "sequential"])
@pytest.mark.parametrize("hidden", [64, 512])
@pytest.mark.parametrize("cell", [BlockGRUCell, LayerNormLSTMCell])
def test_normed_cells_equal_the_loop(cell, hidden, solver):
    torch.manual_seed(1)  # with others, the plain loop in float32 is off by 1e-5 as well
    rnn = RNN(cell(6, hidden), solver=solver).cuda()
    x = torch.randn(3, 300, 6, device="cuda", requires_grad=True)
    plan = rnn.plan(x.shape)
    assert plan.forward.steps == plan.adjoint.steps == "kernel"
    compare(rnn, x)
    compare(rnn, x, torch.rand(3, 300, device="cuda") < 0.02)
    first = rnn(x)[0]
    assert all(torch.equal(rnn(x)[0], first) for _ in range(5))


SPREAD = {
    "block_gru": lambda: BlockGRUCell(6, 512),
    "block_gru_of_320": lambda: BlockGRUCell(6, 320, num_blocks=5),
    "gru": lambda: nn.GRUCell(6, 256),
    "gru_of_300": lambda: nn.GRUCell(6, 300),
    "layer_norm_lstm": lambda: LayerNormLSTMCell(6, 256),
}


@pytest.mark.parametrize("batch", [1, 16, 17, 31])
@pytest.mark.parametrize("name", SPREAD)
def test_few_rows_equal_the_loop(name, batch):
    """Programs share channels, keep the weights and exchange sums; always with the same bits."""
    torch.manual_seed(1)
    rnn = RNN(SPREAD[name]().cuda(), solver=Sequential(), backend="triton")
    x = torch.randn(batch, 120, 6, device="cuda", requires_grad=True)
    if batch <= rnn.runner().facts.few:
        assert "on the chip, shared among programs" in str(rnn.plan(x.shape))
    compare(rnn, x)
    compare(rnn, x, torch.rand(batch, 120, device="cuda") < 0.02)
    first = rnn(x)[0]
    assert all(torch.equal(rnn(x)[0], first) for _ in range(5))


def test_few_rows_of_the_cells_that_were_measured():
    for name, batch in {"block_gru": 16, "gru": 64, "layer_norm_lstm": 16}.items():
        assert RNN(SPREAD[name]()).cuda().runner().facts.few >= batch, name


def test_wide_cells_round_only_where_they_may():
    rnn = RNN(nn.GRUCell(6, 256)).cuda()
    x = torch.randn(200, 60, 6, device="cuda")  # few rows have ordinary products of float32
    assert "reads at every step" in str(rnn.plan(x.shape))
    exact = rnn(x)[0]
    torch.set_float32_matmul_precision("high")
    try:
        rounded = rnn(x)[0]
    finally:
        torch.set_float32_matmul_precision("highest")
    assert 1e-6 < (exact - rounded).abs().max() < 1e-2


@pytest.mark.parametrize("name", ["gru_of_33", "slstm"])
def test_sanitized_fused_steps(name):
    """For compute-sanitizer: `compute-sanitizer pytest -m gpu -k sanitized`."""
    of, chunks = steps_of(FUSED[name](), torch.float32, "forward", Cut(3, 11, 7))
    compare_steps(chunks, random_rows(of, chunks.cut, torch.float32), torch.float32, run=on_device)


@pytest.mark.parametrize("name", ["gru", "block_gru"])
def test_sanitized_few_rows(name):
    """Programs that share channels, and wait for each other; for compute-sanitizer."""
    rnn = RNN(SPREAD[name]().cuda(), solver=Sequential(), backend="triton")
    compare(rnn, torch.randn(2, 20, 6, device="cuda", requires_grad=True))
