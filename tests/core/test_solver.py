"""Multiple shooting: iterates, guarantee, damping, reports."""

import functools
from dataclasses import replace

import pytest
import torch

from pararnn import RNN, Newton, cells
from pararnn.kernels.c.backend import _States
from pararnn.kernels.operators import request_of
from pararnn.planning.plan import Way
from pararnn.solvers.chunks import run_steps
from pararnn.solvers.problem import Problem
from pararnn.solvers.shooting import adjoint_residual, newton_update
from pararnn.solvers.systems import _InRows
from pararnn.testing import assert_close, loop
from pararnn.tracing.capture import resolve

from .cells import CELLS, Cell, Chaotic, make_cell
from .compare import as_tuple, assert_same, outcome, random_state


class Sweeps:
    """Sweeps through the chunks of a layer, by whoever evaluates it.

    First and last states of chunks are (batch, chunks, components, hidden).
    """

    def __init__(self, rnn, x, state, chunk):
        runner = rnn.runner()
        tensors = [resolve(rnn.cell, n) for n in runner.input_part.names]
        with torch.no_grad():
            inputs = runner.inputs(tensors, [x])
        self.initial, time = torch.stack(as_tuple(state), 1), x.shape[1]
        self.chunk, self.chunks = chunk, -(-time // chunk)
        self.path = path = request_of(runner.request).path
        if runner.by_channels:
            self.backend, problem = path.backend, path.problem(inputs, self.initial, None)
            with torch.no_grad():
                self.problem = problem.converted()
            return
        self.problem = path.forward(inputs, self.initial, None)

    @property
    def system(self):
        """What the driver is given."""
        if isinstance(self.problem, Problem):
            return _States(self.backend, self.problem, self.chunk)
        return _InRows(self.problem, self.chunk, run_steps)

    def ends(self, boundary):
        """The last states of chunks."""
        return self.system.run(boundary)[1]

    def tangents(self, boundary):
        """The derivatives of these, (batch, chunks, components, components, hidden)."""
        return self.system.tangents(boundary, self.system.run(boundary)[0])

    def solve(self, settings):
        """All states."""
        if isinstance(self.problem, Problem):
            planner = replace(self.path.planner, solver=settings)
            path = replace(self.path, planner=planner)
            return self.backend.solve(self.problem, path._plan(self.problem).forward)[0]
        return self.problem.solve(Way(settings, 1e-13, warm_up=settings.chunk), run_steps)[0]


def dense_newton(cell, x, first, guess):
    """One Newton iterate of the whole system: all states of one row at once, as one vector.

    Args:
        cell: The cell.
        x: (1, T, features).
        first: State before time 0, (components, H).
        guess: States after every step, (T, components, H).
    """
    components = first.shape[0]

    def residual(states):
        states = states.view_as(guess)
        before = torch.cat([first[None], states[:-1]])
        new = []
        for t in range(len(states)):
            state = tuple(before[t, i][None] for i in range(components))
            new.append(torch.cat(as_tuple(cell(x[:, t], state if components > 1 else state[0]))))
        return (states - torch.stack(new)).flatten()

    flat = guess.flatten()
    jacobian = torch.autograd.functional.jacobian(residual, flat)
    with torch.no_grad():
        return (flat - torch.linalg.solve(jacobian, residual(flat))).view_as(guess)


def test_residual_of_iterations_that_overflow_is_infinite():
    rnn = RNN(cells.SLSTMCell(4, 6), backend="torch", solver=Newton(max_iterations=8, chunk=1))
    y, _ = rnn(5 * torch.randn(2, 200, 4))
    assert torch.isfinite(y).all()
    assert rnn.report.status == "completed step by step"
    assert rnn.report.residual == torch.inf


@pytest.mark.parametrize("name", ["paragru", "paralstm", "exponential", "heads"])
def test_chunk_1_iterates_equal_dense_newton(name, backend):
    rnn = RNN(make_cell(name), backend=backend)
    time, hidden = 6, rnn.hidden_size
    x = torch.randn(1, time, rnn.cell.input_size, dtype=torch.float64)
    state = random_state(rnn.num_components, 1, hidden)
    sweeps = Sweeps(rnn, x, state, chunk=1)
    first = sweeps.initial[0]
    guess = sweeps.initial.unsqueeze(1).expand(-1, time, -1, -1).contiguous()
    dense = guess[0]  # what the solver guesses before step t + 1 is the state after step t
    for iteration in range(4):
        ends = sweeps.ends(guess)
        dense_guess = torch.cat([guess[0, 1:], ends[0, -1:] if iteration == 0 else dense[-1:]])
        dense = dense_newton(rnn.cell, x, first, dense_guess)
        guess = newton_update(ends, guess, sweeps.tangents(guess), 0.0)
        assert_close(f"iterate {iteration}", guess[0, 1:], dense[:-1], rtol=1e-11)


@pytest.mark.parametrize("name", CELLS)
def test_tangents_equal_autograd(name, backend):
    rnn = RNN(make_cell(name), backend=backend)
    components, hidden = rnn.num_components, rnn.hidden_size
    x = torch.randn(2, 8, rnn.cell.input_size, dtype=torch.float64)
    state = random_state(components, 2, hidden)
    boundary = torch.randn(2, 2, components, hidden, dtype=torch.float64)
    actual = Sweeps(rnn, x, state, chunk=4).tangents(boundary)

    def end(b, k, *state):
        part = x[b : b + 1, 4 * k : 4 * k + 4]
        state = tuple(s[None] for s in state)
        last = loop(rnn.cell, part, state if components > 1 else state[0])[1]
        return tuple(s[0] for s in as_tuple(last))

    for b in range(2):
        for k in range(2):
            run = functools.partial(end, b, k)
            blocks = torch.autograd.functional.jacobian(run, tuple(boundary[b, k]))
            expected = torch.stack([torch.stack([j.diagonal() for j in row]) for row in blocks])
            assert_close(f"chunk {k} of row {b}", actual[b, k], expected, rtol=1e-12)


@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_chunks_become_exact_one_by_one(backend, chunk):
    rnn = RNN(Chaotic().double(), backend=backend)
    x = torch.randn(2, 30, 5, dtype=torch.float64)
    state = random_state(1, 2, 7)
    sweeps = Sweeps(rnn, x, state, chunk)
    exact = loop(rnn.cell, x, state)[0].detach()
    guess = torch.randn(2, sweeps.chunks, 1, 7, dtype=torch.float64)
    guess[:, 0] = sweeps.initial
    for k in range(1, sweeps.chunks):
        ends = sweeps.ends(guess)
        guess = newton_update(ends, guess, sweeps.tangents(guess), 0.0)
        known = exact[:, chunk - 1 :: chunk][:, :k]
        assert_close(f"after {k} iterations", guess[:, 1 : k + 1, 0], known, rtol=1e-9)


class Exploding(Cell):
    """Tangents grow beyond any number although the states stay bounded."""

    def __init__(self):
        super().__init__(1)

    def forward(self, x, h):
        return torch.sin(1e6 * h + self.input(x)) + self.diagonal[0] * 1e-3


class Diverging(Cell):
    """Reaches infinity, then NaN."""

    def __init__(self):
        super().__init__(1)

    def forward(self, x, h):
        return self.input(x) + (h * 1e3) ** 3 * torch.exp(-self.diagonal[0])


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("chunk", [1, 4])
def test_exploding_tangents_end_at_the_loop(any_backend, chunk, damping):
    torch.manual_seed(0)
    cell = Exploding().double()
    rnn = RNN(cell, backend=any_backend, solver=Newton(chunk=chunk, damping=damping))
    x = torch.randn(2, 16, 5, dtype=torch.float64)
    with torch.no_grad():
        y, _ = rnn(x)
        expected = RNN(cell, backend=any_backend, solver=Newton(chunk=16))(x)[0]
        truth = loop(cell, x, torch.zeros(2, 7, dtype=torch.float64))[0]
    assert_close("against one chunk", y, expected, rtol=1e-12)
    assert_close("first steps against the loop", y[:, :2], truth[:, :2], rtol=1e-8)
    assert rnn.report.iterations <= rnn.report.chunks


@pytest.mark.parametrize("chunk", [1, 4, "auto"])
def test_infinite_states_equal_the_loop(any_backend, chunk):
    torch.manual_seed(0)
    rnn = RNN(Diverging().double(), backend=any_backend, solver=Newton(chunk=chunk))
    x = torch.randn(2, 10, 5, dtype=torch.float64)
    y, last = rnn(x)
    expected, expected_last = loop(rnn.cell, x, torch.zeros(2, 7, dtype=torch.float64))
    assert not expected.isfinite().all()
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=0, equal_nan=True)
    torch.testing.assert_close(last, expected_last, rtol=1e-9, atol=0, equal_nan=True)


