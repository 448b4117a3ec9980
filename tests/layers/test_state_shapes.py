"""Cells whose state is of any shape, and cells with a readout, against the loop."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from core.conftest import needs_triton
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import pararnn
from pararnn import RNN, TraceError
from pararnn.testing import assert_close, check_cell, loop

# PyTorch's own, at the first tangent of a process and when a library is compiled
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`"),
]
FEATURES, KEYS, VALUES, HEADS = 5, 3, 4, 2


def outer(a, b):
    return a.unsqueeze(-1) * b.unsqueeze(-2)


class Memory(nn.Module):
    """Keys, values and gates of a memory, of one head or of several; subclasses have the step."""

    input_size = FEATURES

    def __init__(self, *heads):
        super().__init__()
        self.heads, self.state_shape = heads, (*heads, KEYS, VALUES)
        numbers = torch.Size(heads).numel()
        sizes = {"k": KEYS, "v": VALUES, "q": KEYS, "f": 1}
        self.project = nn.ModuleDict(
            {name: nn.Linear(FEATURES, numbers * size) for name, size in sizes.items()}
        )

    def of(self, name, x):
        """One of its projections, (N, *heads, size)."""
        return self.project[name](x).unflatten(-1, (*self.heads, -1))

    def gate(self, x):
        return torch.sigmoid(self.of("f", x)).unsqueeze(-1)

    def read(self, x, state):
        """y = state^T q."""
        return (self.of("q", x).unsqueeze(-2) @ state).squeeze(-2)


class M2RNN(Memory):
    def __init__(self, *heads):
        super().__init__(*heads)
        self.weight = nn.Parameter(torch.eye(VALUES) + 0.2 * torch.randn(*heads, VALUES, VALUES))

    def forward(self, x, state):
        f = self.gate(x)
        new = torch.tanh(state @ self.weight + outer(self.of("k", x), self.of("v", x)))
        return f * state + (1 - f) * new

    def readout(self, x, state):
        return self.read(x, state)


class Delta(Memory):
    def forward(self, x, state):
        k = F.normalize(F.silu(self.of("k", x)), dim=-1)
        error = self.of("v", x) - (k.unsqueeze(-2) @ state).squeeze(-2)
        return torch.tanh(self.gate(x) * state + outer(k, error))

    def readout(self, x, state):
        return F.silu(self.of("v", x)) * self.read(x, state)


class Outer(Memory):
    def __init__(self, *heads):
        super().__init__(*heads)
        self.factor = nn.Parameter(torch.rand(*heads, KEYS, VALUES) - 0.5)

    def forward(self, x, state):
        f = self.gate(x)
        new = torch.tanh(self.factor * state + outer(self.of("k", x), self.of("v", x)))
        return f * state + (1 - f) * new

    def readout(self, x, state):
        return self.read(x, state)


class SharedProjection(Outer):
    """Its readout takes the same keys as its step, and a value that the step stashes."""

    def forward(self, x, state):
        self.stashed = self.of("q", x)
        return super().forward(x, state)

    def readout(self, x, state):
        return (self.of("k", x).unsqueeze(-1) * state).sum(-2) + self.stashed.sum(-1, keepdim=True)


class Number(Outer):
    """Hands out one number per row."""

    def readout(self, x, state):
        return (state * outer(self.of("q", x), self.of("v", x))).flatten(1).mean(-1)


class Matrix(Delta):
    """Hands out a matrix, of other axes than the state's."""

    def readout(self, x, state):
        return torch.tanh(state.mT @ state) + outer(self.of("v", x), self.of("v", x))


class Dropped(M2RNN):
    def readout(self, x, state):
        return F.dropout(self.read(x, state), 0.5, self.training)


class ReadoutModule(Memory):
    """A module of that name is no readout."""

    def __init__(self):
        super().__init__()
        self.readout = nn.Linear(VALUES, VALUES)

    def forward(self, x, state):
        return torch.tanh(self.readout(state) + outer(self.of("k", x), self.of("v", x)))


class Differing(nn.Module):
    """Tensors of three shapes; the rows of all belong to each other."""

    input_size, state_shape = FEATURES, ((KEYS, VALUES), (VALUES,), (VALUES, 3))

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(FEATURES, VALUES)

    def forward(self, x, state):
        h, n, m = state
        v = self.project(x)
        h = torch.tanh(0.5 * h * n.unsqueeze(1) + v.unsqueeze(1))
        return h, torch.cos(n + v) + h.mean(1), 0.3 * m + (h.sum(1) * v).unsqueeze(-1)


