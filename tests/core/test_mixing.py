"""Cells whose channels mix: every coupling, chunk length and contract, against the loop."""

import functools
import itertools
import re
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import pararnn
from pararnn import RNN, ConvergenceError, Jacobi, Newton, Picard, QuasiNewton, Sequential
from pararnn.cells import BlockGRUCell, LayerNormLSTMCell
from pararnn.kernels import facts, fused, graphs, rows
from pararnn.kernels.c.build import find_compiler
from pararnn.kernels.operators import request_of
from pararnn.planning import kernel_plans, plan, rows_plan
from pararnn.planning.costs import COSTS
from pararnn.solvers import chunks, shooting
from pararnn.testing import assert_close, loop

from .cells import CELLS, make_cell
from .compare import (
    as_tuple,
    assert_same,
    one_by_one,
    outcome,
    random_state,
    twice,
    with_resets,
)

RTOL = {torch.float64: 1e-10, torch.float32: 1e-5}
INPUT, HIDDEN = 5, 6


class Heads(nn.Module):
    """A gated cell of two components, whose recurrent matrices are blocks of a head each."""

    input_size, hidden_size, num_components = INPUT, HIDDEN, 2

    def __init__(self, size=2):
        super().__init__()
        self.input = nn.Linear(INPUT, 3 * HIDDEN)
        self.blocks = nn.Parameter(torch.randn(3, HIDDEN // size, size, size) * 0.4)

    def forward(self, x, state):
        h, c = state
        heads = h.unflatten(-1, self.blocks.shape[1:3])
        mixed = torch.einsum("nhi,ghij->nghj", heads, self.blocks).flatten(2)
        f, o, z = (self.input(x).unflatten(-1, (3, HIDDEN)) + mixed).unbind(1)
        c = torch.sigmoid(f) * c + torch.sigmoid(-f) * torch.tanh(z)
        return torch.sigmoid(o) * torch.tanh(c), c


class Normed(nn.Module):
    """Layer norm, whose backward takes it for granted that what it saved is contiguous."""

    input_size, hidden_size, num_components = INPUT, HIDDEN, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, 2 * HIDDEN)
        self.norm = nn.LayerNorm(2, eps=0.1)

    def forward(self, x, h):
        u, v = self.input(x).chunk(2, -1)
        mixed = self.norm(h.unflatten(-1, (3, 2)) + v.unflatten(-1, (3, 2))).flatten(1)
        return torch.tanh(u + mixed).unflatten(-1, (2, 3)).transpose(1, 2).flatten(1)


class Partly(nn.Module):
    """Mixes through a path that is detached, and takes a mask and an index from x."""

    input_size, hidden_size, num_components = INPUT, HIDDEN, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, HIDDEN)
        self.weight = nn.Parameter(torch.randn(HIDDEN, HIDDEN) * 0.3)
        self.table = nn.Parameter(torch.randn(3, HIDDEN))

    def forward(self, x, h):
        row = self.table[(x[:, 0] > 0).long() + (x[:, 1] > 0).long()]
        new = torch.tanh(self.input(x) + row + h @ self.weight - 0.2 * (h @ self.weight).detach())
        return torch.where(x[:, 2:3] > -1.0, new, 0.9 * h)


MIXING = {
    "rnn": lambda: nn.RNNCell(INPUT, HIDDEN),
    "gru": lambda: nn.GRUCell(INPUT, HIDDEN),
    "lstm": lambda: nn.LSTMCell(INPUT, HIDDEN),
    "heads": Heads,
    "partly": Partly,
    "normed": Normed,
    "block_gru": lambda: BlockGRUCell(INPUT, HIDDEN, num_blocks=2),
    "layer_norm_lstm": lambda: LayerNormLSTMCell(INPUT, HIDDEN),
}
COUPLINGS = [Newton, QuasiNewton, Picard, Jacobi]


def make(name, dtype=torch.float64):
    torch.manual_seed(5)
    return MIXING[name]().to(dtype)


def data(rnn, batch=3, time=25, dtype=torch.float64):
    x = torch.randn(batch, time, INPUT, dtype=dtype)
    return x, random_state(rnn.num_components, batch, rnn.hidden_size, dtype=dtype)


def starts(time=25):
    resets = torch.rand(3, time) < 0.15
    resets[0, 0] = resets[1, -1] = resets[2, 6:9] = True
    return resets


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("chunk", [1, 7, 25])
@pytest.mark.parametrize("name", MIXING)
def test_equals_loop(name, chunk, coupling):
    cell = make(name)
    rnn = RNN(cell, solver=coupling(chunk=chunk))
    x, state = data(rnn)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, RTOL[torch.float64])
    assert rnn.report.status == ("sequential" if chunk == 25 else "converged")


