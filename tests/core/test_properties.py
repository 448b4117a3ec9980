"""Random cells, sizes, resets, splits and chunks, found by hypothesis: all equal the loop."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pararnn import RNN, Newton
from pararnn.testing import loop

from .compare import assert_same, outcome, random_state

UNARY = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "neg": torch.neg,
    "softplus": nn.functional.softplus,
    "gelu": nn.functional.gelu,
    "atan": torch.atan,
    "square": lambda a: torch.tanh(a).square(),
    "sqrt": lambda a: torch.sqrt(a * a + 0.5),
    "exp": lambda a: torch.exp(-a * a),
}
BINARY = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": lambda a, b: torch.tanh(a) * b,
    "div": lambda a, b: a / (1 + b * b),
    "lerp": lambda a, b: torch.lerp(a, b, torch.sigmoid(a)),
    "maximum": torch.maximum,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "hypot": lambda a, b: torch.sqrt(a * a + b * b + 0.1),
}


def trees(leaves, unary=UNARY, binary=BINARY):
    """Expressions as nested tuples: ("state", 0), ("tanh", tree), ("add", tree, tree)."""
    grow = lambda child: st.one_of(  # noqa: E731
        st.tuples(st.sampled_from(sorted(unary)), child),
        st.tuples(st.sampled_from(sorted(binary)), child, child),
    )
    return st.recursive(st.sampled_from(leaves), grow, max_leaves=6)


class Random(nn.Module):
    """One tree per component, bounded by tanh, plus something of every input."""

    num_drives = 2

    def __init__(self, trees, hidden_size):
        super().__init__()
        self.trees, self.hidden_size = trees, hidden_size
        self.num_components = len(trees)
        self.input_size = self.num_drives * hidden_size
        self.a = nn.Parameter(torch.rand(self.num_components, hidden_size) - 0.5)

    def operation(self, name, *operands):
        return (UNARY | BINARY)[name](*operands)

    def evaluate(self, tree, values):
        if tree in values:
            return values[tree]
        name, *children = tree
        return self.operation(name, *(self.evaluate(c, values) for c in children))

    def forward(self, x, state):
        state = state if isinstance(state, tuple) else (state,)
        values = {("drive", i): d for i, d in enumerate(x.chunk(self.num_drives, -1))}
        values |= {("state", i): h for i, h in enumerate(state)}
        values |= {("coefficient", 0): self.a[0].expand_as(state[0])}
        rest = 0.1 * sum(values.values())
        new = tuple(
            torch.tanh(self.evaluate(tree, values)) + a * h + rest
            for tree, a, h in zip(self.trees, self.a, state, strict=True)
        )
        return new if len(new) > 1 else new[0]


@st.composite
def cells(draw):
    components = draw(st.integers(1, 3))
    leaves = [("state", i) for i in range(components)]
    leaves += [("drive", 0), ("drive", 1), ("coefficient", 0)]
    return Random(
        [draw(trees(leaves)) for _ in range(components)], draw(st.integers(1, 9))
    ).double()


def check(cell, backend, batch, time, chunk, data):
    rnn = RNN(cell, backend=backend, solver=Newton(chunk=chunk))
    x = torch.randn(batch, time, cell.input_size, dtype=torch.float64)
    state = random_state(cell.num_components, batch, cell.hidden_size)
    resets = torch.rand(batch, time) < data.draw(st.sampled_from([0.0, 0.1, 0.5]), "resets")
    resets[0, 0] = False  # else the state may have no influence
    cut = data.draw(st.integers(0, time - 1), "cut")

    def in_two(x, state):
        if cut == 0:
            return rnn(x, state)
        first, middle = rnn(x[:, :cut], state)
        second, last = rnn(x[:, cut:], middle)
        return torch.cat([first, second], 1), last

    expected = outcome(lambda x, s: loop(cell, x, s, resets), cell, x, state)
    assert_same(outcome(lambda x, s: rnn(x, s, resets), cell, x, state), expected, 1e-11)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(in_two, cell, x, state), expected, 1e-11)


@pytest.mark.parametrize(("backend", "examples"), [("torch", 30), ("c", 15)])
def test_random_cells_equal_the_loop(backend, examples):
    @settings(max_examples=examples)
    @given(
        cell=cells(),
        batch=st.integers(1, 4),
        time=st.integers(1, 40),
        chunk=st.one_of(st.integers(1, 45), st.just("auto")),
        data=st.data(),
    )
    def run(cell, batch, time, chunk, data):
        check(cell, backend, batch, time, chunk, data)

    run()
