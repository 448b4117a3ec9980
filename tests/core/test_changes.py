"""A cell that changes after its first call is evaluated as it is then."""

import collections
import copy
import cProfile
import dataclasses
import functools
import gc
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations, parametrize

from pararnn import RNN, Newton, TraceError, layers, scan
from pararnn.testing import loop

from .compare import assert_same, outcome

SCALE = 0.5
SETTINGS = types.SimpleNamespace(shift=0.1, deeper={"list": [0.2]})


def shifted(h, by=(0.1,)):
    return h + by[0] * SETTINGS.shift + SETTINGS.deeper["list"][0]


def make_activation(scale):
    return lambda h: torch.tanh(scale * h)


@dataclasses.dataclass
class Options:
    leak: float = 0.5
    terms: list = dataclasses.field(default_factory=lambda: [0.1, 0.2])
    other: object = None


class Defaults:
    """Its objects have no attributes of their own."""

    rate = 0.2


class Slotted:
    __slots__ = ("gain",)

    def __init__(self, gain):
        self.gain = gain

    def __call__(self, h):
        return self.gain * h


class Scaled(nn.Module):
    """A parametrisation, and a module to swap in."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return self.by * x


class Cell(nn.Module):
    input_size, hidden_size = 3, 4
    offset, offsets = 0.1, (0.1, 0.2)

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3, 4)
        self.decay = nn.Parameter(torch.rand(4))
        self.register_buffer("floor", torch.rand(4))
        self.act = nn.Sequential(nn.Tanh(), nn.LayerNorm(4, elementwise_affine=False))
        self.act.eps = 0.0
        self.mix, self.gain, self.mode = (0.5, 0.5), 0.7, "tanh"
        self.options = {"leak": 0.5, "inner": {"terms": [0.1, 0.2]}}
        self.nested = Options(other=types.SimpleNamespace(weight=0.3))
        self.defaults, self.order = Defaults(), {"first": 0.1, "second": 0.3}
        self.queue = collections.deque([0.1, 0.2])
        self.chosen = {"a", "b"}
        self.slotted = Slotted(0.4)
        self.squash = make_activation(0.9)
        self.partial = functools.partial(torch.mul, other=0.6)
        self.array = np.array([0.1, 0.2])
        self.held = [torch.rand(4).double(), self.decay]
        self.dropout = nn.Dropout(0.0)

    @property
    def computed(self):
        return self.gain * self.offset

    def forward(self, x, h):
        u = self.project(x) + self.computed + self.offsets[1] + SCALE
        v = self.mix[0] * h + self.options["leak"] * self.options["inner"]["terms"][1] * u
        v = v + self.nested.leak * self.nested.terms[-1] * self.nested.other.weight
        v = v + self.queue[0] + ("a" in self.chosen) * 0.3 + self.slotted(self.decay * h)
        v = shifted(v) + self.squash(h) + self.partial(self.floor) + float(self.array[1])
        v = v + self.held[0] * 0.1 + self.held[1] * 0.1
        v = self.dropout(v) + (0.2 if self.training else 0.1)
        v = v + self.defaults.rate * next(iter(self.order.values()))
        if "extra" in self.options:
            v = v - 0.3
        return self.helper(self.act(v) if self.mode == "tanh" else torch.sin(v))

    def helper(self, h):
        return 0.9 * h


def put(owner, name, value):
    """A change that sets an attribute, of the cell's by path."""

    def change(cell, number):
        *path, last = name.split(".")
        of = functools.reduce(getattr, path, owner or cell)
        setattr(of, last, value(number) if callable(value) else value)

    return change


def when(possible, change):
    """A change that is left out where earlier ones have made it impossible."""
    return lambda cell, number: change(cell, number) if possible(cell) else None


def simple(cell, number, x, h):
    return torch.tanh(cell.project(x) + number * cell.decay * h)


def hook(cell, number):
    cell.project.register_forward_hook(lambda m, x, y: y * number)


def add_merged_adapter(cell, number):
    cell.project.weight.data = cell.project.weight.data + number


