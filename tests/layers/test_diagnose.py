"""`diagnose`: exponents that are known, iterations, agreement, words, plot, mistakes."""

import copy
import math
import re
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from pararnn import RNN, Jacobi, Newton, Sequential, cells, diagnose, parallelize


class Map(nn.Module):
    """h' = f(h) + 0 x, one channel after another."""

    input_size, hidden_size, num_components = 1, 3, 1

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, h):
        return self.function(h) + self.weight * x


def test_exponent_of_a_linear_cell_is_the_logarithm_of_its_factor():
    found = diagnose(RNN(Map(lambda h: 0.5 * h)), torch.randn(2, 40, 1))
    assert found.lyapunov_exponent == pytest.approx(math.log(0.5), rel=1e-12)
    assert set(found.iterations.values()) <= {1, 2}
    assert found.value_error < 1e-12
    assert "leave chunk='auto'" in found.recommendation


def test_exponent_of_the_logistic_map_is_the_logarithm_of_two():
    found = diagnose(
        RNN(Map(lambda h: 4 * h * (1 - h))),
        torch.zeros(1, 1500, 1),
        torch.tensor([[0.3, 0.4, 0.7]]),
    )
    assert found.lyapunov_exponent == pytest.approx(math.log(2), rel=0.1)
    assert "iterations grow with the length" in found.recommendation
    assert "agree to rounding times exp(exponent * steps)" in found.recommendation


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_exponent_of_few_steps(steps):
    found = diagnose(RNN(Map(lambda h: 0.5 * h)), torch.randn(2, steps, 1))
    assert found.lyapunov_exponent == pytest.approx(math.log(0.5), rel=1e-12)


class Delayed(Map):
    """What it returns is the state of one step before."""

    num_components = 2

    def forward(self, x, state):
        h, c = state
        return 0.5 * c, h + x


class Tokens(Map):
    """Takes token numbers."""

    input_size = None

    def __init__(self):
        super().__init__(torch.tanh)
        self.table = nn.Embedding(5, 3)

    def forward(self, x, h):
        return self.function(h + self.table(x))


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("recording", [True, False])
def test_outputs_without_gradients(steps, recording):
    delayed = RNN(Delayed(None))
    tokens = RNN(Tokens()).requires_grad_(False)
    x = torch.randn(2, steps, 1)
    with torch.set_grad_enabled(recording):
        for found in (diagnose(delayed, x), diagnose(tokens, torch.randint(5, (2, steps)))):
            assert found.value_error < 1e-12
            assert found.gradient_error < 1e-12
    assert not x.requires_grad


class Restarting(Map):
    """The logistic map, which starts anew where x is 1."""

    def forward(self, x, h):
        return (1 - x) * super().forward(x, h) + x * 0.3


def test_a_step_that_forgets_all_does_not_hide_what_follows():
    x = torch.zeros(1, 1500, 1)
    x[:, 3] = 1
    found = diagnose(RNN(Restarting(lambda h: 4 * h * (1 - h))), x, torch.full((1, 3), 0.3))
    assert found.lyapunov_exponent == pytest.approx(math.log(2), rel=0.1)
    assert "iterations grow with the length" in found.recommendation


@pytest.mark.parametrize(
    ("factor", "words"),
    [(1.0, "Small differences keep their size, and a few"), (1.1, "Small differences grow, but")],
)
def test_a_linear_cell_is_never_chaotic(factor, words):
    found = diagnose(RNN(Map(lambda h: factor * h)), torch.randn(2, 100, 1))
    assert found.recommendation.startswith(words)


def test_states_that_are_not_finite_are_told():
    found = diagnose(RNN(Map(lambda h: 0.5 * h)), torch.full((2, 30, 1), math.nan))
    assert "not finite" in found.recommendation


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_gradients_are_off(mode, dtype):
    with mode():
        rnn = RNN(cells.ParaGRUCell(4, 6).to(dtype))
        found = diagnose(rnn, torch.randn(2, 30, 4, dtype=dtype), torch.randn(2, 6, dtype=dtype))
    assert 0 < found.gradient_error < 1e-12


@pytest.mark.parametrize("reaction", ["raise", "warn"])
def test_a_layer_that_does_not_converge(reaction):
    """As the message of `ConvergenceError` advises."""
    solver = Newton(chunk=1, max_iterations=1, on_failure=reaction)
    rnn = RNN(cells.ParaGRUCell(4, 6), solver=solver)
    with pytest.warns() if reaction == "warn" else nullcontext():
        found = diagnose(rnn, torch.randn(2, 30, 4))
    assert 1 < found.iterations[1] < 10
    assert found.value_error < 1e-12


