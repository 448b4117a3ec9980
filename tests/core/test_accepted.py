"""What cells write in their step besides arithmetic: factories, one_hot, attention, row counts."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pararnn
from pararnn import RNN, Newton, TraceError
from pararnn.testing import assert_close, loop

from .compare import assert_same, outcome, random_state


class Cell(nn.Module):
    """`step(self, x, h)` on a state of three slots of four."""

    input_size, hidden_size, num_components = 5, 12, 1

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.lin, self.rec, self.a = (
            nn.Linear(5, 12),
            nn.Linear(12, 12),
            nn.Parameter(torch.rand(12)),
        )
        self.query, self.key, self.value = nn.Linear(5, 4), nn.Linear(4, 4, False), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, bias=False, batch_first=True)
        self.time_first = nn.MultiheadAttention(4, 2, bias=False)

    def forward(self, x, h):
        return self.step(self, x, h)


def check(step, solver=None, backend="auto", rtol=1e-10):
    torch.manual_seed(0)
    cell = Cell(step).double()
    x, state = torch.randn(2, 23, 5, dtype=torch.float64), random_state(1, 2, 12)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    used = {f"gradient of {n}" for n in ("x", "first[0]", "lin.weight")}
    unused = {n for n, e in expected.items() if n.startswith("gradient") and not e.any()} - used
    found = outcome(RNN(cell, solver=solver, backend=backend), cell, x, state)
    assert_same(found, expected, rtol, unused)


def straight_through(p, size):
    return F.one_hot(p.argmax(-1), size) + p - p.detach()


def attended(c, x, h, **options):
    slots = h.view(-1, 3, 4)
    read = F.scaled_dot_product_attention(
        c.query(x).unsqueeze(1), c.key(slots), c.value(slots), **options
    )
    return torch.tanh((slots * 0.5 + read).flatten(1) + c.lin(x))


def multihead(c, x, h, **options):
    slots = h.view(-1, 3, 4)
    read = c.attention(c.query(x).unsqueeze(1), slots, slots, **options)[0]
    return torch.tanh((slots * 0.5 + read).flatten(1) + c.lin(x))


def time_first(c, x, h):
    slots = h.view(-1, 3, 4).transpose(0, 1)
    read = c.time_first(c.query(x).unsqueeze(0), slots, slots)[0]
    return torch.tanh((slots * 0.5 + read).transpose(0, 1).flatten(1) + c.lin(x))


def over_drives(c, x, h):
    memory = c.lin(x).view(-1, 3, 4)
    read = F.scaled_dot_product_attention(h[:, None, :4], c.key(memory), c.value(memory))
    return torch.tanh(h * 0.5 + read.repeat(1, 3, 1).flatten(1) + c.lin(x))


def overwritten(c, x, h, mask, value):
    new = torch.tanh(c.lin(x) + c.a * h) + 0.1 * c.rec(h)
    new[mask(x, h)] = value(c)
    return new


STEPS = {
    "a number where a mask holds": functools.partial(
        overwritten, mask=lambda x, h: h > 0.2, value=lambda c: 0.25
    ),
    "a weight where a mask holds": functools.partial(
        overwritten, mask=lambda x, h: h > 0.2, value=lambda c: c.a[3]
    ),
    "rows where a mask of x holds": functools.partial(
        overwritten, mask=lambda x, h: x[:, 0] > 0.5, value=lambda c: 0.25
    ),
    "rows where a mask of the state holds": functools.partial(
        overwritten, mask=lambda x, h: h.sum(1) > 0, value=lambda c: 0.0
    ),
    "eye": lambda c, x, h: torch.tanh(
        h @ (c.rec.weight - c.rec.weight.T - 0.1 * torch.eye(12, dtype=h.dtype)) + c.lin(x)
    ),
    "arange": lambda c, x, h: torch.tanh(h / (1 + torch.arange(12)) + c.lin(x)),
    "linspace": lambda c, x, h: torch.linspace(0, 0.9, 12) * h + torch.tanh(c.lin(x)),
    "tril": lambda c, x, h: torch.tanh(h @ torch.ones(12, 12, dtype=h.dtype).tril() + c.lin(x)),
    "numbers": lambda c, x, h: torch.tanh(h * torch.tensor([0.5, -0.5] * 6) + c.lin(x)),
    "one_hot of the state": lambda c, x, h: straight_through((c.lin(x) + c.rec(h)).softmax(-1), 12),
    "one_hot in groups": lambda c, x, h: straight_through(
        (c.lin(x) + c.rec(h)).view(-1, 3, 4).softmax(-1), 4
    ).flatten(1),
    "attention": attended,
    "attention with a mask": functools.partial(
        attended, attn_mask=torch.tensor([[True, False, True]])
    ),
    "attention over drives": over_drives,
    "multihead": multihead,
    "multihead without weights": functools.partial(multihead, need_weights=False),
    "multihead, time first": time_first,
}


@pytest.mark.parametrize("solver", [None, Newton(chunk=6)], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_equals_the_loop(name, solver):
    check(STEPS[name], solver)


@pytest.mark.parametrize("backend", ["torch", "c"])
def test_factories_are_coefficients(backend):
    check(STEPS["arange"], backend=backend)
    check(STEPS["linspace"], backend=backend)


BROADCAST = {
    "a number": lambda c, x, h: torch.tanh(c.a[0] * h + c.lin(x)),
    "one entry": lambda c, x, h: torch.tanh(c.a[:1] * h + c.lin(x)),
    "one row": lambda c, x, h: torch.tanh(c.a.view(1, 12) * h + c.lin(x)),
    "one number per slot": lambda c, x, h: torch.tanh(
        c.a[:3, None] * h.view(-1, 3, 4) + c.lin(x).view(-1, 3, 4)
    ).flatten(1),
    "one number per row": lambda c, x, h: torch.tanh(c.a * h + c.lin(x)[:, :1]),
    "one slot per row": lambda c, x, h: torch.tanh(
        0.5 * h.view(-1, 3, 4) + c.lin(x)[:, None, :4]
    ).flatten(1),
    "truth values": lambda c, x, h: torch.where(
        c.lin(x) > 0, torch.tanh(c.a * h + c.lin(x)), h / 2
    ),
    "a truth value per row": lambda c, x, h: torch.where(
        x[:, :1] > 0, torch.tanh(c.a * h + c.lin(x)), h / 2
    ),
    "whole numbers": lambda c, x, h: torch.tanh(c.a * h + c.lin(x) + (3 * x[:, :1]).long()),
    "channels turned": lambda c, x, h: torch.tanh(
        c.a.flip(0) * h + c.lin(x).view(-1, 4, 3).mT.flatten(1)
    ),
}


@pytest.mark.parametrize("backend", ["torch", "c"])
@pytest.mark.parametrize("name", BROADCAST)
def test_inputs_that_are_broadcast_or_converted(name, backend):
    check(BROADCAST[name], Newton(chunk=5), backend)


class Delay(nn.Module):
    """Hands on its state and what is made of x: its step has no operation."""

    input_size, hidden_size, num_components = 5, 12, 2

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(5, 12)

    def forward(self, x, state):
        return state[1], self.lin(x)


@pytest.mark.parametrize("solver", [None, Newton(), Newton(chunk=6)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "c"])
def test_a_step_without_operations(backend, solver):
    torch.manual_seed(0)
    cell = Delay().double()
    x, state = torch.randn(2, 23, 5, dtype=torch.float64), random_state(2, 2, 12)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    found = outcome(RNN(cell, solver=solver, backend=backend), cell, x, state)
    assert_same(found, expected, 1e-10, {"gradient of first[0]"})


def test_one_hot_keeps_to_its_group():
    cell = Cell(lambda c, x, h: straight_through((c.a * h).view(-1, 3, 4), 4).flatten(1) + c.lin(x))
    assert RNN(cell).runner().traced.structure == "heads (size 4)"


class Tokens(nn.Module):
    hidden_size, num_components = 6, 1

    def __init__(self, classes=6):
        super().__init__()
        self.classes, self.rec = classes, nn.Linear(6, 6)

    def forward(self, x, h):
        return torch.tanh(F.one_hot(x, self.classes) + self.rec(h))


def test_one_hot_of_tokens():
    cell, x = Tokens(), torch.randint(6, (2, 40))
    y, _ = RNN(cell)(x)
    torch.testing.assert_close(y, loop(cell, x, torch.zeros(2, 6))[0])
    for wrong in (6, -1):
        with pytest.raises(IndexError, match="out of range"):
            RNN(cell)(torch.full((2, 40), wrong))
    with pytest.raises(TraceError, match="one_hot without num_classes"):
        RNN(Tokens(-1))(x)


COUNTS = {
    "arange": lambda c, x, h: torch.tanh(h + c.lin(x) * torch.arange(len(x))[:, None]),
    "linspace": lambda c, x, h: torch.tanh(h * torch.linspace(0, 1, len(x))[:, None] + c.lin(x)),
    "eye": lambda c, x, h: torch.tanh(h + c.lin(x) + torch.eye(len(x), 12)),
    "cumsum": lambda c, x, h: torch.tanh(h * torch.ones(len(x), 1).cumsum(0) + c.lin(x)),
    "drives by the count": lambda c, x, h: torch.tanh(h + c.lin(x) / len(x)),
    "state by the count": lambda c, x, h: torch.tanh(h / len(x) + c.lin(x)),
    "product by the count": lambda c, x, h: torch.tanh(c.rec(h) / len(x) + c.lin(x)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_what_depends_on_the_number_of_rows_is_refused(name):
    with pytest.raises(TraceError, match="computes with the number of rows"):
        RNN(Cell(COUNTS[name]))


def test_made_in_inference_mode():
    with torch.inference_mode():
        for cell in (nn.GRUCell(5, 4), pararnn.cells.ParaGRUCell(5, 4)):
            rnn, x = RNN(cell), torch.randn(2, 20, 5)
            expected = loop(cell, x, torch.zeros(2, 4))[0]
            torch.testing.assert_close(rnn(x)[0], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rnn(x.clone())[0], expected, rtol=1e-4, atol=1e-5)
        step = lambda h, u, a: torch.tanh(a * h + u)  # noqa: E731
        pararnn.scan(step, torch.zeros(2, 5), x, torch.ones(5))
    x, a = torch.randn(2, 20, 5), torch.ones(5, requires_grad=True)
    pararnn.scan(step, torch.zeros(2, 5), x, a)[1].sum().backward()
    assert a.grad.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize:UserWarning")
def test_quantised_layers_are_refused():
    cell = torch.ao.quantization.quantize_dynamic(Cell(STEPS["eye"]), {nn.Linear})
    cell.step = lambda c, x, h: torch.tanh(c.rec(h) + c.lin(x))
    with pytest.raises(
        TraceError, match=r"calls quantized\.linear_dynamic.* at .*accepted\.py:\d+"
    ):
        RNN(cell)


class Phase(nn.Module):
    """Whole numbers of x and of the state, or of x times the state."""

    input_size = hidden_size = 4

    def __init__(self, computed):
        super().__init__()
        self.computed, self.rate = computed, nn.Parameter(torch.rand(4))

    def forward(self, x, h):
        return torch.tanh(0.5 * self.rate * h + self.computed(x, h))


WHOLE = {
    "sum": lambda x, h: 0.1 * (((h * 10).round().long() + x) % 7),
    "choice": lambda x, h: 0.1 * torch.where(h > 0, x, x + 1).remainder(5),
    "equal": lambda x, h: 0.3 * (x == x + (h > 0)),
    "rows": lambda x, h: 0.1 * (((h.flip(1) * 10).round().long() + x) % 7),
    "factor": lambda x, h: h * x * 1e-17,
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_numbers_keep_their_digits(name, dtype):
    torch.manual_seed(3)
    cell = Phase(WHOLE[name]).to(dtype)
    state = torch.randn(2, 4, dtype=dtype)
    for begin in (1, 2**24 + 1, 2**54 + 1):
        x = torch.randint(0, 9, (2, 6, 4)) + begin
        assert_close("y", RNN(cell)(x, state)[0].to(dtype), loop(cell, x, state)[0], rtol=1e-5)


def test_kernels_refuse_whole_numbers_that_they_would_round():
    cell, x = Phase(WHOLE["sum"]), torch.zeros(2, 6, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"add at .*integers, of which kernels keep 24 bits"):
        RNN(cell, backend="c")(x)
    RNN(cell, backend="c")(x.to(torch.int16))


def in_autocast(self, x, h):
    with torch.autocast(h.device.type, torch.bfloat16):
        reached = self.rec(h)
    return torch.tanh(reached.to(h.dtype) + self.lin(x))


NARROW = {
    "state": lambda self, x, h: torch.tanh((self.a * h).half().to(h.dtype) + self.lin(x)),
    "drive": lambda self, x, h: torch.tanh((self.lin(x).half() * h.half()).to(h.dtype) + self.a),
    "weight": lambda self, x, h: torch.tanh(
        (h.bfloat16() @ self.rec.weight.bfloat16()).to(h.dtype) + self.lin(x)
    ),
    "float32": lambda self, x, h: torch.tanh((self.lin(x).float() * h.float()).to(h.dtype)),
    "autocast": in_autocast,
}


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_narrower_type_in_a_step_rounds_as_it_does_in_the_loop(name, backend, dtype):
    torch.manual_seed(0)
    cell = Cell(NARROW[name]).to(dtype)
    x, state = torch.randn(3, 21, 5, dtype=dtype), random_state(1, 3, 12, dtype=dtype)
    expected = loop(cell, x, state)[0]
    for solver in (Newton(chunk=21), Newton(chunk=5)):
        y = RNN(cell, backend=backend, solver=solver)(x, state)[0]
        assert_close("y", y, expected, rtol=1e-6 if dtype is torch.float32 else 1e-14)


def test_a_step_of_a_half_cell_that_casts_to_the_type_of_its_weights():
    def step(self, x, h):
        return torch.tanh(self.rec(h.float().to(self.rec.weight.dtype)) + self.lin(x))

    torch.manual_seed(0)
    cell = Cell(step).bfloat16()
    x = torch.randn(3, 21, 5).bfloat16()
    y = RNN(cell, solver=Newton(chunk=5))(x)[0]
    expected = loop(cell.float(), x.float(), torch.zeros(3, 12))[0]
    assert_close("y", y.float(), expected, rtol=0.03)


def test_gradient_of_digamma():
    check(lambda self, x, h: torch.tanh(0.1 * torch.digamma(h.abs() + 1) + self.lin(x)))
