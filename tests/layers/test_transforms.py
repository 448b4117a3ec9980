"""Layers under `torch.func` and with forward-mode tangents, against loops over their cells."""

import copy

import pytest
import torch
from core.conftest import needs_triton
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import pararnn
from pararnn.testing import assert_close, loop

# PyTorch's own, at the first tangent of a process
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
TIME, INPUT, HIDDEN = 6, 4, 4


class Gru(nn.Module):
    """Channels mix; in operations that every transform knows, as those of `nn.GRUCell` do not."""

    input_size, hidden_size, num_components = INPUT, HIDDEN, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, 2 * HIDDEN)
        self.weight = nn.Parameter(torch.randn(HIDDEN, 2 * HIDDEN) * 0.4)

    def forward(self, x, h):
        z, n = (self.input(x) + h @ self.weight).chunk(2, -1)
        return torch.lerp(h, torch.tanh(n), torch.sigmoid(z))


class StraightThrough(nn.Module):
    """The derivative of a derivative must not see through `detach` either."""

    input_size, hidden_size, num_components = INPUT, HIDDEN, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, HIDDEN)

    def forward(self, x, h):
        soft = torch.tanh(self.input(x) + 0.5 * h)
        return soft * (1 + soft.detach() * h.detach().sin())


CELLS = {
    "paragru": lambda: pararnn.cells.ParaGRUCell(INPUT, HIDDEN),
    "paralstm": lambda: pararnn.cells.ParaLSTMCell(INPUT, HIDDEN, num_heads=2),
    "detach": StraightThrough,
    "mixing": Gru,
}
LAYERS = {
    "c": ("paralstm", "c"),
    "torch": ("paralstm", "torch"),
    "triton": ("paragru", "triton"),
    "detach": ("detach", "c"),
    "mixing": ("mixing", "auto"),
}


