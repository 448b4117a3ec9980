"""Cells whose state is cut into tiles, in Triton's interpreter, against the loop in float64."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from pararnn import RNN, diagnose, scan
from pararnn.kernels import facts
from pararnn.kernels.tiled import tiles_of
from pararnn.planning.costs import COSTS
from pararnn.planning.kernel_plans import TileSizes, plan_tiles
from pararnn.planning.plan import BackendError
from pararnn.testing import assert_close, loop

from .conftest import needs_triton
from .random_steps import PartsWriter, random_step
from .tile_cells import TILE_CELLS, Memory

pytestmark = needs_triton
SEGMENT = COSTS.tile_segment
PARTS = (7, 95, 143, 173, 249, 354, 357, 360)  # which have tiles
ELSEWHERE = {  # their keys and values would be one axis
    *("AddsItsTranspose", "MultipliesItself", "OneWeightOnBothSides"),
    *("KeyAsValue", "ReadsAlongBoth"),
}


def make(name, *sizes, dtype=torch.float64, **named):
    torch.manual_seed(0)
    return TILE_CELLS[name](*sizes, **named).to(dtype)


def tuple_of(state):
    return state if isinstance(state, tuple) else (state,)


def states(rnn, rows, dtype=torch.float64):
    found = tuple(0.5 * torch.randn(rows, *s, dtype=dtype) for s in rnn.state_shapes)
    return found if len(found) > 1 else found[0]


def outcome(run, cell, x, *given, only=None):
    """Values and all gradients, where only some of the values have one if `only` says so."""
    x = x.detach().requires_grad_()
    leaves = [tuple(t.detach().requires_grad_() for t in tuple_of(g)) for g in given]
    parts = [g if isinstance(o, tuple) else g[0] for g, o in zip(leaves, given, strict=True)]
    y, last = run(x, *parts)
    values = [y, *tuple_of(last)]
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(v.shape, generator=generator).to(v) for v in values]
    pairs = list(zip(values, cotangents, strict=True))[only or slice(None)]
    total = sum((v * c).sum() for v, c in pairs if v.requires_grad)
    inputs = [x, *(t for g in leaves for t in g), *cell.parameters()]
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    zero = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]
    return [v.detach().double() for v in (*values, *zero)]


def assert_same(found, expected, rtol=1e-10):
    for i, (actual, reference) in enumerate(zip(found, expected, strict=True)):
        if reference.abs().max() > 0:
            assert_close(f"value {i}", actual, reference, rtol=rtol, atol=1e-12)
        else:
            assert not actual.any(), f"value {i} is not zero"


def compare(cell, time=5, batch=2, only=None, rtol=1e-10):
    """A layer with kernels, and the loop."""
    dtype = next((p.dtype for p in cell.parameters()), torch.float64)
    rnn, exact = RNN(cell, backend="triton"), copy.deepcopy(cell).double()
    x = torch.randn(batch, time, cell.input_size, dtype=dtype)
    state = states(rnn, batch, dtype)
    assert rnn.plan(x.shape, dtype).path == "tiles"
    found = outcome(rnn, cell, x, state, only=only)
    given = x.double(), tuple(s.double() for s in state) if type(state) is tuple else state.double()
    assert_same(found, outcome(functools.partial(loop, exact), exact, *given, only=only), rtol)


@pytest.mark.parametrize("name", TILE_CELLS)
def test_cells_equal_the_loop(name):
    try:
        compare(make(name))
    except BackendError:
        assert name in ELSEWHERE
    else:
        assert name not in ELSEWHERE


@pytest.mark.parametrize("seed", [2, 39, 123, 274, 330, 390])
def test_random_steps_equal_the_loop(seed):
    try:
        compare(random_step(seed))
    except BackendError:
        assert seed in (39, 123, 274)  # an axis is in two places of a value there


@pytest.mark.parametrize("time", [1, SEGMENT - 1, SEGMENT, 2 * SEGMENT + 3])
def test_any_number_of_steps(time):
    compare(make("WeightsOnBothSides"), time)


@pytest.mark.parametrize("name", ["WeightsOnBothSides", "Slots", "ParametersOfAllKinds"])
@pytest.mark.parametrize("sizes", [(1, 4, 5), (1, 1, 5), (3, 4, 1), (1, 1, 1), (1, 17, 3)], ids=str)
def test_any_sizes(name, sizes):
    heads, keys, values = sizes
    cell = make(name, heads=heads, keys=keys, values=values)
    try:
        compare(cell, 3)
    except BackendError:
        assert 1 in sizes  # products with one column are none of matrices
    except AssertionError:
        assert 1 in sizes  # nothing mixes, or as the channels of a vector
        path = RNN(cell, backend="triton").plan((2, 3, cell.input_size)).path
        assert (path == "kernel") == (keys == values == 1)


@pytest.mark.parametrize("seed", PARTS)
def test_random_steps_with_parts_equal_the_loop(seed):
    compare(random_step(seed, writer=PartsWriter))


@pytest.mark.parametrize("name", ["WeightPerHead", "DriveTwice", "MatrixLSTM", "HalvesOfTheState"])
@pytest.mark.parametrize("only", [slice(0, 1), slice(1, None)], ids=["outputs", "last state"])
def test_gradients_of_some_results(name, only):
    compare(make(name), SEGMENT + 1, only=only)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    ["WeightPerHead", "Norms", "ParametersOfAllKinds", "MatrixLSTM", "SlicesOfAProduct"],
)
def test_other_types(name, dtype):
    compare(make(name, dtype=dtype), rtol=1e-5 if dtype is torch.float32 else 3e-2)


@pytest.mark.parametrize(
    "name", ["WeightPerHead", "Slots", "DriveTwice", "MatrixLSTM", "HalvesOfTheState"]
)
def test_resets(name):
    cell = make(name)
    rnn = RNN(cell, backend="triton")
    x = torch.randn(2, SEGMENT + 4, cell.input_size, dtype=torch.float64)
    resets = torch.rand(x.shape[:2]) < 0.2
    resets[0, 0] = resets[1, SEGMENT] = True
    given = x, states(rnn, 2), states(rnn, 2)
    run = lambda of: lambda x, state, fresh: of(x, state, resets=resets, reset_state=fresh)  # noqa: E731
    expected = outcome(run(functools.partial(loop, cell)), cell, *given)
    assert_same(outcome(run(rnn), cell, *given), expected)


@pytest.mark.parametrize("name", ["WeightPerHead", "DriveTwice", "MatrixLSTM"])
@pytest.mark.parametrize("ends", [[20], [3, 20], [0, 20], [20, 20], [5, 5, 21, 22]], ids=str)
def test_packed_sequences(name, ends):
    """Also two of them, and ones without steps."""
    cell = make(name)
    kernels, plain = RNN(cell, backend="triton"), RNN(cell, backend="torch")
    offsets = torch.tensor([0, *ends])
    x = torch.randn(1, ends[-1], cell.input_size, dtype=torch.float64)
    given = x, states(kernels, len(ends))
    run = lambda rnn: lambda x, state: rnn(x, state, cu_seqlens=offsets)  # noqa: E731
    assert_same(outcome(run(kernels), cell, *given), outcome(run(plain), cell, *given))


@pytest.mark.parametrize("name", sorted({*TILE_CELLS} - ELSEWHERE - {"FourAxes"}))
def test_tiles_in_parts(name, monkeypatch):
    """A GPU of many processors, where programs share a tile."""
    real = facts.machine_of
    many = lambda device: dataclasses.replace(real(device), processors=1000)  # noqa: E731
    monkeypatch.setattr(facts, "machine_of", many)
    is_square = issubclass(TILE_CELLS[name], TILE_CELLS["Square"])
    options = {"keys": 32} if is_square else {"keys": 32, "values": 3}
    compare(make(name, heads=1, **options), 2, batch=1)


@pytest.mark.parametrize("processors", [1, 1000])
@pytest.mark.parametrize("sizes", [(2, 64, 16), (1, 40, 32), (1, 20, 48)], ids=str)
@pytest.mark.parametrize("name", ["WeightPerHead", "MatrixLSTM", "DriveTwice"])
def test_states_in_panels(name, sizes, processors, monkeypatch):
    """Of half precision, as tensor cores have them; the directions cut tiles in their own ways."""
    real = facts.machine_of
    many = lambda device: dataclasses.replace(real(device), processors=processors)  # noqa: E731
    monkeypatch.setattr(facts, "machine_of", many)
    compare(make(name, *sizes, dtype=torch.bfloat16), SEGMENT + 3, rtol=3e-2)


@pytest.mark.parametrize("name", ["ReadsNumbers", "Reflections", "GatesOfAllKinds"])
@pytest.mark.parametrize("sizes", [(1, 3, 64), (1, 64, 3)], ids=str)
def test_rows_that_fill_up_a_block(name, sizes):
    compare(make(name, *sizes), 2, batch=1)


def test_registers_leave_room_for_programs():
    """A scheduler has 16,384: two warps of 255 or three of 168."""

    def registers(batch, backward=False, half=True, weights=0, rows=16):
        sizes = TileSizes(33, rows, 64, None, (False, False), weights=weights)
        launch = plan_tiles(sizes, batch, 1, 132, backward, half=half)
        assert launch.warps == 1
        return launch.registers

    assert [registers(batch) for batch in (32, 33, 64)] == [255, 168, 168]
    assert [registers(batch, backward=True) for batch in (32, 33, 64)] == [255, 168, 168]
    assert registers(64, backward=True, half=False) == 255
    assert [registers(64, backward=b, rows=8) for b in (False, True)] == [128, 168]
    assert [registers(64, backward=b, weights=1) for b in (False, True)] == [168, 255]


def test_a_cell_that_computes_in_a_wider_type():
    class Wider(Memory):
        def forward(self, x, state):
            new = (
                0.9 * state.double() - state.double().mean(-1, keepdim=True) + self.new(x).double()
            )
            return torch.tanh(new).to(x.dtype)

        def readout(self, x, state):
            return super().readout(x.double(), state.double()).to(x.dtype)

    cell = Wider()
    kernels, plain = RNN(cell, backend="triton"), RNN(cell, backend="torch")
    given = torch.randn(2, 5, cell.input_size), states(kernels, 2, torch.float32)
    assert kernels.plan(given[0].shape).path == "tiles"
    assert_same(outcome(kernels, cell, *given), outcome(plain, cell, *given), 1e-5)


def test_x_in_any_layout():
    cell = make("WeightPerHead")
    features = cell.input_size
    of = functools.partial(torch.randn, dtype=torch.float64)
    for x in (of(1, 1, features).expand(2, 5, -1), of(2, features, 5).mT, of(0, 5, features)):
        both = [RNN(cell, backend=name) for name in ("triton", "torch")]
        found, expected = (rnn(x) for rnn in both)
        for actual, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, reference)
    both = [RNN(cell, backend=name, batch_first=False) for name in ("triton", "torch")]
    given = of(5, 2, features), states(both[0], 2)
    assert_same(*(outcome(rnn, cell, *given) for rnn in both))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["WeightPerHead", "DeltaWithADenominator"])
def test_derivatives_of_all_kinds(name):
    cell = make(name)
    both = [RNN(cell, backend=name) for name in ("triton", "torch")]
    x = torch.randn(2, 4, cell.input_size, dtype=torch.float64)

    def twice(rnn):
        given = x.clone().requires_grad_()
        y, last = rnn(given)
        inputs = [given, *cell.parameters()]
        total = y.sin().sum() + sum(part.pow(2).sum() for part in tuple_of(last))
        grads = torch.autograd.grad(total, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in grads), inputs)

    def transforms(rnn):
        grad = torch.func.grad(lambda x: rnn(x)[0].sin().sum())(x)
        mapped = torch.func.vmap(rnn)(torch.stack([x, 2 * x]))
        pushed = torch.func.jvp(rnn, (x,), (x.cos(),))
        return tree_leaves([grad, mapped, pushed])

    for what in (twice, transforms):
        assert_same(*map(what, both))


@pytest.mark.parametrize("name", ["WeightPerHead", "MixesWithADenominator", "InterleavedGates"])
def test_compiled_and_exported(name):
    """For any batch, time and number of sequences."""
    cell = make(name)
    rnn, plain = RNN(cell, backend="triton"), RNN(cell, backend="torch")
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, SEGMENT + 1, cell.input_size, dtype=torch.float64)
    given = x, states(rnn, 2)
    assert_same(outcome(compiled, cell, *given), outcome(plain, cell, *given))
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)
    program = torch.export.export(RNN(cell, backend="triton"), (x,), dynamic_shapes=sizes).module()
    for shape in ((3, 5), (4, 2 * SEGMENT + 1)):
        x = torch.randn(*shape, cell.input_size, dtype=torch.float64)
        assert_same(tree_leaves(program(x)), tree_leaves(plain(x)))


def test_scan_with_and_without_a_readout():
    weight = (0.4 * torch.randn(6, 6, dtype=torch.float64)).requires_grad_()
    drives = [torch.randn(2, 5, 3, n, dtype=torch.float64, requires_grad=True) for n in (4, 6)]
    state = torch.zeros(2, 3, 4, 6, dtype=torch.float64)

    def step(state, key, value, weight):
        return torch.tanh(state @ weight + key[..., None] * value[..., None, :])

    def readout(state, key, value, weight):
        return (key[..., None] * state).sum(-2)

    for read in (None, readout):
        found = []
        for name in ("triton", "torch"):
            y, last = scan(step, state, drives, weight, readout=read, backend=name)
            grads = torch.autograd.grad(y.sin().sum() + last.sum(), [weight, *drives])
            found.append([y.detach(), last.detach(), *grads])
        assert_same(*found)


def test_diagnose_says_that_there_are_no_chunks(capsys):
    cell = make("WeightPerHead")
    rnn = RNN(cell, backend="triton")
    x = torch.randn(2, 2 * SEGMENT, cell.input_size, dtype=torch.float64)
    found = diagnose(rnn, x, states(rnn, 2))
    assert not found.chunks_pay
    assert "one chunk (4 warps and 32 steps: chunks would not be worth" in found.chunks_reason
    assert found.chunks_reason in capsys.readouterr().out


@pytest.mark.parametrize("name", ["WeightPerHead", "SlicesOfAProduct"])
def test_frozen_parameters_and_copies(name):
    cell = make(name)
    cell.w.requires_grad_(False)
    rnn = copy.deepcopy(RNN(cell, backend="triton"))
    x = torch.randn(2, 5, cell.input_size, dtype=torch.float64)
    (found,) = torch.autograd.grad(rnn(x)[0].sum(), [rnn.cell.b])
    (expected,) = torch.autograd.grad(RNN(cell, backend="torch")(x)[0].sum(), [cell.b])
    assert_close("gradient", found, expected, rtol=1e-10)


def test_an_extreme_of_nan_is_nan():
    drives, state = torch.zeros(1, 3, 1, dtype=torch.float64), torch.zeros(1, 4, 6)
    state = state.double()
    state[0, 1, 2] = torch.nan

    def step(state, drive):
        return 0.5 * state + state.amax(-1, keepdim=True) + state.amin(-2, keepdim=True) + drive

    found = [scan(step, state, drives[..., None], backend=b)[0] for b in ("triton", "torch")]
    assert torch.equal(*(f.isnan() for f in found))
    assert found[0].isnan().sum() > 9


def test_scan_has_the_types_that_other_backends_have():
    drives = [torch.randn(2, 5, 3, n).bfloat16() for n in (4, 6)]
    gate = torch.rand(2, 5, 3, 1, 1)  # float32
    state = torch.zeros(2, 3, 4, 6)

    def step(state, key, value, gate):
        return gate * state + key[..., None] * value[..., None, :]

    def readout(state, key, value, gate):
        return (key[..., None] * state).sum(-2)

    for read in (None, readout):
        found = [
            scan(step, state, [*drives, gate], readout=read, backend=name)
            for name in ("triton", "torch")
        ]
        kinds = [(y.dtype, last.dtype) for y, last in found]
        assert kinds[0] == kinds[1]
        for actual, expected in zip(*found, strict=True):
            assert_close("value", actual, expected, rtol=2e-2)


def test_steps_that_differ_in_what_they_hand_out():
    """Alike in code, with other components or other shapes of what is read."""
    drives = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 5, 3, 6).double()
    state = tuple(torch.zeros(2, 3, 4, 6, dtype=torch.float64) for _ in range(2))

    def step(state, key, value):
        new = key[..., None] * value[..., None, :]
        return 0.5 * state[0] + new, torch.tanh(0.7 * state[1] - new)

    weights = [torch.randn(s, dtype=torch.float64) for s in ((6,), (4, 1), (1,))]
    readouts = [lambda s, k, v, w, i=i: s[i] * w for i in range(2)]
    for readout, weight in [(r, w) for r in readouts for w in weights]:

        def with_weight(state, key, value, w):
            return step(state, key, value)

        found = [
            scan(with_weight, state, drives, weight, readout=readout, backend=name)[0]
            for name in ("triton", "torch")
        ]
        assert_same([found[0]], [found[1]])


@pytest.mark.parametrize("axis", ["heads", "keys", "values"])
def test_a_mask_alone_has_an_axis(axis):
    size = {"heads": 3, "keys": 4, "values": 6}[axis]
    mask = torch.rand(2, 5, size) < 0.5
    drives = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 5, 3, 6).double(), mask
    state = torch.zeros(2, 3, 4, 6, dtype=torch.float64)

    def along(mask):
        shape = [size if axis == name else 1 for name in ("heads", "keys", "values")]
        return torch.where(mask, 1.0, 0.25).double().unflatten(-1, shape)

    def step(state, key, value, mask):
        share = along(mask)
        new = key[..., None] * value[..., None, :]
        return torch.tanh(share * state + new) / (1 + share.sum((-1, -2), keepdim=True))

    def readout(state, key, value, mask):
        return (key[..., None] * state).sum(-2) + along(mask).sum(-2)

    found = [scan(step, state, drives, readout=readout, backend=b) for b in ("triton", "torch")]
    assert_same(*found)


def test_a_gradient_of_a_weight_beside_a_wide_drive():
    torch.manual_seed(0)
    weight = torch.randn(40, dtype=torch.float64, requires_grad=True)
    drives = [torch.randn(2, 5, n, dtype=torch.float64, requires_grad=True) for n in (6, 40)]
    state = torch.zeros(2, 6, 40, dtype=torch.float64)

    def step(state, row, wide, weight):
        return torch.tanh(0.5 * state + row[..., None] * (weight * wide)[:, None, :])

    def readout(state, row, wide, weight):
        return state.sum(-1)

    found = []
    for name in ("triton", "torch"):
        y, last = scan(step, state, drives, weight, readout=readout, backend=name)
        grads = torch.autograd.grad(y.sin().sum() + last.sum(), [weight, *drives])
        found.append([y.detach(), last.detach(), *grads])
    assert_same(*found)


class HandsOutParts(Memory):
    def forward(self, x, state):
        first, second = state.chunk(2, -1)
        turned = torch.cat([first - second, first + second], -1)
        return 0.5 * torch.tanh(turned) + self.new(x)


class Largest(Memory):
    def forward(self, x, state):
        return torch.tanh(state - state.max(-1, keepdim=True).values + self.new(x))


class EverySecond(Memory):
    def forward(self, x, state):
        return torch.tanh(state - state[..., ::2].mean(-1, keepdim=True) + self.new(x))


class TwoWays(Memory):
    """Parts along keys, and parts along values."""

    def forward(self, x, state):
        upper, left = state[..., :2, :].mean(-2, keepdim=True), state[..., :3].mean(-1, True)
        return torch.tanh(state - upper - left + self.new(x))


class Vector(nn.Module):
    """Its channels mix by a weight: other kernels do that."""

    state_shape, input_size = ((6,), (6,)), 24

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 24))

    def forward(self, x, state):
        i, f, o, z = (state[0] @ self.w + x).chunk(4, -1)
        cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(z)
        return torch.sigmoid(o) * torch.tanh(cell), cell


class SharedByHeads(Memory):
    """A vector that all heads write to."""

    num_components = 2

    def __init__(self):
        super().__init__()
        self.state_shape = (self.state_shape, (self.keys,))

    def forward(self, x, state):
        _, key, *_ = self.split(x)
        return torch.tanh(state[0] * state[1][:, None, :, None] + self.new(x)), state[1] + key.sum(
            1
        )

    def readout(self, x, state):
        return super().readout(x, state[0])


REFUSED = {
    HandsOutParts: "it needs parts of an axis as one value",
    Largest: "it looks for the place of an extreme; amax and amin do not",
    EverySecond: "it takes every second entry of an axis or fewer",
    TwoWays: "it takes parts of a tensor along two axes",
    Vector: "channels of a vector mix by weights, which other kernels do",
    SharedByHeads: "a tensor of its state lacks an axis",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(kind):
    small = RNN(kind().double()).runner().traced.small
    found = tiles_of(small.step, small.readout)
    assert isinstance(found, str)
    assert found.startswith(REFUSED[kind])


def test_a_state_is_cut_in_more_than_one_place():
    """And so are drives and weights that meet the parts."""

    class Three(Memory):
        weights = "c:v"

        def forward(self, x, state):
            a, b, c = state.split([2, 2, 2], -1)
            new = torch.cat([a + c.mean(-1, keepdim=True), b * a, c - b.sum(-1, keepdim=True)], -1)
            return torch.tanh(0.5 * new * self.c + self.new(x))

        def readout(self, x, state):
            return state[..., :2].sum(-1) * state[..., 4:].amax(-1)

    torch.manual_seed(0)
    compare(Three().double(), SEGMENT + 2)


def test_parts_of_half_precision_have_gradients_of_their_type():
    cell = make("SlicesOfAProduct", dtype=torch.bfloat16)
    rnn = RNN(cell, backend="triton")
    rnn(torch.randn(2, 5, cell.input_size).bfloat16())[0].sum().backward()
    assert cell.w.grad.dtype is torch.bfloat16
    assert cell.w.grad.shape == cell.w.shape
