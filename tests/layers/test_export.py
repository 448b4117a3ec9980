"""Layers as exported programs."""

import json
import shutil

import pytest
import torch
from forks import FORKS
from torch import nn

import pararnn
from pararnn.kernels.operators import request_of
from pararnn.planning.plan import Way
from pararnn.testing import assert_close


class Itself(nn.Module):
    """Adds x as it is; elementwise, or mixing channels."""

    def __init__(self, *shape):
        super().__init__()
        self.input_size = self.hidden_size = shape[-1]
        self.w = nn.Parameter(torch.rand(shape) / 2)

    def forward(self, x, h):
        return torch.tanh(x + (h * self.w if self.w.dim() == 1 else h @ self.w))


LAYERS = {
    "elementwise": lambda: pararnn.ParaGRU(3, 4, batch_first=True),
    "mixing": lambda: pararnn.RNN(nn.GRUCell(3, 4)),
    "Newton": lambda: pararnn.RNN(nn.RNNCell(3, 4), solver=pararnn.Newton(chunk=8)),
    "directions": lambda: pararnn.parallelize(
        nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)
    ),
    "x itself, elementwise": lambda: pararnn.RNN(Itself(3)),
    "x itself, elementwise, torch": lambda: pararnn.RNN(Itself(3), backend="torch"),
    "x itself, mixing": lambda: pararnn.RNN(Itself(3, 3)),
    "x itself, mixing, torch": lambda: pararnn.RNN(Itself(3, 3), backend="torch"),
}


