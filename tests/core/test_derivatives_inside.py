"""Cells that take derivatives inside of their step: right, or refused in clear words."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pararnn import RNN, TraceError
from pararnn.testing import loop

from .compare import assert_same, outcome


class Energy(nn.Module):
    """h' = h - 0.1 dE/dh + x."""

    input_size = hidden_size = 3
    num_components = 1

    def __init__(self, energy=lambda a, h: torch.sin(h * a)):
        super().__init__()
        self.a = nn.Parameter(torch.rand(3) + 0.5)
        self.energy = lambda h: energy(self.a, h).sum()

    def slope(self, h, create_graph=True):
        with torch.enable_grad():
            h = h if h.requires_grad else h.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.energy(h), h, create_graph=create_graph)
        return slope

    def forward(self, x, h):
        return h - 0.1 * self.slope(h) + x


class Twice(Energy):
    def forward(self, x, h):
        with torch.enable_grad():
            h = h if h.requires_grad else h.detach().requires_grad_()
            slope = self.slope(h)
            (curvature,) = torch.autograd.grad(slope.sum(), h, create_graph=True)
        return h - 0.1 * slope * curvature + x


class Constant(Energy):
    """Without `create_graph` the slope is a constant for autograd."""

    def forward(self, x, h):
        return h - 0.1 * self.slope(h, create_graph=False) + x * self.a


class Forward(Energy):
    def forward(self, x, h):
        step = lambda h: torch.sin(h * self.a)  # noqa: E731
        return h - 0.1 * torch.func.jvp(step, (h,), (torch.ones_like(h),))[1] + x


def write_seen_by_a_view(a, h):
    energy = torch.sin(h * a)
    view = energy[:, 1:]
    energy.mul_(h)
    return view


ENERGIES = {
    "sin": lambda a, h: torch.sin(h * a),
    "saved results": lambda a, h: torch.tanh(h * a).exp() + torch.sigmoid(h) * h,
    "product": lambda a, h: torch.tanh(h @ torch.outer(a, a)) ** 2,
    "softmax": lambda a, h: torch.softmax(h * a, -1) * h,
    "layer norm": lambda a, h: F.layer_norm(h, (3,), a).square(),
    "detached": lambda a, h: torch.sin(h * h.detach()) * a + torch.cos(h * a.detach()),
    "written": lambda a, h: torch.sin(h * a).mul_(h),
    "written, seen by a view": write_seen_by_a_view,
}
CELLS = {name: functools.partial(Energy, energy) for name, energy in ENERGIES.items()}
CELLS |= {"second derivative": Twice, "constant": Constant, "forward mode": Forward}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", CELLS)
def test_equals_the_loop(name):
    cell = CELLS[name]().double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    state = torch.randn(2, 3, dtype=torch.float64)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(RNN(cell), cell, x, state), expected, 1e-10)


class Functional(Energy):
    def forward(self, x, h):
        return h - 0.1 * torch.func.grad(self.energy)(h) + x


def test_refused():
    with pytest.raises(TraceError, match=r"calls torch\.func\.grad.* at .*_inside\.py:\d+"):
        RNN(Functional())