class Scalar(nn.Module):
    input_size, state_shape = FEATURES, ()

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(FEATURES, 2)

    def forward(self, x, h):
        f, n = self.project(x).unbind(-1)
        return torch.sigmoid(f) * h + torch.tanh(n + 0.5 * h)


class MatrixLSTM(nn.Module):
    """Two matrices, elementwise but for the product."""

    input_size, state_shape, num_components = FEATURES, (KEYS, VALUES), 2

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(FEATURES, 4 * KEYS)
        self.weight = nn.Parameter(torch.randn(VALUES, VALUES) * 0.4)

    def forward(self, x, state):
        h, c = state
        i, f, g, o = (self.project(x).unsqueeze(-1) + (h @ self.weight).repeat(1, 4, 1)).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class Normed(nn.Module):
    """A norm over one axis inside the step, the other axis apart."""

    input_size, state_shape = FEATURES, (KEYS, VALUES)

    def __init__(self, norm, axis):
        super().__init__()
        self.norm, self.axis, self.project = norm, axis, nn.Linear(FEATURES, KEYS * VALUES)

    def forward(self, x, state):
        moved = self.norm(state.movedim(self.axis, -1)).movedim(-1, self.axis)
        return torch.tanh(0.7 * moved + self.project(x).unflatten(-1, (KEYS, VALUES)))


CELLS = {
    "m2rnn": (M2RNN, "heads (size 4)"),
    "m2rnn, heads": (lambda: M2RNN(HEADS), "heads (size 4)"),
    "delta": (Delta, "heads (size 3)"),
    "delta, heads": (lambda: Delta(HEADS), "heads (size 3)"),
    "outer": (Outer, "elementwise"),
    "outer, heads": (lambda: Outer(HEADS), "elementwise"),
    "shared projection": (SharedProjection, "elementwise"),
    "number": (Number, "elementwise"),
    "matrix": (Matrix, "heads (size 3)"),
    "module named readout": (ReadoutModule, "heads (size 4)"),
    "differing": (Differing, "heads (size 7)"),
    "scalar": (Scalar, "elementwise"),
    "pair": (MatrixLSTM, "heads (size 4)"),
    "rms norm": (lambda: Normed(nn.RMSNorm(KEYS), 1), "heads (size 3)"),
    "layer norm": (lambda: Normed(nn.LayerNorm(VALUES), 2), "heads (size 4)"),
    "softmax": (lambda: Normed(nn.Softmax(-1), 1), "heads (size 3)"),
}


def states(cell, batch, draw=torch.randn, **options):
    """A state as the cell takes it."""
    shapes = RNN(cell).state_shapes
    parts = tuple(draw(batch, *s, dtype=torch.float64, **options) for s in shapes)
    return parts if len(parts) > 1 else parts[0]


def mapped(function, state):
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


def flat(results):
    y, last = results
    return [y, *(last if isinstance(last, tuple) else (last,))]


def close(actual, expected, rtol=1e-9):
    for i, (a, e) in enumerate(zip(flat(actual), flat(expected), strict=True)):
        assert_close(f"value {i}", a, e, rtol=rtol)


@pytest.fixture(params=["m2rnn", "differing", "outer, heads", "scalar"])
def cell(request):
    """One of each kind: groups and a readout, tensors of several shapes, kernels, no axes."""
    return CELLS[request.param][0]().double()


@pytest.fixture
def x():
    return torch.randn(3, 20, FEATURES, dtype=torch.float64)


