"""Steps in one generated kernel, in Triton's interpreter, against one operation after the other."""

import functools

import pytest
import torch
from torch import nn

from pararnn import RNN, Jacobi, Newton, Sequential
from pararnn.cells import HeadSLSTMCell
from pararnn.kernels import fused
from pararnn.kernels import mixing as operator
from pararnn.solvers.chunks import Chunks
from pararnn.solvers.chunks import run_steps as one_by_one
from pararnn.testing import assert_close, loop

from .compare import assert_same, outcome, random_state
from .conftest import needs_triton
from .test_mixing import INPUT, MIXING, Heads, Normed, Partly

pytestmark = needs_triton

RTOL = {torch.float64: 1e-12, torch.float32: 1e-5}


class TwoProducts(nn.Module):
    """A hidden layer, whose units are no channels, and products from the left."""

    input_size, hidden_size, num_components = INPUT, 6, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, 12)
        self.first = nn.Parameter(torch.randn(6, 12) * 0.4)
        self.second = nn.Parameter(torch.randn(6, 12) * 0.4)

    def forward(self, x, h):
        hidden = torch.tanh(h @ self.first + self.input(x))
        return 0.5 * h + torch.tanh((self.second @ hidden.T).T)


class HeadsInPlace(nn.Module):
    """Two products per head, between which heads stay apart; a block of gates per channel."""

    input_size, hidden_size, num_components = INPUT, 6, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, 6)
        self.first = nn.Parameter(torch.randn(2, 3, 6) * 0.4)
        self.second = nn.Parameter(torch.randn(2, 6, 3) * 0.4)

    def forward(self, x, h):
        heads = h.unflatten(1, (2, 3)).transpose(0, 1)
        mixed = torch.tanh(heads @ self.first) @ self.second
        return torch.tanh(self.input(x) + mixed.transpose(0, 1).flatten(1))


CELLS = {
    "rnn": lambda: nn.RNNCell(INPUT, 6),
    "relu": lambda: nn.RNNCell(INPUT, 19, bias=False, nonlinearity="relu"),
    "gru": lambda: nn.GRUCell(INPUT, 17),
    "gru_of_16": lambda: nn.GRUCell(INPUT, 16),
    "lstm": lambda: nn.LSTMCell(INPUT, 6),
    "heads": Heads,
    "slstm": lambda: HeadSLSTMCell(6, 15, num_heads=3),
    "partly": Partly,
    "two_products": TwoProducts,
    "heads_in_place": HeadsInPlace,
}


def make(name, dtype):
    torch.manual_seed(5)
    return CELLS[name]().to(dtype)


def steps_of(cell, dtype, direction, steps, rows, strided=False):
    """Chunks of the step or its adjoint, at random."""
    of = RNN(cell).evaluation().traced.mixing
    torch.manual_seed(7)
    count = of.num_components
    moved = lambda e: torch.randn(steps, rows, *e.shape).to(e.dtype)  # noqa: E731
    edges = [moved(e) if e.by_rows else torch.randn(e.shape).to(e.dtype) * 0.4 for e in of.edges]
    if direction == "adjoint":
        before, grads = (
            [torch.rand(steps * rows, of.hidden, dtype=dtype) for _ in range(count)]
            for _ in range(2)
        )
        flat = [e.flatten(0, 1) if k.by_rows else e for e, k in zip(edges, of.edges, strict=True)]
        found, adjoint = of.adjoint.edges(before, flat, grads), of.adjoint
        edges = [
            found[i].unflatten(0, (steps, rows)) if adjoint.by_rows[i] else found[i]
            for i in adjoint.step_edges
        ]
    step = of.step if direction == "forward" else of.adjoint.step
    if strided:
        edges = [
            e.transpose(0, 1).contiguous().transpose(0, 1) if by_rows else e
            for e, by_rows in zip(edges, step.by_rows, strict=True)
        ]
    return of, Chunks(step, steps, edges, None, ())


def compare(chunks, state, dtype, **options):
    expected = one_by_one(chunks, state, **options)
    actual = fused.run_steps(chunks, state, **options)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert_close(f"component {i}", a, e, rtol=RTOL[dtype])
        assert a.stride() == e.stride()


@pytest.mark.parametrize("direction", ["forward", "adjoint"])
@pytest.mark.parametrize("name", CELLS)
def test_equals_operations(name, direction, dtype):
    of, chunks = steps_of(make(name, dtype), dtype, direction, steps=4, rows=5)
    state = random_state(of.num_components, 5, of.hidden, dtype=dtype)
    state = state if isinstance(state, tuple) else (state,)
    compare(chunks, state, dtype)


