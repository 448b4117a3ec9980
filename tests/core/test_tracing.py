"""What tracing finds: structure, names, when to trace again, and what has no parallel form."""

import functools
import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pararnn
from pararnn import RNN, Newton, TraceError
from pararnn.testing import loop
from pararnn.tracing import capture, gradients, recorder
from pararnn.tracing.capture import resolve
from pararnn.tracing.recorder import Recorder

from .cells import CELLS, Cell, make_cell
from .compare import assert_same, outcome, random_state

DENSE = {
    "gru_cell": (lambda: nn.GRUCell(5, 6), 1),
    "lstm_cell": (lambda: nn.LSTMCell(5, 6), 2),
    "rnn_cell": (lambda: nn.RNNCell(5, 6), 1),
}


class BlockDiagonal(nn.Module):
    input_size, hidden_size, num_components = 5, 6, 1

    def __init__(self, size):
        super().__init__()
        self.input = nn.Linear(5, 6)
        self.blocks = nn.Parameter(torch.randn(6 // size, size, size))

    def forward(self, x, h):
        heads = h.unflatten(-1, self.blocks.shape[:2])
        return torch.tanh(
            self.input(x) + torch.einsum("nhi,hij->nhj", heads, self.blocks).flatten(1)
        )


class Normed(Cell):
    """Layer norm of the state mixes all channels."""

    def __init__(self):
        super().__init__(1)

    def forward(self, x, h):
        return torch.tanh(self.input(x) + F.layer_norm(h, h.shape[-1:]) * self.diagonal[0])


class StackedGates(Cell):
    """Stacks along the first axis: not read as elementwise, but right."""

    def __init__(self):
        super().__init__(2)

    def forward(self, x, h):
        u, v = self.input(x).chunk(2, -1)
        z, c = torch.stack([u, v + self.diagonal[0] * h]).sigmoid().unbind(0)
        return (1 - z) * h + z * c


class MatricesFromInput(nn.Module):
    """One matrix per row and head, computed from x; rows and heads are folded into one axis."""

    input_size, hidden_size, num_components = 5, 8, 1

    def __init__(self, product):
        super().__init__()
        self.product = product
        self.matrices = nn.Linear(5, 4 * 2 * 2)

    def forward(self, x, h):
        matrices = self.matrices(x).view(-1, 4, 2, 2)
        return torch.tanh(self.product(h.unflatten(-1, (4, 2)), matrices)).reshape(-1, 8)


PRODUCTS = {
    "einsum": lambda h, m: torch.einsum("nhi,nhij->nhj", h, m),
    "matmul": lambda h, m: h.unsqueeze(-2) @ m,
    "bmm": lambda h, m: torch.bmm(h.reshape(-1, 1, 2), m.view(-1, 2, 2)),
    "heads first": lambda h, m: (h.transpose(0, 1).unsqueeze(-2) @ m.transpose(0, 1)).transpose(
        0, 1
    ),
}


class PairsOfComponents(nn.Module):
    """Folds rows and pairs of channels of one of two components."""

    input_size, hidden_size, num_components = 5, 8, 2

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(5, 16)
        self.pairs = nn.Parameter(torch.randn(2, 2))

    def forward(self, x, state):
        u, v = self.input(x).chunk(2, -1)
        h, c = state
        return torch.tanh(u + (c.view(-1, 2) @ self.pairs).view(-1, 8)), torch.sigmoid(v + h)


class Shifted(Cell):
    """Writes into part of a temporary, across channels."""

    def __init__(self):
        super().__init__(1)

    def forward(self, x, h):
        new = torch.tanh(self.input(x) + self.diagonal[0] * h) * 1.0
        new[:, 1:] = new[:, :-1].float().double() * 0.5
        return new


def structure(cell, **options):
    return RNN(cell, backend="torch", **options).runner().traced.structure


@pytest.mark.parametrize("name", CELLS)
def test_table_is_elementwise(name):
    assert structure(make_cell(name)) == "elementwise"


@pytest.mark.parametrize("name", DENSE)
def test_dense_cells_of_pytorch(name):
    make, components = DENSE[name]
    cell = make().double()
    rnn = RNN(cell)
    assert rnn.runner().traced.structure == "dense"
    x = torch.randn(3, 9, 5, dtype=torch.float64)
    state = random_state(components, 3, 6)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-12)


@pytest.mark.parametrize("size", [2, 3])
def test_block_diagonal_cell_has_heads(size):
    cell = BlockDiagonal(size).double()
    assert structure(cell) == f"heads (size {size})"
    with torch.no_grad():
        cell.blocks.zero_()
    assert structure(cell) == f"heads (size {size})", "zeros in a weight prove nothing"


@pytest.mark.parametrize(
    "make", [lambda: BlockDiagonal(3), Normed, StackedGates, Shifted, PairsOfComponents]
)
def test_not_elementwise_equals_loop(make):
    cell = make().double()
    rnn = RNN(cell, solver=Newton(chunk=3))
    x = torch.randn(3, 9, 5, dtype=torch.float64)
    state = random_state(cell.num_components, 3, cell.hidden_size)
    resets = torch.rand(3, 9) < 0.3
    resets[0, 0] = False  # so that a state has a gradient
    expected = outcome(lambda x, s: loop(cell, x, s, resets), cell, x, state)
    assert_same(outcome(lambda x, s: rnn(x, s, resets), cell, x, state), expected, 1e-12)


@pytest.mark.parametrize("product", PRODUCTS)
def test_matrices_from_the_input(product):
    cell = MatricesFromInput(PRODUCTS[product]).double()
    assert structure(cell) == "heads (size 2)"
    rnn, x = RNN(cell), torch.randn(3, 9, 5, dtype=torch.float64)
    state = random_state(1, 3, 8)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-12)
    time_first = RNN(cell, batch_first=False)
    swapped = time_first(x.transpose(0, 1), state)[0].transpose(0, 1)
    torch.testing.assert_close(swapped, expected["y"], rtol=1e-12, atol=0)


