"""Memories with a matrix state: equations by hand, and the layer against step after step."""

import functools

import pytest
import torch
from core.compare import assert_same, outcome, with_resets
from torch import nn

from pararnn import RNN, cells
from pararnn.testing import assert_close, check_cell, loop

CELLS = {
    "m2rnn": cells.M2RNNCell,
    "delta": cells.DeltaMemoryCell,
    "outer": cells.OuterMemoryCell,
    "gated_delta": cells.GatedDeltaCell,
    "mamba2": cells.Mamba2Cell,
}
INPUT, KEYS, VALUES, HEADS = 5, 4, 3, 2
every_cell = pytest.mark.parametrize("name", CELLS)
both_kinds_of_keys = pytest.mark.parametrize("shared_keys", [False, True])


def make(name, shared_keys=False, dtype=torch.float64, input_size=INPUT, **options):
    """A cell with no parameter left at a trivial value."""
    torch.manual_seed(5)
    cell = CELLS[name](input_size, KEYS, VALUES, HEADS, shared_keys, **options).to(dtype)
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return cell


def outer(k, v):
    return k[:, None] * v[None, :]


def silu(x):
    return x / (1 + torch.exp(-x))


def unit(k):
    k = silu(k)
    return k / k.square().sum().sqrt()


def written_out(name, cell, x, h):
    """One step of one head of one row, as the equations have it: the new matrix and what it gives.

    Args:
        name: Of the cell.
        cell: Has the parameters.
        x: One input, (input_size,).
        h: The matrices of all heads, (heads, keys, values).
    """
    split = [cell.input.weight[a:b] @ x for a, b in bounds(name, cell)]
    matrices, outputs = [], []
    squash = torch.tanh if cell.nonlinearity == "tanh" else (lambda new: new)
    for i in range(HEADS):
        own = slice(0, KEYS) if cell.shared_keys else slice(i * KEYS, (i + 1) * KEYS)
        of_head = slice(i * VALUES, (i + 1) * VALUES)
        q, k, v, a = split[0][own], split[1][own], split[2][of_head], split[3][i]
        softplus = torch.log(1 + torch.exp(a + cell.rate_bias[i]))
        f = torch.exp(-torch.exp(cell.log_rate[i]) * softplus)
        if name == "m2rnn":
            new = f * h[i] + (1 - f) * squash(h[i] @ cell.recurrent[i] + outer(k, v))
            y = new.T @ q + cell.skip[i] * v
        elif name == "delta":
            k, q, g = unit(k), unit(q), split[4][of_head]
            new = squash(f * h[i] + outer(k, v - h[i].T @ k))
            y = silu(g) * (new.T @ q)
        elif name == "gated_delta":
            k, q, b = unit(k), unit(q), 1 / (1 + torch.exp(-split[4][i]))
            new = squash(f * h[i] + b * outer(k, silu(v) - f * h[i].T @ k))
            y = new.T @ q
        elif name == "mamba2":
            new = squash(f * h[i] + softplus * outer(silu(k), silu(v)))
            y = new.T @ silu(q) + cell.skip[i] * silu(v)
        else:
            new = f * h[i] + (1 - f) * squash(cell.recurrent[i] * h[i] + outer(k, v))
            y = new.T @ q
        matrices.append(new)
        outputs.append(y)
    return torch.stack(matrices), torch.cat(outputs)


def bounds(name, cell):
    """First and last row of what gives q, k, v, a and the gate."""
    keys = KEYS if cell.shared_keys else KEYS * HEADS
    gate = {"delta": [VALUES * HEADS], "gated_delta": [HEADS]}.get(name, [])
    sizes = [keys, keys, VALUES * HEADS, HEADS, *gate]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert ends[-1] == cell.input.out_features
    return list(zip([0, *ends], ends, strict=False))


def by_hand(name, cell, x, state):
    """`(y, last state)` over a sequence."""
    outputs = []
    for x_t in x.unbind(1):
        rows = [written_out(name, cell, *row) for row in zip(x_t, state, strict=True)]
        state, y = (torch.stack(part) for part in zip(*rows, strict=True))
        outputs.append(y)
    return torch.stack(outputs, 1), state


