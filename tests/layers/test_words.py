"""Numbers of things in printed texts."""

import pytest
import torch

import pararnn
from pararnn._words import counted


@pytest.mark.parametrize(
    ("number", "things", "text"),
    [
        (0, ("chunk",), "0 chunks"),
        (1, ("chunk",), "1 chunk"),
        (2, ("chunk",), "2 chunks"),
        (1024, ("chunk",), "1,024 chunks"),
        (1, ("entry", "entries"), "1 entry"),
        (2, ("entry", "entries"), "2 entries"),
    ],
)
def test_counted(number, things, text):
    assert counted(number, *things) == text


@pytest.mark.parametrize(
    ("solver", "said"),
    [
        (pararnn.Newton(chunk=8), "sequential: 1 chunk, 1 iteration, residual 0.0e+00"),
        (pararnn.Newton(chunk=4), "2 chunks, "),
    ],
)
def test_a_report(solver, said):
    rnn = pararnn.RNN(pararnn.cells.ParaGRUCell(3, 4), solver=solver, backend="torch")
    rnn(torch.randn(2, 8, 3))
    assert said in str(rnn.report)


def test_an_error():
    solver = pararnn.Newton(chunk=1, max_iterations=1, on_failure="raise")
    rnn = pararnn.RNN(pararnn.cells.ParaGRUCell(3, 4), solver=solver, backend="torch")
    with pytest.raises(pararnn.ConvergenceError, match=" after 1 iteration: the residual is "):
        rnn(torch.randn(2, 64, 3) * 5)