def test_report_of_a_layer(tmp_path, capsys):
    rnn = RNN(cells.ParaLSTMCell(4, 6))
    before = {n: p.clone() for n, p in rnn.named_parameters()}
    found = diagnose(rnn, torch.randn(2, 70, 4))
    assert found.structure == "elementwise"
    assert found.steps == 70
    assert list(found.residuals) == [1, 8, 64]
    assert found.lyapunov_exponent < 0
    assert max(found.value_error, found.gradient_error) < 1e-12
    paper = found.residuals[1]
    assert paper[0] > 1e-3 > paper[4]
    assert paper[-1] < 1e-14
    assert found.iterations[8] <= found.iterations[1]
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    assert "ParaLSTMCell: elementwise, 70 steps" in printed
    assert all(torch.equal(before[n], p) for n, p in rnn.named_parameters())
    found.plot(tmp_path / "residuals.png")
    assert (tmp_path / "residuals.png").stat().st_size > 1000


def test_layouts_and_states_are_those_of_the_layer():
    cell, x = cells.ParaLSTMCell(4, 6), torch.randn(2, 20, 4)
    state = (torch.randn(2, 6), torch.randn(2, 6))
    one = diagnose(RNN(cell, solver=Newton(tolerance=1e-3)), x, state)
    other = diagnose(
        RNN(cell, batch_first=False, solver=Newton(tolerance=1e-3)), x.transpose(0, 1), state
    )
    assert one == other
    single = diagnose(RNN(cell), x[0], tuple(s[0] for s in state))
    assert single.steps == 20


def test_mixing_cells_are_diagnosed_too():
    found = diagnose(RNN(nn.GRUCell(4, 6)), torch.randn(2, 30, 4))
    assert found.structure == "dense"
    assert found.lyapunov_exponent < 0
    assert found.method == "Newton"
    assert list(found.residuals) == list(found.contraction) == [1, 8]
    assert found.residuals[1][0] > 1e-3 > 1e-12 > found.residuals[1][-1]
    assert found.contraction[8] < found.contraction[1]
    assert max(found.value_error, found.gradient_error) < 1e-13
    assert "leave chunk='auto'" in found.recommendation


def test_chaotic_mixing_cell_is_told():
    cell = nn.RNNCell(4, 40)
    with torch.no_grad():
        cell.weight_hh.normal_(0, 0.5)  # gain 0.5 * sqrt(40): chaotic (Sompolinsky et al. 1988)
    found = diagnose(RNN(cell), torch.randn(1, 120, 4))
    assert found.method == "Jacobi"
    assert found.lyapunov_exponent > 0.1
    assert found.contraction[64] > 1e3
    assert found.iterations[8] >= 14, "one chunk per iteration"
    assert found.value_error < 1e-2, "rounding grows too"
    assert "iterations grow with the length" in found.recommendation


def test_newton_that_overshoots_is_seen():
    found = diagnose(RNN(cells.SLSTMCell(4, 6)), torch.randn(1, 100, 4))
    assert found.iterations[1] > 10 > found.iterations[64]
    assert found.value_error < 1e-12
    assert "chunks of 1 take" in found.recommendation


PAYING = {  # in 600 steps, on a CPU
    "forgets": (
        lambda: cells.DeltaMemoryCell(4, 3, 2),
        None,
        "chunks pay         the plan's 9 chunks of 67 take 1 iteration: 131 steps one after "
        "another instead of 600; tangents up to ",
    ),
    "remembers": (
        lambda: cells.M2RNNCell(4, 3, 2),
        None,
        "chunks do not pay  the plan's 9 chunks of 67 take . iterations but get 2, after which all "
        "goes step by step: 865 steps one after another instead of 600; tangents up to ",
    ),
    "Newton": (
        lambda: cells.M2RNNCell(4, 3, 2),
        Newton(chunk=100),
        "chunks do not pay  the plan's 6 chunks of 100 take [45] iterations: [79]64 steps",
    ),
    "Jacobi": (
        lambda: cells.M2RNNCell(4, 3, 2),
        Jacobi(chunk=200),
        "chunks do not pay  the plan's 3 chunks of 200 take 3 iterations: 664 steps",
    ),
    "one chunk": (
        lambda: cells.ParaGRUCell(4, 6),
        Sequential(),
        "chunks do not pay  the plan has one chunk .asked for.; on a device with processors to "
        "spare, chunks of 64 would take 1 iteration, 128 steps one after another instead of 600\n",
    ),
}


@pytest.mark.parametrize("name", PAYING)
def test_whether_chunks_pay(name, capsys):
    make, solver, line = PAYING[name]
    rnn = RNN(make(), backend="torch", solver=solver)
    found = diagnose(rnn, torch.randn(1, 600, 4))
    assert found.chunks_pay == line.startswith("chunks pay")
    assert re.search(f"^  {line}", capsys.readouterr().out, re.MULTILINE)


