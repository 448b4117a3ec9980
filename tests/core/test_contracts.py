"""The table: every cell, on every backend, keeps every contract."""

import copy
import functools

import pytest
import torch
from torch import nn

from pararnn import RNN, ConvergenceError, Newton
from pararnn.testing import assert_close, check_cell, loop

from .cells import CELLS, MATRICES, NORMS, make_cell
from .compare import (
    RTOL,
    as_tuple,
    assert_same,
    joined,
    one_by_one,
    outcome,
    state_of,
    with_resets,
)

DISCONTINUOUS = {"unusual"}  # rounding an input may change its states by anything
MIXING = {  # their structures
    "m2rnn": "heads (size 2)",
    "delta_memory": "heads (size 3)",
    "block_gru": "dense",
    "layer_norm_lstm": "dense",
}
NAMES = (*CELLS, *MATRICES, *NORMS)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


ALIVE = {}  # a layer of every cell: the others take the derivatives of its recurrence


def layer(name, backend, dtype=torch.float64, chunk="auto", **options):
    cell, solver = make_cell(name, dtype), Newton(chunk=chunk)
    if name in MIXING and backend != "torch":  # as they are without any choice
        backend, solver = "auto", None
    rnn = RNN(cell, backend=backend, solver=solver, **options)
    ALIVE.setdefault(name, rnn)
    return rnn


def data(rnn, batch=3, time=31, dtype=torch.float64):
    x = torch.randn(batch, time, rnn.cell.input_size, dtype=dtype)
    return x, state_of(rnn, batch, dtype)


def split(state):
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("chunk", [1, 7, "auto"], ids="chunk={}".format)
def test_equals_loop(name, backend, dtype, chunk):
    rnn = layer(name, backend, dtype, chunk)
    x, state = data(rnn, dtype=dtype)
    assert rnn.runner().traced.structure == MIXING.get(name, "elementwise")
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    assert_same(outcome(rnn, rnn.cell, x, state), expected, RTOL[dtype])


@pytest.mark.parametrize("time", [1, 2, 63, 100])
def test_equals_loop_at_any_length(name, backend, time):
    rnn = layer(name, backend, chunk=20)
    x, state = data(rnn, batch=1, time=time)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    assert_same(outcome(rnn, rnn.cell, x, state), expected, 1e-12)


@pytest.mark.parametrize("name", ["paralstm", "slow_gates"])
def test_equals_loop_over_1000_steps(name, backend):
    rnn = layer(name, backend, chunk=125)
    x, state = data(rnn, batch=2, time=1000)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    assert_same(outcome(rnn, rnn.cell, x, state), expected, 1e-12)


@pytest.mark.parametrize("chunk", [1, 7, "auto"], ids="chunk={}".format)
def test_resets_equal_loop(name, backend, chunk):
    rnn = layer(name, backend, chunk=chunk)
    x, state = data(rnn)
    resets = torch.rand(x.shape[:2]) < 0.15
    resets[0, 0] = resets[1, -1] = resets[2, 6:9] = True
    resets[1, 0] = False  # so that some state is carried
    both = (*split(state), *split(data(rnn)[1]))
    run_loop = with_resets(functools.partial(loop, rnn.cell), resets)
    expected = outcome(run_loop, rnn.cell, x, both)
    assert_same(outcome(with_resets(rnn, resets), rnn.cell, x, both), expected, 1e-12)


class Leaky(nn.Module):
    """As large as its inputs, whatever their size; channels forget fast and slowly."""

    input_size, hidden_size, num_components = 4, 4, 2

    def __init__(self, mixes):
        super().__init__()
        self.decay = nn.Parameter(torch.tensor([0.3, 0.9, 0.99, 0.999]))
        self.mix = nn.Parameter(torch.randn(4, 4) * 0.02) if mixes else None

    def forward(self, x, state):
        h, c = state
        c = self.decay * c + 1e-4 * x
        new = self.decay * h + (1 - self.decay) * x + c
        return (new if self.mix is None else new + h @ self.mix), c


@pytest.mark.parametrize("size", [1e-9, 1e-30, 1e6], ids="size={}".format)
def test_states_of_any_size(any_backend, size):
    compare_in_size(Leaky(False), any_backend, size)


@pytest.mark.parametrize("size", [1e-9, 1e-30, 1e6], ids="size={}".format)
def test_states_of_any_size_that_mix(size):
    compare_in_size(Leaky(True), "torch", size)


