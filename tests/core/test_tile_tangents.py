"""Chunks of memories whose entries do not reach each other: tangents say where chunks start."""

import functools

import pytest
import torch

from pararnn import RNN, Sequential, diagnose
from pararnn.kernels.tiled import tiles_of
from pararnn.testing import loop

from .conftest import needs_triton
from .test_tile_chunks import (
    CHUNK,
    Gated,
    GatedWithASum,
    compare,
    cut_time,
    layer,
    short_chunks,
)
from .test_tiles import assert_same, outcome, states
from .tile_cells import TILE_CELLS, Memory, outer

pytestmark = needs_triton
__all__ = ["short_chunks"]  # a fixture


@pytest.fixture(autouse=True)
def empty(monkeypatch):
    """Memory that nothing is written to is not a number."""
    new_empty = torch.Tensor.new_empty

    def filled(self, *sizes, **options):
        new = new_empty(self, *sizes, **options)
        return new.fill_(torch.nan) if new.is_floating_point() else new

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


class Affine(Memory):
    """S' = f S + k v^T, where heads forget at their own rates."""

    def __init__(self, *rates):
        super().__init__(heads=len(rates), keys=5, values=3)
        self.register_buffer("rates", torch.tensor(rates)[:, None, None])

    def keep(self, x):
        gate = 1 + 0.1 * torch.tanh(self.split(x)[-1][..., :1, None])
        return self.rates.to(x.dtype) * torch.where(self.rates == 1, 1, gate)

    def forward(self, x, state):
        return self.keep(x) * state + 0.3 * self.new(x)


class Squashed(Affine):
    """S' = tanh(f S + A k v^T)."""

    weights = "w:hkv"

    def forward(self, x, state):
        return torch.tanh(self.keep(x) * state + self.w * self.new(x))


class WithASum(Affine):
    """And a sum of keys beside the memory, of another shape."""

    num_components = 2

    def __init__(self, *rates):
        super().__init__(*rates)
        self.state_shape = (self.state_shape, (self.heads, self.keys))

    def forward(self, x, state):
        memory, total = state
        keep = self.keep(x)[..., 0].expand_as(total)
        return super().forward(x, memory), keep * torch.sin(total) + 0.3 * self.split(x)[1]

    def readout(self, x, state):
        memory, total = state
        scale = 1 + (self.split(x)[0] * total).sum(-1, keepdim=True).abs()
        return super().readout(x, memory) / scale


class Pair(Affine):
    """Two memories that reach each other, entry by entry."""

    num_components = 2
    weights = "w:hkv"

    def __init__(self, *rates):
        super().__init__(*rates)
        self.state_shape = (self.state_shape, self.state_shape)

    def forward(self, x, state):
        first, second = state
        _, key, _, value, _ = self.split(x)
        turned = 0.8 * first - 0.6 * second, 0.6 * first + 0.8 * second
        keep = self.keep(x)
        return keep * turned[0] + self.w * self.new(x), keep * turned[1] + outer(key, value)

    def readout(self, x, state):
        return super().readout(x, state[0] * torch.sin(state[1]))


KINDS = [Affine, Squashed, WithASum, Pair]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def tangents(cell):
    rnn = layer(cell)
    rnn.plan((1, 4 * CHUNK, cell.input_size), torch.float64)
    found = tiles_of(rnn.runner().traced.step, rnn.runner().traced.readout)
    return len(found.tangents), found.is_affine


def test_which_steps_have_tangents_of_one_number():
    assert [tangents(kind(0.9)) for kind in KINDS] == [(1, True), (1, False), (1, False), (2, True)]
    assert tangents(Gated())[0] == tangents(GatedWithASum((0.1, 0.9)))[0] == 0
    names = "Square Norms SumsAlongKeysAndValues Slots MatrixLSTM"
    assert not any(tangents(TILE_CELLS[name]())[0] for name in names.split())


class SumsAlongKeys(Affine):
    """What an entry becomes depends on the others, although no gradient says so."""

    def forward(self, x, state):
        scale = 1 / (1 + state.square().sum(-2, keepdim=True).detach())
        return self.keep(x) * scale * state + 0.3 * self.new(x)


@each_kind
@pytest.mark.parametrize(
    ("rates", "iterations"),
    [((0.001, 0.001), 1), ((0.001, 0.99), 2), ((1.0, 1.05), 2)],
    ids=["forget", "one remembers", "none forgets"],
)
def test_chunks(kind, rates, iterations):
    """Those that remember are right after one more pass, where the step is affine."""
    exact = tangents(kind(0.9))[1]
    iterations = iterations if exact or iterations == 1 else 3
    compare(kind(*rates), 4 * CHUNK + 3, "converged", iterations, batch=2)


def test_a_sum_that_no_gradient_knows_is_completed_in_order():
    compare(SumsAlongKeys(1.0), 9 * CHUNK, "completed step by step", 3)


def test_chunks_that_tangents_do_not_make_fit_go_step_by_step():
    class Chaotic(Affine):
        def forward(self, x, state):
            return torch.cos(3 * state) + 0.3 * self.new(x)

    torch.manual_seed(0)
    cell = Chaotic(1.0).double()
    rnn, x = layer(cell), torch.randn(1, 9 * CHUNK, cell.input_size, dtype=torch.float64)
    state = states(rnn, 1)
    with torch.no_grad():
        found, expected = rnn(x, state)[0], loop(cell, x, state)[0]
    assert rnn.report.status == "completed step by step"
    torch.testing.assert_close(found[:, : 2 * CHUNK], expected[:, : 2 * CHUNK])