@pytest.mark.parametrize("chunk", [1, 8, "auto"])
def test_nan_input_reaches_what_the_loop_reaches(any_backend, chunk):
    rnn = RNN(make_cell("paralstm"), backend=any_backend, solver=Newton(chunk=chunk))
    x = torch.randn(2, 18, 5, dtype=torch.float64)
    x[1, 10, 2] = torch.nan
    state = random_state(2, 2, 7)
    y, _ = rnn(x, state)
    expected, _ = loop(rnn.cell, x, state)
    assert y[0].isfinite().all()
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=0, equal_nan=True)


@pytest.mark.parametrize("chunk", [1, 5, 20])
def test_chaotic_cell_equals_loop(any_backend, chunk):
    torch.manual_seed(0)
    cell = Chaotic().double()
    rnn = RNN(cell, backend=any_backend, solver=Newton(chunk=chunk))
    x = torch.randn(2, 20, 5, dtype=torch.float64)
    state = random_state(1, 2, 7)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-11)


@pytest.mark.parametrize("damping", [0.2, 0.9])
def test_damping_leaves_the_solution(any_backend, damping):
    rnn = RNN(make_cell("slow_gates"), backend=any_backend, solver=Newton(chunk=4, damping=damping))
    x = torch.randn(2, 22, 5, dtype=torch.float64)
    state = random_state(1, 2, 7)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    assert_same(outcome(rnn, rnn.cell, x, state), expected, 1e-12)


