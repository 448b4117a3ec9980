"""`RNN.plan` says what a call does, whatever has happened to the layer since the last one."""

import copy
import re

import pytest
import torch
from torch import nn

import pararnn
from pararnn import RNN, Newton, Sequential
from pararnn.kernels.c import backend as c_backend
from pararnn.kernels.facts import Planner
from pararnn.layers import pytorch_kernels, runner
from pararnn.planning.costs import COSTS
from pararnn.solvers import systems


class Own(nn.GRUCell):
    """A cell that PyTorch has no kernel for."""


class Tokens(nn.Module):
    """An elementwise cell of token numbers, which does not say the size of its input."""

    hidden_size, num_components = 6, 1

    def __init__(self):
        super().__init__()
        self.table, self.decay = nn.Embedding(5, 6), nn.Parameter(torch.rand(6))

    def forward(self, x, h):
        return torch.tanh(self.decay * h + self.table(x))


def tokens(**options):
    rnn = RNN(Tokens(), **options)
    rnn(torch.zeros(1, 2, dtype=torch.long))
    return rnn


def input_of(rnn, batch, time):
    """Random inputs, laid out as the layer takes them."""
    lead = (batch, time) if rnn.batch_first else (time, batch)
    features = rnn.runner().features
    return torch.randn(*lead, *features) if features else torch.randint(5, lead)


@pytest.fixture
def assert_kept(monkeypatch):
    """A function that returns the plan for x, and asserts that a call keeps to it."""
    ran, run, theirs = [], RNN._run_cell, pytorch_kernels.run
    monkeypatch.setattr(RNN, "_run_cell", lambda *given: ran.append("loop") or run(*given))
    called = lambda *given: ran.append("pytorch") or theirs(*given)  # noqa: E731
    monkeypatch.setattr(pytorch_kernels, "run", called)

    def kept(rnn, x):
        plan = rnn.plan(x.shape)
        ran.clear()
        rnn(x)
        chunks = {c.what: c.value for c in plan.choices}.get("chunks", 1)
        around = [plan.path] if plan.path in ("loop", "pytorch") else []
        assert (rnn.report.chunks, ran) == (chunks, around), plan
        return plan

    return kept


LAYERS = {
    "kernel": lambda: RNN(pararnn.cells.ParaGRUCell(3, 6), solver=Newton(chunk=16)),
    "elementwise rows": lambda: RNN(pararnn.cells.ParaLSTMCell(3, 6), backend="torch"),
    "mixing": lambda: RNN(nn.GRUCell(3, 6)),
    "mixing, own": lambda: RNN(Own(3, 6)),
    "time first": lambda: RNN(nn.GRUCell(3, 6), batch_first=False),
    "one chunk": lambda: RNN(nn.RNNCell(3, 6), solver=Sequential()),
    "tokens": tokens,
}


@pytest.mark.parametrize("grad", [True, False], ids="grad={}".format)
@pytest.mark.parametrize("sizes", [(2, 5), (1, 300), (40, 20), (3, 700)])
@pytest.mark.parametrize("name", LAYERS)
def test_a_call_keeps_to_its_plan(name, sizes, grad, assert_kept):
    rnn = LAYERS[name]()
    with torch.set_grad_enabled(grad):
        assert_kept(rnn, input_of(rnn, *sizes))
        if not rnn.runner().features:
            return
        assert_kept(rnn, torch.randn(sizes[1], 3))


@pytest.mark.parametrize("autocast", [False, True], ids="autocast={}".format)
@pytest.mark.parametrize("grad", [True, False], ids="grad={}".format)
@pytest.mark.parametrize("sizes", [(2, 5), (1, 300), (40, 20)])
@pytest.mark.parametrize("name", LAYERS)
def test_all_who_ask_have_the_plan_that_is_shown(name, sizes, grad, autocast, monkeypatch):
    """The layer, and the operators forwards and backwards."""
    found, ask = [], Planner.plan
    keep = lambda *given, **more: found.append(ask(*given, **more)) or found[-1]  # noqa: E731
    rnn = LAYERS[name]()
    x = input_of(rnn, *sizes)
    enabled = torch.autocast("cpu", torch.bfloat16, autocast)
    with torch.set_grad_enabled(grad), enabled:
        shown = rnn.plan(x.shape)
        monkeypatch.setattr(Planner, "plan", keep)
        y, _ = rnn(x)
    if grad:
        y.sum().backward()
    assert len(found) >= 1 + grad or shown.path in ("loop", "pytorch")
    assert all((p.forward, p.adjoint) == (shown.forward, shown.adjoint) for p in found)
    decided = {id(p) for p in found}
    assert len(decided) == 1 or (rnn.runner().by_channels, len(decided)) == (False, 2)


@pytest.mark.parametrize("chunk", [10, 100])
@pytest.mark.parametrize("backend", ["c", "torch"])
def test_the_warm_up_is_that_of_the_plan(backend, chunk, monkeypatch):
    """In both directions, and shown."""
    looked, states = [], systems._InRows if backend == "torch" else c_backend._InC
    run = states.run
    monkeypatch.setattr(
        states, "run", lambda s, first, last=None: looked.append(last) or run(s, first, last)
    )
    rnn = RNN(pararnn.cells.ParaGRUCell(3, 6), backend=backend, solver=Newton(chunk=chunk))
    plan = rnn.plan((2, 300, 3))
    rnn(torch.randn(2, 300, 3))[0].sum().backward()
    shown = {c.what: c.value for c in plan.choices}["warm-up"]
    assert shown == plan.forward.warm_up == plan.adjoint.warm_up == min(COSTS.warm_up, chunk)
    assert [n for n in looked if n is not None] == [shown] * 2


