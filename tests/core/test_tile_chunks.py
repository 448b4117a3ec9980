"""Kernels of tiles with time cut into chunks, in Triton's interpreter, against the loop."""

import dataclasses
import functools

import pytest
import torch

from pararnn import RNN, Sequential, diagnose
from pararnn.kernels import facts, tiled
from pararnn.planning.costs import COSTS
from pararnn.planning.plan import decide
from pararnn.testing import loop

from .conftest import needs_triton
from .test_tiles import assert_same, outcome, states
from .tile_cells import Memory

pytestmark = needs_triton
SEGMENT, CHUNK = 2, 8


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    cut_time(monkeypatch, CHUNK)


def cut_time(monkeypatch, chunk):
    """Time is cut as soon as there are two chunks; the warm-up is as long as one."""
    warm = {"tile_warm_up": (chunk, chunk, chunk), "tile_chunk": 1, "tile_least_chunks": 2}
    costs = dataclasses.replace(COSTS, **warm, tile_full=(1000, 1000), tile_segment=SEGMENT)
    monkeypatch.setattr(facts, "decide", functools.partial(decide, costs=costs))
    monkeypatch.setattr(tiled, "segment_of_tiles", lambda: SEGMENT)


class Gated(Memory):
    """Heads that forget at their own rates, through products with a weight."""

    weights = "w:vv b:h1v"

    def __init__(self, rates=(0.001, 0.001)):
        super().__init__(heads=len(rates), keys=4, values=3)
        self.register_buffer("rates", torch.tensor(rates)[:, None, None])

    def forward(self, x, state):
        rates = self.rates.to(x.dtype)
        new = torch.tanh(state @ self.w + self.b + self.new(x))
        return rates * (torch.sin(state) + 0.3 * new) + 0.3 * self.new(x)


def layer(cell, **options):
    return RNN(cell.double(), backend="triton", **options)


