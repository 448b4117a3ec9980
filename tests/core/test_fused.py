"""Steps in one kernel, in Triton's interpreter and in C, against one operation after the other."""

import dataclasses
import functools
import itertools
import operator
import weakref
from unittest import mock

import pytest
import torch
from torch import fx, nn

from pararnn import RNN, Jacobi, Newton, Sequential
from pararnn.cells import HeadSLSTMCell
from pararnn.kernels import fused
from pararnn.kernels.facts import streams
from pararnn.kernels.triton import sweeps
from pararnn.layers.xlstm import XLSTMCell
from pararnn.planning.costs import COSTS
from pararnn.planning.kernel_plans import plan_wide, wide_precision
from pararnn.solvers.chunks import WHOLE, Chunks, Cut, Redo, Sweep
from pararnn.solvers.chunks import run_steps as one_by_one
from pararnn.testing import assert_close, loop
from pararnn.tracing.products import unfused
from pararnn.tracing.step import Input, Step
from pararnn.tracing.tile_layout import tiles
from pararnn.tracing.tiles import NotTiled

from .compare import as_tuple, assert_same, outcome, random_state, with_resets
from .conftest import needs_triton
from .test_mixing import INPUT, MIXING, Heads, Normed, Partly

SMALL = dataclasses.replace(COSTS, wide_block=(16, 16), wide_inner=16)  # several blocks


def run_streamed(chunks, state, sweep=WHOLE):
    """As on a GPU on which no weights fit on the chip, so that every step reads them."""
    with (
        mock.patch.object(fused, "_known", weakref.WeakKeyDictionary()),
        mock.patch.object(sweeps, "keeps_weights", return_value=False),
        mock.patch.object(sweeps, "plan_wide", functools.partial(plan_wide, costs=SMALL)),
        mock.patch.object(sweeps, "plan_spread", return_value=None),  # nor in several programs
    ):
        return fused.run_steps(chunks, state, sweep)


RUNS = {
    "triton": pytest.param(fused.run_steps, id="triton", marks=needs_triton),
    "streamed": pytest.param(run_streamed, id="streamed", marks=needs_triton),
    "c": pytest.param(fused.run_in_c, id="c"),
}
ALL = pytest.mark.parametrize("run", RUNS.values())
RTOL = {torch.float64: 1e-12, torch.float32: 1e-5}


class TwoProducts(nn.Module):
    """A hidden layer, whose units are no channels, and products from the left."""

    input_size, num_components = INPUT, 1

    def __init__(self, hidden_size=6):
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(INPUT, 2 * hidden_size)
        self.first = nn.Parameter(torch.randn(hidden_size, 2 * hidden_size) * hidden_size**-0.5)
        self.second = nn.Parameter(torch.randn(hidden_size, 2 * hidden_size) * hidden_size**-0.5)

    def forward(self, x, h):
        hidden = torch.tanh(h @ self.first + self.input(x))
        return 0.5 * h + torch.tanh((self.second @ hidden.T).T)


class HeadsInPlace(nn.Module):
    """Two products per head, between which heads stay apart; a block of gates per channel."""

    input_size, hidden_size, num_components = INPUT, 6, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, 6)
        self.first = nn.Parameter(torch.randn(2, 3, 6) * 0.4)
        self.second = nn.Parameter(torch.randn(2, 6, 3) * 0.4)

    def forward(self, x, h):
        heads = h.unflatten(1, (2, 3)).transpose(0, 1)
        mixed = torch.tanh(heads @ self.first) @ self.second
        return torch.tanh(self.input(x) + mixed.transpose(0, 1).flatten(1))


class HeadsExpanded(nn.Module):
    """A weight per head from the left and one for all heads, both expanded over the rows."""

    input_size, hidden_size, num_components = INPUT, 6, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, 6)
        self.first = nn.Parameter(torch.randn(2, 3, 3) * 0.4)
        self.second = nn.Parameter(torch.randn(3, 3) * 0.4)

    def forward(self, x, h):
        heads = torch.tanh(self.first @ h.view(-1, 2, 3, 1)).squeeze(3)
        mixed = torch.bmm(heads, self.second.expand(len(h), 3, 3))
        return torch.tanh(self.input(x) + mixed.flatten(1))


