"""Every operation of the table in a step: value and gradients of the loop, or a refusal."""

import functools

import pytest
import torch
from torch import nn

from pararnn import RNN, TraceError
from pararnn.testing import loop

from .compare import assert_same, outcome, random_state
from .mixing_operations import OPERATIONS, REFUSED


class Mixed(nn.Module):
    """The operation on a value of state and x, and on one of x alone; its result is mixed."""

    input_size, hidden_size, num_components = 12, 12, 1

    def __init__(self, operation):
        super().__init__()
        self.operation = operation
        self.a, self.b = nn.Parameter(torch.rand(12)), nn.Parameter(torch.rand(12))

    def forward(self, x, h):
        found = self.operation((self.a * h + x).view(-1, 3, 4), (self.b * x).view(-1, 3, 4))
        flat = found.reshape(len(h), -1).to(h.dtype)
        angles = torch.arange(flat.shape[1] * 12, dtype=h.dtype) * 0.7
        return torch.tanh(0.4 * flat @ angles.cos().view(-1, 12) + 0.3 * h + 0.1 * self.b * x)


@pytest.mark.parametrize("name", OPERATIONS)
def test_equals_the_loop(name):
    torch.manual_seed(3)
    cell = Mixed(OPERATIONS[name]).double()
    x, state = torch.randn(2, 4, 12, dtype=torch.float64), random_state(1, 2, 12)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(RNN(cell), cell, x, state), expected, 1e-8)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    operation, words = REFUSED[name]
    with pytest.raises(TraceError, match=words):
        RNN(Mixed(operation).double())


def test_weights_per_head_are_not_copied_for_rows():
    def operation(m, w):
        return m[:, :, None] @ torch.ones(3, 4, 2, dtype=m.dtype)

    inputs = RNN(Mixed(operation).double()).runner().traced.step.inputs
    assert [i.by_rows for i in inputs if i.shape[-2:] == (4, 2)] == [False]
