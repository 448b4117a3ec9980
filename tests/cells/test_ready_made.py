"""Every ready-made cell: equations, structure, and the parallel result with all its gradients."""

import functools

import pytest
import torch
from core.compare import RTOL, assert_same, outcome, random_state
from torch import nn

import pararnn
from pararnn import RNN, Newton, cells
from pararnn.testing import assert_close, loop

CELLS = {
    "ClosedFormContinuousCell": cells.ClosedFormContinuousCell,
    "DiagonalElmanCell": cells.DiagonalElmanCell,
    "IndRNN": functools.partial(cells.DiagonalElmanCell, nonlinearity="relu"),
    "DiagonalLSTMCell": cells.DiagonalLSTMCell,
    "ForgetGateCell": cells.ForgetGateCell,
    "MinimalGatedCell": cells.MinimalGatedCell,
    "MinGRUCell": cells.MinGRUCell,
    "SLSTMCell": cells.SLSTMCell,
}


def make(name, **options):
    torch.manual_seed(5)
    cell = CELLS[name](6, 8, **options).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return cell


def inputs(cell, time=40):
    x = torch.randn(2, time, cell.input_size, dtype=torch.float64)
    if isinstance(cell, cells.ClosedFormContinuousCell):
        x[..., -1] = torch.rand(2, time, dtype=torch.float64) * 3  # irregular times
    return x


@pytest.mark.parametrize("chunk", [1, 7, 40], ids="chunk={}".format)
@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("name", CELLS)
def test_equals_the_loop(name, backend, chunk):
    cell = make(name)
    rnn = RNN(cell, backend=backend, solver=Newton(chunk=chunk))
    assert rnn.evaluation().traced.structure == "elementwise"
    x = inputs(cell)
    state = random_state(cell.num_components, 2, 8)
    if name == "SLSTMCell":
        state = (*state[:2], state[2].abs() + 0.1, state[3])  # a normaliser is positive
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, RTOL[torch.float64] * 10)


@pytest.mark.parametrize("name", CELLS)
def test_starts_from_nothing_in_float32_with_heads(name):
    cell = make(name, num_heads=2).float()
    x = inputs(cell).float()
    y, _ = RNN(cell)(x)
    zeros = torch.zeros(2, 8)
    state = zeros if cell.num_components == 1 else (zeros,) * cell.num_components
    assert_close("y", y, loop(cell, x, state)[0], rtol=1e-5)


def test_full_lstm_is_pytorchs_with_diagonal_weights():
    cell = make("DiagonalLSTMCell", max_recurrent_weight=None)
    theirs = nn.LSTMCell(6, 8).double()
    with torch.no_grad():
        cell.peephole.zero_()
        theirs.weight_ih.copy_(cell.weight.flatten(0, 2))
        theirs.weight_hh.copy_(torch.cat([torch.diag(a) for a in cell.diagonal]))
        theirs.bias_ih.copy_(cell.bias.flatten())
        theirs.bias_hh.zero_()
    x, state = torch.randn(3, 6).double(), random_state(2, 3, 8)
    for a, e in zip(cell(x, state), theirs(x, state), strict=True):
        assert_close("state", a, e, rtol=1e-12)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_elman_is_pytorchs_with_diagonal_weights(nonlinearity):
    cell = cells.DiagonalElmanCell(6, 8, nonlinearity=nonlinearity).double()
    theirs = nn.RNNCell(6, 8, nonlinearity=nonlinearity).double()
    with torch.no_grad():
        theirs.weight_ih.copy_(cell.weight.flatten(0, 2))
        theirs.weight_hh.copy_(torch.diag(cell.diagonal[0]))
        theirs.bias_ih.copy_(cell.bias.flatten())
        theirs.bias_hh.zero_()
    x, h = torch.randn(3, 6).double(), torch.randn(3, 8).double()
    assert_close("state", cell(x, h), theirs(x, h), rtol=1e-12)


def test_stabiliser_changes_nothing_but_the_range():
    """c / n and so h do not depend on m; the plain equations overflow where it does not."""
    cell = make("SLSTMCell")
    x, h = torch.randn(3, 6).double(), torch.randn(3, 8).double()
    c, n = torch.randn(3, 8).double(), torch.rand(3, 8).double() + 0.1
    shift = torch.randn(3, 8).double()
    plain = cell(x, (h, c, n, torch.zeros(3, 8).double()))[0]
    moved = cell(x, (h, c * torch.exp(-shift), n * torch.exp(-shift), shift))[0]
    assert_close("h", moved, plain, rtol=1e-12)
    with torch.no_grad():
        cell.bias[0] += 1000
    assert all(s.isfinite().all() for s in cell(x, (h, c, n, shift)))


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("seed", [1, 15, 21, 26])
def test_an_overshoot_does_not_hide_what_is_wrong(backend, seed):
    """Newton's first states reach 1e109 here; against that size, everything else looked solved."""
    cell = make("SLSTMCell")
    torch.manual_seed(seed)
    x, state = inputs(cell), random_state(4, 2, 8)
    state = (*state[:2], state[2].abs() + 0.1, state[3])
    y, _ = RNN(cell, backend=backend, solver=Newton(chunk=1))(x, state)
    assert_close("y", y, loop(cell, x, state)[0], rtol=1e-11)


def test_linear_cell_takes_one_iteration():
    rnn = RNN(make("MinGRUCell"), backend="torch", solver=Newton(chunk=4))
    rnn(inputs(rnn.cell))
    assert rnn.report.iterations <= 2  # one to solve, one to see that it is solved


def test_elapsed_time_matters():
    cell = make("ClosedFormContinuousCell")
    x = inputs(cell)
    y, _ = RNN(cell)(x)
    x[..., -1] *= 2
    assert (RNN(cell)(x)[0] - y).abs().max() > 1e-3


def test_mistakes():
    with pytest.raises(ValueError, match="nonlinearity is 'gelu'"):
        cells.DiagonalElmanCell(6, 8, nonlinearity="gelu")
    with pytest.raises(ValueError, match="hidden_size 8 cannot be split into 3 heads"):
        cells.MinimalGatedCell(6, 8, num_heads=3)
    with pytest.raises(ValueError, match=r"pass \(batch, time, 7\)"):
        RNN(cells.ClosedFormContinuousCell(6, 8))(torch.randn(2, 5, 6))


def test_bounds_hold_after_projection():
    cell = make("DiagonalLSTMCell")
    with torch.no_grad():
        cell.diagonal.fill_(3.0)
        cell.peephole.fill_(-3.0)
    pararnn.project_parameters(cell)
    assert cell.diagonal.max() == 0.5
    assert cell.peephole.min() == -0.5