CHANGES = {
    "attribute": put(None, "gain", float),
    "mode": put(None, "mode", "sin"),
    "tuple": put(None, "mix", lambda n: (n, 0.5)),
    "dictionary": lambda c, n: c.options.update(leak=n),
    "list in dictionaries": lambda c, n: c.options["inner"]["terms"].__setitem__(1, n),
    "another key": lambda c, n: c.options.update(extra=True),
    "dataclass": put(None, "nested.leak", float),
    "list in a dataclass": lambda c, n: c.nested.terms.append(n),
    "namespace in a dataclass": put(None, "nested.other.weight", float),
    "another dataclass": put(None, "nested", lambda n: Options(n, [n], c0().nested.other)),
    "attribute over one of an object's class": put(None, "defaults.rate", float),
    "order of a dictionary": lambda c, n: c.order.update(first=c.order.pop("first")),
    "deque": lambda c, n: c.queue.appendleft(n),
    "set": lambda c, n: c.chosen.discard("a"),
    "slots": put(None, "slotted.gain", float),
    "closure": put(None, "squash", make_activation),
    "inside a closure": lambda c, n: setattr(c.squash.__closure__[0], "cell_contents", n),
    "partial": put(None, "partial", lambda n: functools.partial(torch.mul, other=n)),
    "inside a partial": lambda c, n: c.partial.keywords.update(other=n),
    "array": lambda c, n: c.array.__setitem__(1, n),
    "tensor in a list": lambda c, n: c.held.__setitem__(0, torch.full((4,), n).double()),
    "tensor in a list, in place": lambda c, n: c.held[0].fill_(n),
    "parameter that a list holds": put(
        None, "decay", lambda n: nn.Parameter(torch.full((4,), n).double())
    ),
    "buffer": put(None, "floor", lambda n: torch.full((4,), n).double()),
    "parameter in place": lambda c, n: c.project.weight.data.mul_(n),
    "parameter's data": add_merged_adapter,
    "submodule": put(None, "act", lambda n: nn.Sigmoid()),
    "module in a submodule": when(
        lambda c: isinstance(c.act, nn.Sequential),
        lambda c, n: c.act.__setitem__(0, nn.Softplus(beta=abs(n))),
    ),
    "user's submodule": put(None, "act", Scaled),
    "setting of PyTorch's module": when(
        lambda c: isinstance(c.act, nn.Sequential), lambda c, n: setattr(c.act[1], "eps", abs(n))
    ),
    "class of the cell": lambda c, n: setattr(c, "__class__", Other),
    "class attribute": put(Cell, "offset", float),
    "tuple of the class": put(Cell, "offsets", lambda n: (0.0, n)),
    "method": put(Cell, "helper", lambda n: lambda self, h: n * h),
    "forward": put(Cell, "forward", lambda n: functools.partialmethod(simple, n)),
    "property": put(Cell, "computed", lambda n: property(lambda self: n)),
    "method of an object's class": put(Slotted, "__call__", lambda n: lambda self, h: n * h),
    "global": lambda c, n: globals().update(SCALE=n),
    "namespace among globals": put(SETTINGS, "shift", float),
    "list among globals": lambda c, n: SETTINGS.deeper["list"].__setitem__(0, n),
    "default of a function": lambda c, n: setattr(shifted, "__defaults__", ((n,),)),
    "function": lambda c, n: globals().update(shifted=lambda h: h * n),
    "forward hook": hook,
    "forward hook on the cell": lambda c, n: c.register_forward_hook(lambda m, x, y: y * n),
    "forward pre-hook": lambda c, n: c.register_forward_pre_hook(lambda m, x: (x[0] * n, x[1])),
    "hook of all modules": lambda c, n: nn.modules.module.register_module_forward_hook(
        lambda m, x, y: y * n if isinstance(m, nn.Linear) else None
    ),
    "hook is gone": lambda c, n: c.project._forward_hooks.clear(),
    "parametrisation": lambda c, n: parametrize.register_parametrization(
        c.project, "weight", Scaled(n)
    ),
    "setting of a parametrisation": when(
        lambda c: parametrize.is_parametrized(c.project, "weight"),
        lambda c, n: setattr(c.project.parametrizations.weight[0], "by", n),
    ),
    "weight norm": when(
        lambda c: c.project.bias is not None and not parametrize.is_parametrized(c.project, "bias"),
        lambda c, n: parametrizations.weight_norm(c.project, "bias", dim=None),
    ),
    "no bias": when(
        lambda c: not parametrize.is_parametrized(c.project, "bias"),
        put(None, "project.bias", None),
    ),
    "evaluation": lambda c, n: c.eval(),
    "training": lambda c, n: c.train(),
    "frozen": lambda c, n: c.requires_grad_(False),
    "single precision and back": lambda c, n: c.float().double(),
    "forward of the instance": lambda c, n: setattr(c, "forward", lambda x, h: simple(c, -n, x, h)),
}