@pytest.mark.parametrize("name", CELLS)
def test_equals_the_loop(name):
    """Values, final states, and gradients of x, both states and all parameters."""
    make, structure = CELLS[name]
    assert check_cell(make(), batch=2, time=9, rtol=1e-9).structure == structure


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_forms_of_a_call(cell, x, backend):
    """Pieces, single sequences, time first, packed sequences, a first state of strides."""
    state, rnn = states(cell, 3), RNN(cell, backend=backend)
    expected = loop(cell, x, state)
    y, middle = rnn(x[:, :13], state)
    rest, last = rnn(x[:, 13:], middle)
    close((torch.cat([y, rest], 1), last), expected)
    y, last = rnn(x[1], mapped(lambda s: s[1], state))
    close((y, last), (expected[0][1], mapped(lambda s: s[1], expected[1])))
    y, last = RNN(cell, batch_first=False, backend=backend)(x.transpose(0, 1), state)
    close((y.transpose(0, 1), last), expected)
    same = mapped(lambda s: s[:1].expand_as(s), state)
    close(rnn(x.expand(2, *x.shape)[1], same), loop(cell, x, same))
    y, ended = rnn(x[:1], state, cu_seqlens=torch.tensor([0, 15, 15, 20]))
    first, second, third = (mapped(lambda s, i=i: s[i : i + 1], state) for i in range(3))
    parts = [loop(cell, x[:1, :15], first), (y[:, :0], second), loop(cell, x[:1, 15:], third)]
    assert_close("y", y, torch.cat([part for part, _ in parts], 1), rtol=1e-9)
    for i, (_, last) in enumerate(parts):
        close((x, mapped(lambda s, i=i: s[i : i + 1], ended)), (x, last))


@needs_triton
@pytest.mark.parametrize("name", ["m2rnn", "outer, heads", "scalar"])
def test_generated_for_a_gpu(name, x):
    """In the interpreter."""
    cell, x = CELLS[name][0](), x[:2, :9].float().requires_grad_()
    state, resets = states(cell, 2).float().requires_grad_(), x[..., 0] > 0.5
    found = RNN(cell, backend="triton")(x, state, resets)
    expected = loop(cell, x, state, resets)
    close(found, expected, rtol=1e-5)
    inputs, cotangents = [x, state, *cell.parameters()], [torch.randn_like(t) for t in flat(found)]
    gradients = [torch.autograd.grad(flat(r), inputs, cotangents) for r in (found, expected)]
    for a, e in zip(*gradients, strict=True):
        assert_close("gradient", a, e, rtol=1e-4)


class NormedReadout(M2RNN):
    """A norm whose result is rounded, as its weight is; `float32` as gates of memories are."""

    def __init__(self, wide):
        super().__init__()
        self.norm, self.out, self.wide = nn.RMSNorm(VALUES), nn.Linear(VALUES, 2), wide

    def readout(self, x, state):
        y = self.out(self.norm(self.read(x, state)))
        return (y * torch.sigmoid(self.of("f", x).float())).to(y.dtype) if self.wide else y