@pytest.mark.parametrize("solver", [None, Newton(chunk=7), Jacobi(chunk=7), Sequential()])
@pytest.mark.parametrize("name", MIXING)
def test_equals_loop_in_float32(name, solver):
    cell = make(name, torch.float32)
    rnn = RNN(cell, solver=solver)
    x, state = data(rnn, time=130, dtype=torch.float32)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, RTOL[torch.float32])


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "heads", "partly"])
def test_whole_layers_in_c(name, reset):
    cell = make(name)
    rnn = RNN(cell, backend="c")
    x, state = data(rnn)
    resets = starts() if reset else None
    actual = outcome(lambda x, s: rnn(x, s, resets), cell, x, state)
    expected = outcome(lambda x, s: loop(cell, x, s, resets), cell, x, state)
    assert_same(actual, expected, RTOL[torch.float64], label=name)
    plan = rnn.plan(x.shape)
    assert plan.backend == "c"
    assert plan.forward.steps == plan.adjoint.steps == "kernel"


def test_long_sequences_run_in_c():
    cell = nn.GRUCell(INPUT, HIDDEN).double()
    rnn, x = RNN(cell), torch.randn(3, 100, INPUT, dtype=torch.float64)
    assert rnn.plan(x.shape).forward.steps == "kernel"
    assert rnn.plan((3, 20, INPUT)).path == "pytorch"  # a loop as well
    zeros = torch.zeros(3, HIDDEN, dtype=torch.float64)
    actual = outcome(lambda x, s: rnn(x, s), cell, x, zeros)
    assert_same(actual, outcome(functools.partial(loop, cell), cell, x, zeros), 1e-12, label="C")
    assert torch.tensor([1e-40]).mul(1.0).item() > 0.0  # tiny numbers are zero in C alone


def test_the_operator_runs_what_the_layer_plans(monkeypatch):
    """It does not know whether gradients are wanted; many sequences without them run in C."""
    rnn, ran = RNN(nn.GRUCell(INPUT, HIDDEN)), []
    run = fused.run_in_c
    monkeypatch.setattr(fused, "run_in_c", lambda *given: ran.append(1) or run(*given))
    with torch.no_grad():
        assert rnn.plan((100, 80, INPUT)).forward.steps == "kernel"
        rnn(torch.randn(100, 80, INPUT))
    assert ran


@pytest.mark.parametrize("solver", [*(c(chunk=7) for c in COUPLINGS), Newton(chunk=1), None])
@pytest.mark.parametrize("name", ["gru", "heads"])
def test_resets_equal_loop(name, solver):
    cell = make(name)
    rnn = RNN(cell, solver=solver)
    x, state = data(rnn)
    resets, both = starts(), (*as_tuple(state), *as_tuple(data(rnn)[1]))
    expected = outcome(with_resets(functools.partial(loop, cell), resets), cell, x, both)
    assert_same(outcome(with_resets(rnn, resets), cell, x, both), expected, RTOL[torch.float64])


@pytest.mark.parametrize("solver", [*(c(chunk=4) for c in COUPLINGS), Sequential()])
def test_packed_equals_one_by_one(solver):
    cell = make("lstm")
    rnn = RNN(cell, solver=solver)
    lengths = [0, 1, 9, 0, 0, 2, 14, 5, 0]
    x, _ = data(rnn, batch=1, time=sum(lengths))
    state = random_state(2, len(lengths), HIDDEN)

    bounds = torch.tensor([0, *lengths]).cumsum(0)
    actual = outcome(lambda x, s: rnn(x, s, cu_seqlens=bounds), cell, x, state)
    assert_same(actual, outcome(one_by_one(cell, lengths), cell, x, state), RTOL[torch.float64])


@pytest.mark.parametrize("name", ["gru", "heads"])
def test_layouts_parts_and_steps(name):
    """Time first, strided inputs, one sequence, two parts and single steps are all the same."""
    cell = make(name)
    rnn = RNN(cell, solver=Newton(chunk=7))
    x, state = data(rnn)
    expected = outcome(rnn, cell, x, state)
    time_first = RNN(cell, solver=rnn.solver, batch_first=False)

    def transposed(x, state):
        y, last = time_first(x.transpose(0, 1), state)
        return y.transpose(0, 1), last

    def strided(x, state):
        return rnn(torch.stack([x, x + 1], -1)[..., 0], state)

    def parts(x, state):
        first, state = rnn(x[:, :12], state)
        second, state = rnn(x[:, 12:], state)
        return torch.cat([first, second], 1), state

    def steps(x, state):
        outputs = []
        for x_t in x.unbind(1):
            y, state = rnn.step(x_t, state)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    for run in (transposed, strided, parts, steps):
        assert_same(outcome(run, cell, x, state), expected, 1e-12, label=run.__name__)