WITHOUT_EFFECT = {"hook is gone", "setting of a parametrisation", "training", "frozen"}
WITHOUT_EFFECT |= {"weight norm", "single precision and back"}


class Other(Cell):
    offset = -0.4


def c0():
    return Cell()


@pytest.fixture
def restored(monkeypatch):
    """What changes touch outside of the cell is put back."""
    restore = _outside()
    yield
    restore()


def _outside():
    module = globals()
    kept = {n: module[n] for n in ("SCALE", "shifted")}
    kept_classes = {k: dict(vars(k)) for k in (Cell, Slotted)}
    shift, deeper, defaults = SETTINGS.shift, SETTINGS.deeper["list"][0], shifted.__defaults__
    everywhere = nn.modules.module._global_forward_hooks

    def restore():
        module.update(kept)
        for kind, own in kept_classes.items():
            for name in ("offset", "offsets", "helper", "forward", "computed", "__call__"):
                if name in own:
                    setattr(kind, name, own[name])
        SETTINGS.shift, SETTINGS.deeper["list"][0] = shift, deeper
        kept["shifted"].__defaults__ = defaults
        everywhere.clear()

    return restore


def check(rnn, label=""):
    """Compare a layer with the loop, whose values are returned."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    state = torch.randn(2, 4, dtype=torch.float64)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    unused = {name for name, value in expected.items() if not value.any()}
    assert "gradient of x" not in unused
    actual = outcome(rnn, rnn.cell, x, state)
    assert_same(actual, expected, 1e-10, unused, label=f"{label}: ")
    return expected["y"]


@pytest.mark.parametrize("change", CHANGES)
def test_each(change, restored):
    rnn = RNN(Cell().double(), backend="torch", solver=Newton(chunk=3))
    before = check(rnn)
    CHANGES[change](rnn.cell, 0.35)
    changed = not torch.equal(check(rnn, change), before)
    assert changed == (change not in WITHOUT_EFFECT)


@pytest.mark.parametrize(
    "change",
    [
        put(None, "mix", lambda n: (0.5, 0.5)),
        put(None, "options", lambda n: {"leak": 0.5, "inner": {"terms": [0.1, 0.2]}}),
        put(None, "squash", lambda n: make_activation(0.9)),
        put(None, "unread", float),
        put(None, "nested.unread", float),
        lambda c, n: c.project.weight.data.mul_(n),
        put(None, "decay", lambda n: nn.Parameter(torch.rand(4).double())),
        lambda c, n: c.eval().train(),
    ],
)
def test_not_traced_again_for_equal_values_or_what_is_not_read(change):
    cell = Cell().double()
    cell.held.pop()  # the parameter
    cell.held.append(0.3)
    rnn = RNN(cell, backend="torch", solver=Newton(chunk=3))
    before = rnn.runner()
    for number in (0.2, 0.3):
        change(cell, number)
        check(rnn)
        assert rnn.runner() is before


@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
def test_compiled(restored):
    """The compiler is told of changes that it does not look for; equal layers share a graph."""
    counter = CompileCounterWithBackend("aot_eager")
    layers = [RNN(Cell().double(), backend="torch", solver=Newton(chunk=3)) for _ in range(2)]
    compiled = [torch.compile(layer, backend=counter, fullgraph=True) for layer in layers]
    x, state = torch.randn(2, 5, 3).double(), torch.randn(2, 4).double()

    def check(graphs):
        for layer, function in zip(layers, compiled, strict=True):
            expected = outcome(functools.partial(loop, layer.cell), layer.cell, x, state)
            assert_same(outcome(function, layer.cell, x, state), expected, 1e-10)
        assert counter.frame_count == graphs

    check(1)
    layers[0].cell.mix = (0.5, 0.5)  # as it was
    layers[1].cell.floor = torch.rand(4).double()
    check(1)
    for graphs, change in enumerate(["tuple", "inside a closure", "forward hook"], start=2):
        CHANGES[change](layers[1].cell, 0.35)
        check(graphs)
    CHANGES["method"](layers[1].cell, 0.35)  # of both
    check(6)
    layers[1].cell.gain = 0.1
    layers[1](x, state)  # which traces it
    check(7)


class Plain(nn.Module):
    input_size, hidden_size = 3, 4

    def __init__(self):
        super().__init__()
        self.project, self.decay = nn.Linear(3, 4), nn.Parameter(torch.rand(4))

    def forward(self, x, h):
        return torch.tanh(self.project(x) + self.decay * h)


@pytest.mark.parametrize("backend", ["torch", "c"])
def test_adapters(backend):
    """LoRA of peft, which keeps what it does in lists and dictionaries."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["project"], init_lora_weights=False)
    rnn = RNN(Plain(), backend=backend).double()
    model = peft.get_peft_model(nn.Sequential(rnn), lora)
    changes = [
        lambda: model.add_adapter("second", lora),
        lambda: model.set_adapter("second"),
        lambda: model.base_model.model[0].cell.project.set_scale("second", 0.3),
        lambda: model.merge_adapter(),
        lambda: model.unmerge_adapter(),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.base_model.set_adapter(["default", "second"]),
        lambda: model.delete_adapter("default"),
    ]
    values = [check(rnn)]
    for change in changes:
        change()
        rnn.double()
        values.append(check(rnn))
    assert len({v.sum().item() for v in values}) > 4