class Own(nn.GRUCell):
    """A cell that PyTorch has no kernel for."""


def test_the_loop_over_a_cell_has_one_chunk():
    found = diagnose(RNN(nn.GRUCell(4, 6)), torch.randn(2, 5, 4))
    assert found.chunks_reason.startswith("the plan has one chunk (PyTorch's loop in C++: ")
    found = diagnose(RNN(Own(4, 6)), torch.randn(2, 5, 4))
    assert not found.chunks_pay
    assert found.chunks_reason.startswith("the plan has one chunk (calling the cell at every step")
    assert "chunks of 1 would take" in found.chunks_reason
    found = diagnose(RNN(nn.GRUCell(4, 6)), torch.randn(2, 1, 4))
    assert found.chunks_reason.endswith("fastest here)")


def test_residuals_are_those_after_so_many_iterations():
    """Of one solve; each equals what a solve of so many iterations reports."""
    torch.manual_seed(0)
    rnn, x = RNN(nn.RNNCell(3, 5), solver=Jacobi()), torch.randn(2, 30, 3)
    found = diagnose(rnn, x)
    assert len(found.residuals[1]) == 10
    exact = RNN(copy.deepcopy(rnn.cell).double(), backend="torch")
    for i, residual in enumerate(found.residuals[1][:4], 1):
        exact.solver = Jacobi(tolerance=1e-300, max_iterations=i, chunk=1)
        exact(x.double())
        assert exact.report.residual == pytest.approx(residual, rel=1e-6)


def test_a_terminal_sees_what_goes_on(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    diagnose(RNN(cells.ParaGRUCell(4, 6)), torch.randn(2, 20, 4))
    said = capsys.readouterr().err.split("\r\x1b[K")
    assert "diagnose: iterations of chunks of 8" in said
    assert said[-1] == ""  # the line is gone
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    diagnose(RNN(cells.ParaGRUCell(4, 6)), torch.randn(2, 20, 4))
    assert capsys.readouterr().err == ""


def test_advice_agrees_with_the_plan():
    """Chunks of one step take many iterations, and the plan has one chunk."""
    found = diagnose(RNN(nn.GRUCell(16, 64)), torch.randn(1, 200, 16))
    assert not found.chunks_pay
    assert re.search(r"chunks of 1 take \d+ iterations", found.recommendation)
    assert "the plan's, which has one chunk here" in found.recommendation


def test_mistakes():
    with pytest.raises(TypeError, match=r"takes a pararnn.RNN, got ParaGRUCell; wrap"):
        diagnose(cells.ParaGRUCell(4, 6), torch.randn(2, 5, 4))
    with pytest.raises(TypeError, match=r"one of \.layers of .* what parallelize made"):
        diagnose(parallelize(nn.GRU(4, 6)), torch.randn(2, 5, 4))
    with pytest.raises(ValueError, match="x has shape"):
        diagnose(RNN(cells.ParaGRUCell(4, 6)), torch.randn(2, 5, 3))
    with pytest.raises(ValueError, match=r"x has shape \(0, 5, 4\); .* at least one sequence"):
        diagnose(RNN(cells.ParaGRUCell(4, 6)), torch.randn(0, 5, 4))


def test_iterations_of_a_cell_that_never_forgets_are_counted_up_to_a_limit():
    """Chunks of one step would take as many iterations as there are steps."""

    class Turns(nn.Module):
        input_size, hidden_size, num_components = 3, 4, 1

        def __init__(self):
            super().__init__()
            self.turn = nn.Parameter(torch.linalg.qr(torch.randn(4, 4))[0])
            self.project = nn.Linear(3, 4)

        def forward(self, x, h):
            return h @ self.turn + self.project(x)

    found = diagnose(RNN(Turns(), solver=Jacobi()), torch.randn(2, 300, 3))
    assert found.iterations[1] == 51
    assert "chunks of 1        more than 50 iterations;" in str(found)
    assert len(found.residuals[1]) == 10
    assert found.iterations[64] == 4  # as many as chunks but one, which the warm-up makes exact
    assert not found.chunks_pay
    if "the plan has one chunk" not in found.chunks_reason:
        assert found.recommendation.endswith("do not pay here. Pass solver=Sequential().")
    html = found._repr_html_()
    assert "more than 50 iterations" in html


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_counted_iterations_are_those_of_a_solve(chunk):
    rnn = RNN(cells.ParaGRUCell(3, 4), backend="torch")
    x = torch.randn(2, 200, 3)
    found = diagnose(rnn, x)
    double = RNN(copy.deepcopy(rnn.cell).double(), backend="torch")
    double.solver = Newton(tolerance=1e-6, chunk=chunk)
    double(x.double())
    # a call looks back before its first guess; the diagnosis does too
    assert found.iterations[chunk] == double.report.iterations
