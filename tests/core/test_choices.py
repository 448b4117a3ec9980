"""What is chosen for 827 combinations of cell, shape, device and settings is what was recorded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pararnn
from pararnn.cells import ParaGRUCell, ParaLSTMCell
from pararnn.kernels import facts
from pararnn.kernels.operators import register, request_of
from pararnn.planning.plan import BackendChoice
from pararnn.tracing.step import step_of_channels

from . import golden
from .choices import recorded
from .conftest import needs_triton
from .pretend_gpu import pretend_gpu


@needs_triton
def test_choices_are_as_recorded():
    stored, found = golden.read("choices.json"), recorded()
    assert len(found) >= 500
    assert list(found) == list(stored)
    other = {name: (stored[name], now) for name, now in found.items() if now != stored[name]}
    shown = "\n".join(f"{n}\n  was {was}\n  is  {now}" for n, (was, now) in list(other.items())[:9])
    assert not other, f"{len(other)} choices are others, for instance\n{shown}"


@needs_triton
@pytest.mark.parametrize("cell", [ParaGRUCell, ParaLSTMCell])
@pytest.mark.parametrize("shape", [(1, 65536), (4, 4096), (32, 2048)])
def test_the_plan_that_is_shown_is_the_plan_that_runs(cell, shape):
    """For a call whose output has a gradient."""
    with pretend_gpu():
        rnn = pararnn.RNN(cell(6, 64).bfloat16())
        shown = rnn.plan((*shape, 6))
        step, path = rnn.runner().traced.step, request_of(rnn.runner().request).path
        one = torch.zeros((), dtype=torch.bfloat16)
        inputs = [one.expand(*shape if i.by_rows else (), *i.shape) for i in step.inputs]
        problem = path.problem(inputs, one.expand(shape[0], step.num_components, 64), None)
        assert path._plan(problem).forward == shown.forward
        assert path._plan(problem, 1).adjoint == shown.adjoint


def test_rows_are_planned_for_the_device_that_they_are_on(monkeypatch):
    """As those of a program that was moved."""
    rnn, decided, decide = pararnn.RNN(nn.GRUCell(3, 4)), [], facts.decide
    runner = rnn.runner()
    inputs = runner.inputs([p.detach() for p in rnn.parameters()], [torch.randn(2, 5, 3)])
    path = request_of(request_of(runner.request).text()).path
    monkeypatch.setattr(facts, "decide", lambda *a: decided.append(a[2].device) or decide(*a))
    with pretend_gpu():
        path.call("forward", lambda *_: [], inputs, torch.zeros(2, 1, 4), [None])
    assert decided == ["cuda"]


@needs_triton
def test_a_step_without_a_layer_is_planned_for_the_device_that_it_is_on():
    """As the one that tangents follow, which is known by its expressions alone."""
    rnn = pararnn.RNN(ParaGRUCell(6, 64))
    step = rnn.runner().traced.step
    with pretend_gpu():
        asked = BackendChoice("triton", "", generated=True)
        path = request_of(register(step_of_channels(step.recurrence, step.layout), asked)).path
        inputs = [torch.zeros((2, 4096) * i.by_rows + i.shape) for i in step.inputs]
        plan = path._plan(path.problem(inputs, torch.zeros(2, 1, 64), None))
        assert plan.forward == pararnn.RNN(ParaGRUCell(6, 64)).plan((2, 4096, 6)).forward
    assert plan.forward.launch.chunks > 1


def test_a_gpu_that_is_not_there_leaves_nothing_behind():
    """In a process of its own, where nothing has made a tensor on a device before."""
    program = (
        "import torch\nfrom core.pretend_gpu import pretend_gpu\n"
        "with pretend_gpu(), torch.device('cpu'):\n    torch.empty(1)\n"
        "with torch.device('meta'):\n    assert torch.empty(1).is_meta"
    )
    tests = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], cwd=tests, check=True)