@pytest.fixture
def rerun_graphs(monkeypatch):
    """What a GPU does, with work that is run again in the place of a graph that is replayed."""

    class Graph:
        pass

    class Rerun:
        def __init__(self, run, beside):
            self.run, self.kept, self.graph = run, run(), Graph()

        def __call__(self):
            for old, new in zip(self.kept, self.run(), strict=True):
                old.copy_(new)

    monkeypatch.setattr(graphs, "captured", Rerun)


def test_graphs_of_forms_that_come_again(monkeypatch, rerun_graphs):
    """Which one is new when more forms take turns than there may be graphs."""
    monkeypatch.setattr(graphs, "_GRAPHS", 2)
    monkeypatch.setattr(graphs, "_UNUSED", 10)
    made, cached = [], graphs.Graphs()

    class Counted(graphs._Graph):
        def __init__(self, function, tensors, context):
            made.append(len(tensors[0]))
            super().__init__(function, tensors, context)

    monkeypatch.setattr(graphs, "_Graph", Counted)

    def call(size):
        x = torch.randn(size)
        (y,) = cached.call("double", lambda tensors: [tensors[0] * 2], [x])
        assert torch.equal(y, x * 2)

    for _ in range(3):
        for size in (1, 2, 3):
            call(size)
    assert made == [1, 2]  # at their second call; then all places are taken
    for _ in range(9):
        call(2)
    call(3)
    assert made == [1, 2, 3]  # in the place of one that was not used for ten calls


def test_graphs_share_memory_as_long_as_there_are_some(monkeypatch, rerun_graphs):
    monkeypatch.setattr(graphs, "_firsts", weakref.WeakValueDictionary())
    forms = [graphs.Graphs() for _ in range(2)]
    for cached in forms:
        for _ in range(2):
            cached.call("double", lambda tensors: [tensors[0] * 2], [torch.ones(3)])
    (shared,) = set(graphs._firsts.values())
    assert all(graph._first is shared for cached in forms for graph in cached._known.values())
    del cached, shared
    forms.pop(0)  # with the graph that was the first
    assert len(graphs._firsts) == 1
    forms.clear()
    assert not graphs._firsts


@pytest.mark.parametrize("solver", [Newton(chunk=7), Jacobi(chunk=10), Sequential()])
def test_sweeps_by_graphs(monkeypatch, rerun_graphs, solver):
    pieces = functools.partial(kernel_plans.steps_of_graphs, costs=replace(COSTS, graph_steps=4))
    monkeypatch.setattr(graphs, "steps_of_graphs", pieces)
    monkeypatch.setattr(graphs, "_GRAPHS", 3)
    monkeypatch.setattr(rows, "run_operations", graphs.replayed)
    cell = make("heads")
    rnn = RNN(cell, solver=solver)
    for resets in (None, starts(), None):
        x, state = data(rnn)
        with torch.no_grad():
            cell.blocks.add_(0.1)
        expected = outcome(lambda x, s, r=resets: loop(cell, x, s, r), cell, x, state)
        actual = outcome(lambda x, s, r=resets: rnn(x, s, r), cell, x, state)
        assert_same(actual, expected, RTOL[torch.float64])


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("name", ["rnn", "lstm"])
def test_whole_calls_by_graphs(monkeypatch, rerun_graphs, name, forgets):
    """What a GPU does where it decides by itself which sequences to run step by step."""

    def settled(*given):
        way = plan.Way(
            *(Jacobi(chunk=8, max_iterations=1), 1e-13, "kernel"),
            settle=True,
            in_graph=True,
            warm_up=8,
        )
        return replace(plan.decide(*given), path="rows", forward=way, adjoint=way)

    monkeypatch.setattr(facts, "decide", settled)
    monkeypatch.setattr(fused, "run_steps", chunks.run_steps)
    cell = make(name)
    with torch.no_grad():
        cell.weight_hh.mul_(1e-3 if forgets else 3.0)
        cell.bias_hh.mul_(0.0).sub_(9.0 if forgets else 0.0)  # gates that forget, too
    rnn = RNN(cell)
    path = request_of(rnn.runner().request).path
    path.graphs._known.clear()
    with torch.inference_mode():
        x, state = data(rnn)
        assert_same({"y": rnn(x, state)[0]}, {"y": loop(cell, x, state)[0]}, RTOL[torch.float64])
    for n, resets in enumerate([None, starts(), None] * 2):
        x, state = data(rnn)
        expected = outcome(lambda x, s, r=resets: loop(cell, x, s, r), cell, x, state)
        actual = outcome(lambda x, s, r=resets: rnn(x, s, r), cell, x, state)
        assert_same(actual, expected, RTOL[torch.float64], label=str(n))
        assert rnn.report.chunks == 4
        assert rnn.report.iterations == 1
        if forgets or resets is None:
            assert (rnn.report.status == "converged") is forgets
    assert len(path.graphs._known) == 4  # forwards and backwards, with resets and without