def compare_in_size(cell, backend, size):
    """Relative to the largest of each component; the second is 1e-4 times the first."""
    rnn = RNN(cell, backend=backend, solver=Newton(chunk=13))
    x = torch.randn(2, 50, 4) * size
    state = tuple(torch.randn(2, 4) * size * factor for factor in (1, 1e-4))
    actual = outcome(rnn, cell, x, state)
    assert rnn.report.status == "converged"
    exact = copy.deepcopy(cell).double()
    run = functools.partial(loop, exact)
    expected = outcome(run, exact, x.double(), tuple(s.double() for s in state))
    assert_same(actual, {n: v.float() for n, v in expected.items()}, 1e-5)


def test_zeros_converge(any_backend):
    rnn = RNN(Leaky(False), backend=any_backend, solver=Newton(chunk=9))
    y, _ = rnn(torch.zeros(1, 20, 4))
    assert not y.any()
    assert (rnn.report.status, rnn.report.residual) == ("converged", 0.0)


@pytest.mark.parametrize("chunk", [5, 3])  # Triton corrects 4 chunks at once, and more than 16 too
@pytest.mark.parametrize(
    ("backend", "mixes"), [("torch", False), ("torch", True), ("c", False), ("triton", False)]
)
def test_a_backward_pass_that_does_not_converge(backend, mixes, chunk):
    """On inputs of zeros the states are right at once, and their adjoints are not."""
    cell, time = Leaky(mixes).double(), 16 if chunk == 5 else 51
    x = torch.zeros(2, time, 4, dtype=torch.float64, requires_grad=True)
    once = functools.partial(Newton, chunk=chunk, max_iterations=1)
    grads = {}
    for action in ("sequential", "warn", "raise"):
        rnn = RNN(cell, backend=backend, solver=once(on_failure=action))
        y, _ = rnn(x)
        assert rnn.report.status == "converged"
        run = functools.partial(torch.autograd.grad, (y * torch.arange(time)[:, None]).sum(), x)
        if action == "sequential":
            grads[action] = run()[0]
        elif action == "warn":
            with pytest.warns(UserWarning, match="step by step, since in the backward pass"):
                grads[action] = run()[0]
        else:
            with pytest.raises(ConvergenceError, match="pass, 2 of 2 parts of the batch") as error:
                run()
            assert len(error.value.report) == 2
            assert 1e-3 < error.value.report.residual < 2
    assert torch.equal(grads["sequential"], grads["warn"])
    enough = RNN(cell, backend=backend, solver=Newton(chunk=chunk, on_failure="raise"))
    (found,) = torch.autograd.grad((enough(x)[0] * torch.arange(time)[:, None]).sum(), x)
    assert_close("gradient", found, grads["sequential"], rtol=1e-12)


def test_resets_restart_from_zeros(name, backend):
    """From one step on nothing of the carried state is left, in value and gradient."""
    rnn = layer(name, backend, chunk=7)
    x, state = data(rnn)
    resets = torch.zeros(3, 31, dtype=torch.bool)
    resets[0, 0] = resets[1, 12] = resets[2, 30] = True
    first = tuple(s.requires_grad_() for s in split(state))
    y, _ = rnn(x, joined(first), resets)
    expected = torch.cat([rnn(x[:1])[0][0], rnn(x[1:2, 12:])[0][0], rnn(x[2:, 30:])[0][0]])
    assert_close("y", torch.cat([y[0], y[1, 12:], y[2, 30:]]), expected, rtol=1e-12)
    y[1, :12].sum().backward(retain_graph=True)
    assert all(s.grad[1].any() and not s.grad[[0, 2]].any() for s in first[:1])
    for s in first:
        s.grad = None
    (y[0].sum() + y[1, 12:].sum() + y[2, 30:].sum()).backward()
    assert not any(s.grad.any() for s in first)


def test_one_reset_state_for_all_sequences(backend):
    rnn = layer("paralstm", backend, chunk=7)
    x, state = data(rnn)
    resets = torch.rand(x.shape[:2]) < 0.15
    fresh = [torch.randn(rnn.hidden_size, dtype=x.dtype, requires_grad=True) for _ in range(2)]
    every = tuple(f.detach().expand(3, -1).clone().requires_grad_() for f in fresh)
    y, _ = rnn(x, state, resets, reset_state=tuple(fresh))
    expected, _ = rnn(x, state, resets, reset_state=every)
    assert_close("y", y, expected, rtol=1e-12)
    y.square().sum().backward()
    expected.square().sum().backward()
    for f, e in zip(fresh, every, strict=True):
        assert_close("gradient", f.grad, e.grad.sum(0), rtol=1e-12)


def test_whole_equals_two_parts(name, backend):
    rnn = layer(name, backend, chunk=7)
    x, state = data(rnn)

    def parts(x, state):
        first, state = rnn(x[:, :12], state)
        second, state = rnn(x[:, 12:], state)
        return torch.cat([first, second], 1), state

    expected = outcome(rnn, rnn.cell, x, state)
    assert_same(outcome(parts, rnn.cell, x, state), expected, 1e-12)


