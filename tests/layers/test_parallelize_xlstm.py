"""`parallelize` on the sLSTM of the package `xlstm`, against a loop of our own and the package."""

import copy
import dataclasses
import pickle
import sys
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import pararnn
from pararnn import Newton, parallelize
from pararnn.testing import assert_close

HIDDEN, HEADS, BATCH, TIME = 8, 2, 3, 9
MODULE = "xlstm.blocks.slstm.cell"


@dataclasses.dataclass
class Config:
    """The settings of the package that its cell reads."""

    hidden_size: int = HIDDEN
    num_heads: int = HEADS
    backend: str = "vanilla"
    function: str = "slstm"
    num_gates: int = 4
    input_shape: str = "BSGNH"
    output_shape: str = "BNSH"
    recurrent_weight_init: str = "zeros"
    gradient_recurrent_cut: bool = False
    gradient_recurrent_clipval: float | None = None
    forward_clipval: float | None = None


class Reference(nn.Module):
    """The recurrence as the package's plain backend has it, one step after another."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        size = config.hidden_size // config.num_heads
        self._recurrent_kernel_ = nn.Parameter(torch.empty(config.num_heads, 4 * size, size))
        self._bias_ = nn.Parameter(torch.empty(4 * config.hidden_size))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self._recurrent_kernel_)
        nn.init.normal_(self._bias_)

    def forward(self, input, state=None, lengths=None):
        x = input.transpose(0, 1) if self.config.input_shape[0] == "B" else input
        if state is None:
            state = x.new_zeros(4, x.shape[1], self.config.hidden_size)
        outputs = []
        for x_t in x:
            state = torch.stack(self.one_step(x_t, *state))
            outputs.append(state[0])
        y, layout = torch.stack(outputs), self.config.output_shape
        axes = "SBNH" if "N" in layout else "SBH"
        if "N" in layout:
            y = y.unflatten(2, (self.config.num_heads, -1))
        return y.permute([axes.index(axis) for axis in layout]), state

    def one_step(self, x, h, c, n, m):
        heads = self.config.num_heads
        blocks = self._recurrent_kernel_.unflatten(1, (4, -1))  # heads, gates, to, from
        mixed = torch.einsum("bhf,hgtf->bght", h.unflatten(1, (heads, -1)), blocks)
        i, f, z, o = (x + self._bias_ + mixed.flatten(1)).unflatten(1, (4, -1)).unbind(1)
        kept = nn.functional.logsigmoid(f) + m
        m = i if not n.any() else torch.maximum(kept, i)
        keep, add = torch.exp(kept - m).clamp(max=1), torch.exp(i - m)
        c, n = keep * c + add * torch.tanh(z), keep * n + add
        return torch.sigmoid(o) * c / n, c, n, m


Reference.__module__ = MODULE
Reference.__name__ = Reference.__qualname__ = "sLSTMCell_vanilla"


@pytest.fixture(params=["our loop", "the package"])
def make(request):
    """A function that makes a cell with random weights, ours or the package's, from settings."""
    if request.param == "our loop":
        kind, config = Reference, Config
    else:
        package = pytest.importorskip(MODULE, reason="xlstm is not installed")
        kind, config = package.sLSTMCell, package.sLSTMCellConfig

    def function(**settings):
        options = {"hidden_size": HIDDEN, "num_heads": HEADS, "backend": "vanilla", **settings}
        cell = kind(config(**options)).double()
        with torch.no_grad():
            for weight in cell.parameters():
                weight.normal_(std=0.7)
        return cell

    return function


def draw(*batch_and_time, features=4 * HIDDEN):
    return torch.randn(*(batch_and_time or (BATCH, TIME)), features, dtype=torch.float64)


def usual(batch=BATCH):
    """A state in which something has been added to n."""
    return torch.rand(4, batch, HIDDEN, dtype=torch.float64) + 0.5


def fresh_rows():
    """One sequence begins where the others go on."""
    state = usual()
    state[:, 1] = 0
    return state


def nothing_counted():
    """n is zero, c and m are not."""
    state = usual()
    state[2] = 0
    return state


STATES = {
    "none": lambda: None,
    "zeros": lambda: torch.zeros(4, BATCH, HIDDEN, dtype=torch.float64),
    "usual": usual,
    "fresh rows": fresh_rows,
    "nothing counted": nothing_counted,
}


def gradients(cell, x, state, parameters):
    """Results of a call, and the gradients of everything that went in, with random cotangents."""
    given = [t.requires_grad_() for t in (x, state, *parameters) if t is not None]
    values = cell(x, state)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(v.shape, generator=generator, dtype=v.dtype) for v in values]
    return [*values, *torch.autograd.grad(values, given, cotangents)]