@pytest.mark.parametrize("name", ["gru", "heads", "slstm"])
@pytest.mark.parametrize("direction", ["forward", "adjoint"])
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_rows_starts_and_order(name, direction, copies, begins, reverse):
    """More rows than a program has, strided edges, states that are replaced, both directions."""
    dtype, rows, steps = torch.float64, 7, 5
    of, chunks = steps_of(make(name, dtype), dtype, direction, steps, rows, strided=True)
    flags, fresh = None, ()
    if begins:
        flags = torch.rand(steps, rows, 1) < 0.3
        fresh = [torch.randn(steps, rows, of.hidden, dtype=dtype) for _ in range(of.num_components)]
        fresh[-1] = fresh[-1][:1, :1, :1].expand_as(fresh[-1])
    chunks = Chunks(chunks.step, steps, chunks.edges, flags, fresh, reverse)
    state = [torch.randn(copies * rows, of.hidden, dtype=dtype) for _ in range(of.num_components)]
    compare(chunks, state, dtype, copies=copies)
    if not reverse:
        compare(chunks, state, dtype, copies=copies, first=2)


@pytest.mark.parametrize("solver", [Newton(chunk=4), Jacobi(chunk=4), Sequential()], ids=repr)
@pytest.mark.parametrize("name", ["gru", "heads", "lstm"])
@pytest.mark.parametrize("reset", [False, True])
def test_whole_solve_equals_loop(monkeypatch, name, solver, reset):
    monkeypatch.setattr(operator, "run_steps", fused.run_steps)
    torch.manual_seed(5)
    cell = MIXING[name]().double()
    rnn = RNN(cell, solver=solver)
    x = torch.randn(2, 10, INPUT, dtype=torch.float64)
    state = random_state(rnn.num_components, 2, rnn.hidden_size)
    resets = torch.rand(2, 10) < 0.2 if reset else None
    expected = outcome(functools.partial(loop, cell, resets=resets), cell, x, state)
    actual = outcome(functools.partial(rnn, resets=resets), cell, x, state)
    assert_same(actual, expected, 1e-10)


def test_first_read_in_inference_mode(monkeypatch):
    """Inside an operator and without autograd, where the step is recorded for the first time."""
    monkeypatch.setattr(operator, "run_steps", fused.run_steps)
    fused._known.clear()
    cell = make("heads", torch.float64)
    rnn = RNN(cell, solver=Jacobi(chunk=4))
    x = torch.randn(2, 9, INPUT, dtype=torch.float64)
    zeros = (torch.zeros(2, 6, dtype=torch.float64),) * 2
    with torch.inference_mode():
        y, _ = rnn(x)
        assert_close("y", y, loop(cell, x, zeros)[0], rtol=1e-10)


class Softmax(nn.Module):
    """A reduction over channels."""

    input_size, hidden_size, num_components = INPUT, 6, 1

    def forward(self, x, h):
        return torch.softmax(h + x[:, :1], -1)


class Twisted(nn.Module):
    """The channels of a product in another order."""

    input_size, hidden_size, num_components = INPUT, 6, 1

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x, h):
        return torch.tanh(h * (h @ self.weight).flip(1) + x[:, :1])


class Squared(nn.Module):
    """A product of the state with itself."""

    input_size, hidden_size, num_components = INPUT, 4, 1

    def forward(self, x, h):
        matrix = h.unflatten(1, (2, 2))
        return torch.tanh((matrix @ matrix).flatten(1) + x[:, :1])


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (Softmax, "softmax at .*: it is not an operation on each element by itself"),
        (Normed, "layer_norm at .*: it is not an operation on each element by itself"),
        (Twisted, "mul at .*: the rows or channels of its operands lie apart differently"),
        (Squared, "bmm at .*: none of the factors is a weight"),
        (lambda: nn.GRUCell(INPUT, 200), "its weights take 1536 KB on the chip, which has 200 KB"),
    ],
)
def test_what_is_not_fused_says_why(cell, reason):
    dtype = torch.float64
    of, chunks = steps_of(cell().to(dtype), dtype, "forward", steps=2, rows=3)
    state = [torch.rand(3, of.hidden, dtype=dtype) for _ in range(of.num_components)]
    with pytest.raises(fused.NotFused, match=reason):
        fused.run_steps(chunks, state)
    assert any(reason.split(":")[-1].strip() in r for r in fused.reasons(chunks.step.module))


def test_source_is_deterministic_and_shows_the_equations():
    from pararnn.kernels.triton_steps import Form, source
    from pararnn.tracing.products import products

    def text():
        _, chunks = steps_of(make("gru", torch.float32), torch.float32, "forward", 2, 3)
        of = RNN(make("gru", torch.float32)).evaluation().traced.mixing
        strides = [
            e.stride()[2 if r else 0 :]
            for e, r in zip(chunks.edges, chunks.step.by_rows, strict=True)
        ]
        found = products(
            of.step.module, of.edges, strides, 1, of.hidden, torch.float32, torch.device("cpu")
        )
        return source(found, Form(double=False, precision="ieee", begins=False))

    assert text() == text()
    assert "tanh(drive2 + " in text().split('"""')[1]
    assert "dot(state0, weight2)" in text()