@each_kind
def test_chunks_with_resets(kind):
    torch.manual_seed(0)
    cell, time = kind(1.0, 0.99), 5 * CHUNK
    rnn = layer(cell)
    x = torch.randn(2, time, cell.input_size, dtype=torch.float64)
    resets = torch.rand(2, time) < 0.1
    resets[:, CHUNK], resets[0, 2 * CHUNK - 1], resets[:, 0] = True, True, False
    resets[1, 3 * CHUNK :] = False
    given = states(rnn, 2), states(rnn, 2)

    run = lambda rnn: lambda x, *s: rnn(x, s[0], resets=resets, reset_state=s[1])  # noqa: E731
    plain = RNN(cell, backend="torch", solver=Sequential())
    assert_same(outcome(run(rnn), cell, x, *given), outcome(run(plain), cell, x, *given))
    assert rnn.report.status == "converged"


@each_kind
def test_chunks_of_packed_sequences(kind):
    ends = 0, 18, 30, 31, 40
    torch.manual_seed(0)
    cell = kind(1.0, 0.99)
    rnn, plain = layer(cell), RNN(cell, backend="torch", solver=Sequential())
    offsets = torch.tensor([0, *ends])
    x = torch.randn(1, ends[-1], cell.input_size, dtype=torch.float64)
    run = lambda rnn: lambda x, state: rnn(x, state, cu_seqlens=offsets)  # noqa: E731
    given = x, states(rnn, len(ends))
    assert_same(outcome(run(rnn), cell, *given), outcome(run(plain), cell, *given))
    assert rnn.report.status == "converged"


@pytest.mark.parametrize(("kind", "value"), [(Affine, torch.inf), (Squashed, torch.nan)])
@pytest.mark.parametrize("place", ["state", "x", "cotangent of the last state"])
@pytest.mark.parametrize("chunk", [6, 8])
def test_numbers_that_are_none_stay_where_they_belong(kind, value, place, chunk, monkeypatch):
    """With 6 steps a head that remembers has an infinite adjoint in its backward warm-up."""
    cut_time(monkeypatch, chunk)
    torch.manual_seed(0)
    cell = kind(1.0, 0.9).double()
    rnn, plain = layer(cell), RNN(cell, backend="torch", solver=Sequential())
    x, state = torch.randn(2, 5 * chunk, cell.input_size).double(), states(rnn, 2)
    cotangents = torch.randn(2, 5 * chunk, *rnn.output_shape).double(), torch.randn_like(state)
    if place == "state":
        state[1, 0, 2, 1] = value
    elif place == "x":
        x[1, 3 * chunk + 1, 2] = value
    else:
        cotangents[1][1, 0, 2, 1] = value

    def values(rnn):
        given = [x.detach().requires_grad_(), state.detach().requires_grad_()]
        found = rnn(*given)
        grads = torch.autograd.grad(found, [*given, *cell.parameters()], cotangents)
        return [t.detach() for t in (*found, *grads)]

    for found, expected in zip(values(rnn), values(plain), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_growth_beyond_all_numbers():
    """Tangents overflow, and states that are zero stay right."""
    cell = Affine(1e30, 1.0)
    rnn, plain = layer(cell), RNN(cell, backend="torch", solver=Sequential())
    x = torch.zeros(1, 5 * CHUNK, cell.input_size, dtype=torch.float64)
    x[:, 3 * CHUNK + 2 :] = 0.1
    state = torch.zeros(1, *cell.state_shape, dtype=torch.float64)
    for found, expected in zip(rnn(x, state), plain(x, state), strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_gradients_of_the_last_output_or_of_the_last_state_alone():
    torch.manual_seed(0)
    cell = Squashed(1.0, 0.99).double()
    rnn, x = layer(cell), torch.randn(2, 5 * CHUNK - 1, cell.input_size, dtype=torch.float64)
    state, reference = states(rnn, 2), functools.partial(loop, cell)
    for pick in (
        lambda y, s: (y[:, -1], torch.zeros(())),
        lambda y, s: (s, torch.zeros(())),
    ):
        alone = lambda run, pick=pick: lambda *given: pick(*run(*given))  # noqa: E731
        expected = outcome(alone(reference), cell, x, state)
        assert_same(outcome(alone(rnn), cell, x, state), expected)


@pytest.mark.parametrize(
    ("kind", "status"), [(Affine, "converged"), (Squashed, "completed step by step")]
)
def test_single_precision(kind, status):
    torch.manual_seed(0)
    cell = kind(1.0, 0.99)
    exact = kind(1.0, 0.99).double()
    exact.load_state_dict(cell.state_dict())
    rnn = RNN(cell, backend="triton")
    x, state = torch.randn(2, 6 * CHUNK, cell.input_size), states(layer(exact), 2)
    found = outcome(rnn, cell, x, state.float())
    expected = outcome(functools.partial(loop, exact), exact, x.double(), state.float().double())
    assert rnn.report.status == status
    assert_same(found, expected, 2e-5)


def test_the_plan_says_how_chunks_are_coupled():
    for kind, method, words in (
        (Affine((0.9)), "Newton", "each entry of the state depends on itself alone"),
        (Gated(), "Jacobi", "entries of the state reach each other"),
    ):
        plan = str(layer(kind).plan((1, 4 * CHUNK, kind.input_size), torch.float64))
        (line,) = (line for line in plan.splitlines() if line.startswith("method"))
        assert method in line
        assert words in line
        short = str(layer(kind).plan((1, CHUNK, kind.input_size), torch.float64))
        assert "method" not in short


def test_diagnose_says_that_chunks_pay():
    torch.manual_seed(0)
    rnn = layer(Affine(1.0, 0.99))
    x = torch.randn(1, 6 * CHUNK, rnn.cell.input_size, dtype=torch.float64)
    found = diagnose(rnn, x)
    assert found.chunks_pay, found
    assert f"the plan's 6 chunks of {CHUNK} take 2 iterations" in found.chunks_reason
