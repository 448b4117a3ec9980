"""What a user gets to read: each message says what was wrong, what was seen, what to do."""

import re

import pytest
import torch
from torch import fx, nn

from pararnn import RNN, Newton, ParaGRU, scan
from pararnn.kernels import facts
from pararnn.kernels.c import build as c_build
from pararnn.layers import runner
from pararnn.testing import loop
from pararnn.tracing.recorder import show_place

from .cells import Cell, SlowGates, paralstm
from .conftest import needs_triton


def layer(**options):
    return RNN(paralstm(), **options)


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


CALLS = {
    "x is no tensor": (lambda: layer()([[1.0]]), TypeError, "x must be a tensor, got"),
    "x too flat": (
        lambda: layer()(zeros(5)),
        ValueError,
        "x has shape (5,); pass (batch, time, 5), or (time, 5) for a single sequence.",
    ),
    "x too deep": (
        lambda: layer()(zeros(1, 2, 3, 5)),
        ValueError,
        "has shape (1, 2, 3, 5); pass",
    ),
    "x of another size": (
        lambda: layer(batch_first=False)(zeros(3, 2, 4)),
        ValueError,
        "x has shape (3, 2, 4); pass (time, batch, 5)",
    ),
    "no time": (lambda: layer()(zeros(2, 0, 5)), ValueError, "time must be at least 1"),
    "state is one tensor": (
        lambda: layer()(zeros(2, 3, 5), zeros(2, 7)),
        ValueError,
        "state must be a tuple of 2 tensors",
    ),
    "state of another batch": (
        lambda: layer()(zeros(2, 3, 5), (zeros(4, 7), zeros(4, 7))),
        ValueError,
        "state has shape (4, 7) but x needs (2, 7); pass (rows, hidden_size), or None for zeros.",
    ),
    "state of complex numbers": (
        lambda: RNN(SlowGates())(zeros(2, 3, 5), zeros(2, 7, dtype=torch.complex64)),
        TypeError,
        "state is of torch.complex64, but a state is of real numbers; pass real and imaginary part "
        "as two components.",
    ),
    "component of complex numbers, one step": (
        lambda: layer().step(zeros(2, 5), (zeros(2, 7), zeros(2, 7, dtype=torch.complex64))),
        TypeError,
        "component 1 of state is of torch.complex64, but a state is of real numbers",
    ),
    "reset_state of complex numbers": (
        lambda: RNN(SlowGates())(
            zeros(2, 3, 5),
            resets=zeros(2, 3, dtype=torch.bool),
            reset_state=zeros(7, dtype=torch.complex64),
        ),
        TypeError,
        "reset_state is of torch.complex64, but a state is of real numbers",
    ),
    "component of complex numbers, scan": (
        lambda: scan(
            lambda h, x: (torch.tanh(x + h[0]), h[1]),
            (zeros(2, 7), zeros(2, 7, dtype=torch.complex64)),
            zeros(2, 3, 7),
        ),
        TypeError,
        "state component 1 is of torch.complex64, but a state is of real numbers",
    ),
    "state of integers, scan": (
        lambda: scan(lambda h, x: torch.tanh(x + h), zeros(2, 7, dtype=torch.long), zeros(2, 3, 7)),
        TypeError,
        "state component 0 is of torch.int64; pass floating-point numbers.",
    ),
    "resets of numbers": (
        lambda: layer()(zeros(2, 3, 5), resets=zeros(2, 3)),
        ValueError,
        "type torch.float32; pass booleans of shape (2, 3)",
    ),
    "resets of another shape": (
        lambda: layer()(zeros(2, 3, 5), resets=zeros(3, 2, dtype=torch.bool)),
        ValueError,
        "resets has shape (3, 2)",
    ),
    "resets laid out unlike x, time first": (
        lambda: layer(batch_first=False)(zeros(3, 2, 5), resets=zeros(2, 3, dtype=torch.bool)),
        ValueError,
        "resets has shape (2, 3) and type torch.bool; pass booleans of shape (3, 2), laid out like "
        "x. The layer takes x as (time, batch, ...); if yours is not, pass batch_first=True.",
    ),
    "x laid out unlike the state": (
        lambda: layer()(zeros(2, 3, 5), (zeros(3, 7), zeros(3, 7))),
        ValueError,
        "(rows, hidden_size), or None for zeros. The layer takes x as (batch, time, ...); if yours "
        "is not, pass batch_first=False.",
    ),
    "x laid out unlike the state, layers": (
        lambda: ParaGRU(5, 7)(zeros(2, 3, 5), zeros(1, 2, 7)),
        ValueError,
        "or None for zeros. The layer takes x as (time, batch, ...); if yours is not, pass "
        "batch_first=True.",
    ),
    "resets laid out unlike x, layers": (
        lambda: ParaGRU(5, 7)(zeros(3, 2, 5), resets=zeros(2, 3, dtype=torch.bool)),
        ValueError,
        "resets has shape (2, 3) and type torch.bool; pass booleans of shape (3, 2), laid out like",
    ),
    "resets with a batch axis, single sequence": (
        lambda: layer()(zeros(3, 5), resets=zeros(1, 3, dtype=torch.bool)),
        ValueError,
        "resets has shape (1, 3) and type torch.bool; pass booleans of shape (3,), laid out like x",
    ),
    "resets without a batch axis, time first": (
        lambda: layer(batch_first=False)(zeros(3, 2, 5), resets=zeros(3, dtype=torch.bool)),
        ValueError,
        "resets has shape (3,) and type torch.bool; pass booleans of shape (3, 2), laid out like x",
    ),
    "resets in a list, layers": (
        lambda: ParaGRU(5, 7)(zeros(3, 2, 5), resets=[[False] * 2] * 3),
        TypeError,
        "resets must be a tensor of booleans, got a list of 3",
    ),
    "cu_seqlens of complex numbers": (
        lambda: layer()(zeros(1, 3, 5), cu_seqlens=torch.tensor([0, 3j])),
        TypeError,
        "cu_seqlens must be integers, got torch.complex64",
    ),
    "cu_seqlens of booleans": (
        lambda: layer()(zeros(1, 1, 5), cu_seqlens=torch.tensor([False, True])),
        TypeError,
        "cu_seqlens must be integers, got torch.bool",
    ),
    "resets and cu_seqlens": (
        lambda: layer()(
            zeros(1, 3, 5), resets=zeros(1, 3, dtype=torch.bool), cu_seqlens=torch.tensor([0, 3])
        ),
        ValueError,
        "pass resets or cu_seqlens, not both",
    ),
    "reset_state of another batch": (
        lambda: layer()(
            zeros(2, 3, 5),
            resets=zeros(2, 3, dtype=torch.bool),
            reset_state=(zeros(4, 7), zeros(4, 7)),
        ),
        ValueError,
        "reset_state has shape (4, 7) but x needs (2, 7)",
    ),
    "reset_state of another size, without resets": (
        lambda: layer()(zeros(2, 3, 5), reset_state=(zeros(9), zeros(9))),
        ValueError,
        "component 0 of reset_state has shape (2, 9) but x needs (2, 7)",
    ),
    "reset_state and cu_seqlens": (
        lambda: layer()(
            zeros(1, 3, 5), cu_seqlens=torch.tensor([0, 3]), reset_state=(zeros(7), zeros(7))
        ),
        ValueError,
        "with cu_seqlens every sequence starts from its own row of state",
    ),
    "reset_state is a number": (
        lambda: layer()(zeros(1, 3, 5), reset_state=0.0),
        TypeError,
        "reset_state must be a tensor or a tuple of tensors, got a float",
    ),
    "cu_seqlens too short": (
        lambda: layer()(zeros(1, 3, 5), cu_seqlens=torch.tensor([0, 2])),
        ValueError,
        "cu_seqlens must rise from 0 to the number of steps 3",
    ),
    "cu_seqlens that fall": (
        lambda: layer()(zeros(1, 3, 5), cu_seqlens=torch.tensor([0, 2, 1, 3])),
        ValueError,
        "cu_seqlens must rise",
    ),
    "cu_seqlens of no sequence": (
        lambda: layer()(zeros(1, 3, 5), cu_seqlens=torch.tensor([0])),
        ValueError,
        "cu_seqlens has shape (1,); pass boundaries (0, ..., time), one more than there are",
    ),
    "x of another type": (
        lambda: RNN(nn.GRUCell(5, 7))(zeros(2, 3, 5, dtype=torch.float64)),
        TypeError,
        "x has type torch.float64, but the parameters of GRUCell have type torch.float32 (",
    ),
    "x of another type, channels alone": (
        lambda: RNN(paralstm().float())(zeros(2, 3, 5, dtype=torch.bfloat16)),
        TypeError,
        "use x.to(torch.float32) or cell.to(torch.bfloat16) or torch.autocast.",
    ),
    "x of integers": (
        lambda: RNN(nn.GRUCell(5, 7))(zeros(2, 3, 5, dtype=torch.long)),
        TypeError,
        "x has type torch.int64, but the parameters of GRUCell have type torch.float32 (",
    ),
    "x of integers, one step": (
        lambda: RNN(nn.GRUCell(5, 7)).step(zeros(2, 5, dtype=torch.long)),
        TypeError,
        "use x.to(torch.float32).",
    ),
    "x of complex numbers": (
        lambda: RNN(nn.GRUCell(5, 7))(zeros(2, 3, 5, dtype=torch.complex64)),
        TypeError,
        "use torch.view_as_real(x).flatten(-2), twice as many features.",
    ),
    "x of complex numbers, one step": (
        lambda: RNN(nn.GRUCell(5, 7)).step(zeros(2, 5, dtype=torch.complex64)),
        TypeError,
        "use torch.view_as_real(x).flatten(-2), twice as many features.",
    ),
    "x of complex numbers, which stay": (
        lambda: RNN(Nameless(), hidden_size=7)(zeros(2, 3, 7, dtype=torch.complex64)),
        ValueError,
        "Nameless returned component 0 of type torch.complex64; the state must be floating point; "
        "keep real and imaginary part as two components.",
    ),
    "x of complex numbers, scan": (
        lambda: scan(
            lambda h, x: torch.tanh(x + h), zeros(2, 7), zeros(2, 3, 7, dtype=torch.complex64)
        ),
        ValueError,
        "returned component 0 of type torch.complex64; the state must be floating point; keep",
    ),
    "plan of a name": (
        lambda: layer().plan((2, 3, 5), dtype="float32"),
        TypeError,
        "dtype is 'float32'; pass a torch.dtype, such as torch.float32, or None for that of the",
    ),
    "unknown backend": (lambda: layer(backend="cuda"), ValueError, "backend='cuda' is not known"),
    "cell is no module": (lambda: RNN(lambda x, h: h), TypeError, "use pararnn.scan"),
    "cell is a class": (
        lambda: RNN(nn.GRUCell),
        TypeError,
        "cell is the class GRUCell; pass an instance of it: RNN(GRUCell(...)).",
    ),
    "cell is a whole layer": (
        lambda: RNN(nn.LSTM(3, 4)),
        TypeError,
        "use pararnn.parallelize(layer), or a cell: RNN(nn.LSTMCell(...)).",
    ),
    "another hidden_size": (
        lambda: RNN(nn.GRUCell(3, 4), hidden_size=5),
        TypeError,
        "hidden_size=5 was passed to RNN and GRUCell says self.hidden_size = 4; leave it out?",
    ),
    "another hidden_size, components known": (
        lambda: RNN(paralstm(), hidden_size=5),
        ValueError,
        "hidden_size=5 was passed to RNN and ParaLSTMCell says self.hidden_size = 7; leave it out?",
    ),
    "another number of components": (
        lambda: RNN(nn.LSTMCell(3, 4), num_components=1),
        ValueError,
        "num_components=1 was passed to RNN and LSTMCell does not say it; leave it out?",
    ),
    "solver is no Newton": (lambda: layer(solver=3), TypeError, "solver must be pararnn.Newton"),
    "c for a cell with a softmax": (
        lambda: RNN(Cumulated(), backend="c"),
        ValueError,
        "mix channels by products with weights, and Cumulated is neither",
    ),
    "tolerance": (lambda: Newton(tolerance=0.0), ValueError, "must be positive, got 0.0"),
    "max_iterations": (lambda: Newton(max_iterations=0), ValueError, "must be at least 1, got 0"),
    "chunk": (
        lambda: Newton(chunk=0),
        ValueError,
        "chunk must be 'auto' or at least 1 step, got 0",
    ),
    "damping": (lambda: Newton(damping=1.0), ValueError, "damping must be in [0, 1), got 1.0"),
}