@pytest.mark.parametrize("wide", [False, True], ids="wide={}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types_of_a_readout_in_half_precision(x, dtype, wide):
    """They are those of the cell itself."""
    cell, x = NormedReadout(wide).to(dtype), x.to(dtype)
    zeros = torch.zeros(3, KEYS, VALUES)
    y, _ = RNN(cell)(x)
    assert y.dtype is dtype
    expected = loop(copy.deepcopy(cell).float(), x.float(), zeros)[0].to(dtype)
    assert_close("y", y, expected, rtol=8 * torch.finfo(dtype).eps)


def test_steps(cell, x):
    state, rnn = states(cell, 3), RNN(cell)
    y, last = loop(cell, x, state)
    for t in range(x.shape[1]):
        now, state = rnn.step(x[:, t], state)
        assert_close("y", now, y[:, t], rtol=1e-9)
    close((now, state), (y[:, -1], last))


def test_resets_restart_all_rows_from_one_state(cell, x):
    state, fresh = states(cell, 3), states(cell, 1)
    resets = torch.rand(3, 20) < 0.2
    every = mapped(lambda s: s.expand(3, *s.shape[1:]), fresh)
    expected = loop(cell, x, state, resets, every)
    for given in (every, mapped(lambda s: s[0], fresh)):
        close(RNN(cell)(x, state, resets, reset_state=given), expected)


def test_second_derivatives(cell, x):
    x, state = x[:, :6].requires_grad_(), states(cell, 3, requires_grad=True)
    inputs = flat((x, state))

    def twice(run):
        torch.manual_seed(1)
        draw = lambda t: torch.randn(t.shape, dtype=t.dtype)  # noqa: E731
        total = sum((t * draw(t)).sum() for t in flat(run(x, state)))
        once = torch.autograd.grad(total, inputs, create_graph=True)
        total = sum((g * draw(g)).sum() for g in once)
        return torch.autograd.grad(total, inputs, allow_unused=True)

    for found, expected in zip(twice(RNN(cell)), twice(lambda *a: loop(cell, *a)), strict=True):
        if expected is None:  # linear in it
            assert found is None or not found.any()
        else:
            assert_close("second derivative", found, expected, rtol=1e-8)


def test_transforms(cell, x):
    rnn, state = RNN(cell), states(cell, 3)
    expected = loop(cell, x, state)
    close(vmap(rnn)(x, state), expected)
    tangents = torch.randn_like(x), mapped(torch.sin, state)
    found = jvp(lambda *a: tuple(flat(rnn(*a))), (x, state), tangents)
    reference = jvp(lambda *a: tuple(flat(loop(cell, *a))), (x, state), tangents)
    for a, e in zip(found[1], reference[1], strict=True):
        assert_close("tangent", a, e, rtol=1e-9)
    gradients = grad(lambda p: functional_call(rnn, p, (x, state))[0].sin().sum())
    found = gradients(dict(rnn.named_parameters()))
    total = expected[0].sin().sum()
    for name, parameter in cell.named_parameters():
        (reference,) = torch.autograd.grad(total, parameter, retain_graph=True)
        assert_close(name, found[f"cell.{name}"], reference, rtol=1e-9)
    layers = [RNN(copy.deepcopy(cell)), RNN(type(cell)(*getattr(cell, "heads", ())).double())]
    parameters, _ = stack_module_state(layers)
    found = vmap(lambda p: functional_call(rnn, p, (x, state))[0])(parameters)
    for y, layer in zip(found, layers, strict=True):
        assert_close("member", y, loop(layer.cell, x, state)[0], rtol=1e-9)


def test_compiled(cell, x):
    state, resets = states(cell, 3), torch.rand(3, 20) < 0.2
    compiled = torch.compile(RNN(cell), backend="aot_eager", fullgraph=True)
    close(compiled(x, state, resets), loop(cell, x, state, resets))
    found, expected = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, cotangent = compiled(found, state)[0], torch.randn_like(loop(cell, x, state)[0])
    y.backward(cotangent)
    loop(cell, expected, state)[0].backward(cotangent)
    assert_close("gradient", found.grad, expected.grad, rtol=1e-9)


def test_a_compiled_layer_notices_its_readout(x):
    """Two traces that differ in nothing else: the first one comes back."""
    cell, state = Scaled().double(), torch.randn(3, KEYS, VALUES, dtype=torch.float64)
    compiled = torch.compile(RNN(cell), backend="eager", fullgraph=True)
    for cell.scale in (1.0, 2.0, 1.0, 3.0):
        close(compiled(x, state), loop(cell, x, state))


class Scaled(M2RNN):
    scale = 1.0

    def readout(self, x, state):
        return self.scale * self.read(x, state)


class Net(nn.Module):
    """A layer whose outputs and final states are one tuple, as programs return them."""

    def __init__(self, cell):
        super().__init__()
        self.rnn = RNN(cell)

    def forward(self, x):
        return tuple(flat(self.rnn(x)))


X = torch.linspace(-1, 1, 7 * 9 * FEATURES).view(7, 9, FEATURES)
SIZES = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)


def test_exported(cell):
    net = Net(cell.float()).eval()
    program = torch.export.export(net, (X[:2],), dynamic_shapes=SIZES, strict=False).module()
    for x in (X, X[:1, :4]):
        for found, expected in zip(program(x), net(x), strict=True):
            assert_close("value", found, expected, rtol=1e-5)


class Call(nn.Module):
    """A call with a state and more, as programs take it."""

    def __init__(self, call):
        super().__init__()
        self.rnn, self.call = RNN(M2RNN()), call

    def forward(self, x, state, more):
        return tuple(self.call(self.rnn, x, state, more))