class Loop(nn.Module):
    """What a layer is compared with."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, state, resets=None):
        return loop(self.cell, x, state, resets)


MARKS = {"triton": needs_triton}


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, ())) for name in LAYERS])
def pair(request):
    """A layer and its loop, an input, a state and resets."""
    name, backend = LAYERS[request.param]
    cell = CELLS[name]().double()
    rnn = pararnn.RNN(cell, backend=backend)
    x = torch.randn(2, TIME, INPUT, dtype=torch.float64)
    parts = tuple(torch.randn(2, HIDDEN, dtype=torch.float64) for _ in range(rnn.num_components))
    state = parts if len(parts) > 1 else parts[0]
    resets = torch.rand(2, TIME) < 0.25
    resets[:, 0] = False  # the state has gradients
    return rnn, Loop(cell), x, state, resets


def assert_equal(actual, expected):
    leaves = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    for i, (one, other) in enumerate(leaves):
        assert_close(f"result {i}", one, other, rtol=1e-9)


def like(tree):
    return torch.utils._pytree.tree_map(torch.randn_like, tree)


def test_tangents(pair):
    """Of the input, the state and the parameters, to the outputs and the last state."""
    *layers, x, state, resets = pair
    own = dict(layers[0].named_parameters())
    given = (own, x, state)
    moves = like(given)
    results = [
        jvp(lambda p, z, s, m=m: functional_call(m, p, (z, s, resets)), given, moves)
        for m in layers
    ]
    assert_equal(*results)


def test_tangents_of_forward_ad(pair):
    *layers, x, state, resets = pair
    move, found = torch.randn_like(x), []
    for layer in layers:
        with forward_ad.dual_level():
            y = layer(forward_ad.make_dual(x, move), state, resets)
            found.append([forward_ad.unpack_dual(t).tangent for t in tree_leaves(y)])
    assert_equal(*found)


def test_gradients_and_those_per_sample(pair):
    """Also where samples begin at steps of their own."""
    *layers, x, state, resets = pair
    own, cotangent = dict(layers[0].named_parameters()), torch.randn(1, TIME, HIDDEN).double()

    def loss(m, p, z, s, r):
        s = torch.utils._pytree.tree_map(lambda t: t[None], s)
        return (functional_call(m, p, (z[None], s, r[None]))[0] * cotangent).sum()

    def gradient(m):
        return grad(lambda p, z, s, r: loss(m, p, z, s, r), (0, 1, 2))

    first = torch.utils._pytree.tree_map(lambda t: t[0], state)
    assert_equal(*(gradient(m)(own, x[0], first, resets[0]) for m in layers))
    for r, axis in ((resets, 0), (resets[0], None)):
        assert_equal(*(vmap(gradient(m), (None, 0, 0, axis))(own, x, state, r) for m in layers))


def test_ensembles(pair):
    """Values, and gradients of the stacked parameters by ordinary autograd."""
    rnn, reference, x, state, resets = pair
    members = [copy.deepcopy(rnn) for _ in range(3)]
    for member in members:
        for parameter in member.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    stacked, buffers = stack_module_state(members)
    found = []
    for layer in (rnn, reference):
        run = lambda p, b, m=layer: functional_call(m, (p, b), (x, state, resets))  # noqa: E731
        y, last = vmap(run)(stacked, buffers)
        (y.sin().sum() + sum(t.cos().sum() for t in tree_leaves(last))).backward()
        found.append((y, last, [p.grad.clone() for p in stacked.values()]))
        for parameter in stacked.values():
            parameter.grad = None
    assert_equal(*found)
    assert rnn.report is None


SECOND = {
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "forward over reverse": lambda f, x, v: hessian(scalar(f))(x),
    "reverse over reverse": lambda f, x, v: jacrev(grad(scalar(f)))(x),
    "forward over forward": lambda f, x, v: jacfwd(jacfwd(scalar(f)))(x),
    "reverse over forward": lambda f, x, v: grad(lambda z: jvp(scalar(f), (z,), (v,))[1])(x),
    "third": lambda f, x, v: jvp(grad(lambda z: grad(scalar(f))(z).sin().sum()), (x,), (v,)),
}


def scalar(f):
    return lambda x: f(x).sin().sum()


@pytest.mark.parametrize("kind", SECOND)
def test_compositions(pair, kind):
    *layers, x, state, resets = pair
    x, resets = x[:, :3], resets[:, :3]
    move = torch.randn_like(x)
    run = SECOND[kind]
    assert_equal(*(run(lambda z, m=m: m(z, state, resets)[0], x, move) for m in layers))


def test_second_derivatives_of_autograd(pair):
    *layers, x, state, resets = pair
    found = []
    for layer in layers:
        z, s = torch.utils._pytree.tree_map(lambda t: t.clone().requires_grad_(), (x, state))
        inputs = [z, *tree_leaves(s), *layer.parameters()]
        y, last = layer(z, s, resets)
        total = y.sin().sum() + tree_leaves(last)[-1].cos().sum()
        first = torch.autograd.grad(total, inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), inputs)
        found.append((first, second))
    assert_equal(*found)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_operations_that_are_recorded(pair):
    """Who records what a transform does sees all of it."""
    *layers, x, state, resets = pair
    x, resets = x[:, :3], resets[:, :3]
    other, move, found = torch.randn_like(x), torch.randn_like(x), []

    def waves(layer):
        return lambda z: layer(z, state, resets)[0].sin()

    def gradient(layer):
        return grad(lambda z: waves(layer)(z).sum())

    for layer in layers:
        tangent = linearize(waves(layer), x)[1]
        recorded = make_fx(vmap(gradient(layer)))(torch.stack([other, move]))
        found.append((tangent(move), tangent(other), recorded(torch.stack([x, other]))))
    assert_equal(*found)


@pytest.mark.parametrize("name", ["paragru", "mixing"])
def test_traced_inside(name):
    """A layer that is on no device, or new, as the skeleton of an ensemble."""
    members = [pararnn.RNN(CELLS[name]()) for _ in range(2)]
    stacked, buffers = stack_module_state(members)
    x = torch.randn(2, TIME, INPUT)
    expected = torch.stack([m(x)[0] for m in members])
    for skeleton in (copy.deepcopy(members[0]).to("meta"), copy.deepcopy(members[0])):
        run = lambda p, b, m=skeleton: functional_call(m, (p, b), (x,))[0]  # noqa: E731
        assert_close("y", vmap(run)(stacked, buffers), expected, rtol=1e-5)
    fresh, move = copy.deepcopy(members[1]), torch.randn_like(x)
    _, tangent = jvp(lambda z: fresh(z)[0], (x,), (move,))
    assert_close("tangent", tangent, jvp(lambda z: members[1](z)[0], (x,), (move,))[1], rtol=1e-5)
    assert_close("y", fresh(x)[0], expected[1], rtol=1e-5)


@pytest.mark.parametrize("mixes", [False, True])
def test_scan(mixes):
    def step(h, d, c):
        return torch.tanh((h @ torch.ones(4, 4) * 0.1 if mixes else h) * c + d)

    def looped(h, d, c):
        outputs = []
        for d_t in d.unbind(1):
            h = step(h, d_t, c)
            outputs.append(h)
        return torch.stack(outputs, 1)

    run = lambda h, d, c: pararnn.scan(step, h, d, c)[0]  # noqa: E731
    given = (torch.randn(2, 4), torch.randn(2, 7, 4), torch.randn(3, 4))
    one = (*given[:2], given[2][0])
    for f in (lambda f: jvp(f, one, one), lambda f: vmap(f, (None, None, 0))(*given)):
        for a, b in zip(tree_leaves(f(run)), tree_leaves(f(looped)), strict=True):
            assert_close("result", a, b, rtol=1e-5)


def test_layers_of_pytorch_as_ensembles():
    members = [
        pararnn.parallelize(nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True))
        for _ in range(2)
    ]
    stacked, buffers = stack_module_state(members)
    x = torch.randn(2, TIME, 3)
    found = vmap(lambda p, b: functional_call(members[0], (p, b), (x,))[0])(stacked, buffers)
    assert_close("y", found, torch.stack([m(x)[0] for m in members]), rtol=1e-5)


@pytest.mark.parametrize("name", ["paragru", "mixing"])
def test_operators_refuse_what_they_would_lose(name):
    """An exported program calls them whatever its tensors carry."""
    x = torch.randn(2, TIME, INPUT)
    program = torch.export.export(pararnn.RNN(CELLS[name]()), (x,)).module()
    with pytest.raises(NotImplementedError, match="call the layer itself"):
        jvp(lambda z: program(z)[0], (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="call the layer itself"):
        program(forward_ad.make_dual(x, x))