def test_a_call_without_a_kernel_changes_no_later_one(monkeypatch):
    """Weights that lie otherwise than those that were traced may have none."""
    way, ran = plan.Way(Jacobi(chunk=8, max_iterations=1), 1e-13, "kernel", True, warm_up=8), []

    def settled(known, *given):
        made = plan.decide(known, *given)
        return made if known.kernels[0] else replace(made, forward=way)

    def run_steps(chunks_, *given):
        odd = any(i.is_contiguous() for i in chunks_.inputs if i.dim() == 2)
        ran.append("refused" if odd else "kernel")
        if odd:
            raise fused.NotFused("weights lie apart")
        return chunks.run_steps(chunks_, *given)

    monkeypatch.setattr(facts, "decide", settled)
    monkeypatch.setattr(fused, "run_steps", run_steps)
    monkeypatch.setattr(fused, "run_in_c", run_steps)
    cell = make("rnn")
    runner = RNN(cell).runner()
    x, path = torch.randn(2, 40, INPUT), request_of(runner.request).path
    with torch.no_grad():
        inputs = runner.inputs([*cell.parameters()], [x.double()])
        odd = [i.contiguous() if i.dim() == 2 else i for i in inputs]
        initial, found = torch.zeros(2, 1, HIDDEN, dtype=torch.float64), []
        for given in (inputs, odd, inputs, odd):
            ran.clear()
            found.append(path.solve(given, initial, None))
            assert set(ran) == ({"refused"} if given is odd else {"kernel"})
    for one, other in zip(found[:2], found[2:], strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("pieces", [1, 4, 7])
@pytest.mark.parametrize("reset", [False, True])
def test_pieces_of_the_sequential_backward(monkeypatch, pieces, reset):
    monkeypatch.setattr(plan, "steps_at_once", lambda *_: pieces)
    cell = make("lstm")
    rnn = RNN(cell, solver=Sequential())
    x, state = data(rnn)
    resets = starts() if reset else None
    both = (*as_tuple(state), *as_tuple(data(rnn)[1]))
    unused = () if reset else ("first[2]", "first[3]")
    expected = outcome(with_resets(functools.partial(loop, cell), resets), cell, x, both)
    actual = outcome(with_resets(rnn, resets), cell, x, both)
    assert_same(actual, expected, 1e-12, [f"gradient of {name}" for name in unused])


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("name", ["gru", "heads"])
def test_chunks_are_coupled_by_their_tangents(monkeypatch, name, chunk):
    """What Newton is given equals the Jacobian of the loop over a chunk, resets included."""
    cell = make(name)
    rnn = RNN(cell, solver=Newton(chunk=chunk))
    components, size = rnn.num_components, rnn.runner().traced.step.group
    x, state = data(rnn, batch=2, time=20)
    resets = torch.zeros(2, 20, dtype=torch.bool)
    resets[1, 12] = True
    seen = []
    tangents = pararnn.solvers.systems.Forward.tangents

    def spy(self, cut, first, states, run):
        seen.append((torch.stack(list(first), 1), tangents(self, cut, first, states, run)))
        return seen[-1][1]

    monkeypatch.setattr(pararnn.solvers.systems.Forward, "tangents", spy)
    with torch.no_grad():
        rnn(x, state, resets)
    first, found = seen[0]
    first = first.unflatten(0, (-1, 2))
    for k, b in [(1, 0), (1, 1), (12 // chunk, 1)]:
        part = x[b : b + 1, k * chunk : (k + 1) * chunk]
        replaced = resets[b : b + 1, k * chunk : (k + 1) * chunk]

        def end(*components, part=part, replaced=replaced, b=b):
            given = components if len(components) > 1 else components[0]
            fresh = tuple(torch.zeros_like(s[b : b + 1]) for s in as_tuple(state))
            for t in range(part.shape[1]):
                if replaced[0, t]:
                    given = fresh if len(components) > 1 else fresh[0]
                given = cell(part[:, t], given)
            return tuple(s + 0 * c for s, c in zip(as_tuple(given), components, strict=True))

        blocks = torch.autograd.functional.jacobian(end, tuple(first[k, b].unsqueeze(1)))
        whole = torch.stack([torch.stack(row, 2) for row in blocks])  # [i, 1, h, j, 1, h']
        whole = whole[:, 0, :, :, 0].reshape(components, HIDDEN, components, HIDDEN)
        groups = whole.unflatten(3, (-1, size)).unflatten(1, (-1, size))
        wanted = torch.stack([groups[:, g, :, :, g] for g in range(HIDDEN // size)], -1)
        wanted = wanted.flatten(2, 3).flatten(0, 1)
        torch.testing.assert_close(found[b, k], wanted, rtol=1e-11, atol=1e-13)


def test_heads_are_found_and_probed_together():
    traced = RNN(make("heads")).runner().traced
    assert traced.structure == "heads (size 2)"
    assert traced.step.group == 2
    assert RNN(make("gru")).runner().traced.step.group == HIDDEN


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("coupling", [QuasiNewton, Picard, Jacobi])
def test_elementwise_cells_have_the_family_too(name, coupling, backend):
    cell = make_cell(name)
    rnn = RNN(cell, solver=coupling(chunk=4), backend=backend)
    x = torch.randn(2, 18, cell.input_size, dtype=torch.float64)
    state = random_state(rnn.num_components, 2, rnn.hidden_size)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, RTOL[torch.float64])


def test_sequential_elementwise(any_backend):
    rnn = RNN(make_cell("paragru"), solver=Sequential(), backend=any_backend)
    rnn(torch.randn(2, 18, 5, dtype=torch.float64))
    assert rnn.report.status == "sequential"


def chaotic(hidden=32):
    """Lyapunov exponent above 0: gain 0.6 * sqrt(32)."""
    torch.manual_seed(0)
    cell = nn.RNNCell(INPUT, hidden).double()
    with torch.no_grad():
        cell.weight_hh.normal_(0, 0.6)
    return cell


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_chaotic_cell_equals_loop(coupling):
    cell = chaotic()
    rnn = RNN(cell, solver=coupling(chunk=4, max_iterations=2))
    x = torch.randn(2, 30, INPUT, dtype=torch.float64)
    state = random_state(1, 2, 32)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-9)
    assert rnn.report.status == "completed step by step"
    assert rnn.report.residual > 1e-3


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_chunks_become_exact_one_by_one(coupling):
    """Without a limit, a chaotic cell takes at most as many iterations as chunks."""
    cell = chaotic()
    rnn = RNN(cell, solver=coupling(chunk=4))
    x = torch.randn(2, 30, INPUT, dtype=torch.float64)
    with torch.no_grad():
        y, _ = rnn(x)
    assert_close("y", y, loop(cell, x, torch.zeros(2, 32, dtype=torch.float64))[0], rtol=1e-9)
    assert rnn.report.status == "converged"
    assert rnn.report.iterations <= 8 == rnn.report.chunks


def test_failure_raises_what_helps():
    rnn = RNN(chaotic(), solver=Jacobi(chunk=4, max_iterations=2, on_failure="raise"))
    x = torch.randn(2, 30, INPUT, dtype=torch.float64)
    with pytest.raises(ConvergenceError, match=r"after 2 iterations: the residual is .* the toler"):
        rnn(x)
    with pytest.raises(ConvergenceError, match="2 of 2 parts of the batch") as caught:
        rnn(x)
    assert caught.value.report.iterations == 2
    assert len(caught.value.report) == 2


@pytest.mark.parametrize("structure", ["elementwise", "dense"])
def test_failure_warns(structure):
    cell = chaotic() if structure == "dense" else make_cell("slow_gates")
    rnn = RNN(cell, solver=Newton(chunk=4, max_iterations=1, on_failure="warn"), backend="torch")
    x = torch.randn(2, 30, INPUT, dtype=torch.float64)
    with pytest.warns(UserWarning, match="evaluated step by step, since 2 of 2 parts"):
        y, _ = rnn(x)
    zeros = torch.zeros(2, rnn.hidden_size, dtype=torch.float64)
    assert_close("y", y, loop(cell, x, zeros)[0], rtol=1e-9)


class Switched(nn.Module):
    """Chaotic where the first entry of x is above 0, forgetful elsewhere."""

    input_size, hidden_size, num_components = INPUT, 32, 1

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) * 0.6)
        self.input = nn.Linear(INPUT, 32)

    def forward(self, x, h):
        return torch.tanh((h @ self.weight) * (x[:, :1] > 0) + self.input(x))


@pytest.mark.parametrize("kind", ["dense", "elementwise"])
def test_report_by_sequence(kind):
    torch.manual_seed(0)
    x = torch.randn(3, 40, INPUT, dtype=torch.float64)
    if kind == "dense":
        cell = Switched().double()
        x[:, :, 0] = torch.tensor([-1.0, 1.0, -1.0])[:, None]
        rnn = RNN(cell, solver=Jacobi(chunk=8, max_iterations=3))
    else:
        cell = make_cell("slow_gates")
        rnn = RNN(cell, solver=Newton(chunk=8, max_iterations=1), backend="torch")
        with torch.no_grad():
            cell.input.weight.mul_(3.0)
        x[0], x[2] = 30.0 * x[0].sign(), 30.0 * x[2].sign()  # open gates forget
        x[1] = 0.0
    with torch.no_grad():
        y, _ = rnn(x)
    report = rnn.report
    assert len(report) == 3
    assert report.status == report[1].status == "completed step by step"
    assert report.residual == report[1].residual > 1e-3
    if kind == "dense":
        assert [report[i].status for i in (0, 2)] == ["converged", "converged"]
        assert [report[i].iterations for i in range(3)] == [1, 3, 1]
        assert report[0].residual == 0.0
    zeros = torch.zeros(3, rnn.hidden_size, dtype=torch.float64)
    assert_close("y", y, loop(cell, x, zeros)[0], rtol=1e-9)


def test_automatic_choice_uses_chunks():
    x = torch.randn(1, 600, INPUT)
    torch.manual_seed(0)
    rnn = RNN(nn.GRUCell(INPUT, 16), backend="torch")
    rnn(x)
    assert rnn.report.status == "converged"
    assert rnn.report.chunks > 4
    assert rnn.report.iterations == 1


class Narrow(nn.Module):
    """Chaotic, in heads so small that chunks are coupled by Newton."""

    input_size, hidden_size, num_components = INPUT, 8, 1

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) * 1.5)

    def forward(self, x, h):
        return torch.tanh(h @ self.weight.T + x.sum(-1, keepdim=True))


