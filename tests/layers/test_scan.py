"""The functional form."""

import importlib

import pytest
import torch

import pararnn
from pararnn.testing import assert_close

scanning = importlib.import_module("pararnn.layers.scan")  # pararnn.scan is the function


def gated(h, z, c, a):
    gate = torch.sigmoid(z + a * h)
    return gate * h + (1 - gate) * torch.tanh(c)


def oscillator(state, force, stiffness):
    position, velocity = state
    velocity = 0.9 * velocity + 0.1 * (force - torch.sin(stiffness * position))
    return position + 0.1 * velocity, velocity


@pytest.mark.parametrize("backend", ["torch", "c"])
def test_one_component_equals_the_loop(backend):
    z, c = torch.randn(2, 3, 50, 7, dtype=torch.float64).requires_grad_().unbind(0)
    a = torch.randn(7, dtype=torch.float64, requires_grad=True)
    first = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    states, last = pararnn.scan(gated, first, (z, c), (a,), backend=backend)
    h, expected = first, []
    for t in range(50):
        h = gated(h, z[:, t], c[:, t], a)
        expected.append(h)
    expected = torch.stack(expected, 1)
    assert_close("states", states, expected, rtol=1e-12)
    assert torch.equal(last, states[:, -1])
    assert last.untyped_storage().nbytes() == last.nbytes  # writing into it changes no states
    cotangent = torch.randn_like(states)
    inputs = {"z": z, "c": c, "a": a, "first": first}
    ours = torch.autograd.grad((states * cotangent).sum(), inputs.values(), retain_graph=True)
    theirs = torch.autograd.grad((expected * cotangent).sum(), inputs.values())
    for name, actual, reference in zip(inputs, ours, theirs, strict=True):
        assert_close(name, actual, reference, rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, "auto"])
def test_tuple_of_components_one_drive_and_scalar_coefficient(chunk):
    force = torch.randn(2, 40, 5, dtype=torch.float64)
    stiffness = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    first = (torch.zeros(2, 5, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64))
    solver = pararnn.Newton(chunk=chunk)
    states, last = pararnn.scan(oscillator, first, force, stiffness, solver=solver)
    state = first
    for t in range(40):
        state = oscillator(state, force[:, t], stiffness)
    for name, actual, reference in zip("xv", last, state, strict=True):
        assert_close(name, actual, reference, rtol=1e-12)
    assert states[0].shape == (2, 40, 5)
    (ours,) = torch.autograd.grad(last[0].sum(), stiffness)
    (theirs,) = torch.autograd.grad(state[0].sum(), stiffness)
    assert_close("stiffness", ours, theirs, rtol=1e-12)


class Leaky:
    """A step with settings: an attribute, a global, and a tensor that is a coefficient too."""

    def __init__(self, weight):
        self.leak, self.weights = 0.5, [weight]

    def step(self, h, u, a):
        return SCALE * torch.tanh(u + a * h) + self.leak * self.weights[0] * h


SCALE = 0.5


@pytest.mark.parametrize("backend", ["torch", "c"])
def test_what_a_step_reads_from_outside_may_change(backend, monkeypatch):
    u, first = torch.randn(2, 30, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    a, b, c = torch.rand(3, 4, dtype=torch.float64).unbind(0)
    leaky = Leaky(a)

    def check(coefficient):
        _, last = pararnn.scan(leaky.step, first, u, coefficient, backend=backend)
        h = first
        for t in range(30):
            h = leaky.step(h, u[:, t], coefficient)
        assert_close("last", last, h, rtol=1e-12)

    check(a)
    check(b)  # and no longer a, which the step goes on to read
    leaky.leak = 0.3
    check(b)
    leaky.weights[0] = c
    check(b)
    monkeypatch.setitem(globals(), "SCALE", -0.7)
    check(a)


def test_traced_once_for_equal_settings(monkeypatch):
    u, first, leaky, traced = torch.randn(2, 5, 4), torch.zeros(2, 4), Leaky(torch.rand(4)), []
    trace = scanning.trace
    monkeypatch.setattr(scanning, "trace", lambda *a: traced.append(1) or trace(*a))
    for _ in range(3):
        pararnn.scan(leaky.step, first, u, torch.rand(4), backend="torch")
        leaky.weights = list(leaky.weights)
    assert len(traced) == 1


def test_messages():
    h, z = torch.zeros(3, 7), torch.randn(3, 5, 7)
    with pytest.raises(ValueError, match="drives is empty"):
        pararnn.scan(gated, h, ())
    with pytest.raises(ValueError, match=r"drive 1 has shape \(3, 4, 7\)"):
        pararnn.scan(gated, h, (z, z[:, :4]))
    with pytest.raises(ValueError, match=r"state component 0 has shape \(2, 7\).*batch 3"):
        pararnn.scan(gated, h[:2], (z, z))
    with pytest.raises(
        pararnn.TraceError, match="given one tensor as state but returned a tuple of 1"
    ):
        pararnn.scan(lambda h, z: (h + z,), h, z)


def test_steps_that_differ_in_axes_of_what_they_share():
    """Alike in every operation on an entry, with a gate per row or per column."""
    state = torch.zeros(2, 4, 6, dtype=torch.float64)
    for axis, size in ((-1, 4), (-2, 6), (-1, 4)):
        drives = torch.randn(2, 5, 4, 6, dtype=torch.float64), torch.rand(2, 5, size).double()

        def step(state, x, gate, axis=axis):
            return torch.tanh(gate.unsqueeze(axis) * state + x)

        found, last = pararnn.scan(step, state, drives, backend="torch")
        expected = state
        for t in range(5):
            expected = step(expected, *(d[:, t] for d in drives))
            assert torch.allclose(found[:, t], expected)
        assert torch.allclose(last, expected)


@pytest.mark.parametrize("backend", ["torch", "c"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_have_the_type_of_drives_in_half_precision(backend, dtype):
    """Also where coefficients and the first state are in float32: drives are what is large."""

    def step(h, drives, weights):
        z, c = drives.unbind(1)
        z = torch.sigmoid(z + weights[0] * h)
        return (1 - z) * h + z * torch.tanh(c + weights[1] * h)

    drives, weights, first = torch.randn(2, 30, 2, 8).to(dtype), torch.rand(2, 8), torch.zeros(2, 8)
    y, last = pararnn.scan(step, first, drives, weights, backend=backend)
    assert y.dtype is last.dtype is dtype
    exact, _ = pararnn.scan(step, first.double(), drives.double(), weights.double())
    assert_close("y", y.double(), exact, rtol=1e-2)