def compare(cell, time, status, iterations, batch=1, change=None):
    torch.manual_seed(0)
    rnn = layer(cell)
    x = torch.randn(batch, time, cell.input_size, dtype=torch.float64)
    if change is not None:
        change(x)
    plan = rnn.plan(x.shape, torch.float64)
    assert plan.path == "tiles"
    chunks = -(-time // plan.forward.solver.chunk)
    assert chunks > 1
    state = states(rnn, batch)
    found = outcome(rnn, cell, x, state)
    report = rnn.report
    assert (report.status, report.iterations, report.chunks) == (status, iterations, chunks)
    assert_same(found, outcome(functools.partial(loop, cell), cell, x, state))


@pytest.mark.parametrize("time", [2 * CHUNK, 5 * CHUNK - 3])
def test_chunks_of_a_cell_that_forgets(time):
    compare(Gated(), time, "converged", 1, batch=2)


def test_a_length_has_chunks_of_its_own():
    """Not those of the first call, although it is the same kernel."""
    torch.manual_seed(0)
    cell = Gated()
    rnn = layer(cell)
    for time, chunk in ((2 * CHUNK, CHUNK), (2 * CHUNK + 4, CHUNK + 2), (2 * CHUNK, CHUNK)):
        x = torch.randn(1, time, cell.input_size, dtype=torch.float64)
        assert rnn.plan(x.shape, torch.float64).forward.solver.chunk == chunk
        state = states(rnn, 1)
        found = outcome(rnn, cell, x, state)
        assert rnn.report.chunks == 2
        assert_same(found, outcome(functools.partial(loop, cell), cell, x, state))


def test_a_cell_that_forgets_within_a_warm_up_and_a_chunk_takes_a_second_pass():
    compare(Gated((0.05, 0.001)), 4 * CHUNK, "converged", 2)


@pytest.mark.parametrize("rates", [(0.001, 0.999), (0.999, 0.999)], ids=["one head", "no head"])
def test_chunks_of_heads_that_do_not_forget(rates):
    """They are run again, one after another."""
    compare(Gated(rates), 4 * CHUNK + 3, "completed step by step", 2)


class GatedWithASum(Gated):
    """And the sum of its keys, which lies beside the memory."""

    num_components = 2

    def __init__(self, rates):
        super().__init__(rates)
        self.state_shape = (self.state_shape, (self.heads, self.keys))

    def forward(self, x, state):
        memory, total = state
        rates, key = self.rates[..., 0].to(x.dtype), self.split(x)[1]
        return super().forward(x, memory), rates * total + 0.3 * key

    def readout(self, x, state):
        memory, total = state
        scale = 1 + (self.split(x)[0] * total).sum(-1, keepdim=True).abs()
        return super().readout(x, memory) / scale


@pytest.mark.parametrize(
    ("rates", "status", "iterations"),
    [((0.001, 0.001), "converged", 1), ((0.001, 0.999), "completed step by step", 2)],
    ids=["forgets", "does not"],
)
def test_chunks_of_a_state_of_two_tensors(rates, status, iterations):
    compare(GatedWithASum(rates), 4 * CHUNK + 3, status, iterations, batch=2)


class ForgetsForAWhile(Gated):
    """A cell that forgets, but for a stretch of time."""

    def forward(self, x, state):
        stays = (x[:, :1, None, None] > 100).to(x.dtype)
        return stays * state + (1 - stays) * super().forward(x.clamp(-3, 3), state)


def test_chunks_are_run_again_between_others_that_fit():
    def change(x):
        x[:, 4 * CHUNK + 2 : 7 * CHUNK - 3, 0] = 1000.0

    compare(ForgetsForAWhile(), 8 * CHUNK, "completed step by step", 2, change=change)


def test_chunks_with_resets():
    torch.manual_seed(0)
    cell, time = Gated((0.001, 0.999)), 5 * CHUNK
    rnn = layer(cell)
    x = torch.randn(2, time, cell.input_size, dtype=torch.float64)
    resets = torch.rand(2, time) < 0.1
    resets[:, CHUNK], resets[0, 2 * CHUNK - 1], resets[:, 0] = True, True, False
    given = states(rnn, 2), states(rnn, 2)
    run = lambda rnn: lambda x, *s: rnn(x, s[0], resets=resets, reset_state=s[1])  # noqa: E731
    plain = RNN(cell, backend="torch", solver=Sequential())
    assert_same(outcome(run(rnn), cell, x, *given), outcome(run(plain), cell, x, *given))


@pytest.mark.parametrize("ends", [[18, 40], [8, 16, 40], [0, 30, 31, 40]], ids=str)
def test_chunks_of_packed_sequences(ends):
    torch.manual_seed(0)
    cell = Gated((0.001, 0.999))
    rnn, plain = layer(cell), RNN(cell, backend="torch", solver=Sequential())
    offsets = torch.tensor([0, *ends])
    x = torch.randn(1, ends[-1], cell.input_size, dtype=torch.float64)
    run = lambda rnn: lambda x, state: rnn(x, state, cu_seqlens=offsets)  # noqa: E731
    given = x, states(rnn, len(ends))
    assert_same(outcome(run(rnn), cell, *given), outcome(run(plain), cell, *given))


def test_inputs_that_are_not_numbers_stay_so():
    torch.manual_seed(0)
    cell = Gated().double()
    rnn = layer(cell)
    x = torch.randn(2, 4 * CHUNK, cell.input_size, dtype=torch.float64)
    x[1, CHUNK + 3] = torch.nan
    state = states(rnn, 2)
    found, expected = rnn(x, state)[0], loop(cell, x, state)[0]
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.fixture
def loud(monkeypatch):
    """Memory that nothing is written to is full of a number."""
    new_empty = torch.Tensor.new_empty

    def filled(self, *sizes, **options):
        new = new_empty(self, *sizes, **options)
        return new.fill_(1234.5) if new.is_floating_point() else new

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["state", "cotangent of the last state"])
def test_what_chunks_begin_with_may_be_no_number(place, value, loud):
    """Of one head of one of the sequences that share the first and the last chunk."""
    torch.manual_seed(0)
    cell, ends = Gated().double(), [3, 10, 18, 22, 24]
    x = torch.randn(1, ends[-1], cell.input_size, dtype=torch.float64)
    rnn, plain = layer(cell), RNN(cell, backend="torch", solver=Sequential())
    state = states(rnn, len(ends))
    cotangents = torch.randn(1, ends[-1], *rnn.output_shape).double(), torch.randn_like(state)
    if place == "state":
        state[0, 0, 1, 1] = value
    else:
        cotangents[1][-1, 0, 1, 1] = value

    def values(rnn):
        given = [x.detach().requires_grad_(), state.detach().requires_grad_()]
        found = rnn(*given, cu_seqlens=torch.tensor([0, *ends]))
        grads = torch.autograd.grad(found, [*given, *cell.parameters()], cotangents)
        return [t.detach() for t in (*found, *grads)]

    for found, expected in zip(values(rnn), values(plain), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_gradients_of_the_last_output_alone():
    torch.manual_seed(0)
    cell = Gated((0.05, 0.999)).double()
    rnn, x = layer(cell), torch.randn(1, 4 * CHUNK, 32, dtype=torch.float64)
    x, state = x[..., : cell.input_size], states(rnn, 1)
    last = lambda run: lambda *given: (run(*given)[0][:, -1], torch.zeros(()))  # noqa: E731
    reference = functools.partial(loop, cell)
    assert_same(outcome(last(rnn), cell, x, state), outcome(last(reference), cell, x, state))


@pytest.mark.parametrize("rates", [(0.05, 0.001), (0.001, 0.999)], ids=["forgets", "does not"])
def test_diagnose_says_whether_chunks_pay(rates):
    torch.manual_seed(0)
    rnn = layer(Gated(rates))
    x = torch.randn(1, 6 * CHUNK, rnn.cell.input_size, dtype=torch.float64)
    found = diagnose(rnn, x)
    assert found.chunks_pay == (rates[1] < 0.5)
    assert f"the plan's 6 chunks of {CHUNK}" in found.chunks_reason


def test_no_chunks_where_they_are_not_wanted():
    rnn = layer(Gated(), solver=Sequential())
    plan = rnn.plan((1, 3 * CHUNK, rnn.cell.input_size), torch.float64)
    assert "chunks forward 1 asked for" in " ".join(str(plan).split())