def test_elementwise_cells_on_every_backend(any_backend):
    rnn = RNN(Plain().double(), backend=any_backend)
    values = [check(rnn)]
    for number in (0.5, -2.0):
        rnn.cell.forward = functools.partial(simple, rnn.cell, number)
        rnn.cell.project.register_forward_hook(lambda m, x, y, by=number: y * by)
        values.append(check(rnn))
    assert len({v.sum().item() for v in values}) == 3


def test_exported_as_it_is():
    rnn, x = RNN(Plain(), backend="torch"), torch.randn(2, 5, 3)
    rnn.cell.register_forward_hook(lambda m, x, y: y * 0.5)
    with pytest.raises(RuntimeError, match=r"Plain has changed.*call the layer once before"):
        torch.export.export(rnn, (x,), strict=False)
    rnn(x)
    program = torch.export.export(rnn, (x,), strict=False)
    torch.testing.assert_close(program.module()(x)[0], rnn(x)[0])


REFUSED = {
    "backward hook": (
        lambda c: c.project.register_full_backward_hook(lambda m, of_x, of_y: (of_x[0] * 2,)),
        "backward hook \\(on self.project\\)",
    ),
    "backward pre-hook": (
        lambda c: c.register_full_backward_pre_hook(lambda m, of_y: (of_y[0] * 2,)),
        "backward hook \\(on the cell\\)",
    ),
    "backward hook of all modules": (
        lambda c: nn.modules.module.register_module_full_backward_hook(lambda *_: None),
        "backward hook \\(for all modules\\)",
    ),
    "hook on a tensor": (
        lambda c: c.project.register_forward_hook(scale_gradient),
        "the gradient of .* differs from what autograd gives",
    ),
    "values of a parameter": (
        lambda c: setattr(c, "squash", lambda h: h * torch.tensor(c.decay.tolist())),
        r"takes the values of a tensor into Python at .*\(\.tolist\(\)\)",
    ),
    "values of a parameter by NumPy": (
        lambda c: setattr(c, "squash", lambda h: h * float(np.asarray(c.decay.detach())[0])),
        r"takes the values of a tensor into Python at .*test_changes.*\(\.numpy\(\)\)",
    ),
}


def scale_gradient(module, x, y):
    y.register_hook(lambda gradient: gradient * 2)


@pytest.mark.parametrize("change", REFUSED)
def test_refused(change):
    rnn = RNN(Cell().double(), backend="torch", solver=Newton(chunk=3))
    check(rnn)
    apply, message = REFUSED[change]
    apply(rnn.cell)
    try:
        for _ in range(2):
            with pytest.raises(TraceError, match=message):
                rnn(torch.randn(2, 5, 3, dtype=torch.float64))
    finally:
        nn.modules.module._global_backward_hooks.clear()