def test_dense_packed_equals_one_by_one():
    cell = nn.GRUCell(5, 6).double()
    rnn = RNN(cell)
    lengths = [3, 1, 5]
    x = torch.randn(1, 9, 5, dtype=torch.float64)
    state = random_state(1, 3, 6)

    def one_by_one(x, state):
        parts = [loop(cell, p, state[i : i + 1]) for i, p in enumerate(x.split(lengths, 1))]
        ys, lasts = zip(*parts, strict=True)
        return torch.cat(ys, 1), torch.cat(lasts)

    bounds = torch.tensor([0, 3, 4, 9])
    actual = outcome(lambda x, s: rnn(x, s, cu_seqlens=bounds), cell, x, state)
    assert_same(actual, outcome(one_by_one, cell, x, state), 1e-12)


def test_reason_names_operation_and_line():
    reason = RNN(Normed(), backend="torch").runner().traced.reason
    assert "layer_norm" in reason
    assert "test_tracing.py" in reason


def test_equations_use_the_names_of_the_source():
    text = str(pararnn.explain(RNN(pararnn.cells.ParaGRUCell(3, 4), backend="torch")))
    assert "z = sigmoid(a_z * h + x_z)" in text
    assert "c = tanh(a_c * (h * r) + x_c)" in text


def test_heads_and_biases_reach_the_recurrence_without_a_pass_over_memory():
    """What the batched product leaves is the drives' source itself; the bias is a coefficient."""
    cell = pararnn.cells.ParaGRUCell(6, 8, num_heads=2)
    traced = RNN(cell, backend="c").runner().traced
    tensors = [resolve(cell, name) for name in traced.input_part.names]
    source, *coefficients = traced.input_part(tensors, torch.randn(10, 6))
    assert source.shape == (10, 3, 2, 4)
    assert source.stride() == (12, 4, 120, 1)
    assert len(coefficients) == 6
    assert "z = sigmoid(a_z * h + (x_z + x_z_bias))" in str(pararnn.explain(RNN(cell)))


class Settable(Cell):
    def __init__(self):
        super().__init__(1)
        self.gain, self.mode, self.dropout = 0.5, "tanh", nn.Dropout(0.5)

    def forward(self, x, h):
        squash = torch.tanh if self.mode == "tanh" else torch.sin
        gain = self.gain * (2 if self.training else 1)
        return squash(self.input(x) + gain * self.diagonal[0] * h)