class Turned(nn.Module):
    """The channels of a product in another order, and a bias in another."""

    input_size, hidden_size, num_components = INPUT, 6, 1

    def __init__(self):
        super().__init__()
        self.input, self.bias = nn.Linear(INPUT, 6), nn.Parameter(torch.randn(6))
        self.weight = nn.Parameter(torch.randn(6, 6) * 0.4)

    def forward(self, x, h):
        return torch.tanh(self.input(x) + h * (h @ self.weight).flip(1) + self.bias.flip(0) * h)


def xlstm():
    cell = XLSTMCell(3, 5)
    cell._recurrent_kernel_ = nn.Parameter(torch.randn(3, 20, 5) * 0.4)
    cell._bias_ = nn.Parameter(torch.randn(60))
    return cell


CELLS = {
    "rnn": lambda: nn.RNNCell(INPUT, 6),
    "relu": lambda: nn.RNNCell(INPUT, 19, bias=False, nonlinearity="relu"),
    "gru": lambda: nn.GRUCell(INPUT, 17),
    "gru_of_16": lambda: nn.GRUCell(INPUT, 16),
    "lstm": lambda: nn.LSTMCell(INPUT, 6),
    "heads": Heads,
    "slstm": lambda: HeadSLSTMCell(6, 15, num_heads=3),
    "xlstm": xlstm,
    "partly": Partly,
    "two_products": TwoProducts,
    "heads_in_place": HeadsInPlace,
    "heads_expanded": HeadsExpanded,
    "turned": Turned,
}


def make(name, dtype):
    torch.manual_seed(5)
    return CELLS[name]().to(dtype)


def steps_of(cell, dtype, direction, cut, strided=False):
    """Chunks of the step or its adjoint, at random."""
    of = RNN(cell).runner().traced.step
    torch.manual_seed(7)
    count, rows = of.num_components, (cut.batch, cut.time)
    moved = lambda e: torch.randn(*rows, *e.shape).to(e.dtype)  # noqa: E731
    inputs = [
        moved(e) if e.by_rows else torch.randn(e.shape).to(e.dtype) * 0.8 / e.shape[-1] ** 0.5
        for e in of.inputs
    ]
    if direction == "adjoint":
        before, grads = (
            [torch.rand(cut.batch * cut.time, of.hidden, dtype=dtype) for _ in range(count)]
            for _ in range(2)
        )
        flat = [e.flatten(0, 1) if k.by_rows else e for e, k in zip(inputs, of.inputs, strict=True)]
        adjoint = of.adjoint
        found = adjoint.part.module(*adjoint.part_arguments(before, flat, grads))
        inputs = [
            found[i].unflatten(0, rows) if adjoint.by_rows[i] else found[i]
            for i in adjoint.step_inputs
        ]
    step = of if direction == "forward" else of.adjoint.step
    if strided:
        inputs = [
            e.transpose(0, 1).contiguous().transpose(0, 1) if by_rows else e
            for e, by_rows in zip(inputs, step.by_rows, strict=True)
        ]
    return of, Chunks(step, cut, inputs, None, ())


def random_rows(of, cut, dtype, copies=1):
    rows = copies * cut.chunks * cut.batch
    return [torch.randn(rows, of.hidden, dtype=dtype) for _ in range(of.num_components)]


def doubled(chunks):
    exact = lambda t: t.double() if t.is_floating_point() else t  # noqa: E731
    return dataclasses.replace(
        chunks,
        inputs=list(map(exact, chunks.inputs)),
        reset_states=list(map(exact, chunks.reset_states)),
    )