class Net(nn.Module):
    """A layer's outputs alone."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


class EveryKind(nn.Module):
    """Layers that have the outputs of another as their inputs; the last is a memory."""

    def __init__(self):
        super().__init__()
        self.elementwise = pararnn.ParaGRU(3, 3, batch_first=True)
        self.mixing = LAYERS["mixing"]()
        self.memory = pararnn.RNN(pararnn.cells.M2RNNCell(4, 2, 3))

    def forward(self, x):
        return self.memory(self.mixing(self.elementwise(x)[0])[0])


def exported(make, strict=False):
    net = Net(make()).eval()
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)
    return net, torch.export.export(
        net, (torch.randn(2, 20, 3),), dynamic_shapes=sizes, strict=strict
    )


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("strict", [False, True], ids="strict={}".format)
def test_dynamic_batch_and_time(name, strict):
    net, program = exported(LAYERS[name], strict)
    for shape in ((5, 33, 3), (1, 7, 3)):
        x = torch.randn(shape)
        assert_close("y", program.module()(x), net(x), rtol=1e-5)


X = torch.linspace(-1, 1, 105).view(5, 7, 3)


def elsewhere(run, file):
    """What a function makes of a file in a process that has only imported the library."""
    with FORKS.Pool(1) as process:
        return torch.tensor(process.apply(run, (file,)))


def outputs(file):
    return torch.export.load(file).module()(X).tolist()


def input_gradient(file):
    x = X.clone().requires_grad_()
    torch.export.load(file).module()(x).sum().backward()
    return x.grad.tolist()


def compiled_outputs(file):
    return torch._inductor.aoti_load_package(file)(X).tolist()


@pytest.mark.parametrize("name", LAYERS)
def test_runs_in_another_process(name, tmp_path):
    net, program = exported(LAYERS[name])
    torch.export.save(program, tmp_path / "net.pt2")
    found = elsewhere(outputs, tmp_path / "net.pt2")
    assert_close("y", found, net(X), rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["elementwise", "mixing", "x itself, elementwise", "x itself, mixing"]
)
def test_gradients_in_another_process(name, tmp_path):
    net, program = exported(LAYERS[name])
    torch.export.save(program, tmp_path / "net.pt2")
    found = elsewhere(input_gradient, tmp_path / "net.pt2")
    x = X.clone().requires_grad_()
    net(x).sum().backward()
    assert_close("gradient", found, x.grad, rtol=1e-4)


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="PyTorch compiles C++ here"
)
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`")
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_ahead_of_time_inductor(tmp_path):
    """Compiled to a library, which another process loads."""
    with torch.no_grad():
        net, program = exported(EveryKind)
        file = str(tmp_path / "net.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=file)
    found = elsewhere(compiled_outputs, file)
    assert_close("y", found, net(X), rtol=1e-5)


def call(content):
    """Call an operator with a request from a file."""
    x = torch.zeros(1, 2, 1, 1, 3)
    text = json.dumps({"pararnn": 1, **content})
    return torch.ops.pararnn.solve([x], torch.zeros(1, 1, 3), None, text)


STEP = {
    "nodes": [
        ["aten.reshape.default", [{"node": 1}, [-1, 3]], {}],
        ["aten.add.Tensor", [{"node": 0}, {"node": 2}], {}],
    ],
    "step": [{"node": 3}],
    "inputs": [[[1, 1, 3], "float32", True]],
    "hidden": 3,
    "group": 3,
    "device": "cpu",
    "dtype": "float32",
    "channel": None,
}
REQUEST = {"backend": "torch", "solver": {"method": "Newton"}, "generated": True}


def rows(**changed):
    """A step on rows, with changes."""
    return {"step": STEP | changed, **REQUEST}


def channels(node=("add", [0], [1]), **changed):
    """An elementwise step whose expression ends in a node, with changes."""
    channel = {
        "nodes": [["state", 0], ["drive", 0], list(node)],
        "roots": [[2]],
        "drives": [[0, 0]],
        "coefficients": [],
    }
    step = STEP | {"group": 1, "channel": channel | changed}
    return {"step": step, **REQUEST, "backend": "c"}


@pytest.mark.parametrize("made", [rows, channels])
def test_a_written_request_is_read(made):
    states, _ = call(made())
    assert states.shape == (1, 2, 3)


BAD = {
    "a function of PyTorch": channels(["load", "file"]),
    "a name with code in it": channels(["add(1, 2) or exit", [0], [1]]),
    "a private name": channels(["__class__", [0]]),
    "a value that is nowhere": channels(["add", [0], [9]]),
    "a state that is nowhere": channels(["state", 7]),
    "a drive that is nowhere": channels(drives=[[1, 0]]),
    "a slot that is nowhere": channels(drives=[[0, 1]]),
    "a slot before the first": channels(drives=[[0, -1]]),
    "no drives": channels(drives=[]),
    "too many results": channels(roots=[[2], [2]]),
    "a backend that is none": {**channels(), "backend": "os"},
    "a solver that is none": {**channels(), "solver": {"method": "exec"}},
    "no inputs": rows(inputs=[]),
    "no input with rows": rows(inputs=[[[1, 1, 3], "float32", False]]),
    "an input of no type": rows(inputs=[[[1, 1, 3], "load", True]]),
    "an input of no size": rows(inputs=[[[-3], "float32", True]]),
    "more inputs than places": channels()
    | {"step": channels()["step"] | {"inputs": [*STEP["inputs"], [[1, 3], "float32", False]]}},
    "no components": rows(step=[]),
    "a result that is no value": rows(step=[3]),
    "no channels": rows(hidden=0),
    "a group that does not divide the channels": rows(group=2),
    "a device that is none": rows(device="os"),
    "a type of arithmetic that is none": rows(dtype="int64"),
    "an operation that fails": rows(
        nodes=[["aten.reshape.default", [{"node": 1}, [-1, 2]], {}], STEP["nodes"][1]]
    ),
    "another version": {**rows(), "pararnn": 2},
    "no content": {},
}


@pytest.mark.parametrize("what", BAD)
def test_a_program_from_elsewhere_runs_nothing_but_operations(what):
    with pytest.raises(ValueError, match="has a request that cannot be read"):
        call(BAD[what])


def damaged(content):
    """The content with one of its parts left out or replaced, for each of them."""
    yield from (None, -1, 0.5, 10**30, "load", [], {}, [[]], {"node": 99}, True)
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            left_out = content.copy()
            del left_out[key]
            yield left_out
            for part in damaged(content[key]):
                changed = content.copy()
                changed[key] = part
                yield changed


def refusal(text):
    """The message with which a text is refused; empty if it is read."""
    try:
        request_of(text)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("made", [rows, channels])
def test_damaged_texts_are_read_or_refused_in_one_way(made):
    contents = (c for c in damaged({"pararnn": 1, **made()}) if isinstance(c, dict))
    refused = [message for message in map(refusal, map(json.dumps, contents)) if message]
    assert len(refused) > 100
    assert all("has a request that cannot be read" in message for message in refused)


@pytest.mark.parametrize(
    "name",
    ["aten.from_file.default", "aten.add_.Tensor", "os.system", "pararnn.matvec.default", ""],
)
def test_steps_from_elsewhere_call_operations_that_only_compute(name):
    content = rows(nodes=[[name, [{"node": 0}], {}]], step=[{"node": 2}])
    with pytest.raises(ValueError, match="is no operation that only computes"):
        call(content)


def test_a_name_from_elsewhere_is_refused():
    with pytest.raises(RuntimeError, match="no layer with the request 'abc' in this process"):
        torch.ops.pararnn.solve([torch.zeros(1, 2, 1, 1, 3)], torch.zeros(1, 1, 3), None, "abc")


def test_kernels_for_a_cpu_are_not_run_on_other_tensors():
    """As of a program that was moved."""
    rnn = pararnn.RNN(pararnn.cells.ParaGRUCell(3, 4), backend="c")
    runner = rnn.runner()
    inputs = runner.inputs([*(p.data for p in rnn.parameters())], [torch.randn(2, 5, 3)])
    initial, path = torch.zeros(2, 1, 4, device="meta"), request_of(runner.request).path
    problem = path.flat_problem([i.to("meta") for i in inputs], initial, None)
    with pytest.raises(ValueError, match="the kernels are for a CPU and the tensors are on meta"):
        path.backend.solve(problem, Way(pararnn.Newton(chunk=5), 1e-6))


@pytest.mark.parametrize("cell", ["paragru", "paralstm"])
def test_the_text_of_an_elementwise_step_on_rows(cell):
    """Its operations lead from the inputs with slots to the user's own."""
    torch.manual_seed(0)
    make = {"paragru": pararnn.cells.ParaGRUCell, "paralstm": pararnn.cells.ParaLSTMCell}[cell]
    rnn = pararnn.RNN(make(3, 4), backend="torch")
    runner = rnn.runner()
    step = runner.traced.step
    shapes = [(*((2, 7) if i.by_rows else ()), *i.shape) for i in step.inputs]
    inputs = [torch.randn(shape) for shape in shapes]
    given = inputs, torch.randn(2, step.num_components, 4), None
    text = request_of(runner.request).text()
    expected = torch.ops.pararnn.solve(*given, runner.request)
    for actual, reference in zip(torch.ops.pararnn.solve(*given, text), expected, strict=True):
        assert torch.equal(actual, reference)