BATCH, TIME, MORE = (torch.export.Dim(name) for name in ("batch", "time", "more"))
ROWS = torch.zeros(2, KEYS, VALUES)
CALLS = {
    "resets": (
        lambda rnn, x, state, more: rnn(x, state, more, reset_state=state),
        [(X[:2], ROWS, X[:2, :, 0] > 0), (X, torch.randn(7, KEYS, VALUES), X[..., 0] > 0.3)],
        ({0: BATCH, 1: TIME}, {0: BATCH}, {0: BATCH, 1: TIME}),
    ),
    "packed": (
        lambda rnn, x, state, more: rnn(x, state, cu_seqlens=more),
        [
            (X[:1], torch.zeros(3, KEYS, VALUES), torch.tensor([0, 4, 4, 9])),
            (X[:1, :6], torch.randn(4, KEYS, VALUES), torch.tensor([0, 1, 3, 3, 6])),
        ],
        ({1: TIME}, {0: MORE}, {0: MORE + 1}),
    ),
    "step": (
        lambda rnn, x, state, more: rnn.step(x, state + more),
        [(X[:2, 0], ROWS, ROWS.clone()), (X[:, 0], *torch.randn(2, 7, KEYS, VALUES))],
        ({0: BATCH}, {0: BATCH}, {0: BATCH}),
    ),
}


@pytest.mark.parametrize(("name", "strict"), [("resets", False), ("packed", True), ("step", False)])
def test_exported_calls(name, strict):
    call, (first, other), sizes = CALLS[name]
    net = Call(call).eval()
    program = torch.export.export(net, first, dynamic_shapes=sizes, strict=strict).module()
    for found, expected in zip(program(*other), net(*other), strict=True):
        assert_close("value", found, expected, rtol=1e-5)