CHANGES = {
    "gain": lambda c: setattr(c, "gain", 0.9),
    "mode": lambda c: setattr(c, "mode", "sin"),
    "training": lambda c: c.eval(),
    "frozen": lambda c: c.diagonal.requires_grad_(False),
    "type": lambda c: c.float().double(),
    "replaced": lambda c: setattr(c, "input", nn.Linear(5, 7, bias=False).double()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_traced_again_when_the_cell_changes(change, backend):
    cell = Settable().double()
    rnn = RNN(cell, backend=backend)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    state = random_state(1, 2, 7)
    rnn(x, state)
    CHANGES[change](cell)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-12)


def test_not_traced_again_when_only_values_change():
    cell = make_cell("paralstm")
    rnn = RNN(cell, backend="torch")
    before = rnn.runner()
    with torch.no_grad():
        cell.diagonal.mul_(0.5)
    rnn(torch.randn(2, 6, 5, dtype=torch.float64))
    rnn(torch.randn(1, 60, 5, dtype=torch.float64))
    assert rnn.runner() is before


class Bad(Cell):
    def __init__(self, body):
        super().__init__(1)
        self.body = body
        self.norm = nn.BatchNorm1d(7)
        self.register_buffer("count", torch.zeros(7))

    def forward(self, x, h):
        return self.body(self, self.input(x), h)


class Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def _branch(self, u, h):
    return u + h if h.sum() > 0 else u - h


def _write(self, u, h):
    h.mul_(0.5)
    return u + h


def _write_buffer(self, u, h):
    self.count += 1
    return u + h * self.count


REFUSED = {
    "branch on the state": (_branch, "reads the value of a tensor"),
    "item": (lambda self, u, h: u + h.mean().item(), "reads the value of a tensor"),
    "random": (lambda self, u, h: u + h * torch.rand_like(h), "mixes|random"),
    "autograd function": (lambda self, u, h: Own.apply(u + h), r"torch\.autograd\.Function"),
    "batch norm of x": (lambda self, u, h: self.norm(u) + h, "rows|in place"),
    "batch statistic of x": (lambda self, u, h: u - u.mean(0) + h, "mixes the rows"),
    "scrambled rows of x": (
        lambda self, u, h: torch.tanh(u.view(7, -1).T + h),
        "mixes the rows of x",
    ),
    "attention over rows of x": (lambda self, u, h: (u @ u.T) @ h, "mixes the rows of x at"),
    "rare mixing of rows of h": (
        lambda self, u, h: torch.where(h > 9, h.cumsum(0), u + h),
        "mixes the rows of its state",
    ),
    "rare mixing of rows of x": (
        lambda self, u, h: torch.where(u < -9, u.roll(1, 0), u + h),
        "mixes the rows of x",
    ),
    "first row of x for all": (lambda self, u, h: u[:1].relu() + u + h, "mixes the rows of x"),
    "batch statistic of h": (lambda self, u, h: u + h - h.mean(0), "mixes the rows"),
    "write into the state": (_write, "in place"),
    "write into a buffer": (_write_buffer, "in place"),
    "too wide": (
        lambda self, u, h: torch.cat([u, h], -1),
        r"of shape \(3, 14\)",
    ),
    "tuple": (lambda self, u, h: (u, h), "was given one tensor as state but returned"),
    "integers": (lambda self, u, h: (u + h).long(), "must be floating point"),
    "without x": (lambda self, u, h: torch.tanh(h), "does not use x"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    body, message = REFUSED[case]
    with pytest.raises(TraceError, match=message) as error:
        RNN(Bad(body))
    assert "Bad" in str(error.value)


@pytest.mark.parametrize(
    "case", ["branch on the state", "write into the state", "autograd function"]
)
def test_refusal_names_the_line(case):
    with pytest.raises(TraceError, match=r"test_tracing\.py:\d+"):
        RNN(Bad(REFUSED[case][0]))


def test_random_numbers_in_the_input_part_are_fine():
    cell = Bad(lambda self, u, h: torch.tanh(F.dropout(u, 0.5, self.training) + h))
    rnn = RNN(cell, backend="torch")
    x = torch.randn(2, 9, 5)
    torch.manual_seed(7)
    one, _ = rnn(x)
    torch.manual_seed(7)
    two, _ = rnn(x)
    assert torch.equal(one, two)
    assert not torch.equal(one, rnn(x)[0])
    assert torch.isfinite(one).all()


def test_dropout_of_the_state_is_fresh_for_every_row_and_time():
    cell = Bad(lambda self, u, h: u * 0 + 1 + F.dropout(h, 0.5, True)).double()
    y, _ = RNN(cell, backend="torch")(torch.randn(4, 40, 5, dtype=torch.float64))
    kept = y[:, 1:] == 1 + 2 * y[:, :-1]
    assert torch.equal(kept | (y[:, 1:] == 1), torch.ones_like(kept))
    for axis in range(3):
        assert (kept.any(axis) & ~kept.all(axis)).float().mean() > 0.5


def test_integer_input():
    class Tokens(nn.Module):
        input_size = None
        hidden_size, num_components = 7, 1

        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 7)
            self.a = nn.Parameter(torch.randn(7))

        def forward(self, x, h):
            return torch.tanh(self.embedding(x) + self.a * h)

    cell = Tokens().double()
    rnn = RNN(cell)
    x = torch.randint(0, 11, (3, 9))
    state = random_state(1, 3, 7)
    y, last = rnn(x, state)
    expected, expected_last = loop(cell, x, state)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(last, expected_last, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "make", [lambda: pararnn.cells.ParaGRUCell(4, 6), lambda: nn.GRUCell(4, 6)]
)
def test_a_cell_that_is_gone_is_forgotten(make):
    """And nothing that was recorded lives on, with which a CUDA graph could not be captured."""
    cell = make()
    rnn = RNN(cell)
    rnn(torch.randn(2, 5, 4))[0].sum().backward()
    gc.collect()
    assert not any(type(o) is Recorder for o in gc.get_objects())
    parameters = [weakref.ref(p) for p in cell.parameters()]
    del rnn, cell
    gc.collect()
    assert not any(p() is not None for p in parameters)


@pytest.mark.parametrize("make", [lambda: nn.GRUCell(5, 6), lambda: make_cell("paragru")])
def test_a_cell_is_recorded_twice_and_no_more(monkeypatch, make):
    recorded = []

    def record(function, inputs, subject, *rest):
        recorded.append(subject)
        return recorder.record(function, inputs, subject, *rest)

    monkeypatch.setattr(capture, "record", record)
    cell = make()
    rnn = RNN(cell)
    kind = next(cell.parameters()).dtype
    x = torch.randn(2, 7, cell.input_size, dtype=kind, requires_grad=True)
    rnn(x)[0].sum().backward()
    rnn(torch.randn(3, 300, cell.input_size, dtype=kind))
    assert recorded == [type(cell).__name__] * 2


@pytest.mark.parametrize("inference", [False, True])
def test_a_trace_never_touches_the_cell(inference):
    """Other threads may compute with it meanwhile, in the type that it has."""
    gradients._known.clear()
    seen = []

    class Watching(nn.Module):
        input_size, hidden_size = 3, 4

        def __init__(self):
            super().__init__()
            self.project = nn.Linear(3, 4)
            self.decay = nn.Parameter(torch.zeros(4))

        def forward(self, x, h):
            own = vars(self)["_parameters"]["decay"], self.project._parameters["weight"]
            seen.append((x.dtype, [id(p) for p in own]))
            return torch.tanh(self.project(x) + self.decay * h)

    with torch.inference_mode(inference):
        cell = Watching()
    rnn = RNN(cell)
    own = [id(cell.decay), id(cell.project.weight)]
    assert torch.float64 in [kind for kind, _ in seen], "compared in float64"
    assert all(ids == own for _, ids in seen)
    x = torch.randn(2, 20, 3)
    with torch.no_grad():
        torch.testing.assert_close(rnn(x)[0], loop(cell, x, torch.zeros(2, 4))[0])


def test_threads_that_call_a_changed_layer_at_once():
    cell = nn.GRUCell(3, 4)
    rnn, x = RNN(cell), torch.randn(2, 3, 3)
    for change in range(4):
        cell.register_buffer(f"buffer_{change}", torch.zeros(1))
        gradients._known.clear()  # so that all compare derivatives again
        start = threading.Barrier(4)

        def call(start=start):
            start.wait()
            with torch.no_grad():
                return [rnn(x)[0] for _ in range(10)]

        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(call) for _ in range(4)]
        expected = loop(cell, x, torch.zeros(2, 4))[0]
        for y in itertools.chain(*(c.result() for c in calls)):
            torch.testing.assert_close(y, expected)  # PyTorch's kernel, which adds up otherwise