def test_whole_equals_steps(name, backend):
    rnn = layer(name, backend, chunk=7)
    x, state = data(rnn, time=13)

    def steps(x, state):
        outputs = []
        for x_t in x.unbind(1):
            y, state = rnn.step(x_t, state)
            outputs.append(y)
        return torch.stack(outputs, 1), state

    expected = outcome(rnn, rnn.cell, x, state)
    assert_same(outcome(steps, rnn.cell, x, state), expected, 1e-12)


@pytest.mark.parametrize("time", [1, 9])
def test_the_state_is_no_part_of_the_outputs(name, backend, time):
    """Whoever resets a row of the state in place keeps the outputs, and the other way round."""
    rnn = layer(name, backend)
    x, state = data(rnn, time=time)
    calls = [lambda: rnn(x, state), lambda: rnn.step(x[:, 0], state)]
    calls.append(lambda: rnn(x[:1], None, cu_seqlens=torch.tensor([0, time])))
    for call in calls:
        with torch.no_grad():
            y, last = call()
            kept = y.clone()
            for part in split(last):
                part.zero_()
            assert torch.equal(y, kept)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in split(call()[1]))


@pytest.mark.parametrize("chunk", [4, "auto"], ids="chunk={}".format)
def test_packed_equals_one_by_one(name, backend, chunk):
    rnn = layer(name, backend, chunk=chunk)
    lengths = [0, 1, 9, 0, 0, 2, 14, 5, 0]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x, _ = data(rnn, batch=1, time=sum(lengths))
    state = state_of(rnn, len(lengths))

    expected = outcome(one_by_one(rnn.cell, lengths), rnn.cell, x, state)
    actual = outcome(lambda x, s: rnn(x, s, cu_seqlens=bounds), rnn.cell, x, state)
    assert_same(actual, expected, 1e-12)


def test_layouts(name, backend):
    """Time first, a single sequence, and tensors that are not contiguous."""
    rnn = layer(name, backend, chunk=7)
    x, state = data(rnn, batch=2)
    expected = outcome(rnn, rnn.cell, x, state)
    time_first = RNN(rnn.cell, backend=rnn.backend, solver=rnn.solver, batch_first=False)

    def transposed(x, state):
        y, last = time_first(x.transpose(0, 1), state)
        return y.transpose(0, 1), last

    def contiguous_transposed(x, state):
        y, last = time_first(x.transpose(0, 1).contiguous(), state)
        return y.transpose(0, 1), last

    def strided(x, state):
        wide = torch.stack([x, x + 1], -1)[..., 0].flip(1).flip(1)
        far = [torch.stack([s, s], -1)[..., 0] for s in split(state)]
        return rnn(wide, joined(far))

    def singles(x, state):
        outputs, lasts = zip(
            *(rnn(x[b], joined([s[b] for s in split(state)])) for b in range(2)), strict=True
        )
        components = zip(*map(as_tuple, lasts), strict=True)
        return torch.stack(outputs), joined([torch.stack(c) for c in components])

    for run in (transposed, contiguous_transposed, strided, singles):
        label = f"{run.__name__}: "
        assert_same(outcome(run, rnn.cell, x, state), expected, 1e-12, label=label)


def test_no_state_means_zeros(name, backend):
    rnn = layer(name, backend)
    x, state = data(rnn)
    zeros = joined([torch.zeros_like(s) for s in split(state)])
    for actual, expected in zip(rnn(x), rnn(x, zeros), strict=True):
        for a, e in zip(as_tuple(actual), as_tuple(expected), strict=True):
            assert_close("from zeros", a, e, rtol=1e-15)


@pytest.mark.parametrize("chunk", [7, "auto"], ids="chunk={}".format)
@pytest.mark.parametrize("name", sorted({*NAMES} - DISCONTINUOUS))
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(name, backend, kind, chunk):
    """Inputs and parameters in half precision: the loop in float32 on the same values, rounded."""
    rnn = layer(name, backend, kind, chunk)
    x, state = data(rnn, time=20, dtype=kind)
    actual = outcome(rnn, rnn.cell, x, state)
    single = make_cell(name, kind).float()
    state = joined([s.float() for s in split(state)])
    expected = outcome(functools.partial(loop, single), single, x.float(), state)
    rtol = 16 * torch.finfo(kind).eps
    assert_same(actual, {n: v.to(kind) for n, v in expected.items()}, rtol)


@pytest.mark.parametrize("name", ["paralstm", "unusual", "lora"])
def test_check_cell_agrees(name):
    check = check_cell(make_cell(name, torch.float32))
    assert check.structure == "elementwise"
    assert len(check.errors) == 6
    assert max(check.errors.values()) <= 1e-12