def agree(cell, x, state, **options):
    parameters = list(cell.parameters())
    expected = gradients(cell, x, state, parameters)
    found = gradients(parallelize(cell, **options), x, state, parameters)
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"value or gradient {i}", f, e, rtol=1e-11)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_values_states_and_gradients(make, heads, state):
    agree(make(num_heads=heads), draw(), STATES[state]())


def test_plan_and_report_are_those_of_its_recurrence(make):
    ours, x = parallelize(make()), draw()
    assert ours.report is None
    ours(x)
    assert torch.equal(ours.report.values, ours.layers[0].report.values)
    assert ours.plan(x.shape) == ours.layers[0].plan(x.shape)


@pytest.mark.parametrize("input_shape", ["BSGNH", "SBGNH"])
@pytest.mark.parametrize("output_shape", ["BNSH", "SBH", "BSH", "SBNH"])
def test_layouts(make, input_shape, output_shape):
    x = draw() if input_shape == "BSGNH" else draw(TIME, BATCH)
    agree(make(input_shape=input_shape, output_shape=output_shape), x, usual())


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("options", [{"solver": Newton(chunk=8), "backend": "torch"}, {}], ids=str)
def test_in_chunks(make, options, state):
    agree(make(), draw(BATCH, 100), STATES[state](), **options)


def test_a_state_goes_on(make):
    ours, x = parallelize(make()), draw(BATCH, 20)
    y, last = ours(x)
    first, state = ours(x[:, :7])
    second, state = ours(x[:, 7:], state=state, lengths=None)
    assert_close("y", torch.cat([first, second], 2), y, rtol=1e-12)
    assert_close("state", state, last, rtol=1e-12)


def test_steps_equal_the_whole(make):
    ours, x = parallelize(make()), draw()
    expected, last = ours(x)
    outputs, state = [], None
    for t in range(TIME):
        y, state = ours.step(x[:, t : t + 1], state)
        outputs.append(y)
    assert_close("y", torch.cat(outputs, 2), expected, rtol=1e-12)
    assert_close("state", state, last, rtol=1e-12)


def test_the_very_same_parameters(make):
    cell = make()
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    ours, x = parallelize(cell), draw()
    assert list(ours.named_parameters()) == list(cell.named_parameters())
    before = cell(x)[0]
    ours(x)[0].square().sum().backward()
    optimizer.step()
    assert not torch.equal(cell(x)[0], before)
    assert_close("y", ours(x)[0], cell(x)[0], rtol=1e-12)


class Layer(nn.Module):
    """Around a cell, what the package has around it: projections before, a norm of heads behind."""

    def __init__(self, cell):
        super().__init__()
        self.gates = nn.Linear(HIDDEN, 4 * HIDDEN).double()
        self.slstm_cell = cell
        self.group_norm = nn.GroupNorm(HEADS, HIDDEN).double()

    def forward(self, x, slstm_state=None):
        y, state = self.slstm_cell(self.gates(x), state=slstm_state)
        y = y.transpose(1, 2).flatten(2)
        return x + self.group_norm(y.flatten(0, 1)).unflatten(0, y.shape[:2]), state


def test_cells_inside_a_model_are_replaced(make):
    model = nn.Sequential(Layer(make()), nn.Identity())
    x = draw(features=HIDDEN)
    expected, parameters = model(x), dict(model.named_parameters())
    assert parallelize(model, solver=Newton(chunk=4)) is model
    assert model[0].slstm_cell.layers[0].solver == Newton(chunk=4)
    found = dict(model.named_parameters())
    assert list(found) == list(parameters)
    assert all(found[name] is p for name, p in parameters.items())
    for f, e in zip(model(x), expected, strict=True):
        assert_close("value", f, e, rtol=1e-11)


def test_checkpoints_go_both_ways(make):
    cell, ours, x = make(), parallelize(Layer(make())), draw()
    saved = {f"slstm_cell.{name}": t.clone() for name, t in cell.state_dict().items()}
    kept = {n: t for n, t in ours.state_dict().items() if "slstm_cell" in n}
    assert list(kept) == list(saved)
    ours.load_state_dict(saved, strict=False)
    assert_close("y", ours.slstm_cell(x)[0], cell(x)[0], rtol=1e-12)
    other = make()
    other.load_state_dict(ours.slstm_cell.state_dict())
    assert_close("y", other(x)[0], cell(x)[0], rtol=1e-12)
    with pytest.raises(
        RuntimeError, match=r"Missing key\(s\) in state_dict: \"_bias_\"\."
    ) as error:
        ours.slstm_cell.load_state_dict({"_recurrent_kernel_": saved.popitem()[1]}, strict=True)
    assert "layers.0" not in str(error.value).split("size mismatch")[0]