@pytest.mark.parametrize("wild", [lambda: chaotic(24).float(), Narrow])
def test_a_call_depends_on_nothing_before_it(wild):
    """The same bits in every call, also where the first one did not converge."""
    torch.manual_seed(0)
    rnn = RNN(wild(), backend="torch")
    calm, x = RNN(nn.GRUCell(INPUT, 24), backend="torch"), torch.randn(1, 900, INPUT)
    found = []
    for _ in range(3):
        y, _ = rnn(x)
        assert rnn.report.status == "completed step by step"
        assert rnn.report.chunks > 4
        y[:, 300:320].square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in rnn.parameters())])
        rnn.zero_grad()
        calm(x)
    assert all(f.isfinite().all() and f.any() for f in found[0])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_training_resumes_to_the_bit():
    """What was evaluated before in the process has no part in it; the cell turns chaotic."""

    def train(rnn, first, steps):
        for step in range(first, first + steps):
            torch.manual_seed(step)
            rnn(torch.randn(1, 700, INPUT))[0].square().mean().backward()
            with torch.no_grad():
                for p in rnn.parameters():
                    p.mul_(1.6).sub_(p.grad)
            rnn.zero_grad()
        return rnn

    torch.manual_seed(0)
    whole = train(RNN(nn.GRUCell(INPUT, 16), backend="torch"), 0, 2)
    saved = {n: v.clone() for n, v in whole.state_dict().items()}
    train(whole, 2, 3)
    assert whole.report.status == "completed step by step"
    resumed = RNN(nn.GRUCell(INPUT, 16), backend="torch")
    resumed.load_state_dict(saved)
    train(resumed, 2, 3)
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def count_calls(*cells):
    """A function that says how often the cells were called since it was asked last.

    Not by a list: what a hook changes is seen as a change of the cell, which is traced again.
    """
    tally, asked = itertools.count(), [0]
    for cell in cells:
        cell.register_forward_hook(lambda *_: (next(tally), None)[1])

    def calls():
        now = next(tally)
        found, asked[0] = now - asked[0], now + 1
        return found

    return calls


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
def test_few_steps_are_those_of_the_cell(kind, grad):
    """It is the cell that runs, with resets too."""
    cell = kind(INPUT, HIDDEN)
    rnn = RNN(cell)
    x = torch.randn(3, 6, INPUT)
    state = tuple(torch.randn(3, HIDDEN) for _ in range(rnn.num_components))
    state = state if kind is nn.LSTMCell else state[0]
    resets = torch.rand(3, 6) < 0.3
    calls = count_calls(cell)
    rnn(x)  # with its hook, the cell is another one
    with torch.set_grad_enabled(grad):
        for given in (None, resets):
            calls()
            y, last = rnn(x, state, given)
            assert calls() == 6
            expected, end = loop(cell, x, state, given)
            assert_close("y", y, expected, rtol=1e-6)
            for a, e in zip(as_tuple(last), as_tuple(end), strict=True):
                assert_close("state", a, e, rtol=1e-6)
        fresh = rnn(x)[1]
        y, _ = rnn(x, state, resets, reset_state=fresh)
        assert_close("y", y, loop(cell, x, state, resets, fresh)[0], rtol=1e-6)
        y, last = rnn.step(x[:, 0], state)
    assert_close("step", y, loop(cell, x[:, :1], state)[0][:, 0], rtol=1e-6)
    assert (rnn.report.status, rnn.report.chunks, len(rnn.report)) == ("sequential", 1, 3)
    if grad:
        expected = outcome(lambda x, s: loop(cell, x, s, resets), cell, x, state)
        assert_same(outcome(lambda x, s: rnn(x, s, resets), cell, x, state), expected, 1e-5)


