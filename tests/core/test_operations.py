"""Every operation of the table, inside a recurrence: value and all gradients equal the loop's."""

import functools

import pytest
import torch
from torch import nn

from pararnn import RNN, Newton
from pararnn.kernels.primitives import PRIMITIVES
from pararnn.testing import loop
from pararnn.tracing.derivatives import torch_callable

from .compare import RTOL, assert_same, outcome, random_state
from .operations import DOMAINS, OPERATIONS, Operation

GROUP = 3  # operations in one cell: compiling takes longer than running
GROUPS = [OPERATIONS[i : i + GROUP] for i in range(0, len(OPERATIONS), GROUP)]
WHERE = {o.name: (g, i) for g, group in enumerate(GROUPS) for i, o in enumerate(group)}
UNDEFINED = {  # where PyTorch's own result is no reference: (u, w) -> mask
    "fmod fmod_number remainder remainder_negative": lambda u, w: u.abs() > 1e6,  # NaN for some
    "gelu": lambda u, w: u.abs() > 1e30,  # overflows before halving
    "sinc": lambda u, w: (u.abs() < 0.1) & (u != 0),  # the gradient is cancellation
    "cast_float": lambda u, w: w.abs() > 1e30,  # its gradient overflows in float32
    "cast_long cast_int": lambda u, w: ~(u.abs() < 1e6),
    "unflatten": lambda u, w: u.isnan(),  # 0 * NaN from an entry that is not selected
    "relu6 hardtanh softshrink hardshrink": lambda u, w: u.isnan(),  # by position
}
UNDEFINED = {name: mask for names, mask in UNDEFINED.items() for name in names.split()}
ONE_SIXTH = {"hardsigmoid", "hardswish"}  # PyTorch's is float32's on a GPU, not on a CPU
BATCH, TIME, HIDDEN = 2, 3, 15  # few steps of many channels: those cost nothing


class Operations(nn.Module):
    """Component i uses operation i on its own state and its own two parts of x.

    Where the last feature of x is positive, the operation gets its state and second part of x as
    they are, and nothing is done to its result.
    """

    def __init__(self, operations, hidden_size=HIDDEN):
        super().__init__()
        self.operations = operations
        self.num_components, self.hidden_size = len(operations), hidden_size
        self.input_size = 2 * hidden_size * len(operations) + 1
        self.weights = nn.ParameterList(torch.rand(hidden_size) for _ in operations)

    def forward(self, x, state):
        parts = x[:, :-1].chunk(2 * len(self.operations), 1)
        raw = x[:, -1:].expand(-1, self.hidden_size) > 0
        new = []
        for i, (operation, a, h) in enumerate(
            zip(self.operations, self.weights, state, strict=True)
        ):
            u, w = a * h + parts[2 * i], parts[2 * i + 1]
            r = operation.function(
                torch.where(raw, h, DOMAINS[operation.domain](u)), torch.where(raw, w, w - 0.3 * h)
            )
            new.append(torch.where(raw, r, r / (1 + r * r) + 0.2 * u + 0.1 * w))
        return tuple(new)


@functools.cache
def of_the_loop(group, dtype):
    """A cell, its inputs, and what the loop gives for them."""
    torch.manual_seed(group)
    cell = Operations(GROUPS[group]).to(dtype)
    x = 3 * torch.rand(BATCH, TIME, cell.input_size, dtype=dtype) - 1.5
    x[..., -1] = -1
    state = random_state(cell.num_components, BATCH, HIDDEN, dtype=dtype)
    return cell, x, state, outcome(functools.partial(loop, cell), cell, x, state)


ALIVE = {}  # a layer of every group: the others take the derivatives of its recurrence


@functools.cache
def outcomes(group, dtype, backend):
    """What the layer and the loop give for a group."""
    cell, x, state, expected = of_the_loop(group, dtype)
    rnn = RNN(cell, backend=backend)
    ALIVE.setdefault(group, rnn)
    assert rnn.runner().traced.structure == "elementwise", rnn.runner().traced.reason
    return outcome(rnn, cell, x, state), expected


def own_part(values, i, count):
    """The entries of an outcome that belong to component i."""
    x = values["gradient of x"][..., :-1].unflatten(-1, (count, 2, HIDDEN))[:, :, i]
    names = (f"last[{i}]", f"gradient of first[{i}]", f"gradient of weights.{i}")
    return {"gradient of u": x[:, :, 0], "gradient of w": x[:, :, 1]} | {
        n: values[n] for n in names
    }


@pytest.mark.parametrize("name", WHERE)
def test_operation_equals_loop(name, backend_and_type):
    any_backend, dtype = backend_and_type
    group, i = WHERE[name]
    actual, expected = (
        own_part(v, i, len(GROUPS[group])) for v in outcomes(group, dtype, any_backend)
    )
    rtol = max(RTOL[dtype], GROUPS[group][i].rtol)
    if name in ONE_SIXTH and actual["gradient of u"].is_cuda:
        rtol = RTOL[torch.float32]
    assert_same(actual, expected, rtol, label=f"{name}: ")