def compare(chunks, state, dtype, copies=1, run=fused.run_steps, **options):
    """All states after all steps, and the ends of all chunks but the last, against float64.

    Where float32 loses accuracy one operation after the other, so may one kernel.
    """
    sweep = Sweep(copies=copies, **options)
    exact = one_by_one(doubled(chunks), [s.double() for s in state], sweep)
    expected = one_by_one(chunks, state, sweep)
    found = run(chunks, state, sweep)
    assert all(s.is_contiguous() for s in found[0])
    if chunks.cut.chunks == 1:
        exact, expected, found = exact[:1], expected[:1], found[:1]
    else:
        used = lambda e: e.unflatten(0, (copies, -1))[:, : -chunks.cut.batch]  # noqa: E731
        exact, expected, found = (
            (states, [used(e) for e in ends]) for states, ends in (exact, expected, found)
        )
    for kind, *parts in zip(("states", "ends"), exact, expected, found, strict=False):
        for i, (reference, e, a) in enumerate(zip(*parts, strict=True)):
            lost = float((e - reference).abs().max() / reference.abs().max())
            rtol = RTOL[dtype] + 4 * lost
            assert_close(f"{kind} of component {i}", a.cpu().double(), reference, rtol=rtol)


def with_reset_states(of, chunks, dtype, reverse=False):
    """Some states are replaced."""
    rows = (chunks.cut.batch, chunks.cut.time)
    reset_states = [torch.randn(*rows, of.hidden, dtype=dtype) for _ in range(of.num_components)]
    reset_states[-1] = reset_states[-1][:1, :1, :1].expand_as(reset_states[-1])
    return Chunks(
        chunks.step, chunks.cut, chunks.inputs, torch.rand(*rows, 1) < 0.3, reset_states, reverse
    )


@ALL
@pytest.mark.parametrize("direction", ["forward", "adjoint"])
@pytest.mark.parametrize("name", CELLS)
def test_equals_operations(name, direction, dtype, run):
    of, chunks = steps_of(make(name, dtype), dtype, direction, Cut(batch=2, time=7, chunk=4))
    compare(chunks, random_rows(of, chunks.cut, dtype), dtype, run=run)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_rows_in_c(batch, threads):
    """Blocks of rows that are full, not full, and of one row, among threads."""
    dtype, before = torch.float32, torch.get_num_threads()
    of, chunks = steps_of(make("gru", dtype), dtype, "forward", Cut(batch, 6, 6))
    torch.set_num_threads(threads)
    try:
        compare(chunks, random_rows(of, chunks.cut, dtype), dtype, run=fused.run_in_c)
    finally:
        torch.set_num_threads(before)


@ALL
@pytest.mark.parametrize("name", ["gru", "heads"])
@pytest.mark.parametrize("direction", ["forward", "adjoint"])
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_chunks_starts_and_order(name, direction, resets, reverse, backwards, run):
    """Strided inputs, states that are replaced, both directions, copies, chunks cut off."""
    dtype = torch.float64
    for cut in (Cut(2, 8, 3, backwards), Cut(1, 3, 3, backwards)):
        of, chunks = steps_of(make(name, dtype), dtype, direction, cut, strided=True)
        chunks = Chunks(chunks.step, cut, chunks.inputs, None, (), reverse)
        if resets:
            chunks = with_reset_states(of, chunks, dtype, reverse)
        if not reverse:
            compare(chunks, random_rows(of, cut, dtype), dtype, run=run)
            compare(chunks, random_rows(of, cut, dtype), dtype, run=run, first=2, keep=False)
        rows = random_rows(of, cut, dtype, copies=2)
        compare(chunks, rows, dtype, copies=2, run=run, keep=False)


@ALL
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_sequences_that_are_run_again(resets, backwards, run):
    dtype, cut = torch.float64, Cut(5, 4, 4, backwards)
    of, chunks = steps_of(make("lstm", dtype), dtype, "forward", cut)
    chunks = with_reset_states(of, chunks, dtype) if resets else chunks
    state, settled = random_rows(of, cut, dtype), torch.tensor([True, False, True, True, False])
    found = {}
    for one in (one_by_one, run):
        found[one] = [torch.ones(5, 4, of.hidden, dtype=dtype) for _ in state]
        one(chunks, state, Sweep(redo=Redo(found[one], settled)))
    expected, _ = one_by_one(chunks, state)
    for a, b, e in zip(*found.values(), expected, strict=True):
        e[settled] = 1.0
        assert torch.equal(a, e)
        assert_close("states", b, e, rtol=RTOL[dtype])