@pytest.mark.parametrize("way", ["float32", "bfloat16", "autocast"])
def test_narrower_types(cell, x, way):
    """Outputs and states have the type of x; gradients come in that of the parameters."""
    state = states(cell, 3)
    expected, dtype = loop(cell, x, state), torch.bfloat16 if way == "bfloat16" else torch.float32
    rnn = RNN(copy.deepcopy(cell).to(dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        found = rnn(x.to(dtype), mapped(lambda s: s.to(dtype), state))
    for a, e in zip(flat(found), flat(expected), strict=True):
        assert a.dtype is dtype
        assert_close("value", a.double(), e, rtol=1e-4 if way == "float32" else 0.06)
    found[0].float().sum().backward()
    assert all(p.grad.isfinite().all() for p in rnn.parameters())


def test_convolutions_under_autocast(x):
    """Of what autocast has rounded, before the step and in the readout."""

    class Convolves(M2RNN):
        def __init__(self):
            super().__init__()
            self.before, self.after = (nn.Conv1d(1, 1, 3, padding=1) for _ in range(2))

        def of(self, name, x):
            return self.before(super().of(name, x).unsqueeze(1)).squeeze(1)

        def readout(self, x, state):
            return self.after(super().readout(x, state).unsqueeze(1)).squeeze(1)

    cell, x = Convolves(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = RNN(cell)(x), loop(cell, x, torch.zeros(3, KEYS, VALUES))
    for a, e in zip(found, expected, strict=True):
        assert_close("value", a.float(), e.float(), rtol=0.06)


def test_the_output_has_the_type_of_x(x):
    """Whatever the readout computes in, and however the call is carried out."""

    class Wide(M2RNN):
        def readout(self, x, state):
            return state.double().sum(-1)

    rnn, x = RNN(Wide()), x.float()
    for y in (rnn(x)[0], rnn(x[:, :1])[0], rnn(x[0])[0], rnn.step(x[:, 0])[0]):
        assert y.dtype is torch.float32


def test_activation_checkpointing(cell, x):
    rnn, state, x = RNN(cell), states(cell, 3), x.requires_grad_()
    y = checkpoint(lambda x: rnn(x, state)[0], x, use_reentrant=False)
    expected = loop(cell, x, state)[0]
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(t, [x, *cell.parameters()], cotangent) for t in (y, expected)]
    for found, reference in zip(*gradients, strict=True):
        assert_close("gradient", found, reference, rtol=1e-9)


def test_copies(cell, x):
    rnn, state = RNN(cell), states(cell, 3)
    expected = rnn(x, state)
    for copied in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        close(copied(x, state), expected, rtol=0)


def test_parametrised_weights(x):
    """One in the step, one in the readout."""

    class Parametrised(M2RNN):
        def __init__(self):
            super().__init__()
            parametrizations.orthogonal(self, "weight")
            self.out = parametrizations.weight_norm(nn.Linear(VALUES, 2))

        def readout(self, x, state):
            return self.out(self.read(x, state))

    assert check_cell(Parametrised(), batch=2, time=9, rtol=1e-9).structure == "heads (size 4)"
    cell = Parametrised().double()
    state = states(cell, 1)
    close(RNN(cell)(x[:1], state), loop(cell, x[:1], state))  # a loop over the cell


def test_empty_batch(cell):
    rnn, x = RNN(cell), torch.randn(0, 6, FEATURES, dtype=torch.float64, requires_grad=True)
    y, last = rnn(x)
    assert y.shape == (0, 6, *rnn.output_shape)
    assert [s.shape[1:] for s in flat((y, last))[1:]] == list(rnn.state_shapes)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert rnn.step(x[:, 0])[0].shape == (0, *rnn.output_shape)


def test_what_looks_into_cells(cell, x, capsys):
    rnn = RNN(cell)
    assert type(cell).__name__ in str(pararnn.explain(rnn))
    assert str(rnn.plan(x.shape))
    found = pararnn.diagnose(rnn, x, states(cell, 3))
    assert found.value_error < 1e-9
    assert found.gradient_error < 1e-9


def test_dropout_in_a_readout(x):
    """Half of the outputs are gone, the others doubled; so in the gradients."""
    cell, state = Dropped().double(), torch.randn(3, KEYS, VALUES, dtype=torch.float64)
    rnn, x = RNN(cell), x.requires_grad_()
    with pytest.raises(ValueError, match=r"Dropped draws random numbers"):
        check_cell(cell)
    y, _ = rnn(x, state)
    close(rnn.eval()(x, state), loop(cell, x, state))
    whole = rnn(x, state)[0]
    kept = (y / whole).round()
    assert kept.unique().tolist() == [0, 2]
    assert 0.3 < kept.mean() / 2 < 0.7
    inputs, cotangent = [x, *cell.parameters()], torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, cotangent)
    expected = torch.autograd.grad(rnn(x, state)[0] * kept.detach(), inputs, cotangent)
    for a, e in zip(found, expected, strict=True):
        assert_close("gradient", a, e, rtol=1e-9)


def forgets(state, drive):
    """For states of any shape."""
    return torch.tanh(0.5 * state + drive.sum(-1).view(-1, *[1] * (state.dim() - 1)))


def total(state, drive):
    return state.reshape(len(state), -1).sum(-1) * drive[:, 0]


@pytest.mark.parametrize("readout", [None, total])
def test_scan_of_any_shape(x, readout):
    """One function; each shape has a trace of its own."""
    for shape in ((), (4,), (2, 4), (1, 3, 2), (2, 4)):
        first = torch.randn(3, *shape, dtype=torch.float64)
        now, ys = first, []
        for x_t in x.unbind(1):
            now = forgets(now, x_t)
            ys.append(now if readout is None else readout(now, x_t))
        close(pararnn.scan(forgets, first, x, readout=readout), (torch.stack(ys, 1), now))
    with pytest.raises(ValueError, match=r"has shape \(3, 0\) .*; pass \(3, ...\), no axis empty"):
        pararnn.scan(forgets, x.new_zeros(3, 0), x)


def test_scan_follows_what_its_readout_reads():
    """Coefficients, closures and a number that the readout alone reads."""
    draw = lambda *s: torch.randn(s, dtype=torch.float64, requires_grad=True)  # noqa: E731
    state, drive, a, q = draw(3, 2, 4), draw(3, 7, 4), draw(2, 4), draw(4, 3)
    held = {"factor": 1.0, "bias": torch.zeros(3, dtype=torch.float64)}

    def step(state, drive, a, q):
        return torch.tanh(state * a + drive.unsqueeze(1))

    def readout(state, drive, a, q):
        return (state @ q).sum(1) * held["factor"] + held["bias"]

    def one_by_one():
        now, ys = state, []
        for z in drive.unbind(1):
            now = step(now, z, a, q)
            ys.append(readout(now, z, a, q))
        return torch.stack(ys, 1), now

    for held["factor"] in (1.0, 3.0, 1.0):
        held["bias"] += 1
        found, expected = pararnn.scan(step, state, drive, (a, q), readout=readout), one_by_one()
        close(found, expected)
        cotangent = torch.randn_like(expected[0])
        gradients = [
            torch.autograd.grad(y, (state, drive, a, q), cotangent) for y, _ in (found, expected)
        ]
        for actual, reference in zip(*gradients, strict=True):
            assert_close("gradient", actual, reference, rtol=1e-9)


def test_a_changed_cell_is_traced_again(x):
    """Another shape, a readout that is new, replaced, or gone."""

    class Plain(nn.Module):
        input_size, state_shape = FEATURES, (KEYS, VALUES)

        def forward(self, x, state):
            if isinstance(state, tuple):
                return tuple(forgets(s, x) for s in state)
            return forgets(state, x)

    cell = Plain()
    rnn = RNN(cell)
    for cell.state_shape in ((KEYS, VALUES), (2,), ((VALUES, KEYS), (2,)), (KEYS, VALUES)):
        close(rnn(x), loop(cell, x, states(cell, 3, torch.zeros)))
    for axis in (-1, -2):
        Plain.readout = lambda self, x, state, axis=axis: state.sum(axis)
        close(rnn(x), loop(cell, x, states(cell, 3, torch.zeros)))
    del Plain.readout
    close(rnn(x), loop(cell, x, states(cell, 3, torch.zeros)))


def cell_with(base=Outer, **attributes):
    cell = base()
    for name, value in attributes.items():
        setattr(cell, name, value)
    return cell


@pytest.mark.parametrize("shape", [[KEYS, VALUES], torch.Size((KEYS, VALUES)), [(KEYS, VALUES)]])
def test_a_shape_may_be_any_sequence(x, shape):
    assert RNN(cell_with(state_shape=shape)).state_shapes == ((KEYS, VALUES),)


@pytest.mark.parametrize(
    ("attributes", "kind", "message"),
    [
        ({"state_shape": (4, 3)}, ValueError, r"raised: .* Its state had shape \(N, 4, 3\) for N"),
        ({"state_shape": 12}, ValueError, r"had shape \(N, 12\) for N rows, as it declares; is"),
        ({"state_shape": (2, 3, 4)}, ValueError, r"had shape \(N, 2, 3, 4\) for N rows"),
        ({"num_components": 2}, ValueError, r"tensors of shape \(N, 3, 4\) and \(N, 3, 4\) for"),
        ({"state_shape": (-1, 3, 4)}, ValueError, r"is \(-1, 3, 4\); sizes must be whole numbers"),
        ({"state_shape": (3.0, 4.0)}, TypeError, r"is \(3.0, 4.0\); it must be a shape without"),
        ({"state_shape": (None, 3)}, TypeError, r"is \(None, 3\); it must be a shape without the"),
        ({"state_shape": "34"}, TypeError, "it must be a shape without the batch, of whole"),
        ({"state_shape": ((3, 4), 4)}, TypeError, r"a tuple of shapes, such as \(\(4, 8\), \(4,"),
    ],
    ids=str,
)
def test_wrong_declarations(x, attributes, kind, message):
    with pytest.raises(kind, match=message):
        RNN(cell_with(**attributes))(x.float())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"hidden_size": 3, "state_shape": (3,)}, ValueError, "both passed; .* so pass one"),
        ({"state_shape": (4, 3)}, ValueError, r"says self.state_shape = \(3, 4\); leave it out\?"),
        ({"hidden_size": 12}, TypeError, r"says self.state_shape = \(3, 4\); leave it out\?"),
        ({"hidden_size": 4.0}, TypeError, "hidden_size is 4.0; it must be a whole number"),
        ({"hidden_size": (4, "5")}, TypeError, r"hidden_size is \(4, '5'\); it must be"),
        ({"hidden_size": -4}, ValueError, "hidden_size is -4; sizes must be whole numbers of at"),
    ],
    ids=str,
)
def test_wrong_options(options, kind, message):
    with pytest.raises(kind, match=message):
        RNN(Outer(), **options)(torch.randn(3, 20, FEATURES))


