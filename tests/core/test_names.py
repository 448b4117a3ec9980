"""Names of a cell's tensors and variables, which generated code shows but never runs."""

# ruff: noqa: RUF001 - names in Greek are part of what is tested

import functools

import pytest
import torch
from torch import nn

import pararnn
from pararnn import RNN
from pararnn.testing import assert_close, loop

from .compare import assert_same, outcome, random_state

CRAFTED = 'w"""\n*/ #error\nraise SystemExit("a name was run") #'
NAMES = [
    ("gate", "gate_bias"),
    ("x_0", "state_0"),
    ("attribute_1", "constant_0"),
    ("lambda", "import"),
    ("w-in", "a b"),
    ("α", "__linux_"),
    (CRAFTED, "'''\\"),
]


class Named(nn.Module):
    """Two weights by any name, and one more in a submodule whose full name looks like the first."""

    input_size, hidden_size = 3, 4

    def __init__(self, first, second):
        super().__init__()
        self.names = first, second
        self.weights = nn.ParameterDict({n: torch.rand(4) for n in self.names})
        self.register_parameter("gate_weight", nn.Parameter(torch.rand(4)))
        self.gate = nn.Linear(3, 4)

    def forward(self, x, h):
        first, second = (self.weights[name] for name in self.names)
        __linux_ = torch.sigmoid(first * h)
        α = self.gate(x) + second
        int = torch.tanh(α + __linux_ * h * self.gate_weight)
        return self.mixed(int)

    def mixed(self, h):
        return h


class NamedDense(Named):
    def mixed(self, h):
        return h - 0.1 * h.sum(1, keepdim=True)


def check(cell, backend):
    rnn = RNN(cell.double(), backend=backend)
    x, state = torch.randn(2, 6, 3, dtype=torch.float64), random_state(1, 2, 4)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-12)
    assert pararnn.explain(rnn)


@pytest.mark.parametrize("names", NAMES, ids=lambda n: ascii(n[0])[:12])
def test_elementwise(names, any_backend, fresh_cache):
    check(Named(*names), any_backend)


@pytest.mark.parametrize("names", NAMES, ids=lambda n: ascii(n[0])[:12])
def test_mixing(names):
    check(NamedDense(*names), "torch")


def test_a_file_that_has_changed_since(tmp_path):
    """Its lines are no source of the cell any more; nothing is named, and nothing else is lost."""
    source = "class Cell(nn.Module):\n    input_size = hidden_size = 4\n\n"
    source += "    def forward(self, x, h):\n        return torch.tanh(x + 0.5 * h)\n"
    file = tmp_path / "cells.py"
    file.write_text("texts = [\n  '''(\n" + "(\n" * 9)
    scope = {"nn": nn, "torch": torch}
    exec(compile(source, str(file), "exec"), scope)
    x = torch.randn(2, 5, 4)
    rnn = RNN(scope["Cell"]())
    assert_close("y", rnn(x)[0], loop(rnn.cell, x, torch.zeros(2, 4))[0], rtol=1e-5)