def special_values(dtype):
    info = torch.finfo(dtype)
    positive = [0.0, info.tiny / 8, info.tiny, 1e-3, 0.5, 1.0, 1.5, 2.5, 3.0, 20.5, 90.0, 800.0]
    positive += [info.max / 4, info.max, torch.inf]
    return torch.tensor([*positive, *(-v for v in positive), torch.nan], dtype=dtype)


@functools.cache
def special_outcomes(group, dtype):
    """New states and gradients at all pairs of special values, through C and by the cell itself."""
    special = special_values(dtype)
    u, w = (v.flatten() for v in torch.meshgrid(special, special, indexing="ij"))
    cell = Operations(GROUPS[group], len(u)).to(dtype)
    count = cell.num_components
    x = torch.cat([w.repeat(2 * count), w.new_ones(1)])[None, None]
    rnn = RNN(cell, backend="c")
    ALIVE.setdefault(group, rnn)
    results = []
    for run in (lambda s: rnn(x, s)[1], lambda s: cell(x[:, 0], s)):
        state = tuple(u[None].clone().requires_grad_() for _ in range(count))
        new = run(state)
        gradients = torch.autograd.grad(sum(n.sum() for n in new), state)
        results.append([(n.detach()[0], g[0]) for n, g in zip(new, gradients, strict=True)])
    return u, w, *results


def first_difference(u, w, actual, expected, rtol):
    same = torch.isclose(actual, expected, rtol=rtol, atol=rtol, equal_nan=True)
    where = (~same).nonzero().flatten()
    if len(where):
        i = where[0]
        return (
            f"{len(where)} differ, first at ({u[i]}, {w[i]}): {actual[i]} instead of {expected[i]}"
        )
    return None


@pytest.mark.parametrize("name", WHERE)
def test_special_values_through_c(name, dtype):
    group, i = WHERE[name]
    u, w, actual, expected = special_outcomes(group, dtype)
    rtol = max(RTOL[dtype], GROUPS[group][i].rtol)
    keep = ~UNDEFINED[name](u, w) if name in UNDEFINED else torch.ones_like(u, dtype=torch.bool)
    for what, a, e in zip(("value", "gradient"), actual[i], expected[i], strict=True):
        difference = first_difference(u[keep], w[keep], a[keep], e[keep], rtol)
        assert difference is None, f"{what} of {name}: {difference}"


NUMBERS = (
    "sub true_div div_floor remainder fmod pow_tensor atan2 copysign hypot minimum maximum "
    "min_pair max_pair fmin fmax clamp_tensor clamp_min_tensor where lt le gt ge eq ne mask_float "
    "logaddexp logaddexp2 lerp lerp_tensor addcmul addcdiv xlogy mask_numbers masked_fill gelu "
    "logsigmoid silu"
).split()


def with_number(operation, first):
    """An operation one of whose operands is a number that only tracing knows to be one."""

    def function(u, w):
        number = torch.full_like(u, 0.37)
        domain = DOMAINS[operation.domain]
        return operation.function(*((domain(number), w) if first else (domain(u), number))) + u

    return Operation(operation.name, function)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("part", range(3))
def test_a_number_as_an_operand(part, first):
    check_numbers(part, first, "torch", Newton(chunk=2))


def test_a_number_as_an_operand_in_c():
    """And components enough for names with two figures."""
    check_numbers(0, True, "c", None)


def check_numbers(part, first, backend, solver):
    table = {o.name: o for o in OPERATIONS}
    chosen = [with_number(table[name], first) for name in NUMBERS[part::3]]
    torch.manual_seed(part)
    cell = Operations(chosen).double()
    x = 3 * torch.rand(BATCH, TIME, cell.input_size, dtype=torch.float64) - 1.5
    x[..., -1] = -1
    state = random_state(cell.num_components, BATCH, HIDDEN)
    rnn = RNN(cell, num_components=len(chosen), backend=backend, solver=solver)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    actual = outcome(rnn, cell, x, state)
    for i, operation in enumerate(chosen):
        parts = (own_part(values, i, len(chosen)) for values in (actual, expected))
        assert_same(*parts, 1e-10, label=f"{operation.name}: ")


def test_table_covers_enough():
    assert len(OPERATIONS) >= 60


@pytest.mark.parametrize("name", PRIMITIVES)
def test_primitive_takes_as_many_operands_everywhere(name):
    primitive = PRIMITIVES[name]
    assert primitive.c.count("{}") == primitive.operands == primitive.half.count("{}")
    operands = [torch.rand(3, dtype=torch.float64) + 1.5 for _ in range(primitive.operands)]
    if name == "where":
        operands[0] = operands[0] > 2
    if name == "to_float":
        operands = [operands[0] > 2, operands[0]]  # and what has the type
    if operands:
        assert torch_callable(name)(*operands).shape == (3,)
