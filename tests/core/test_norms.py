"""Cells with weights and norms over channels in one kernel, in Triton's interpreter and in C."""

import functools
import operator
from unittest import mock

import pytest
import torch
from torch import fx, nn

from pararnn import RNN, Jacobi, Newton, Sequential
from pararnn.kernels import fused
from pararnn.kernels.stages import NotFused
from pararnn.kernels.triton import sweeps
from pararnn.solvers.chunks import Chunks, Cut
from pararnn.solvers.chunks import run_steps as one_by_one
from pararnn.testing import assert_close, loop
from pararnn.tracing.products import unfused

from .compare import as_tuple, assert_same, outcome, random_state, with_resets
from .conftest import needs_triton
from .mixing_operations import OPERATIONS
from .norm_cells import INPUT, NORMED
from .pretend_gpu import pretend_gpu
from .test_fused import compare, random_rows, run_streamed, steps_of, with_reset_states
from .test_mixing_operations import Mixed

IN_TRITON = pytest.param(run_streamed, id="triton", marks=needs_triton)
IN_C = pytest.param(fused.run_in_c, id="c")
BOTH = pytest.mark.parametrize("run", [IN_TRITON, IN_C])
BACKENDS = pytest.mark.parametrize("backend", [pytest.param("triton", marks=needs_triton), "c"])
DIRECTIONS = pytest.mark.parametrize("direction", ["forward", "adjoint"])


def make(name, dtype):
    torch.manual_seed(5)
    return NORMED[name]().to(dtype)


def kernel_of(cell, direction):
    of, chunks = steps_of(cell, torch.float32, direction, Cut(2, 2, 2))
    return fused._kernel(chunks, random_rows(of, chunks.cut, torch.float32))


@DIRECTIONS
@pytest.mark.parametrize(
    "run", [pytest.param(fused.run_steps, id="one_block", marks=needs_triton), IN_TRITON, IN_C]
)
@pytest.mark.parametrize("name", NORMED)
def test_equals_operations(name, direction, dtype, run):
    of, chunks = steps_of(make(name, dtype), dtype, direction, Cut(batch=2, time=7, chunk=4))
    compare(chunks, random_rows(of, chunks.cut, dtype), dtype, run=run)


@needs_triton
@DIRECTIONS
@pytest.mark.parametrize("name", NORMED)
def test_programs_share_channels(name, direction):
    """Several programs for the channels of some rows, and several for the rows."""
    from .at_once import programs_at_once

    dtype = torch.float64
    of, chunks = steps_of(make(name, dtype), dtype, direction, Cut(batch=10, time=5, chunk=3))
    with programs_at_once(20):
        compare(chunks, random_rows(of, chunks.cut, dtype), dtype, run=run_streamed)