def test_the_cell_runs_by_itself_only_where_it_does_the_same():
    cell = nn.GRUCell(INPUT, HIDDEN)
    x = torch.randn(3, 6, INPUT)
    asked = RNN(cell, solver=Sequential())
    wide, half = RNN(cell), RNN(nn.GRUCell(INPUT, HIDDEN).bfloat16())
    calls = count_calls(cell, half.cell)
    for layer, given in ((asked, x), (wide, x), (half, x.bfloat16())):
        layer(given)  # with its hook, the cell is another one
    calls()
    asked(x)
    wide(x, torch.zeros(3, HIDDEN, dtype=torch.float64))
    half(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        wide(x)
    assert calls() == 0
    wide(x)
    assert calls() == 6


def test_hopeless_iterations_are_given_up():
    hopeless = lambda before, now, left, part=1.0, kind="zero": shooting.Contraction(  # noqa: E731
        before, part
    ).is_hopeless(now, left, 1e-6, kind)
    assert not hopeless(1.0, 0.1, 6)
    assert hopeless(1.0, 0.1, 4)
    assert not hopeless(1.0, 0.1, 2, part=0.25)  # a chunk forgets four times as much
    assert hopeless(1.0, 0.5, 6)
    assert hopeless(1.0, 2.0, 6)
    assert hopeless(1.0, torch.nan, 6)
    assert hopeless(torch.inf, torch.inf, 6)
    assert not hopeless(1.0, 0.9, 1, kind="tangent")
    assert hopeless(1.0, 1.0, 9, kind="tangent")
    assert not hopeless(torch.inf, 2.0, 9, kind="tangent")
    wild = RNN(chaotic(24).float(), backend="torch")
    x = torch.randn(1, 2000, INPUT)
    with torch.no_grad():
        y, _ = wild(x)
    assert wild.report.status == "completed step by step"
    assert wild.report.iterations == 1 < wild.plan(x.shape).forward.solver.max_iterations
    zeros = torch.zeros(1, 24)
    assert_close("y", y[:, :10], loop(wild.cell, x[:, :10], zeros)[0], rtol=1e-4)


def test_automatic_choice_of_the_cell_itself():
    choose = functools.partial(rows_plan.prefers_cell, 64, 30.0, device="cpu", one_call=False)
    assert choose(batch=4, time=8)
    assert not choose(batch=4, time=100)
    assert choose(batch=4, time=100, one_call=True)
    assert choose(batch=64, time=4096)
    assert not choose(batch=8, time=4096)
    assert not choose(batch=4, time=8, device="cuda")
    heads = functools.partial(rows_plan.prefers_cell, device="cpu", one_call=False, time=1024)
    assert not heads(512, 0.6, batch=8)  # weights decide
    assert heads(32, 9.0, batch=8)  # gates do


def test_automatic_choice_by_size():
    choose = functools.partial(rows_plan.plan_rows, time=4096)
    few = choose(64, 30.0, batch=1)
    assert isinstance(few, Jacobi)
    assert few.max_iterations >= 1
    assert isinstance(choose(8, 300.0, batch=1), Newton)
    assert isinstance(choose(1024, 0.5, batch=32), Sequential)
    assert isinstance(rows_plan.plan_rows(64, 30.0, 1, 100), Sequential)
    assert choose(64, 30.0, batch=4).chunk > few.chunk


def test_rows_that_are_free():
    """More operations hide more arithmetic; what comes in as a matrix for every row counts."""

    class Own(nn.Module):
        input_size, hidden_size, num_components = 36, 6, 1

        def forward(self, x, h):
            return torch.tanh(torch.einsum("ni,nij->nj", h, 0.1 * x.unflatten(1, (6, 6))))

    gru, own = (RNN(c).runner().facts for c in (make("gru"), Own()))
    free = rows_plan.free_rows(gru.work, gru.launches, "cpu")
    assert free == gru.launches * 2**15 / gru.work
    assert gru.launches > own.launches
    assert own.work >= 36


def test_half_precision_is_computed_in_single():
    torch.manual_seed(0)
    cell = nn.GRUCell(INPUT, 16)
    x = torch.randn(2, 40, INPUT)
    exact = RNN(cell, solver=Newton(chunk=8))(x)[0]
    half = RNN(nn.GRUCell(INPUT, 16).bfloat16(), solver=Newton(chunk=8))
    half.cell.load_state_dict(cell.state_dict())
    y, last = half(x.bfloat16())
    assert y.dtype == last.dtype == torch.bfloat16
    assert_close("y", y.float(), exact, rtol=2e-2)
    y.float().square().sum().backward()
    assert half.cell.weight_hh.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = RNN(cell, solver=Newton(chunk=8))(x)
    assert_close("autocast", y, exact, rtol=2e-2)


def test_compiles_without_a_break():
    torch.manual_seed(0)
    rnn = RNN(nn.GRUCell(INPUT, HIDDEN).double(), solver=Jacobi(chunk=8))
    x, state = data(rnn)
    expected = outcome(rnn, rnn.cell, x, state)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, rnn.cell, x, state), expected, 1e-12)