def test_wrong_states(x):
    x, rnn, number = x.float(), RNN(Outer()), RNN(Scalar())
    needs = r"but x needs \(3, 3, 4\); pass \(rows, \*state_shape\), or None for zeros"
    for state in (torch.zeros(KEYS, VALUES), torch.zeros(4, 3, 4), torch.zeros(3, 12)):
        for call in (lambda s: rnn(x, s), lambda s: rnn.step(x[:, 0], s)):
            with pytest.raises(ValueError, match=needs):
                call(state)
    with pytest.raises(ValueError, match=r"one tensor of shape \(3, 3, 4\), got 1 in a tuple"):
        rnn(x, (torch.zeros(3, 3, 4),))
    with pytest.raises(ValueError, match=r"reset_state has shape \(3, 4, 2\) but x needs"):
        rnn(x, reset_state=torch.zeros(3, 4, 2))
    with pytest.raises(ValueError, match=r"state has shape \(\) but x needs \(3,\)"):
        number(x, torch.zeros(()))


def test_shapes_learnt_from_a_state(x):
    """Wrong ones are forgotten."""
    for make, wrong, right in (
        (Outer, (VALUES, KEYS), (KEYS, VALUES)),
        (lambda: nn.GRUCell(FEATURES, 4), (5,), (4,)),
    ):
        cell, x = make(), x.float()
        for name in ("state_shape", "hidden_size"):
            vars(cell).pop(name, None)
        rnn = RNN(cell)
        with pytest.raises(TypeError, match=r"set self.hidden_size = ... or self.state_shape = "):
            rnn(x)
        with pytest.raises(
            ValueError, match=r"raised: .* for N rows, as was passed; is that right"
        ):
            rnn(x, torch.zeros(3, *wrong))
        y, last = rnn(x, torch.zeros(3, *right))
        assert last.shape == (3, *right)
        assert_close("y", rnn(x)[0], y, rtol=1e-6)
        with pytest.raises(ValueError, match="but x needs"):
            rnn(x, torch.zeros(3, *wrong))