@both_kinds_of_keys
@every_cell
def test_steps_are_the_equations(name, shared_keys):
    cell = make(name, shared_keys)
    x = torch.randn(3, 6, INPUT, dtype=torch.float64)
    first = state = torch.randn(3, *cell.state_shape, dtype=torch.float64)
    outputs = []
    for x_t in x.unbind(1):
        state = cell(x_t, state)
        outputs.append(cell.readout(x_t, state))
    expected, last = by_hand(name, cell, x, first)
    assert_close("y", torch.stack(outputs, 1), expected, rtol=1e-12)
    assert_close("last state", state, last, rtol=1e-12)


@pytest.mark.parametrize("nonlinearity", ["tanh", "linear"])
@every_cell
def test_both_nonlinearities(name, nonlinearity):
    cell = make(name, nonlinearity=nonlinearity)
    x = torch.randn(2, 6, INPUT, dtype=torch.float64)
    state = torch.randn(2, *cell.state_shape, dtype=torch.float64)
    expected = outcome(functools.partial(by_hand, name, cell), cell, x, state)
    assert_same(outcome(RNN(cell), cell, x, state), expected, 1e-10)


@both_kinds_of_keys
@every_cell
def test_a_memory_alone(name, shared_keys):
    """x is q, k and v after silu, and gates of heads; nothing skips the memory or gates values."""
    alone, whole = make(name, shared_keys, input_size=None), make(name, shared_keys)
    whole.load_state_dict(alone.state_dict(), strict=False)
    skip, keys_and_values = hasattr(whole, "skip"), sum(alone.widths[:3])
    x = torch.randn(2, 40, INPUT, dtype=torch.float64)
    gate = [VALUES * HEADS] if name == "delta" else []
    parts = whole.input(x).split([keys_and_values, sum(alone.widths[3:]), *gate], -1)
    silent = name in ("m2rnn", "outer")  # published without silu; the block around has it
    given = torch.cat([parts[0] if silent else nn.functional.silu(parts[0]), parts[1]], -1)
    if name == "delta":  # alone, it takes values as they are
        values = parts[0][..., -VALUES * HEADS :]
        given[..., keys_and_values - VALUES * HEADS : keys_and_values] = values
    expected, last = RNN(whole)(x)
    if name == "delta":
        expected = expected / nn.functional.silu(parts[2])
    if skip:
        v = given[..., :keys_and_values][..., -VALUES * HEADS :]
        expected = expected - whole.skip.flatten() * v
    assert alone.input_size == given.shape[-1]
    assert not hasattr(alone, "input")
    y, state = RNN(alone)(given)
    assert_close("y", y, expected, rtol=1e-9)
    assert_close("state", state, last, rtol=1e-10)


STRUCTURES = {
    "m2rnn": f"heads (size {VALUES})",
    "delta": f"heads (size {KEYS})",
    "gated_delta": f"heads (size {KEYS})",
}


@both_kinds_of_keys
@every_cell
def test_rows_and_columns_that_do_not_mix_are_found(name, shared_keys):
    """`check_cell` compares values and all gradients, with resets, in chunks of 1, 7 and all."""
    check = check_cell(make(name, shared_keys), rtol=1e-11)
    assert check.structure == STRUCTURES.get(name, "elementwise")


