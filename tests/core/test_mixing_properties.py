"""Random cells whose channels mix: they equal the loop, and are seen to mix."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pararnn import RNN
from pararnn.testing import loop

from .compare import as_tuple, assert_same, outcome, random_state
from .test_properties import BINARY, UNARY, Random, trees


def in_heads(cell, a):
    return a.unflatten(-1, cell.blocks.shape[:2])


def half(a):
    return a.shape[-1] // 2


MIXING = {
    "linear": lambda cell, a: F.linear(a, cell.full, cell.scale),
    "matmul": lambda cell, a: a @ cell.full * cell.scale,
    "einsum": lambda cell, a: torch.einsum("nhi,hij->nhj", in_heads(cell, a), cell.blocks).flatten(
        1
    ),
    "bmm": lambda cell, a: (
        torch.bmm(in_heads(cell, a).transpose(0, 1), cell.blocks).transpose(0, 1).flatten(1)
    ),
    "convolution": lambda cell, a: F.conv1d(a[:, None], cell.kernel, padding=1)[:, 0],
    "layer_norm": lambda cell, a: F.layer_norm(a, a.shape[-1:], cell.scale, eps=0.1),
    "head_norm": lambda cell, a: (
        F.layer_norm(in_heads(cell, a), cell.blocks.shape[1:2], eps=0.1).flatten(1) * cell.scale
    ),
    "unit_norm": lambda cell, a: a / (0.1 + a.norm(dim=-1, keepdim=True)),
    "softmax": lambda cell, a: torch.softmax(a, -1) * cell.scale,
    "mean": lambda cell, a: a * (a * cell.scale).mean(-1, keepdim=True),
    "gate_of_head": lambda cell, a: (
        in_heads(cell, a) * torch.sigmoid(in_heads(cell, a).sum(-1, keepdim=True))
    ).flatten(1),
    "cumsum": lambda cell, a: torch.cumsum(a, -1) / a.shape[-1],
    "roll": lambda cell, a: torch.roll(a, 1, -1),
    "flip": lambda cell, a: a.flip(-1),
    "swap_halves": lambda cell, a: torch.cat([a[:, half(a) :], a[:, : half(a)]], -1),
    "permutation": lambda cell, a: a[:, cell.order],
    "transposed_heads": lambda cell, a: in_heads(cell, a).transpose(1, 2).flatten(1),
    "amax": lambda cell, a: a - 0.5 * a.amax(-1, keepdim=True),
}


NOISE = 1e-13
HEADS = dict.fromkeys(["einsum", "bmm", "head_norm", "gate_of_head"], "heads (size 2)")


class RandomMixing(Random):
    """A `Random` cell with one more kind of operation; every one is followed by a tanh."""

    def __init__(self, trees, heads, size):
        super().__init__(trees, heads * size)
        hidden = heads * size
        self.full = nn.Parameter(torch.randn(hidden, hidden) / hidden**0.5)
        self.blocks = nn.Parameter(torch.randn(heads, size, size) / size**0.5)
        self.kernel = nn.Parameter(torch.randn(1, 1, 3) / 3**0.5)
        self.scale = nn.Parameter(torch.rand(hidden) + 0.5)
        self.register_buffer("order", torch.randperm(hidden))

    def operation(self, name, *operands):
        if name in MIXING:
            return torch.tanh(MIXING[name](self, *operands))
        return super().operation(name, *operands)


@st.composite
def cells(draw):
    components = draw(st.integers(1, 2))
    leaves = [("state", i) for i in range(components)]
    leaves += [("drive", 0), ("drive", 1), ("coefficient", 0)]
    names = st.sampled_from(sorted(MIXING))
    mixed = st.tuples(names, trees(leaves, {**UNARY, **MIXING}, BINARY))
    other = trees(leaves, {**UNARY, **MIXING}, BINARY)
    found = [draw(mixed)] + [draw(st.one_of(mixed, other)) for _ in range(components - 1)]
    torch.manual_seed(draw(st.integers(0, 1000)))
    return RandomMixing(found, draw(st.integers(1, 3)), draw(st.integers(1, 4))).double()


def mixing(cell):
    """Which channels reach which, (new, old), by Jacobians at random points; near and far."""
    hidden = cell.hidden_size
    mixes = torch.eye(hidden, dtype=torch.bool)
    for scale in (0.3, 0.3, 1.0, 1.0, 3.0, 3.0):
        x = torch.randn(1, cell.input_size, dtype=torch.float64) * scale
        state = tuple(s * scale for s in as_tuple(random_state(cell.num_components, 1, hidden)))
        step = lambda *s, x=x: as_tuple(cell(x, s if len(s) > 1 else s[0]))  # noqa: E731
        for row in torch.autograd.functional.jacobian(step, state):
            for block in row:
                mixes |= block.reshape(hidden, hidden) != 0
    return mixes


def allowed(cell, structure):
    """Which channels may reach which, by what was found."""
    sizes = {"elementwise": 1, "dense": cell.hidden_size}
    size = sizes.get(structure) or int(structure.removeprefix("heads (size ").removesuffix(")"))
    group = torch.arange(cell.hidden_size) // size
    return group[:, None] == group[None, :]


def compare(cell, rnn, x, state, resets):
    """Values and all gradients; some of these are 0 but for rounding, whatever the weights."""
    expected = outcome(lambda x, s: loop(cell, x, s, resets), cell, x, state)
    actual = outcome(lambda x, s: rnn(x, s, resets), cell, x, state)
    for name in [n for n, v in expected.items() if v.abs().max() < NOISE]:
        assert actual.pop(name).abs().max() < NOISE, name
        del expected[name]
    assert_same(actual, expected, 1e-10)


@pytest.mark.timeout(120)
@settings(max_examples=150, derandomize=True, deadline=None)
@given(cell=cells(), batch=st.integers(1, 3), time=st.integers(1, 20), data=st.data())
def test_random_mixing_cells(cell, batch, time, data):
    rnn = RNN(cell)
    structure = rnn.runner().traced.structure
    assert not (mixing(cell) & ~allowed(cell, structure)).any()
    x = torch.randn(batch, time, cell.input_size, dtype=torch.float64)
    state = random_state(cell.num_components, batch, cell.hidden_size)
    resets = torch.rand(batch, time) < data.draw(st.sampled_from([0.0, 0.3]), "resets")
    compare(cell, rnn, x, state, None)
    compare(cell, rnn, x, state, resets)


@pytest.mark.parametrize("name", MIXING)
def test_every_operation_is_seen_to_mix(name):
    cell = RandomMixing([(name, ("state", 0))], 3, 2).double()
    structure = RNN(cell).runner().traced.structure
    assert structure == HEADS.get(name, "dense")
    assert not (mixing(cell) & ~allowed(cell, structure)).any()


class Rare(nn.Module):
    """Mixes channels only where the state or the input is somewhere unusual."""

    input_size = hidden_size = 4
    num_components = 1

    def __init__(self, condition):
        super().__init__()
        self.condition = condition
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x, h):
        there = torch.where(self.condition(x, h), torch.roll(h, 1, -1), h)
        return torch.tanh(x + self.scale * there)


@pytest.mark.parametrize(
    "condition",
    [lambda x, h: h < 0, lambda x, h: h > 1.5, lambda x, h: x < 0],
    ids=["negative state", "large state", "negative input"],
)
def test_mixing_that_is_rare_is_seen(condition):
    cell = Rare(condition).double()
    structure = RNN(cell).runner().traced.structure
    assert not (mixing(cell) & ~allowed(cell, structure)).any()