def _fused_step(name, inputs):
    """A step of `nn.GRUCell` or `nn.LSTMCell` as it is traced on a GPU."""
    gates = {"gru": 3, "lstm": 4}[name]
    graph = fx.Graph()
    h, *c = (graph.placeholder(f"state_{n}") for n in range(gates - 2))
    given = [graph.placeholder(f"input_{n}") for n in range(len(inputs))]
    turned = graph.call_function(torch.ops.aten.t.default, (given[1],))
    product = graph.call_function(torch.ops.aten.mm.default, (h, turned))
    operation = getattr(torch.ops.aten, f"_thnn_fused_{name}_cell").default
    both = graph.call_function(operation, (given[0], product, *(c or [h]), *given[2:]))
    results = [graph.call_function(operator.getitem, (both, n)) for n in range(gates - 2)]
    graph.output(results)
    x, *weights = inputs
    kinds = [Input(x.shape[2:], x.dtype, True), *(Input(w.shape, w.dtype, False) for w in weights)]
    module, device = fx.GraphModule(nn.Module(), graph), torch.device("cpu")
    return Step(lambda: module, tuple(kinds), gates - 2, 17, 17, device, x.dtype)


@needs_triton
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_cells_that_a_gpu_fuses(name, bias, dtype):
    """Their steps there are one operation, which a CPU does not have."""
    gates, cut = {"gru": 3, "lstm": 4}[name], Cut(2, 4, 3)
    cell = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[name](INPUT, 17, bias, dtype=dtype)
    x = torch.randn(2, 4, gates * 17, dtype=dtype)
    inputs = [x, cell.weight_hh.detach()]
    inputs += [b.detach() for b in (cell.bias_ih, cell.bias_hh)] if bias else []
    step = _fused_step(name, inputs)
    state = [torch.randn(4, 17, dtype=dtype) for _ in range(gates - 2)]
    states, _ = fused.run_steps(Chunks(step, cut, inputs, None, ()), state)
    for n in range(2):
        for t in range(4):
            row = n + 2 * (t // 3)
            past = [
                s[row] if t % 3 == 0 else e[n, t - 1] for s, e in zip(state, states, strict=True)
            ]
            expected = _step_of(cell, x[n, t], past)
            for e, a in zip(expected, states, strict=True):
                assert_close("state", a[n, t], e, rtol=RTOL[dtype])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_cells_that_a_gpu_fuses_are_read_for_tiles(name, bias):
    """Whether there are tiles is asked for every cell; here packed gates come in pieces."""
    gates, cell = {"gru": 3, "lstm": 4}[name], {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[name]
    x = torch.randn(2, 4, gates * 17)
    inputs = [x, *(p.detach() for p in cell(INPUT, 17, bias).parameters() if p.shape[-1] != INPUT)]
    step = _fused_step(name, inputs)
    with pytest.raises(NotTiled):
        tiles(step, None)


@needs_triton
@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_transforms_of_cells_that_a_gpu_fuses(name):
    cell = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[name](INPUT, 17)
    inputs = [p.detach() for p in (cell.weight_hh, cell.bias_ih, cell.bias_hh)]
    x, *state = (torch.randn(2, n * 17) for n in ([3, 1] if name == "gru" else [4, 1, 1]))
    module = unfused(_fused_step(name, [x, *inputs]).module)
    found = torch.func.vmap(lambda x, *s: module(*(t[None] for t in s), x[None], *inputs))(
        x, *state
    )
    for row in range(2):
        expected = _step_of(cell, x[row], [s[row] for s in state])
        for a, e in zip(found, expected, strict=True):
            assert_close("state", a[row, 0], e, rtol=1e-5)


def _step_of(cell, gates, past):
    """What a cell of PyTorch makes of the products of its input with its weights."""
    wide = type(cell)(len(gates), len(past[0]), cell.bias, dtype=gates.dtype)
    wide.load_state_dict(
        cell.state_dict() | {"weight_ih": torch.eye(len(gates), dtype=gates.dtype)}
    )
    with torch.no_grad():
        found = wide(gates[None], past[0][None] if len(past) == 1 else tuple(p[None] for p in past))
    return [found[0]] if len(past) == 1 else [f[0] for f in found]


@needs_triton
@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_weights_that_do_not_fit_are_read_at_every_step(direction):
    dtype, cut = torch.float64, Cut(9, 3, 2)
    of, chunks = steps_of(nn.GRUCell(INPUT, 100).to(dtype), dtype, direction, cut)
    state = random_rows(of, cut, dtype)
    assert isinstance(fused._kernel(chunks, state), sweeps.Streamed)
    compare(chunks, state, dtype)


@needs_triton
@pytest.mark.parametrize("direction", ["forward", "adjoint"])
@pytest.mark.parametrize("size", [64, 128, 129, 256])
@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "two_products", "slstm"])
def test_a_plan_knows_whether_weights_are_read_at_every_step(name, size, direction):
    cells = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
    cells["two_products"] = lambda _, hidden: TwoProducts(hidden)
    cells["slstm"] = lambda _, hidden: HeadSLSTMCell(3 * hidden, 3 * hidden, num_heads=3)
    dtype, cut = torch.float32, Cut(1, 2, 2)
    of, chunks = steps_of(cells[name](INPUT, size), dtype, direction, cut)
    kernel = fused._kernel(chunks, random_rows(of, cut, dtype))
    assert isinstance(kernel, sweeps.Streamed) == streams(of)


