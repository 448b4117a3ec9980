"""The generated C: accuracy, special values, building, threads."""

import functools
import math

import mpmath
import pytest
import torch
from torch import nn

from pararnn import RNN, Newton
from pararnn.cells import ParaLSTMCell
from pararnn.kernels.c.backend import CBackend
from pararnn.testing import loop

from .cells import make_cell
from .compare import RTOL, assert_same, outcome, random_state


class OfState(nn.Module):
    """A function of the old value where x > 0: one step evaluates it in C."""

    input_size, num_components = 1, 1

    def __init__(self, function, hidden_size):
        super().__init__()
        self.function, self.hidden_size = function, hidden_size

    def forward(self, x, state):
        return torch.where(x.expand(-1, self.hidden_size) > 0, self.function(state), state)


def through_c(function, values):
    """The function of `values` (1-d), computed by generated C."""
    rnn = RNN(OfState(function, len(values)), backend="c")
    return rnn(values.new_ones(1, 1, 1), values[None])[1][0]


ACCURATE = {  # name: largest error in units in the last place
    "exp": (mpmath.exp, 2),
    "log": (mpmath.log, 2),
    "log1p": (mpmath.log1p, 3),
    "expm1": (mpmath.expm1, 3),
    "tanh": (mpmath.tanh, 3),
    "sigmoid": (lambda x: 1 / (1 + mpmath.exp(-x)), 3),
}


def wide_values(dtype):
    """Both signs, every magnitude, and the neighbourhoods where formulas change."""
    top = 700 if dtype is torch.float64 else 85
    low = -300 if dtype is torch.float64 else -36
    generator = torch.Generator().manual_seed(0)
    uniform = (torch.rand(300, generator=generator, dtype=torch.float64) * 2 - 1) * top
    small = 10.0 ** torch.linspace(low, 2, 200, dtype=torch.float64)
    near = torch.linspace(-3, 3, 300, dtype=torch.float64)
    return torch.cat([uniform, small, -small, near]).to(dtype)


def ulps(actual, exact, dtype):
    """Errors in units in the last place of the exact value."""
    info = torch.finfo(dtype)
    errors = []
    for a, e in zip(actual.double().tolist(), exact, strict=True):
        if abs(e) > info.max:
            errors.append(mpmath.mpf(0) if a == float("inf") else mpmath.inf)
            continue
        scale = max(abs(e), mpmath.mpf(info.tiny))
        unit = mpmath.mpf(2) ** (mpmath.floor(mpmath.log(scale, 2))) * info.eps
        errors.append(abs(mpmath.mpf(a) - e) / unit)
    return errors


@pytest.mark.parametrize("name", ACCURATE)
def test_elementary_function_is_accurate(name, dtype):
    reference, allowed = ACCURATE[name]
    values = wide_values(dtype)
    if name == "log":
        values = values.abs().clamp_min(torch.finfo(dtype).tiny)
    if name == "log1p":
        values = values[values > -1]
    if name == "sigmoid":  # below, 1 / (1 + exp(-x)) is 0 where the exact value is denormal
        values = values[values > math.log(torch.finfo(dtype).tiny)]
    with mpmath.workdps(400):
        exact = [reference(mpmath.mpf(v)) for v in values.double().tolist()]
        actual = through_c(getattr(torch, name), values)
        errors = ulps(actual, exact, dtype)
    worst = max(range(len(errors)), key=errors.__getitem__)
    message = f"{float(errors[worst]):.2f} ulps at {values[worst].item()!r}"
    assert errors[worst] <= allowed, message


@pytest.mark.parametrize(
    ("batch", "time", "hidden", "chunk"),
    [
        (1, 70, 300, "auto"),
        (3, 33, 257, 8),
        (1, 2100, 16, "auto"),
        (1100, 3, 5, 2),
        (2, 40, 513, 40),
    ],
)
def test_blocks_threads_and_tails(batch, time, hidden, chunk, dtype):
    """More channels than a block, more rows than threads, tails of every kind."""
    torch.set_num_threads(3)
    cell = ParaLSTMCell(3, hidden).to(dtype)
    rnn = RNN(cell, backend="c", solver=Newton(chunk=chunk))
    x = torch.randn(batch, time, 3, dtype=dtype)
    state = random_state(2, batch, hidden, dtype=dtype)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    actual = outcome(rnn, cell, x, state)
    assert_same(actual, expected, RTOL[dtype])
    again = outcome(rnn, cell, x, state)
    assert all(torch.equal(actual[name], again[name]) for name in actual), "not deterministic"


def test_source_is_deterministic_and_shows_the_equations():
    sources = [CBackend(RNN(make_cell("paragru")).runner().traced.step.recurrence).source()]
    sources.append(CBackend(RNN(make_cell("paragru")).runner().traced.step.recurrence).source())
    assert sources[0] == sources[1]
    assert "z = sigmoid(a_z * h + x_z)" in sources[0].split("*/")[0]
