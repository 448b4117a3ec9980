"""`explain` and `check_cell` say what is there."""

import pytest
import torch
from torch import nn

import pararnn
from pararnn.kernels.c.build import find_compiler


class Leaky(nn.Module):
    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.project = nn.Linear(input_size, 2 * hidden_size)
        self.decay = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x, state):
        h = state
        gate_x, value = self.project(x).chunk(2, -1)
        gate = torch.sigmoid(gate_x + self.decay * h)
        return gate * h + (1 - gate) * torch.tanh(value)


def test_explanation_of_an_elementwise_cell(capsys):
    explanation = pararnn.explain(pararnn.RNN(Leaky(4, 6), backend="c"))
    printed = capsys.readouterr().out
    assert explanation.structure == "elementwise"
    assert explanation.equations[0] == "gate = sigmoid(gate_x + decay * h)"
    assert explanation.equations[-1].startswith("h' = gate * h + (1 - gate) *")
    assert explanation.drives[0] == "gate_x"
    assert explanation.coefficients == ["decay"]
    assert explanation.plan.backend == "c"
    assert [c.because for c in explanation.plan.choices if c.what == "backend"] == ["asked for"]
    assert any("addmm" in line for line in explanation.input_part)
    assert any(
        "sigmoid" in line and "test_explain.py" in line for line in explanation.recurrent_part
    )
    assert "void forward(" in explanation.source
    assert "gate = sigmoid(gate_x + decay * h)" in printed


def test_explanation_says_what_compiling_took(fresh_cache, capsys):
    rnn = pararnn.RNN(Leaky(4, 6), backend="c")
    rnn(torch.randn(2, 3, 4))
    explanation = pararnn.explain(rnn)
    assert 0 < explanation.compile_s < 60
    took = f"kernels took {explanation.compile_s:.2f} s to compile and load"
    assert took in capsys.readouterr().out


def test_explanation_of_a_dense_cell_names_the_operation(capsys):
    explanation = pararnn.explain(pararnn.RNN(nn.GRUCell(4, 6)))
    capsys.readouterr()
    assert explanation.structure == "dense"
    assert "addmm" in explanation.structure_reason
    assert explanation.plan.backend == ("c" if find_compiler() else "torch")
    assert explanation.plan.path == "rows"
    assert "channels mix" in str(explanation.plan)


def test_generated_source_is_deterministic():
    sources = [pararnn.RNN(Leaky(4, 6), backend="c").runner() for _ in range(2)]
    assert sources[0].request == sources[1].request


class Helped(Leaky):
    """Gets its values from a function, not in the order in which that computes them."""

    def forward(self, x, state):
        h, kept = self.read(state)
        gate, value = self.gates(x, h)
        new, _ = self.mixed(gate, value, kept), h
        return new

    def read(self, state):
        return state, state * self.decay

    def gates(self, x, h):
        gate_x, value_x = self.project(x).chunk(2, -1)
        value = torch.tanh(value_x + h)
        return torch.sigmoid(gate_x + h), value

    def mixed(self, gate, value, kept):
        return gate * kept + (1 - gate) * value


def test_values_that_a_function_returns_have_the_names_of_their_variables(capsys):
    lines = pararnn.explain(pararnn.RNN(Helped(4, 6), backend="torch")).equations
    assert "kept = state * decay" in lines
    assert any(line.startswith("gate = sigmoid(") for line in lines)
    assert any(line.startswith("value = tanh(") for line in lines)
    capsys.readouterr()


class Reassigned(Leaky):
    """Gives one name to several values, and uses the first after the second."""

    def forward(self, x, h):
        gate = self.decay * h
        kept = torch.cos(gate)
        gate = torch.sin(gate)
        h = gate + self.project(x).chunk(2, -1)[0]
        return torch.tanh(h) * kept


def test_values_of_one_variable_have_names_of_their_own(capsys):
    *lines, last = pararnn.explain(pararnn.RNN(Reassigned(4, 6), backend="torch")).equations
    assert "gate = decay * h" in lines
    assert "gate_2 = sin(gate)" in lines
    assert "kept = cos(gate)" in lines
    assert any(line.startswith("h_2 = gate_2 + ") for line in lines)
    assert last == "h' = tanh(h_2) * kept"
    capsys.readouterr()


def test_a_cell_whose_last_line_is_a_function_of_its_own(capsys):
    class Swapped(Leaky):
        num_components = 2

        def forward(self, x, state):
            h, c = self.both(x, *state)
            return h, c

        def both(self, x, h, c):
            u, v = self.project(x).chunk(2, -1)
            c = torch.sin(c * self.decay + u)
            return torch.tanh(h + v), c

    lines = pararnn.explain(pararnn.RNN(Swapped(4, 6), backend="torch")).equations
    assert not any(line.startswith("h = sin") for line in lines)
    capsys.readouterr()


def test_explain_wants_a_layer():
    with pytest.raises(TypeError, match=r"explain takes a pararnn.RNN, got Linear"):
        pararnn.explain(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"one of \.layers of .* what parallelize made"):
        pararnn.explain(pararnn.parallelize(nn.GRU(2, 2)))
    cell = Leaky(4, 6)
    del cell.input_size
    with pytest.raises(TypeError, match="call the layer once"):
        pararnn.explain(pararnn.RNN(cell))


def test_check_cell_passes_and_reports():
    check = pararnn.testing.check_cell(Leaky(4, 6))
    assert check.structure == "elementwise"
    assert set(check.errors) == {f"{b}, chunk={c}" for b in ("torch", "c") for c in (1, 7, 37)}
    assert max(check.errors.values()) < 1e-12


def test_check_cell_says_that_a_cell_is_random():
    class Dropped(Leaky):
        def forward(self, x, state):
            return super().forward(nn.functional.dropout(x, 0.5, self.training), state)

    cell = Dropped(4, 6)
    with pytest.raises(ValueError, match=r"Dropped draws random numbers \(.*test_explain\.py:\d+"):
        pararnn.testing.check_cell(cell)
    assert pararnn.testing.check_cell(cell.eval()).structure == "elementwise"


def test_check_cell_sees_a_wrong_result(monkeypatch):
    from pararnn.solvers.systems import Backward

    right = Backward.initial_gradient

    def wrong(self, found):
        return right(self, found) * 1.001

    monkeypatch.setattr(Backward, "initial_gradient", wrong)
    with pytest.raises(AssertionError, match="gradient of"):
        pararnn.testing.check_cell(Leaky(4, 6))