@pytest.fixture
def traced(monkeypatch):
    """The names of what has been traced."""
    names = []
    for module in (layers.rnn, layers.scan):

        def counted(subject, *arguments, of=module.trace):
            names.append(subject.name)
            return of(subject, *arguments)

        monkeypatch.setattr(module, "trace", counted)
    return names


def test_what_alternates_is_traced_once_for_each_value(traced):
    rnn = RNN(Cell().double(), backend="torch", solver=Newton(chunk=3))
    other = Newton(chunk=2)

    def settings():
        for training in (True, False):
            yield rnn.train(training)
        rnn.cell.mix, rnn.solver = (0.25, 0.75), other
        yield rnn
        rnn.cell.mix, rnn.solver = (0.5, 0.5), Newton(chunk=3)
        rnn.float()
        rnn.double()

    for _ in range(3):
        for layer in settings():
            layer.cell.decay = nn.Parameter(torch.rand(4).double())
            layer.cell.held[1] = layer.cell.decay
            check(layer)
    assert len(traced) == 4  # with the one in float32
    for gain in range(6):  # no more are kept than some
        rnn.cell.gain = gain / 10
        check(rnn)
    assert len(rnn._traces._kept) == 4
    count = len(traced)
    check(copy.deepcopy(rnn))
    assert len(traced) == count + 1


def test_modes_that_alternate_are_compiled_once_for_each():
    counter = CompileCounterWithBackend("aot_eager")
    rnn = RNN(Cell().double(), backend="torch", solver=Newton(chunk=3))
    compiled = torch.compile(rnn, backend=counter, fullgraph=True)
    x, state = torch.randn(2, 5, 3).double(), torch.randn(2, 4).double()
    for number in range(6):
        rnn.train(number % 2 == 0)
        assert_same({"y": compiled(x, state)[0]}, {"y": loop(rnn.cell, x, state)[0]}, 1e-10)
    assert counter.frame_count == 2


class OfModes(nn.Module):
    """Takes x in another way in each mode."""

    input_size = hidden_size = 4
    num_components = 1

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.rand(4))

    def forward(self, x, h):
        return torch.tanh(self.a * h + (x if self.training else x.flip(-1)))


def test_compiled_calls_after_others_in_another_mode():
    counter = CompileCounterWithBackend("aot_eager")
    rnn = RNN(OfModes().double(), backend="torch", solver=Newton(chunk=3))
    compiled = torch.compile(rnn, backend=counter, fullgraph=True)
    state = torch.randn(2, 4).double()

    def holds(call, x):
        assert_same({"y": call(x, state)[0]}, {"y": loop(rnn.cell, x, state)[0]}, 1e-10)

    for time in (5, 5, 8, 9):
        x = torch.randn(2, time, 4).double()
        for call in (rnn, compiled):
            rnn.train(call is compiled)
            holds(call, x)
    assert counter.frame_count == 2  # the second for any time
    holds(rnn.eval(), x)
    holds(torch.export.export(rnn.train(), (x, state), strict=False).module(), x)


def test_scan_keeps_what_alternates(traced):
    rate = 0.0

    def step(h, x):
        return torch.tanh(rate * h + x)

    h, x = torch.zeros(2, 4).double(), torch.randn(2, 6, 4).double()
    for rate in (0.1, 0.9, 0.1, 0.9, 0.1):  # noqa: B007, which the step reads
        expected, now = [], h
        for t in range(6):
            now = step(now, x[:, t])
            expected.append(now)
        y, _ = scan(step, h, x, backend="torch")
        assert_same({"y": y}, {"y": torch.stack(expected, 1)}, 1e-10)
    assert traced == ["step"] * 2


def test_another_cell_in_the_layer():
    rnn = RNN(Cell().double(), backend="torch", solver=Newton(chunk=3))
    check(rnn)
    rnn.cell = Other().double()
    check(rnn)


def test_a_number_that_changes_at_every_call_is_warned_of():
    rnn = RNN(Cell().double(), backend="torch", solver=Newton(chunk=3))

    def anneal(steps):
        for step in steps:
            rnn.cell.gain = 1 / (2 + step)
            check(rnn)

    anneal(range(7))
    with pytest.warns(UserWarning, match=r"self\.gain changed.*register_buffer\('gain'"):
        anneal([7])
    anneal([8, 9])


