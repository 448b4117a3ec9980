"""Layers as exported programs."""

import json
import shutil

import pytest
import torch
from forks import FORKS
from torch import nn

import pararnn
from pararnn.kernels import operators
from pararnn.testing import assert_close

LAYERS = {
    "elementwise": lambda: pararnn.ParaGRU(3, 4, batch_first=True),
    "mixing": lambda: pararnn.RNN(nn.GRUCell(3, 4)),
    "Newton": lambda: pararnn.RNN(nn.RNNCell(3, 4), solver=pararnn.Newton(chunk=8)),
    "directions": lambda: pararnn.parallelize(
        nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)
    ),
}


class Net(nn.Module):
    """A layer's outputs alone."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


class TwoKinds(nn.Module):
    """A layer that has the states of another as its inputs."""

    def __init__(self):
        super().__init__()
        self.elementwise = pararnn.ParaGRU(3, 3, batch_first=True)
        self.mixing = LAYERS["mixing"]()

    def forward(self, x):
        return self.mixing(self.elementwise(x)[0])


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


@pytest.mark.parametrize("name", ["elementwise", "mixing"])
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
        net, program = exported(TwoKinds)
        file = str(tmp_path / "net.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=file)
    found = elsewhere(compiled_outputs, file)
    assert_close("y", found, net(X), rtol=1e-5)


def call(content):
    """Call an operator with a plan from a file."""
    x = torch.zeros(1, 2, 1, 1, 3)
    text = json.dumps({"pararnn": 1, **content})
    return torch.ops.pararnn.recurrence([x], [], torch.zeros(1, 1, 3), None, text)


def written(node):
    """An elementwise plan whose step ends in a node."""
    return {
        "recurrence": {
            "nodes": [["state", 0], ["drive", 0], node],
            "roots": [[2]],
            "drives": 1,
            "coefficients": 0,
        },
        "drives": [[0, 0]],
        "coefficients": [],
        "backend": "c",
        "solver": {"method": "Newton"},
    }


def test_a_written_plan_is_read():
    states, _ = call(written(["add", [0], [1]]))
    assert states.shape == (1, 2, 3)


BAD = {
    "a function of PyTorch": written(["load", "file"]),
    "a name with code in it": written(["add(1, 2) or exit", [0], [1]]),
    "a private name": written(["__class__", [0]]),
    "a value that is nowhere": written(["add", [0], [9]]),
    "a state that is nowhere": written(["state", 7]),
    "a backend that is none": {**written(["add", [0], [1]]), "backend": "os"},
    "a solver that is none": {**written(["add", [0], [1]]), "solver": {"method": "exec"}},
    "no content": {},
}


@pytest.mark.parametrize("what", BAD)
def test_a_program_from_elsewhere_runs_nothing_but_operations(what):
    with pytest.raises(ValueError, match="has a plan that cannot be read"):
        call(BAD[what])


@pytest.mark.parametrize(
    "name",
    ["aten.from_file.default", "aten.add_.Tensor", "os.system", "pararnn.matvec.default", ""],
)
def test_steps_from_elsewhere_call_operations_that_only_compute(name):
    mixing = {
        "nodes": [[name, [{"node": 0}], {}]],
        "step": [{"node": 2}],
        "edges": [[[3], "float32", True]],
        "components": 1,
        "hidden": 3,
        "device": "cpu",
        "dtype": "float32",
    }
    text = json.dumps(
        {"pararnn": 1, "mixing": mixing, "group": 3, "solver": None, "generated": True}
    )
    with pytest.raises(ValueError, match="is no operation that only computes"):
        torch.ops.pararnn.mixing([torch.zeros(1, 2, 3)], torch.zeros(1, 1, 3), None, 1, 2, text)


def test_a_name_from_elsewhere_is_refused():
    with pytest.raises(RuntimeError, match="no layer with the plan 'abc' in this process"):
        torch.ops.pararnn.recurrence(
            [torch.zeros(1, 2, 1, 1, 3)], [], torch.zeros(1, 1, 3), None, "abc"
        )


def test_kernels_for_a_cpu_are_not_run_on_other_tensors():
    """As of a program that was moved."""
    rnn = pararnn.RNN(pararnn.cells.ParaGRUCell(3, 4), backend="c")
    evaluation = rnn.evaluation()
    drives, *coefficients = evaluation.edges(
        [*(p.data for p in rnn.parameters())], [torch.randn(2, 5, 3)]
    )
    moved = ([drives.to("meta")], [c.to("meta") for c in coefficients])
    initial = torch.zeros(2, 1, 4, device="meta")
    problem = operators.flat_problem(*moved, initial, None, evaluation.plan)
    with pytest.raises(ValueError, match="the kernels are for a CPU and the tensors are on meta"):
        operators.backend_of(evaluation.plan).solve(problem, pararnn.Newton())