@needs_triton
def test_a_gpu_runs_programs_that_wait_for_each_other_at_the_same_time():
    for size, groups, rows, products, factors, itemsize in itertools.product(
        (64, 129, 256, 300, 1024), (1, 4, 300), (1, 16, 17, 500, 5000), (1, 4, 20), (1, 4), (4, 8)
    ):
        for processors in (1, 16, 132):
            sizes = size, groups, rows, products, factors, itemsize
            plan = plan_wide(*sizes, processors, shared=99 * 2**10)
            programs = -(-rows // plan.rows) * groups * plan.parts
            assert plan.parts == 1 or programs <= processors
            assert plan.width >= size
            assert plan.width % plan.block == plan.width % plan.inner == 0
            assert (plan.parts - 1) * plan.block < size
            one = (products * plan.block + factors * plan.rows) * itemsize
            assert (plan.stages - 1) * plan.inner * one <= 99 * 2**10 or products == 20


def test_products_round_only_where_they_may():
    assert wide_precision(rounds=False, itemsize=4) == "tf32x3"
    assert wide_precision(rounds=True, itemsize=4) == "tf32"
    assert wide_precision(rounds=False, itemsize=8) == "ieee"


@needs_triton
@pytest.mark.parametrize("solver", [Newton(chunk=3), Jacobi(chunk=3), Sequential()], ids=repr)
@pytest.mark.parametrize("name", ["gru", "heads", "lstm"])
@pytest.mark.parametrize("reset", [False, True])
def test_whole_solve_equals_loop(name, solver, reset):
    torch.manual_seed(5)
    cell = MIXING[name]().double()
    rnn = RNN(cell, solver=solver, backend="triton")
    x = torch.randn(2, 8, INPUT, dtype=torch.float64)
    state = random_state(rnn.num_components, 2, rnn.hidden_size)
    if not reset:
        expected = outcome(functools.partial(loop, cell), cell, x, state)
        return assert_same(outcome(rnn, cell, x, state), expected, 1e-10)
    resets = torch.rand(2, 8) < 0.2
    resets[:, 0] = torch.tensor([False, True])
    both = (*as_tuple(state), *as_tuple(random_state(rnn.num_components, 2, rnn.hidden_size)))
    expected = outcome(with_resets(functools.partial(loop, cell), resets), cell, x, both)
    assert_same(outcome(with_resets(rnn, resets), cell, x, both), expected, 1e-10)


@needs_triton
def test_first_read_in_inference_mode():
    """Inside an operator and without autograd, where the step is recorded for the first time."""
    cell = make("heads", torch.float64)
    rnn = RNN(cell, solver=Jacobi(chunk=4), backend="triton")
    fused._known.clear()
    x = torch.randn(2, 9, INPUT, dtype=torch.float64)
    zeros = (torch.zeros(2, 6, dtype=torch.float64),) * 2
    with torch.inference_mode():
        y, _ = rnn(x)
        assert_close("y", y, loop(cell, x, zeros)[0], rtol=1e-10)


class Cumulated(nn.Module):
    """Sums of the channels so far."""

    input_size, hidden_size, num_components = INPUT, 6, 1

    def forward(self, x, h):
        return torch.tanh(torch.cumsum(h, -1) + x[:, :1])


class Twisted(nn.Module):
    """The channels of the state in another order."""

    input_size, hidden_size, num_components = INPUT, 6, 1

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x, h):
        return torch.tanh(h.flip(1) * (h @ self.weight) + x[:, :1])