def test_a_backward_pass_in_one_chunk_keeps_the_gates_of_a_piece():
    rnn = RNN(nn.GRUCell(3, 64), solver=Sequential())
    shown = {c.what: c.value for c in rnn.plan((64, 300, 3)).choices}
    assert shown["piece backward"] == rnn.plan((64, 300, 3)).adjoint.piece == COSTS.piece // 64**2
    assert "piece backward" not in str(rnn.plan((64, 30, 3)))


def test_a_loop_over_the_cell_is_planned_only_where_it_is_taken(assert_kept):
    x = torch.randn(1, 20, 3)
    rnn = RNN(Own(3, 6))
    assert assert_kept(rnn, x).path == "loop"
    with torch.autocast("cpu", torch.bfloat16):
        assert assert_kept(rnn, x).path == "rows"
    assert assert_kept(rnn.bfloat16(), x.bfloat16()).path == "rows"


CHANGES = {
    "a backend": lambda rnn: setattr(rnn, "backend", "torch"),
    "a solver": lambda rnn: setattr(rnn, "solver", Newton(chunk=7)),
    "a step that mixes": lambda rnn: setattr(rnn, "cell", nn.GRUCell(3, 6)),
    "a type": lambda rnn: rnn.double(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_since_the_last_call_is_seen(what, assert_kept):
    rnn = RNN(pararnn.cells.ParaGRUCell(3, 6), backend="auto")
    rnn(torch.randn(2, 50, 3))
    CHANGES[what](rnn)
    plan = assert_kept(rnn, torch.randn(2, 50, 3, dtype=next(rnn.parameters()).dtype))
    fresh = RNN(copy.deepcopy(rnn.cell), backend=rnn.backend, solver=rnn.solver)
    assert str(plan) == str(fresh.plan((2, 50, 3)))


def test_a_copy_has_a_plan():
    rnn = RNN(nn.GRUCell(3, 6))
    assert str(copy.deepcopy(rnn).plan((2, 50, 3))) == str(rnn.plan((2, 50, 3)))


REFUSED = {
    "features": ((4, 9, 4), ValueError, "shape is (4, 9, 4); pass that of x: (time, batch, 3)"),
    "no features": ((4, 9), ValueError, "(time, batch, 3), or (time, 3) for a single sequence."),
    "nothing": ((), ValueError, "shape is (); pass that of x"),
    "no steps": ((0, 4, 3), ValueError, "at least one sequence and one step"),
    "a fraction": ((4.0, 9, 3), TypeError, "shape must be sizes, such as x.shape, got (4.0, 9, 3)"),
    "a tensor": (torch.zeros(4, 9, 3), TypeError, "got a tensor of shape (4, 9, 3)"),
    "a number": (5, TypeError, "got 5."),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("ask", [RNN.plan, pararnn.explain])
def test_shapes_that_are_refused(ask, what):
    shape, error, message = REFUSED[what]
    with pytest.raises(error, match=re.escape(message)):
        ask(RNN(nn.GRUCell(3, 6), batch_first=False), shape)


def test_inputs_without_features_are_shown_so():
    message = "pass that of x: (batch, time), or (time) for a single sequence."
    with pytest.raises(ValueError, match=re.escape(message)):
        tokens().plan((4, 9, 1))


def test_a_cell_without_values_has_no_plan():
    rnn = RNN(nn.GRUCell(3, 6))
    for layer in (rnn.to("meta"), RNN(nn.GRUCell(3, 6, device="meta"))):
        with pytest.raises(TypeError, match="no values"):
            layer.plan((2, 50, 3))


@pytest.mark.parametrize("what", ["elementwise", "heads", "dense"])
def test_facts_say_whether_channels_reach_each_other(what):
    cells = {
        "elementwise": pararnn.cells.ParaGRUCell(3, 6),
        "heads": pararnn.cells.HeadSLSTMCell(4, 6, num_heads=2),
        "dense": nn.GRUCell(3, 6),
    }
    made = RNN(cells[what]).runner()
    facts, step = made.facts, made.traced.step
    assert facts.elementwise is (what == "elementwise")
    assert made.traced.structure.startswith(what)
    if what != "elementwise":
        assert (facts.group, facts.work, facts.launches) == (step.group, step.work, step.launches)


def test_the_backend_of_a_layer_is_chosen_once(monkeypatch):
    names, choose = [], runner.choose_backend
    monkeypatch.setattr(runner, "choose_backend", lambda *a: names.append(a[0]) or choose(*a))
    rnn = RNN(nn.GRUCell(3, 6))
    plans = [rnn.plan((batch, time, 3)) for batch in (1, 30) for time in (5, 900)]
    rnn(torch.randn(2, 50, 3))
    rnn(torch.randn(1, 900, 3))
    assert names == ["auto"]
    assert len({p.path for p in plans}) == 2
    assert {p.backend for p in plans} == {rnn.runner().choice.name}