@BOTH
@DIRECTIONS
@pytest.mark.parametrize("name", ["layer_norm_lstm", "mixed_heads"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_chunks_starts_and_order(name, direction, reverse, backwards, run):
    dtype = torch.float64
    for cut in (Cut(2, 8, 3, backwards), Cut(1, 3, 3, backwards)):
        of, chunks = steps_of(make(name, dtype), dtype, direction, cut, strided=True)
        chunks = Chunks(chunks.step, cut, chunks.inputs, None, (), reverse)
        chunks = with_reset_states(of, chunks, dtype, reverse)
        if not reverse:
            compare(chunks, random_rows(of, cut, dtype), dtype, run=run)
        rows = random_rows(of, cut, dtype, copies=2)
        compare(chunks, rows, dtype, copies=2, run=run, keep=False)


@needs_triton
@DIRECTIONS
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ["block_gru", "gated_layer"])
def test_who_computes_a_normed_vector(name, late, direction):
    """Those who multiply it, or those whose channels it has."""
    dtype = torch.float64
    of, chunks = steps_of(make(name, dtype), dtype, direction, Cut(batch=3, time=4, chunk=4))
    with mock.patch.object(sweeps, "computes_late", return_value=late):
        compare(chunks, random_rows(of, chunks.cut, dtype), dtype, run=run_streamed)


@needs_triton
def test_fewer_blocks_on_their_way_where_memory_is_short():
    dtype, tried, launch = torch.float64, [], sweeps._launch

    def of_a_small_chip(kernel, grid, arguments):
        tried.append(arguments["STAGES"])
        if tried[-1] > 1:
            raise NotFused("out of resource: shared memory")
        launch(kernel, grid, arguments)

    of, chunks = steps_of(make("gated_layer", dtype), dtype, "adjoint", Cut(3, 4, 4))
    with (
        mock.patch.object(sweeps, "_launch", of_a_small_chip),
        mock.patch.object(sweeps, "plan_spread", return_value=None),
    ):
        for _ in range(2):
            compare(chunks, random_rows(of, chunks.cut, dtype), dtype)
    assert tried == [3, 2, 1, 1]


@needs_triton
@pytest.mark.parametrize(
    ("name", "rounds"), [("block_gru", (3, 3)), ("layer_norm_lstm", (5, 2)), ("attending", (3, 2))]
)
def test_rounds_of_a_step(name, rounds):
    for direction, expected in zip(("forward", "adjoint"), rounds, strict=True):
        kernel = kernel_of(make(name, torch.float32), direction)
        assert len(kernel.constants["COMPUTE"]) == expected
        assert "reduced0" in kernel.source


@BACKENDS
@pytest.mark.parametrize("name", NORMED)
def test_whole_solve_equals_loop(name, backend):
    cell = make(name, torch.float64)
    rnn = RNN(cell, solver=Newton(chunk=2), backend=backend)
    assert rnn.runner().facts.kernels == (None, None)
    x = torch.randn(1, 4, INPUT, dtype=torch.float64)
    state = random_state(rnn.num_components, 1, rnn.hidden_size)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-10)


@pytest.mark.parametrize("solver", [Jacobi(chunk=3), Sequential()], ids=["jacobi", "sequential"])
@pytest.mark.parametrize("name", ["block_gru", "layer_norm_lstm"])
@BACKENDS
def test_resets(name, solver, backend):
    cell = make(name, torch.float64)
    rnn = RNN(cell, solver=solver, backend=backend)
    x, resets = torch.randn(3, 5, INPUT, dtype=torch.float64), torch.rand(3, 5) < 0.2
    resets[:2, 0] = torch.tensor([False, True])
    states = [random_state(rnn.num_components, 3, rnn.hidden_size) for _ in range(2)]
    both = tuple(component for state in states for component in as_tuple(state))
    expected = outcome(with_resets(functools.partial(loop, cell), resets), cell, x, both)
    assert_same(outcome(with_resets(rnn, resets), cell, x, both), expected, 1e-10)


_REFUSED = {("std", "adjoint"), ("norm", "adjoint"), ("logsumexp", "forward")}
_REFUSED |= {("vecdot", "adjoint")}
KNOWN = (
    "mean amin std norm logsumexp renorm softmax layer_norm_weight rms_norm instance_norm_weight "
    "matmul_weight matmul_per_head addmm einsum_weight tensordot chain_matmul vecdot flip cat "
    "where matrix_norm kl_div".split()
)


@DIRECTIONS
@pytest.mark.parametrize("name", KNOWN)
@BACKENDS
def test_operations(name, direction, backend):
    """Those that mix channels in ways that kernels know."""
    dtype = torch.float64
    torch.manual_seed(3)
    cell = Mixed(OPERATIONS[name]).double()
    of, chunks = steps_of(cell, dtype, direction, Cut(batch=2, time=4, chunk=3))
    state = random_rows(of, chunks.cut, dtype)
    if fused.reason(chunks, state, backend) is None:
        run = {"triton": run_streamed, "c": fused.run_in_c}[backend]
        compare(chunks, state, dtype, run=run)
    else:
        assert (name, direction) in _REFUSED