def test_records_of_many_hooks_in_one_place_are_warned_of():
    rnn, seen = RNN(Cell().double(), backend="torch", solver=Newton(chunk=3)), {}
    for module in (rnn.cell, rnn):
        module.register_forward_hook(lambda m, x, y: seen.__setitem__(type(m).__name__, y))
    for _ in range(9):
        check(rnn)
    with pytest.warns(UserWarning, match=r"because .*seen\['Cell'\] changed.*nothing else writes"):
        check(rnn)


def test_modes_that_change_often_are_not_warned_of(recwarn):
    rnn = RNN(Cell().double(), backend="torch", solver=Newton(chunk=3))
    for number in range(10):
        rnn.train(number % 2 == 0)
        check(rnn)
    assert not recwarn.list


def test_callbacks_of_the_garbage_collector_are_not_taken_for_the_step():
    cell = Cell()

    def collect(cell, x, y):
        for _ in range(20):
            [[] for _ in range(1000)]  # enough for the collector to run

    cell.register_forward_hook(collect)
    callback = lambda phase, info: None  # noqa: E731
    gc.callbacks.append(callback)
    rnn = RNN(cell, backend="torch")
    gc.callbacks.remove(callback)
    assert id(callback.__code__) not in rnn._watched.ran.codes
    assert id(collect.__code__) in rnn._watched.ran.codes


def test_a_profiler_goes_on_after_a_trace():
    profiler = cProfile.Profile()
    with profiler:
        RNN(Cell())
        make_activation(0.1)
    names = {
        code.co_name for code in (e.code for e in profiler.getstats()) if hasattr(code, "co_name")
    }
    assert "make_activation" in names
    seen = []
    sys.setprofile(lambda *event: seen.append(event))
    try:
        RNN(Cell())
        assert sys.getprofile() is not None
    finally:
        sys.setprofile(None)


@settings(max_examples=10)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(CHANGES)), st.sampled_from((0.2, -0.6, 1.1))),
        min_size=2,
        max_size=5,
    )
)
def test_many(changes):
    restore = _outside()
    try:
        torch.manual_seed(0)
        rnn = RNN(Cell().double(), backend="torch", solver=Newton(chunk=3))
        check(rnn)
        for change, number in changes:
            CHANGES[change](rnn.cell, number)
            check(rnn, f"{change} {number}")
    finally:
        restore()


def test_a_compiled_function_in_a_step_is_traced_as_it_was_written():
    compiled = []

    def backend(graph, _inputs):
        compiled.append(graph)
        return graph.forward

    function = torch.compile(lambda a, h: torch.tanh(a * h), backend=backend)

    class Compiled(nn.Module):
        input_size = hidden_size = 4

        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.rand(4))

        def forward(self, x, h):
            return x + function(self.a, h)

    RNN(Compiled(), structure="elementwise")(torch.randn(2, 5, 4))
    assert not compiled
    function(torch.ones(5), torch.ones(5))
    assert compiled  # outside of a trace it is compiled as ever


class Inner(nn.Module):
    """A cell with a module inside that `torch.compile` made."""

    input_size, hidden_size = 5, 6

    def __init__(self):
        super().__init__()
        self.inner = torch.compile(nn.GRUCell(5, 6), backend="eager")

    def forward(self, x, h):
        return self.inner(x, h)


@pytest.mark.parametrize("whole", [False, True])
def test_modules_made_by_the_compiler_inside_a_compiled_layer(whole):
    torch.manual_seed(0)
    cell = torch.compile(nn.GRUCell(5, 6), backend="eager") if whole else Inner()
    rnn, x = RNN(cell, solver=Newton(chunk=3)), torch.randn(2, 7, 5)  # no loop over the cell
    found = []
    for layer in (rnn, torch.compile(rnn, fullgraph=True, backend="aot_eager")):
        y = layer(x)[0]
        found.append([y, *torch.autograd.grad(y.sin().sum(), [*rnn.parameters()])])
    assert all(map(torch.equal, *found))
    with torch.no_grad():
        next(rnn.parameters()).mul_(2)
    assert torch.equal(torch.compile(rnn, fullgraph=True, backend="aot_eager")(x)[0], rnn(x)[0])