def test_too_few_iterations_are_completed_step_by_step(any_backend):
    solver = Newton(chunk=4, max_iterations=1)
    rnn = RNN(make_cell("slow_gates"), backend=any_backend, solver=solver)
    x = torch.randn(2, 22, 5, dtype=torch.float64)
    state = random_state(1, 2, 7)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    assert_same(outcome(rnn, rnn.cell, x, state), expected, 1e-12)
    assert rnn.report.status == "completed step by step"
    assert rnn.report.iterations == 1
    assert rnn.report.residual > 1e-13


def test_report_of_a_solve(any_backend):
    rnn = RNN(make_cell("paragru"), backend=any_backend, solver=Newton(chunk=8))
    assert rnn.report is None
    rnn(torch.randn(2, 60, 5, dtype=torch.float64))
    report = rnn.report
    assert report.status == "converged"
    assert report.chunks == 8
    assert 1 <= report.iterations <= 8
    assert report.residual <= 1e-13
    assert str(report).startswith("converged: 8 chunks, ")


def test_report_of_one_chunk(any_backend):
    rnn = RNN(make_cell("paragru"), backend=any_backend, solver=Newton(chunk=60))
    rnn(torch.randn(2, 60, 5, dtype=torch.float64))
    assert rnn.report.status == "sequential"
    assert rnn.report.iterations == rnn.report.chunks == 1


def test_forgetful_cell_converges_in_one_sweep(any_backend):
    """A chunk that is longer than the memory starts from the right state at once."""
    rnn = RNN(make_cell("paragru"), backend=any_backend, solver=Newton(chunk=100))
    rnn(torch.randn(2, 400, 5, dtype=torch.float64))
    assert rnn.report.iterations == 1
    assert rnn.report.chunks == 4


def test_loose_tolerance_stops_earlier(any_backend):
    x = torch.randn(2, 100, 5, dtype=torch.float64)
    cell = make_cell("slow_gates")
    iterations = []
    for tolerance in (None, 1e-2):
        rnn = RNN(cell, backend=any_backend, solver=Newton(chunk=5, tolerance=tolerance))
        y, _ = rnn(x)
        iterations.append(rnn.report.iterations)
    assert iterations[1] < iterations[0]
    assert_close("y", y, loop(cell, x, torch.zeros(2, 7, dtype=torch.float64))[0], rtol=0.1)


def test_solve_writes_every_state(any_backend):
    """The NaN that fresh memory is filled with must be gone everywhere."""
    rnn = RNN(make_cell("paralstm"), backend=any_backend)
    x = torch.randn(2, 23, 5, dtype=torch.float64)
    assert torch.empty(3).isnan().all(), "fresh memory is not filled with NaN"
    sweeps = Sweeps(rnn, x, random_state(2, 2, 7), chunk=23)
    for chunk in (1, 5, 23):
        with torch.no_grad():
            states = sweeps.solve(Newton(chunk=chunk))
        assert all(s.isfinite().all() for s in states)


def test_infinity_hides_no_mismatch_of_adjoints():
    """Beside it every difference would be small."""
    ends = torch.tensor([1.0, torch.inf, 2.0]).view(1, 3, 1, 1)
    starts = torch.tensor([1.0, torch.inf, 3.0]).view(1, 3, 1, 1)
    assert adjoint_residual(ends, ends) == 0
    assert adjoint_residual(ends, starts) == 0.5
    assert not adjoint_residual(ends, starts.flip(1)) < 1