def test_operators_keep_their_promises():
    rnn = RNN(make("lstm"), solver=Newton(chunk=8))
    inputs = [
        torch.randn(*((2, 20) if i.by_rows else ()), *i.shape, dtype=i.dtype, requires_grad=True)
        for i in rnn.runner().traced.step.inputs
    ]
    initial = torch.randn(2, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    arguments = (inputs, initial, None, rnn.runner().request)
    torch.library.opcheck(
        torch.ops.pararnn.solve,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("solver", [Newton(chunk=8), Jacobi(chunk=8), Sequential(), None])
def test_gradient_of_a_gradient_equals_loop(solver):
    """Whatever solves: a second derivative goes step by step."""
    rnn = RNN(make("gru"), solver=solver)
    x, state = data(rnn)
    expected = twice(functools.partial(loop, rnn.cell), x, state)
    assert_same(twice(rnn, x, state), expected, RTOL[torch.float64])


@pytest.mark.parametrize("solver", [Newton(chunk=1), Jacobi(chunk=8), None])
def test_nan_and_infinity_reach_what_the_loop_reaches(solver):
    cell = make("lstm")
    rnn = RNN(cell, solver=solver)
    x, state = data(rnn, time=30)
    x[1, 17, 2], x[2, 4, 0] = torch.nan, torch.inf
    y, _ = rnn(x, state)
    assert y[0].isfinite().all()
    torch.testing.assert_close(y, loop(cell, x, state)[0], rtol=1e-11, atol=0, equal_nan=True)


def test_check_cell():
    check = pararnn.testing.check_cell(nn.GRUCell(INPUT, HIDDEN))
    assert check.structure == "dense"
    backends = ["torch", "c"] if find_compiler() else ["torch"]
    assert set(check.errors) == {f"{b}, chunk={c}" for b in backends for c in (1, 7, 37)}


def test_inference_mode_and_frozen_weights():
    cell = make("gru")
    rnn = RNN(cell, solver=Newton(chunk=8))
    x, state = data(rnn)
    with torch.inference_mode():
        y, _ = rnn(x, state)
    assert_close("y", y, loop(cell, x, state)[0], rtol=1e-12)
    cell.requires_grad_(False)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-12)


@pytest.mark.parametrize(
    ("claim", "name", "words"),
    [
        ("elementwise", "gru", "is claimed but GRUCell is dense: .*addmm"),
        ("heads", "gru", "is claimed but GRUCell is dense"),
        ("elementwise", "heads", r"is claimed but Heads is heads \(size 2\)"),
    ],
)
def test_false_claims_are_refused(claim, name, words):
    with pytest.raises(ValueError, match=f"structure='{claim}' {words}"):
        RNN(make(name), structure=claim)


def test_true_and_cautious_claims_are_fine():
    RNN(make("gru"), structure="dense")
    RNN(make("heads"), structure="heads")
    RNN(make("heads"), structure="dense")
    RNN(make_cell("paragru"), structure="elementwise")
    RNN(make_cell("paragru"), structure="dense")
    with pytest.raises(ValueError, match="structure must be one of 'elementwise', 'heads', 'dense"):
        RNN(make("gru"), structure="banded")


@pytest.mark.parametrize("method", [*COUPLINGS, Sequential])
def test_settings_are_checked(method):
    if method is Sequential:
        with pytest.raises(TypeError, match="unexpected keyword"):
            method(chunk=3)
        return
    mistakes = {
        "tolerance must be positive, got 0.0": {"tolerance": 0.0},
        "max_iterations must be at least 1, got 0": {"max_iterations": 0},
        "chunk must be 'auto' or at least 1 step, got 0": {"chunk": 0},
        "on_failure must be one of 'sequential', 'warn', 'raise', got 'ignore'": {
            "on_failure": "ignore"
        },
    }
    if method is not Jacobi:
        mistakes["damping must be in [0, 1), got 1.0"] = {"damping": 1.0}
    for message, settings in mistakes.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            method(**settings)


@pytest.mark.parametrize("method", [Newton, QuasiNewton, Picard])
def test_damping_leaves_the_solution(method):
    cell = make("gru")
    rnn = RNN(cell, solver=method(chunk=4, damping=0.3))
    x, state = data(rnn)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, RTOL[torch.float64])


def test_triton_solves_by_newton_only():
    with pytest.raises(ValueError, match=r"Newton's method, not by Picard\. Use backend='torch'"):
        RNN(make_cell("paragru", torch.float32), backend="triton", solver=Picard())


def test_state_of_another_type_than_the_cell():
    """As with elementwise cells: the more exact type computes, that of x comes out."""
    rnn = RNN(nn.GRUCell(INPUT, HIDDEN), solver=Newton(chunk=4))
    x, state = torch.randn(2, 9, INPUT), torch.randn(2, HIDDEN, dtype=torch.float64)
    y, last = rnn(x, state)
    assert y.dtype is last.dtype is torch.float32
    assert_close("y", y, loop(rnn.cell, x, state.float())[0], rtol=1e-5)
