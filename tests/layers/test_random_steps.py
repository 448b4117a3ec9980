"""Random steps with states of any shape equal the loop: pieces, resets, packed sequences."""

import functools

import pytest
import torch
from core.compare import as_tuple, assert_same, joined, one_by_one, outcome, with_resets
from core.random_steps import write
from hypothesis import given, settings
from hypothesis import strategies as st

from pararnn import RNN, Newton
from pararnn.testing import loop

NOISE = 1e-13  # of what is 0 but for rounding, in float64


@st.composite
def steps(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    return write(lambda options: draw(st.sampled_from(options))).double()


def compare(run, expected, cell, x, state):
    expected, actual = (outcome(f, cell, x, state) for f in (expected, run))
    for name in [n for n, v in expected.items() if v.abs().max() < NOISE]:
        assert actual.pop(name).abs().max() < NOISE, name
        del expected[name]
    assert_same(actual, expected, 1e-9)


def check(cell, rnn, batch, time, cut, share):
    """All ways of a call, with random cotangents.

    Args:
        cell: The cell.
        rnn: Its layer.
        batch: Sequences.
        time: Steps of each.
        cut: Steps of the first piece, and of the first of two packed sequences.
        share: Of the steps that are resets.
    """

    def states():
        drawn = tuple(torch.randn(batch, *s, dtype=x.dtype) for s in rnn.state_shapes)
        return joined(drawn)

    def in_two(x, state):
        first, middle = rnn(x[:, :cut], state)
        second, last = rnn(x[:, cut:], middle)
        return torch.cat([first, second], 1), last

    x = torch.randn(batch, time, cell.input_size, dtype=torch.float64)
    state, resets = states(), torch.rand(batch, time) < share
    compare(in_two if cut else rnn, functools.partial(loop, cell), cell, x, state)
    both = (*as_tuple(state), *as_tuple(states()))
    runs = (with_resets(run, resets) for run in (rnn, functools.partial(loop, cell)))
    compare(*runs, cell, x, both)
    if batch == 2:
        packed = functools.partial(rnn, cu_seqlens=torch.tensor([0, cut, time]))
        compare(packed, one_by_one(cell, [cut, time - cut]), cell, x[:1], state)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("backend", "examples"), [("torch", 120), ("auto", 40)])
def test_random_steps_equal_the_loop(backend, examples):
    @settings(max_examples=examples, derandomize=True, deadline=None)
    @given(cell=steps(), data=st.data())
    def run(cell, data):
        batch, time = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
        chunk = data.draw(st.sampled_from(["auto", 1, 4]))
        rnn = RNN(cell, backend=backend, solver=Newton(chunk=chunk))
        cut, share = data.draw(st.integers(0, time - 1)), data.draw(st.sampled_from([0.0, 0.3]))
        check(cell, rnn, batch, time, cut, share)

    run()