@pytest.mark.parametrize("case", CALLS)
def test_message(case, capsys):
    call, kind, message = CALLS[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()
    assert not capsys.readouterr().err


class Tokens(nn.Module):
    """Looks x up; elementwise, or mixing channels."""

    hidden_size = 6

    def __init__(self, *shape):
        super().__init__()
        self.table = nn.Embedding(4, 6)
        self.w = nn.Parameter(torch.rand(shape) / 2)

    def forward(self, x, h):
        return torch.tanh(self.table(x) + (h * self.w if self.w.dim() == 1 else h @ self.w))


@pytest.mark.parametrize("shape", [(6,), (6, 6)])
def test_what_fails_inside_a_step_prints_nothing(shape, capsys):
    rnn = RNN(Tokens(*shape), solver=Newton(chunk=2))
    tokens = torch.randint(4, (2, 9))
    rnn(tokens)
    for call in (rnn, RNN(rnn.cell, solver=rnn.solver), lambda x: rnn.step(x[:, 0])):
        with pytest.raises(IndexError, match="index out of range"):
            call(tokens + 4)
    assert not capsys.readouterr().err


class Cumulated(nn.Module):
    """Sums of channels that no kernel has."""

    input_size, hidden_size, num_components = 5, 5, 1

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 5))

    def forward(self, x, h):
        return torch.cumsum(x + h @ self.w, -1)