@both_kinds_of_keys
@every_cell
def test_layer_is_the_equations(name, shared_keys):
    cell = make(name, shared_keys)
    rnn = RNN(cell)
    x = torch.randn(3, 20, INPUT, dtype=torch.float64)
    state = torch.randn(3, *cell.state_shape, dtype=torch.float64)
    expected = outcome(functools.partial(by_hand, name, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-10)
    y, last = rnn(x)
    assert y.shape == (3, 20, HEADS * VALUES)
    assert last.shape == (3, HEADS, KEYS, VALUES)
    assert_close("from nothing", y, by_hand(name, cell, x, torch.zeros_like(state))[0], rtol=1e-10)


@every_cell
def test_whole_equals_two_parts_equals_steps(name):
    cell = make(name)
    rnn = RNN(cell)
    x = torch.randn(2, 90, INPUT, dtype=torch.float64)
    y, last = rnn(x)
    first, state = rnn(x[:, :41])
    second, state = rnn(x[:, 41:], state)
    assert_close("in two parts", torch.cat([first, second], 1), y, rtol=1e-10)
    assert_close("its last state", state, last, rtol=1e-10)
    outputs, state = [], None
    for x_t in x.unbind(1):
        y_t, state = rnn.step(x_t, state)
        outputs.append(y_t)
    assert_close("in steps", torch.stack(outputs, 1), y, rtol=1e-10)
    assert_close("its last state", state, last, rtol=1e-10)


@every_cell
def test_resets_begin_anew(name):
    cell = make(name)
    x = torch.randn(2, 30, INPUT, dtype=torch.float64)
    resets = torch.rand(2, 30) < 0.2
    resets[0, 0] = resets[1, 12] = True
    resets[1, 0] = False
    states = tuple(torch.randn(2, *cell.state_shape, dtype=torch.float64) for _ in range(2))
    expected = outcome(with_resets(functools.partial(loop, cell), resets), cell, x, states)
    assert_same(outcome(with_resets(RNN(cell), resets), cell, x, states), expected, 1e-10)
    y, _ = RNN(cell)(x, resets=resets)
    after, _ = by_hand(name, cell, x[1:, 12:], torch.zeros_like(states[0][:1]))
    until = 12 + int(torch.cat([resets[1, 13:], torch.tensor([True])]).int().argmax()) + 1
    assert_close("after a reset", y[1:, 12:until], after[:, : until - 12], rtol=1e-10)


@every_cell
def test_packed_sequences_do_not_reach_each_other(name):
    cell = make(name)
    x = torch.randn(1, 30, INPUT, dtype=torch.float64)
    y, last = RNN(cell)(x, cu_seqlens=torch.tensor([0, 7, 7, 30]))
    state = torch.zeros(1, *cell.state_shape, dtype=torch.float64)
    for i, (a, b) in enumerate(((0, 7), (7, 30))):
        expected, of_last = by_hand(name, cell, x[:, a:b], state)
        assert_close(f"sequence {i}", y[:, a:b], expected, rtol=1e-10)
        assert_close(f"last state {i}", last[2 * i : 2 * i + 1], of_last, rtol=1e-10)
    assert not last[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_cell
def test_narrower_types(name, dtype):
    """A layer keeps states in float32 between steps, so that it is closer than the loop."""
    cell = make(name, dtype=dtype)
    x = torch.randn(2, 50, INPUT, dtype=dtype)
    y, last = RNN(cell)(x)
    assert y.dtype is last.dtype is dtype
    exact = make(name)
    exact.load_state_dict(cell.state_dict())
    state = torch.zeros(2, *cell.state_shape, dtype=torch.float64)
    expected, _ = loop(exact, x.double(), state)
    rtol = 1e-5 if dtype is torch.float32 else 0.03
    assert_close("y", y.double(), expected, rtol=rtol)


@every_cell
def test_one_product_serves_all_that_x_gives(name):
    per_head, shared = CELLS[name](64, 32, 16, 8), CELLS[name](64, 32, 16, 8, shared_keys=True)
    linear = [part for part in per_head.modules() if isinstance(part, nn.Linear)]
    values = 16 * 8 * (2 if name == "delta" else 1)
    gates = 2 * 8 if name == "gated_delta" else 8
    assert [part.out_features for part in linear] == [2 * 32 * 8 + values + gates]
    assert shared.input.out_features == 2 * 32 + values + gates


@pytest.mark.parametrize("num_heads", [1, 2, 32])
@every_cell
def test_heads_forget_over_1_to_1000_steps(name, num_heads):
    """Evenly in the logarithm; where x is zero, a head keeps exp(-1 / its time)."""
    cell = CELLS[name](INPUT, KEYS, VALUES, num_heads).double()
    kept = cell.keep(torch.zeros(1, num_heads).double()).flatten()
    place = (torch.arange(num_heads).double() + 0.5) / num_heads
    assert_close("times", -1 / torch.log(kept), 1000**place, rtol=1e-4)


def test_new_m2rnn_adds_up_what_it_is_given():
    cell = cells.M2RNNCell(INPUT, KEYS, VALUES, HEADS)
    assert torch.equal(cell.recurrent, torch.eye(VALUES).expand(HEADS, VALUES, VALUES))
    assert torch.equal(cell.skip, torch.ones(HEADS, VALUES))


def test_bound_of_the_outer_memory_holds_after_projection():
    cell = cells.OuterMemoryCell(INPUT, KEYS, VALUES, HEADS)
    assert 0.3 < cell.recurrent.abs().max() <= 0.5
    with torch.no_grad():
        cell.recurrent.fill_(-3.0)
    cell.project_()
    assert torch.equal(cell.recurrent, torch.full_like(cell.recurrent, -0.5))


@pytest.mark.parametrize("name", ["delta", "outer"])
def test_a_step_always_brings_memories_closer(name):
    """The largest singular value of the Jacobian of a head, which the docstrings bound."""
    cell = make(name)
    if name == "outer":
        cell.project_()
    x = torch.randn(1, INPUT).double()
    state = torch.randn(1, *cell.state_shape).double()
    jacobian = torch.func.jacrev(lambda h: cell(x, h).flatten())(state).flatten(1)
    kept = cell.keep(cell.project(x)[3]).flatten()
    bound = torch.maximum(kept, 1 - kept) if name == "delta" else (1 + kept) / 2
    assert 0 < torch.linalg.matrix_norm(jacobian, 2) <= bound.max() < 1


def test_delta_memory_finds_what_was_written_under_a_key():
    cell = cells.DeltaMemoryCell(6, 4, 3).double()
    with torch.no_grad():
        cell.rate_bias.fill_(-30.0)  # keeps all
    x = 0.3 * torch.randn(1, 6).double()
    _, k, v, _, _ = cell.project(x)
    k = nn.functional.normalize(nn.functional.silu(k), dim=-1)
    state = torch.randn(1, 1, 4, 3).double() * 0.1
    found = torch.einsum("nhkv,nhk->nhv", torch.atanh(cell(x, state)), k)
    assert_close("value", found, v, rtol=1e-10)


@every_cell
def test_half_precision_keeps_slow_heads_apart(name):
    """In bfloat16 a head that keeps 0.999 of its memory would keep all of it, and learn nothing."""
    cell = CELLS[name](INPUT, KEYS, VALUES, 32).bfloat16()
    x, state = torch.randn(2, INPUT).bfloat16(), torch.zeros(2, *cell.state_shape).bfloat16()
    kept = cell.keep(cell.project(x)[3])
    assert kept.dtype is torch.float32
    assert kept.max() < 1
    new = cell(x, state)
    assert new.dtype is cell.readout(x, new).dtype is torch.bfloat16
    assert new[:, -1].any()


@pytest.mark.parametrize("size", ["input_size", "key_size", "value_size", "num_heads"])
@every_cell
def test_sizes_that_cannot_be(name, size):
    sizes = {"input_size": 3, "key_size": 4, "value_size": 5, "num_heads": 2}
    with pytest.raises(ValueError, match=f"{size} is 0; it must be at least 1"):
        CELLS[name](**{**sizes, size: 0})


@every_cell
def test_nonlinearities_that_there_are_not(name):
    with pytest.raises(ValueError, match="nonlinearity is 'relu'; it must be 'tanh' or 'linear'"):
        CELLS[name](3, 4, 5, nonlinearity="relu")


@every_cell
def test_shared_keys_are_no_text(name):
    """A command line may pass one, and every text is true."""
    with pytest.raises(TypeError, match="shared_keys must be True or False, got 'false'"):
        CELLS[name](3, 4, 5, shared_keys="false")


def test_timescales_are_set_again():
    cell = cells.M2RNNCell(INPUT, KEYS, VALUES, 4)
    before = cell.rate_bias.clone()
    with torch.no_grad():
        cell.rate_bias.zero_()
        cell.log_rate.fill_(3.0)
    cell.reset_parameters()
    assert torch.equal(cell.rate_bias, before)
    assert not cell.log_rate.any()
