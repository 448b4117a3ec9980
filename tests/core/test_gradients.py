"""Gradients that a recording could lose: as the loop has them, or refused with the line."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pararnn
from pararnn import RNN, Newton, Sequential, TraceError
from pararnn.testing import loop
from pararnn.tracing import gradients
from pararnn.tracing import step as steps

from .compare import assert_same, outcome, random_state


class Cell(nn.Module):
    """`step(self, x, h)` with some weights at hand."""

    input_size, hidden_size, num_components = 5, 6, 1

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.lin, self.rec = nn.Linear(5, 6), nn.Linear(6, 6)
        self.key, self.a = nn.Linear(5, 2), nn.Parameter(torch.rand(6) / 2)
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    def forward(self, x, h):
        return self.step(self, x, h)


def as_complex(x):
    return torch.view_as_complex(x.reshape(-1, 3, 2))


def clamped(x, low):
    with torch.no_grad():
        return x.clamp_(low, 0.3)


def fourier(c, x, h):
    bound = torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(c.lin(x)), n=6)
    return torch.tanh(bound + c.lin(x))


def cosine(c, x, h):
    slots = h.view(-1, 3, 2)
    where = F.cosine_similarity(slots, c.key(x).unsqueeze(1), dim=-1).softmax(-1).unsqueeze(-1)
    return ((1 - where) * slots + where * torch.tanh(c.lin(x)).view(-1, 3, 2)).flatten(1)


def rotation(c, x, h):
    z = torch.polar(torch.exp(-c.a[:3]), c.a[3:]) * as_complex(h) + as_complex(c.lin(x))
    return torch.view_as_real(z / (1 + z.abs())).reshape(-1, 6)


STEPS = {
    "fourier": fourier,
    "cosine": cosine,
    "rotation": rotation,
    "complex parameter": lambda c, x, h: torch.view_as_real(
        torch.tanh(c.phase * as_complex(h) * 0.2 + as_complex(c.lin(x)))
    ).reshape(-1, 6),
    "modulus": lambda c, x, h: torch.tanh(
        (h * torch.complex(c.lin(x), c.a.expand(len(x), 6))).abs()
    ),
    "strided": lambda c, x, h: torch.tanh(
        c.rec(h).as_strided((len(h), 3), (6, 2)).repeat(1, 2) + c.lin(x)
    ),
    "written slices": lambda c, x, h: torch.tanh(
        torch.slice_scatter(c.rec(h), c.a.expand(len(h), 6)[:, :2], 1, 1, 3) + c.lin(x)
    ),
    "written without history": lambda c, x, h: torch.tanh(
        clamped(c.rec(h), -0.2) * clamped(h * c.a, -0.1) + c.lin(x)
    ),
}


def check(step, solver=None, backend="auto", dtype=torch.float64, rtol=1e-9):
    torch.manual_seed(0)
    cell = Cell(step)
    cell = cell.double() if dtype is torch.float64 else cell
    cell.phase.data = cell.phase.data.to(dtype.to_complex())
    x, state = torch.randn(2, 23, 5, dtype=dtype), random_state(1, 2, 6, dtype=dtype)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    used = {f"gradient of {n}" for n in ("x", "first[0]", "lin.weight")}
    unused = {n for n, e in expected.items() if n.startswith("gradient") and not e.any()} - used
    found = outcome(RNN(cell, solver=solver, backend=backend), cell, x, state)
    assert_same(found, expected, rtol, unused)


@pytest.mark.parametrize("solver", [None, Sequential(), Newton(chunk=6)], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_equals_the_loop(name, solver):
    check(STEPS[name], solver)


@pytest.mark.parametrize("backend", ["torch", "c"])
def test_written_without_history_on_every_backend(backend):
    check(lambda c, x, h: torch.tanh(clamped(h * c.a, -0.1) + c.lin(x)), backend=backend)


@pytest.mark.parametrize("solver", [Sequential(), Newton(chunk=6)], ids=str)
def test_complex_numbers_in_single_precision(solver):
    check(STEPS["rotation"], solver, dtype=torch.float32, rtol=1e-4)


def test_complex_inputs():
    class Signal(nn.Module):
        hidden_size, num_components = 6, 1

        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.rand(6, dtype=torch.float64))

        def forward(self, x, h):
            return torch.view_as_real(torch.tanh(as_complex(h * self.a) + x)).reshape(-1, 6)

    cell, state = Signal(), random_state(1, 2, 6)
    x = torch.randn(2, 12, 3, dtype=torch.complex128)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    found = outcome(RNN(cell), cell, x, state)
    assert_same(found, expected, 1e-10)


def through_data(c, x, h):
    z = c.rec(h)
    z.data.clamp_(-0.1, 0.1)  # here
    return torch.tanh(z * z + c.lin(x))


def through_a_view(c, x, h):
    z = h * 2
    with torch.no_grad():
        z[:, :2].mul_(0.3)  # here
    return torch.tanh(z * z + c.lin(x))


@pytest.mark.parametrize("step", [through_data, through_a_view])
def test_what_cannot_be_recorded_is_refused_with_its_line(step):
    line = step.__code__.co_firstlineno + (2 if step is through_data else 3)
    words = rf"operation (clamp|mul)_ at .*test_gradients\.py:{line} .*gradient of component 0"
    with pytest.raises(TraceError, match=words):
        RNN(Cell(step))


def test_a_backward_that_changes_where_it_is_recorded_is_refused(monkeypatch):
    """Whatever the reason: here all gradients of hyperbolic tangents are lost."""
    lost = {"tanh_backward": torch.zeros_like}
    recorded = steps.vjp

    def without(outputs, adjoints, inputs):
        found = recorded(outputs, adjoints, inputs)
        names = {o.grad_fn.name() for o in outputs if o.grad_fn}
        return [lost["tanh_backward"](f) for f in found] if "TanhBackward0" in names else found

    monkeypatch.setattr(steps, "vjp", without)
    gradients._known.clear()
    with pytest.raises(TraceError, match=r"the gradient of .* differs from what autograd gives"):
        RNN(Cell(lambda c, x, h: torch.tanh(c.rec(h) + c.lin(x))))


def test_equal_layers_are_compared_once(monkeypatch):
    step = lambda c, x, h: torch.tanh(c.rec(h) + c.lin(x)) * 0.9  # noqa: E731
    RNN(Cell(step))
    calls = []
    monkeypatch.setattr(gradients, "_differing", lambda *a: calls.append(a))
    RNN(Cell(step))
    assert not calls
    RNN(Cell(lambda c, x, h: torch.tanh(c.rec(h) + c.lin(x)) * 0.8))
    assert calls


KINDS = {
    "float16": lambda c: c.half(),
    "bfloat16": lambda c: c.bfloat16(),
    "frozen": lambda c: c.requires_grad_(False),
    "zeros": lambda c: nn.init.zeros_(c.rec.weight) is None or c,
}


@pytest.mark.parametrize("change", KINDS)
@pytest.mark.parametrize("name", ["dense", "elementwise", "own types"])
def test_any_type_and_setting_passes(name, change):
    steps = {
        "dense": lambda c, x, h: torch.tanh(F.layer_norm(c.rec(h), (6,)) + c.lin(x)),
        "elementwise": lambda c, x, h: torch.sigmoid(c.a * h) * c.lin(x),
        "own types": lambda c, x, h: torch.tanh(c.a.float() * h.float() + 1).to(h) * c.lin(x),
    }
    cell = Cell(steps[name])
    del cell.phase
    RNN(KINDS[change](cell), backend="torch")


def test_what_autograd_refuses_still_has_a_value():
    cell = Cell(lambda c, x, h: torch.tanh(c.rec(h) + c.lin(x)).mul_(0.5).exp_().sub_(1))
    x = torch.randn(2, 9, 5)
    with torch.no_grad():
        torch.testing.assert_close(RNN(cell)(x)[1], loop(cell, x, torch.zeros(2, 6))[1])


def test_a_cell_without_any_gradient():
    class Counter(nn.Module):
        hidden_size, num_components = 3, 1

        def forward(self, x, h):
            return (h.detach() + x.detach()).round()

    y, _ = RNN(Counter())(torch.ones(1, 4, 3))
    assert y[0, :, 0].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_dropout_of_the_input_is_drawn_alike():
    pararnn.RNN(Cell(lambda c, x, h: torch.tanh(c.rec(h) + F.dropout(c.lin(x), 0.5, True))))


def test_where_new_tensors_are_by_default_changes_nothing():
    cell = nn.GRUCell(3, 4)
    with torch.device("meta"):
        rnn = RNN(cell)
    x = torch.randn(2, 70, 3)
    assert torch.equal(rnn(x)[0], RNN(cell)(x)[0])