class Squared(nn.Module):
    """A product of the state with itself."""

    input_size, hidden_size, num_components = INPUT, 4, 1

    def forward(self, x, h):
        matrix = h.unflatten(1, (2, 2))
        return torch.tanh((matrix @ matrix).flatten(1) + x[:, :1])


@needs_triton
@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (Cumulated, "cumsum: it is not a pointwise operation"),
        (Normed, "channels are mixed"),
        (Twisted, "channels are mixed"),
        (Squared, "bmm: neither factor is a weight"),
    ],
)
def test_what_is_not_fused_says_why(cell, reason):
    dtype = torch.float64
    of, chunks = steps_of(cell().to(dtype), dtype, "forward", Cut(3, 2, 2))
    state = random_rows(of, chunks.cut, dtype)
    with pytest.raises(fused.NotFused, match=reason):
        fused.run_steps(chunks, state)
    assert reason.split(":")[-1].strip() in fused.reason(chunks, state)


@needs_triton
def test_source_is_deterministic_and_shows_the_equations():
    from pararnn.kernels.triton.expressions import source
    from pararnn.tracing.products import products

    def text():
        of, chunks = steps_of(make("gru", torch.float32), torch.float32, "forward", Cut(3, 2, 2))
        strides = [
            e.stride()[2 if r else 0 :]
            for e, r in zip(chunks.inputs, chunks.step.by_rows, strict=True)
        ]
        found = products(
            *(of.module, of.inputs, strides, 1, of.hidden, of.group),
            *(torch.float32, torch.device("cpu")),
        )
        leaves = {"state": 1, "drive": 3, "coefficient": 3, "weight": 3}
        return source("step", leaves, found.step, double=False)

    assert text() == text()
    assert "tanh(drive2 + " in text().split('"""')[1]
    assert "dot(state0, weight2)" in text()
    assert len(text().splitlines()) < 50


class Masked(nn.Module):
    """Channels are multiplied with a part of numbers of another type."""

    input_size, hidden_size, num_components = INPUT, 6, 1

    def __init__(self, numbers, part):
        super().__init__()
        self.input, self.mixed, self.part = nn.Linear(INPUT, 6), nn.Linear(6, 6), part
        self.register_buffer("numbers", numbers)

    def forward(self, x, h):
        scaled = (h.unflatten(1, (3, 2)) * self.part(self.numbers)).flatten(1)
        return torch.tanh(self.input(x) + self.mixed(scaled))


PARTS = {
    "expanded": (torch.arange(3), lambda m: m[:, None].expand(3, 2)),
    "columns": (torch.arange(12).view(3, 4) % 3 > 0, lambda m: m[:, 1:3]),
    "every_second": (torch.arange(12).view(3, 4) % 5 > 2, lambda m: m[:, ::2]),
    "transposed": (torch.arange(6).view(2, 3), lambda m: m.T),
    "as_it_lies": (torch.tensor([[True], [False], [True]]).expand(3, 2), lambda m: m),
}


@pytest.mark.parametrize("backend", ["c", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("name", PARTS)
def test_inputs_of_another_type_lie_as_they_did(name, backend):
    torch.manual_seed(2)
    cell = Masked(*PARTS[name]).double()
    rnn = RNN(cell, backend=backend, solver=Sequential())
    x, state = torch.randn(2, 5, INPUT, dtype=torch.float64), random_state(1, 2, 6)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-12)