@pytest.mark.parametrize("name", ["index_select", "gather", "cumsum", "sort", "roll", "matmul"])
def test_operations_that_kernels_do_not_know(name):
    runner = RNN(Mixed(OPERATIONS[name]).double(), backend="torch").runner()
    tensors = [getattr(owner, attribute) for owner, attribute in runner.owners]
    assert None not in runner._kernels("triton", tensors)["kernels"]


def test_a_plan_says_that_steps_run_in_one_kernel():
    """Few rows keep the weights, in several programs; more read them at every step."""
    with pretend_gpu():
        rnn = RNN(make("block_gru", torch.float32))
        few = rnn.runner().facts.few
        plans = [rnn.plan((batch, 512, INPUT)) for batch in (few, few + 1)]
        assert all(p.forward.steps == p.adjoint.steps == "kernel" for p in plans)
        assert rnn.runner().facts.streams
    for plan, where in zip(plans, ("on the chip, shared", "which it reads"), strict=True):
        assert f"weights {where}" in str(plan)


def test_extremes_with_a_number_that_is_none(dtype):
    """They are none, as PyTorch's are; the compared rows have one each in another place."""
    of, chunks = steps_of(make("extremes", dtype), dtype, "forward", Cut(3, 2, 2))
    state = random_rows(of, chunks.cut, dtype)
    for row, component in enumerate(state[0]):
        component[row] = float("nan")
    found, expected = (run(chunks, state) for run in (fused.run_in_c, one_by_one))
    for a, e in zip(found[0], expected[0], strict=True):
        assert torch.equal(a.isnan(), e.isnan())


def test_the_norm_that_a_gpu_fuses():
    """It is one operation there, and its derivative another, which a CPU does not have."""
    torch.manual_seed(5)
    x, w, grad = (
        torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3, 5), (5,), (4, 3, 5))
    )
    graph = fx.Graph()
    given = [graph.placeholder(name) for name in ("x", "w", "grad")]
    forward = torch.ops.aten._fused_rms_norm.default
    both = graph.call_function(forward, (given[0], [5], given[1], 1e-3))
    y, scale = (graph.call_function(operator.getitem, (both, n)) for n in range(2))
    backward = torch.ops.aten._fused_rms_norm_backward.default
    arguments = given[2], given[0], [5], scale, given[1], [True, True]
    grads = graph.call_function(backward, arguments)
    graph.output((y, *(graph.call_function(operator.getitem, (grads, n)) for n in range(2))))
    found = unfused(fx.GraphModule(nn.Module(), graph))(x, w, grad)
    x, w = x.requires_grad_(), w.requires_grad_()
    expected = torch.nn.functional.rms_norm(x, (5,), w, 1e-3)
    expected = [expected, *torch.autograd.grad(expected, (x, w), grad)]
    for a, e in zip(found, expected, strict=True):
        assert_close("norm", a, e.detach(), rtol=1e-12)


class Chunked(nn.Module):
    """A hidden layer that is larger than the state, in parts that are no multiples of it."""

    input_size, hidden_size, num_components = INPUT, 6, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, 6)
        self.up, self.down = nn.Linear(6, 2 * 10), nn.Linear(10, 6)
        self.norm = nn.LayerNorm(20, eps=0.1)

    def forward(self, x, h):
        a, b = self.norm(self.up(h)).chunk(2, -1)
        return torch.tanh(self.input(x) + self.down(torch.tanh(a) * b))


@BOTH
@DIRECTIONS
def test_layers_that_are_larger_than_the_state(direction, dtype, run):
    torch.manual_seed(5)
    of, chunks = steps_of(Chunked().to(dtype), dtype, direction, Cut(batch=2, time=5, chunk=3))
    compare(chunks, random_rows(of, chunks.cut, dtype), dtype, run=run)
