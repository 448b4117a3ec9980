"""Cells that should work, or be refused in clear words, and do neither yet."""

import contextlib
import functools

import pytest
import torch
from torch import nn

from pararnn import RNN, TraceError
from pararnn.testing import loop

from .compare import assert_same, outcome


class Energy(nn.Module):
    """h' = h - 0.1 dE/dh + x, with E = sum sin(a h)."""

    input_size = hidden_size = 3
    num_components = 1

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.rand(3) + 0.5)

    def energy(self, h):
        return torch.sin(h * self.a).sum()


class AutogradInside(Energy):
    def forward(self, x, h):
        with torch.enable_grad():
            h = h if h.requires_grad else h.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(h), h, create_graph=True)
        return h - 0.1 * slope + x


class FunctorchInside(Energy):
    def forward(self, x, h):
        return h - 0.1 * torch.func.grad(self.energy)(h) + x


def equals_the_loop(cell):
    rnn = RNN(cell)
    x = torch.randn(2, 5, cell.input_size, dtype=torch.float64)
    state = torch.randn(2, cell.hidden_size, dtype=torch.float64)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-10)


@pytest.mark.xfail(strict=True, reason="parameters under autograd.grad get no gradient, in silence")
def test_autograd_inside_a_cell():
    with contextlib.suppress(TraceError):  # a refusal would do
        equals_the_loop(AutogradInside().double())


@pytest.mark.xfail(strict=True, reason="the message is that of PyTorch's saved tensor hooks")
def test_functorch_inside_a_cell():
    with contextlib.suppress(TraceError):  # a refusal would do
        equals_the_loop(FunctorchInside().double())


@pytest.mark.xfail(strict=True, reason="the message is that of a matrix product")
def test_inputs_of_another_type_are_refused_in_words():
    with pytest.raises((TypeError, ValueError), match=r"x .*float64"):
        RNN(nn.GRUCell(5, 6))(torch.randn(2, 5, 5, dtype=torch.float64))
