"""More chunks than `refine` runs side by side: all are corrected at once, for every cell."""

import functools

import pytest
import torch

from pararnn import RNN, Newton
from pararnn.testing import loop

from .cells import INPUT, Cell, Chaotic, make_cell
from .compare import as_tuple, assert_same, one_by_one, outcome, random_state, with_resets
from .conftest import needs_triton

pytestmark = needs_triton

TIME = 33  # 17 chunks of 2, the last of one step: one more than run side by side


class Remembering(Cell):
    """Adds up what it sees, forever, in one of two components; the other looks at it."""

    num_components = 2

    def __init__(self):
        super().__init__(2)

    def forward(self, x, state):
        total, h = state
        u, v = self.input(x).chunk(2, -1)
        h = torch.tanh(v + self.diagonal[0] * h + 0.1 * total)
        return total + 0.1 * torch.tanh(u) + 0.01 * h, h


MADE = {"remembering": Remembering, "chaotic": Chaotic}


def layer(name, chunk=2, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    cell = MADE[name]().to(dtype) if name in MADE else make_cell(name, dtype)
    return RNN(cell, backend="triton", solver=Newton(chunk=chunk, **settings))


def data(rnn, batch=1, time=TIME):
    return torch.randn(batch, time, INPUT, dtype=torch.float64), state_of(rnn, batch)


def state_of(rnn, rows):
    return random_state(rnn.num_components, rows, rnn.hidden_size)


@pytest.mark.parametrize("name", ["slow_gates", "paralstm", "remembering", "unusual"])
def test_equals_loop(name):
    rnn = layer(name)
    x, state = data(rnn)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    assert_same(outcome(rnn, rnn.cell, x, state), expected, 1e-12)


def test_chaotic_cell_equals_loop():
    rnn = layer("chaotic")
    x, state = data(rnn)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    assert_same(outcome(rnn, rnn.cell, x, state), expected, 1e-9)


@pytest.mark.parametrize("name", ["slow_gates", "remembering"])
def test_resets_equal_loop(name):
    rnn = layer(name)
    x, state = data(rnn)
    resets = torch.rand(x.shape[:2]) < 0.04
    resets[0, -1] = resets[0, 20:23] = True
    both = (*as_tuple(state), *as_tuple(data(rnn)[1]))
    expected = outcome(with_resets(functools.partial(loop, rnn.cell), resets), rnn.cell, x, both)
    assert_same(outcome(with_resets(rnn, resets), rnn.cell, x, both), expected, 1e-12)


@pytest.mark.parametrize("name", ["slow_gates", "remembering"])
def test_packed_equals_one_by_one(name):
    rnn = layer(name)
    lengths = [0, 1, 11, 0, 2, 18, 1]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x, state = data(rnn, 1)[0], state_of(rnn, len(lengths))
    expected = outcome(one_by_one(rnn.cell, lengths), rnn.cell, x, state)
    actual = outcome(lambda x, s: rnn(x, s, cu_seqlens=bounds), rnn.cell, x, state)
    assert_same(actual, expected, 1e-12)


@pytest.mark.parametrize("at", [0, 17, TIME - 1])
def test_nan_reaches_what_the_loop_reaches(at):
    rnn = layer("slow_gates")
    x, state = data(rnn)
    x[0, at, 2] = torch.nan
    y, last = rnn(x, state)
    expected, expected_last = loop(rnn.cell, x, state)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=0, equal_nan=True)
    torch.testing.assert_close(last, expected_last, rtol=1e-11, atol=0, equal_nan=True)


@pytest.mark.parametrize("most", [1, 2, 3, 17])
def test_iterations_that_count(most):
    """Few are completed step by step, and the report says how far off they were."""
    rnn = layer("slow_gates", max_iterations=most, tolerance=1e-13)
    x, state = data(rnn)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    assert_same(outcome(rnn, rnn.cell, x, state), expected, 1e-12)
    if most == 17:
        assert rnn.report.status == "converged"
        assert rnn.report.residual <= 1e-13
        assert rnn.report.iterations < most
    else:
        assert rnn.report.status == "completed step by step"
        assert rnn.report.residual > 1e-13
        assert rnn.report.iterations == most


def test_same_bits():
    rnn = layer("slow_gates")
    x, state = data(rnn)
    first, again = (outcome(rnn, rnn.cell, x, state) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