@needs_triton
def test_what_is_refused_inside_a_step_names_no_generated_code(capsys):
    with pytest.raises(
        ValueError, match="cannot run Cumulated here: cumsum: it is not a pointwise op"
    ):
        RNN(Cumulated(), backend="triton")
    with pytest.raises(ValueError, match=r"\(mm at .*test_errors.py:\d+: it is not a pointwise op"):
        RNN(Cumulated(), backend="c")
    assert not capsys.readouterr().err


def test_generated_code_has_no_place():
    """As of a cell that FX made."""
    cell = fx.symbolic_trace(Cumulated())
    with pytest.raises(
        ValueError, match=r"Cumulated is neither \(mm: it is not a pointwise operation"
    ):
        RNN(cell, hidden_size=5, num_components=1, backend="c")(zeros(2, 3, 5))
    assert show_place(("<eval_with_key>.12", 5)) == show_place(None) == "an unknown line"


class Nameless(nn.Module):
    """Hides its sizes."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(7))

    def forward(self, x, h):
        return torch.tanh(x + self.a * h)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiled_calls_refuse_complex_numbers(backend):
    rnn = RNN(Nameless(), hidden_size=7, backend=backend)
    x, state = torch.randn(2, 3, 7), torch.randn(2, 7)
    y, _ = rnn(x, state)
    compiled = torch.compile(rnn, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, state)[0], y)
    with pytest.raises(Exception, match=r"returned component 0 of type torch\.complex64"):
        compiled(x + 0j, state)
    with pytest.raises(Exception, match=r"state is of torch\.complex64, but a state is of real"):
        compiled(x, state + 0j)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiled_calls_of_numbers_of_other_kinds(backend):
    rnn = RNN(Nameless(), hidden_size=7, backend=backend)
    compiled = torch.compile(rnn, backend="eager", fullgraph=True)
    state = torch.randn(2, 7)
    for x in (torch.randn(2, 3, 7), torch.randint(-2, 3, (2, 3, 7))) * 2:
        y, _ = compiled(x, state)
        torch.testing.assert_close(y, loop(rnn.cell, x, state)[0])


def test_cell_without_size_says_what_to_add():
    with pytest.raises(TypeError, match=r"set self\.hidden_size = .*RNN\(cell, hidden_size="):
        RNN(Nameless())(torch.zeros(2, 3, 7))


def test_cell_without_size_takes_it_from_the_state():
    cell = Nameless()
    y, _ = RNN(cell)(torch.ones(2, 3, 7), torch.zeros(2, 7))
    assert torch.isfinite(y).all()
    assert y.any()


def test_explaining_before_sizes_are_known():
    with pytest.raises(TypeError, match="call the layer once"):
        RNN(Nameless(), hidden_size=7).runner()


class NeverReturnsItsState(Cell):
    num_components = None

    def __init__(self):
        super().__init__(1)

    def forward(self, x, state):
        return torch.zeros(3, 3)


def test_components_that_cannot_be_found():
    with pytest.raises(TypeError, match="num_components"):
        RNN(NeverReturnsItsState())


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(c_build, "find_compiler", lambda: None)
    monkeypatch.setattr(facts, "find_compiler", lambda: None)
    runner._warn_slow.cache_clear()
    yield
    runner._warn_slow.cache_clear()


@pytest.mark.usefixtures("no_compiler")
def test_auto_without_a_compiler_says_so_once():
    with pytest.warns(UserWarning, match="no C compiler was found"):
        rnn = RNN(SlowGates())
    choice = rnn.runner().choice
    assert choice.name == "torch"
    assert "compiler" in choice.reason
    RNN(SlowGates())  # a second warning would be an error


@pytest.mark.usefixtures("no_compiler")
def test_c_without_a_compiler_raises():
    with pytest.raises(ValueError, match="no C compiler was found"):
        RNN(SlowGates(), backend="c")


def test_compiler_that_fails(fresh_cache, monkeypatch, tmp_path):
    script = tmp_path / "broken-cc"
    script.write_text("#!/bin/sh\necho 'the disk is on fire' >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(c_build, "find_compiler", lambda: str(script))
    with pytest.raises(c_build.CompilerError, match="the disk is on fire"):
        c_build.load("int main(void) { return 0; }", ["main"])


def test_compiled_once_and_kept(fresh_cache):
    source = "int answer(void) { return 42; }"
    assert c_build.load(source, ["answer"]).answer() == 42
    (library,) = fresh_cache.glob("*.so")
    stamp = library.stat().st_mtime_ns
    assert c_build.load(source, ["answer"]).answer() == 42
    assert library.stat().st_mtime_ns == stamp
    assert next(fresh_cache.glob("*.c")).read_text() == source