def returns(make):
    """A cell that makes something of the right new state."""

    class Returns(Outer):
        def forward(self, x, state):
            return make(super().forward(x, state))

    return Returns()


def reads(make):
    """A cell whose readout makes something of x, the state, and itself."""

    class Reads(Outer):
        def forward(self, x, state):
            self.before, self.doubled = state, 2 * state
            return super().forward(x, state)

        def readout(self, x, state):
            return make(self, x, state)

    return Reads()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda h: h.mT, r"component 0 of shape \(3, 4, 3\) for one of shape \(3, 3, 4\); a state"),
        (lambda h: h.flatten(1), r"component 0 of shape \(3, 12\) for one of shape \(3, 3, 4\)"),
        (lambda h: (h,), "given one tensor as state but returned a tuple of 1"),
        (lambda h: None, "returned None; .* `return` missing"),
        (lambda h: {"h": h}, "component 0 as a dict for one of shape"),
        (lambda h: h.int(), "component 0 of type torch.int32; the state must be floating point"),
    ],
)
def test_wrong_new_states(make, message):
    with pytest.raises(TraceError, match=f"Returns .*{message}"):
        RNN(returns(make))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c, x, h: h - c.before, "depends on the state before the step, at .*shapes.py:"),
        (lambda c, x, h: h + c.doubled, "depends on the state before the step, at .*shapes.py:"),
        (lambda c, x, h: x, "does not use the state; leave it out, and compute from x outside"),
        (lambda c, x, h: h.sum(), r"a tensor of shape \(\) .* for 3 rows; it must be"),
        (lambda c, x, h: h[0], r"of shape \(3, 4\) and type .* for 5 rows; it must be"),
        (lambda c, x, h: (h, h), "returned a tuple of 2; it must return one tensor"),
        (lambda c, x, h: h.cfloat(), "must be floating point.* torch.view_as_real"),
        (lambda c, x, h: h.add_(1), "writes into its state in place; compute a new tensor"),
        (lambda c, x, h: h - h.mean(0), "mixes the rows of its state"),
        (lambda c, x, h: h / len(h), "computes with the number of rows"),
        (lambda c, x, h: h * float(h.sum()), "reads the value of a tensor at .*shapes.py:"),
    ],
)
def test_wrong_readouts(make, message):
    with pytest.raises(TraceError, match=f"Reads.*{message}"):
        RNN(reads(make))


def test_writes_into_one_of_several_tensors():
    """They lie side by side, so the step gets copies; the loop would see the write."""

    class Writes(Differing):
        def forward(self, x, state):
            state[0][:, 0] = 0
            return super().forward(x, state)

    with pytest.raises(TraceError, match="Writes writes into its state in place; compute a new"):
        RNN(Writes())