def other_weight(cell):
    cell._bias_ = nn.Parameter(cell._bias_.detach() * 0.5)


def normed(cell):
    parametrizations.weight_norm(cell, "_recurrent_kernel_")


def another_checkpoint(cell):
    cell.load_state_dict({n: 0.5 * t for n, t in cell.state_dict().items()}, assign=True)


def another_type(cell):
    cell.float().double()


@pytest.mark.parametrize("change", [other_weight, normed, another_checkpoint, another_type])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cell_that_changes(make, change, when):
    cell, x = make(), draw()
    ours = make()
    ours.load_state_dict(cell.state_dict())
    ours = parallelize(ours)
    if when == "after":
        ours(x)
    for each in (cell, ours):
        change(each)
        each(x)[0].square().sum().backward()
    assert list(ours.state_dict()) == list(cell.state_dict())
    assert_close("y", ours(x)[0], cell(x)[0], rtol=1e-12)
    pairs = zip(ours.named_parameters(), cell.named_parameters(), strict=True)
    for (name, found), (expected_name, expected) in pairs:
        assert name == expected_name
        assert_close(name, found.grad, expected.grad, rtol=1e-11)


def test_weights_drawn_anew(make):
    cell = make(recurrent_weight_init="standard")
    ours, x = parallelize(copy.deepcopy(cell)), draw()
    parameters = list(ours.parameters())
    for each in (cell, ours):
        torch.manual_seed(1)
        each.reset_parameters()
    for found, expected in zip(ours.parameters(), cell.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert all(f is p for f, p in zip(ours.parameters(), parameters, strict=True))
    assert_close("y", ours(x)[0], cell(x)[0], rtol=1e-12)


@pytest.fixture
def as_imported(monkeypatch):
    """Have pickle find our loop where it says that it comes from."""
    parts = MODULE.split(".")
    names = [".".join(parts[: count + 1]) for count in range(len(parts))]
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    vars(sys.modules[MODULE])[Reference.__name__] = Reference


@pytest.mark.usefixtures("as_imported")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    ours, x = parallelize(Reference(Config()).double()), draw()
    expected, other = ours(x)[0], copied(ours)
    assert_close("y", other(x)[0], expected, rtol=1e-12)
    other.load_state_dict({n: 0 * t for n, t in ours.state_dict().items()})
    assert_close("y", ours(x)[0], expected, rtol=1e-12)
    assert not torch.allclose(other(x)[0], expected)


def test_weights_by_head_and_gate(make):
    """As the package shows them, to read and to write into."""
    cell = make()
    ours, size = parallelize(cell), HIDDEN // HEADS
    weight = cell._recurrent_kernel_.detach().clone()
    assert ours.recurrent_kernel.shape == (HEADS, size, 4, size)
    assert torch.equal(ours.recurrent_kernel[1, 2, 3], weight[1, 3 * size :, 2])
    assert ours.bias.shape == (HEADS, 4, size)
    assert torch.equal(ours.bias[1, 2], cell._bias_[2 * HIDDEN + size : 2 * HIDDEN + 2 * size])
    ours.bias[1, 2] = 7.0
    assert (cell._bias_ == 7.0).sum() == size
    if not isinstance(cell, Reference):
        assert torch.equal(ours.recurrent_kernel, cell.recurrent_kernel[:])
        assert torch.equal(ours.bias, cell.bias[:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(make, dtype):
    cell = make()
    exact = cell(draw := torch.randn(BATCH, TIME, 4 * HIDDEN).to(dtype).double())
    narrow = parallelize(cell.to(dtype))(draw.to(dtype))
    for found, expected in zip(narrow, exact, strict=True):
        assert found.dtype is dtype
        assert_close("value", found.double(), expected, rtol=20 * torch.finfo(dtype).eps)


def test_autocast(make):
    """Inputs as a linear layer makes them under autocast; the state keeps their type."""
    cell = make().float()
    ours, x = parallelize(cell), torch.randn(BATCH, TIME, 4 * HIDDEN).bfloat16()
    expected = cell.double()(x.double())
    cell.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found, exact in zip(ours(x), expected, strict=True):
            assert found.dtype is torch.bfloat16
            assert_close("value", found.double(), exact, rtol=0.1)


def test_compiled():
    ours, x = parallelize(Layer(Reference(Config()).double())), draw(features=HIDDEN)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert_close("y", compiled(x)[0], ours(x)[0], rtol=1e-12)


def test_steps_are_proved_to_stay_within_heads():
    ours = parallelize(Reference(Config()))
    assert "heads (size 4)" in str(pararnn.explain(ours.layers[0]))


def weight_normed():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(Reference(Config()), "_recurrent_kernel_")


def of_two_types():
    cell = Reference(Config())
    cell._recurrent_kernel_.data = cell._recurrent_kernel_.data.bfloat16()
    return cell


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (
            lambda: Reference(Config(backend="cuda")),
            r"sLSTMCell_vanilla has backend='cuda', which .* make it with backend='vanilla'",
        ),
        (lambda: Reference(Config(function="lstm")), r"has function='lstm'; .* function='slstm'"),
        (
            lambda: Reference(Config(gradient_recurrent_cut=True)),
            "has gradient_recurrent_cut=True; .* gradient_recurrent_cut=False",
        ),
        (
            lambda: nn.ModuleDict({"a": Reference(Config(gradient_recurrent_clipval=1.0))}),
            r"sLSTMCell_vanilla 'a' has gradient_recurrent_clipval=1\.0; .*=None: make it with",
        ),
        (lambda: Reference(Config(forward_clipval=2.0)), r"has forward_clipval=2\.0"),
        (weight_normed, "_recurrent_kernel_ of sLSTMCell_vanilla is not a parameter but computed"),
        (
            of_two_types,
            r"recurrent weights of type torch\.bfloat16 and biases of type torch\.float32; give",
        ),
    ],
)
def test_what_is_refused(cell, words):
    with pytest.raises(ValueError, match=words):
        parallelize(cell())


class Own(Reference):
    pass


def test_subclasses_are_left_alone():
    with pytest.raises(ValueError, match="no sLSTMCell of xlstm"):
        parallelize(Own(Config()))


def test_wrong_calls():
    ours, first = parallelize(Reference(Config())), parallelize(Reference(Config(input_shape="S")))
    with pytest.raises(ValueError, match=r"input has shape \(3, 9, 8\); pass \(batch, time, 32\)"):
        ours(torch.randn(3, 9, 8))
    with pytest.raises(ValueError, match=r"input has shape \(3, 32\); pass \(time, batch, 32\)"):
        first(torch.randn(3, 32))
    with pytest.raises(ValueError, match=r"state has shape \(4, 9, 8\); pass \(4, 3, 8\)"):
        ours(torch.randn(3, 9, 32), torch.zeros(4, 9, 8))


def test_cells_of_the_cuda_backend_go_by_way_of_the_plain_one():
    package = pytest.importorskip(MODULE, reason="xlstm is not installed")
    settings = {"hidden_size": HIDDEN, "num_heads": HEADS}
    config = package.sLSTMCellConfig(**settings, backend="cuda")
    cell = package.sLSTMCell(config, skip_backend_init=True)
    with pytest.raises(ValueError, match=r"sLSTMCell_cuda has backend='cuda', .* make it with"):
        parallelize(cell)
    plain = package.sLSTMCell(package.sLSTMCellConfig(**settings, backend="vanilla"))
    plain.recurrent_kernel[:], plain.bias[:] = cell.recurrent_kernel[:], cell.bias[:]
    ours = parallelize(plain)
    assert torch.equal(ours.recurrent_kernel, cell.recurrent_kernel[:])
    assert torch.equal(ours.bias, cell.bias[:])


def test_a_model_of_the_package():
    """A stack of blocks with convolutions, in which nothing but the cells changes."""
    package = pytest.importorskip("xlstm", reason="xlstm is not installed")
    layer = package.sLSTMLayerConfig(
        backend="vanilla", num_heads=HEADS, recurrent_weight_init="standard"
    )
    block = package.sLSTMBlockConfig(slstm=layer, feedforward=package.FeedForwardConfig())
    config = package.xLSTMBlockStackConfig(
        slstm_block=block, num_blocks=2, embedding_dim=HIDDEN, context_length=TIME
    )
    model = package.xLSTMBlockStack(config).double()
    x = draw(features=HIDDEN)

    def outcome():
        with torch.no_grad():
            _, state = model.step(x[:, :1])
            second, _ = model.step(x[:, 1:2], state=state)
        y = model(x)
        return [second, y, *torch.autograd.grad(y.sin().sum(), list(model.parameters()))]

    expected, names = outcome(), list(model.state_dict())
    assert parallelize(model) is model
    assert list(model.state_dict()) == names
    scale = max(e.abs().max().item() for e in expected)
    for found, e in zip(outcome(), expected, strict=True):
        assert_close("value or gradient", found, e, rtol=1e-10, atol=1e-12 * scale)
