"""PyTorch's own kernels for its own cells: where they are called, and that results are the same."""

import functools
import gc
from dataclasses import replace

import pytest
import torch
from core.pretend_gpu import pretend_gpu
from torch import nn
from torch.nn.utils import parametrizations

import pararnn
from pararnn import RNN, Sequential
from pararnn.kernels import facts
from pararnn.layers import pytorch_kernels
from pararnn.layers.pytorch_kernels import library_of
from pararnn.planning.costs import COSTS
from pararnn.planning.plan import decide
from pararnn.planning.pytorch_plan import compare, milliseconds
from pararnn.testing import assert_close, loop

CELLS = {
    "tanh": lambda **more: nn.RNNCell(3, 5, **more),
    "relu": lambda **more: nn.RNNCell(3, 5, nonlinearity="relu", **more),
    "lstm": lambda **more: nn.LSTMCell(3, 5, **more),
    "gru": lambda **more: nn.GRUCell(3, 5, **more),
}
FREE = ((0.0,) * 7,) * 4


class Own(nn.GRUCell):
    """A cell that PyTorch has no kernel for."""


@pytest.fixture
def calls(monkeypatch):
    """Calls of PyTorch's kernels, which the planner takes to take no time."""
    found, run = [], pytorch_kernels.run
    monkeypatch.setattr(pytorch_kernels, "run", lambda *given: found.append(given) or run(*given))
    costs = replace(COSTS, aten=FREE, onednn=FREE, cudnn=FREE, cudnn_kept=FREE)
    monkeypatch.setattr(facts, "decide", functools.partial(decide, costs=costs))
    return found


def tensors_of(cell, dtype=torch.float64, batch=4, time=7):
    """Inputs and the state before the first step, with gradients."""
    kind = {"dtype": dtype, "requires_grad": True}
    x = torch.randn(batch, time, 3, **kind)
    state = [torch.randn(batch, 5, **kind) for _ in range(1 + isinstance(cell, nn.LSTMCell))]
    return x, state


def given_as(state):
    return tuple(state) if len(state) > 1 else state[0]


def outcome(run, cell, x, state, second=False):
    """Outputs, last states and gradients of all that is given, with random cotangents."""
    y, last = run(x, given_as(state))
    values = [y, *(last if isinstance(last, tuple) else (last,))]
    torch.manual_seed(1)
    cotangents = [torch.randn(v.shape, dtype=torch.float64).to(v) for v in values]
    wanted = [x, *state, *cell.parameters()]
    grads = torch.autograd.grad(values, wanted, cotangents, create_graph=second)
    if second:
        sums = [(g * torch.randn(g.shape, dtype=torch.float64).to(g)).sum() for g in grads]
        return values, torch.autograd.grad(sum(sums), wanted)
    return values, grads


def assert_same(actual, expected, rtol):
    for i, (a, e) in enumerate(zip(sum(map(list, actual), []), sum(map(list, expected), []))):  # noqa: B905, RUF017
        assert_close(f"tensor {i}", a.detach(), e.detach().to(a), rtol=rtol)


@pytest.mark.parametrize("second", [False, True], ids="second={}".format)
@pytest.mark.parametrize("bias", [True, False], ids="bias={}".format)
@pytest.mark.parametrize("name", CELLS)
def test_equals_the_loop(name, bias, second, calls):
    cell = CELLS[name](bias=bias).double()
    x, state = tensors_of(cell)
    actual = outcome(RNN(cell), cell, x, state, second)
    assert len(calls) == 1
    assert_same(actual, outcome(functools.partial(loop, cell), cell, x, state, second), 1e-10)


@pytest.mark.parametrize("name", CELLS)
def test_float32_equals_the_loop_in_float64(name, calls):
    cell = CELLS[name]()
    x, state = tensors_of(cell, torch.float32, time=300)
    actual = outcome(RNN(cell), cell, x, state)
    assert len(calls) == 1
    exact = CELLS[name]().double()
    exact.load_state_dict(cell.state_dict())
    x, *state = (t.detach().double().requires_grad_() for t in (x, *state))
    assert_same(actual, outcome(functools.partial(loop, exact), exact, x, state), 1e-5)


def test_layouts_of_x(calls):
    cell = nn.GRUCell(3, 5).double()
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    expected, last = loop(cell, x, torch.zeros(4, 5, dtype=torch.float64))
    y, state = RNN(cell, batch_first=False)(x.transpose(0, 1))
    torch.testing.assert_close(y.transpose(0, 1), expected)
    torch.testing.assert_close(state, last)
    y, state = RNN(cell)(x[0])
    torch.testing.assert_close((y, state), (expected[0], last[0]))
    y, _ = RNN(cell)(x)
    assert y.is_contiguous()
    assert len(calls) == 3


def test_whole_equals_split(calls):
    rnn = RNN(nn.LSTMCell(3, 5).double())
    x, state = tensors_of(rnn.cell)
    y, last = rnn(x, given_as(state))
    one, between = rnn(x[:, :3], given_as(state))
    two, end = rnn(x[:, 3:], between)
    torch.testing.assert_close(torch.cat([one, two], 1), y)
    torch.testing.assert_close(end, last)
    assert len(calls) == 3


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_layers_and_directions(kind, calls):
    theirs = kind(3, 5, num_layers=2, bidirectional=True, batch_first=True).double()
    ours, x = pararnn.parallelize(theirs), torch.randn(4, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert len(calls) == 4


def test_other_weights(calls):
    """Those of a functional call, and those that were set since."""
    rnn, x = RNN(nn.GRUCell(3, 5)), torch.randn(4, 7, 3)
    other = {name: 2 * p.detach() for name, p in rnn.named_parameters()}
    y, _ = torch.func.functional_call(rnn, other, (x,))
    assert not torch.allclose(y, rnn(x)[0])
    with torch.no_grad():
        for name, p in rnn.named_parameters():
            p.copy_(other[name])
    torch.testing.assert_close(rnn(x)[0], y)
    assert len(calls) == 3


def test_the_state_is_a_copy(calls):
    rnn = RNN(nn.GRUCell(3, 5))
    with torch.no_grad():
        y, state = rnn(torch.randn(4, 7, 3))
        before = y.clone()
        state.zero_()
    assert torch.equal(y, before)
    assert rnn.report.status == "sequential"
    assert len(calls) == 1


def weight_normed():
    return parametrizations.weight_norm(nn.GRUCell(3, 5), "weight_hh")


def hooked():
    cell = nn.GRUCell(3, 5)
    cell.register_forward_hook(lambda *_: None)
    return cell


def patched():
    cell = nn.GRUCell(3, 5)
    cell.forward = lambda x, h: nn.GRUCell.forward(cell, x, h)
    return cell


OTHERS = {"subclass": lambda: Own(3, 5), "parametrised": weight_normed, "hooked": hooked}


@pytest.mark.parametrize("name", [*OTHERS, "patched"])
def test_steps_that_may_be_others_are_not_taken(name, calls):
    cell = {**OTHERS, "patched": patched}[name]()
    assert library_of(cell, [torch.float32], torch.float32, "cpu") is None
    if name != "patched":
        RNN(cell)(torch.randn(4, 7, 3))
        assert not calls


CALLS = {
    "resets": lambda rnn, x: rnn(x, resets=torch.rand(4, 7) < 0.3),
    "packed": lambda rnn, x: rnn(x[:1], cu_seqlens=torch.tensor([0, 3, 7])),
    "step": lambda rnn, x: rnn.step(x[:, 0]),
    "one step": lambda rnn, x: rnn(x[:, :1]),
    "no sequences": lambda rnn, x: rnn(x[:0]),
    "backend": lambda rnn, x: RNN(rnn.cell, backend="torch")(x),
    "solver": lambda rnn, x: RNN(rnn.cell, solver=Sequential())(x),
    "half": lambda rnn, x: RNN(rnn.cell.bfloat16())(x.bfloat16()),
    "autocast": lambda rnn, x: torch.autocast("cpu", torch.bfloat16)(rnn)(x),
    "vmap": lambda rnn, x: torch.func.vmap(lambda x: rnn(x)[0])(x.unsqueeze(1)),
    "jvp": lambda rnn, x: torch.func.jvp(lambda x: rnn(x)[0], (x,), (x,)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_not_taken(name, calls):
    CALLS[name](RNN(nn.GRUCell(3, 5)), torch.randn(4, 7, 3))
    assert not calls


def test_the_plan_says_so(calls):
    rnn = RNN(nn.LSTMCell(3, 5))
    plan = rnn.plan((4, 7, 3))
    assert plan.path == "pytorch"
    assert "oneDNN: 0 ms by the estimate, " in str(plan) or "C++" in str(plan)
    assert "pytorch" in str(pararnn.explain(rnn, (4, 7, 3)))
    rnn(torch.randn(4, 7, 3))
    assert len(calls) == 1


# cuDNN, by stand-ins on the CPU


@pytest.fixture
def cudnn(monkeypatch):
    """Operators that compute what cuDNN's do; the precision in which each was called."""
    precisions, settings = [], torch.backends.cudnn.rnn
    functions = [torch.rnn_relu, torch.rnn_tanh, torch.lstm, torch.gru]

    def run(x, weights, h, c, mode):
        state = h if c is None else [h, c]
        found = functions[mode](x, state, weights, len(weights) > 2, 1, 0.0, True, False, True)
        return found if c is not None else (*found, torch.empty(0))

    def flatten(weights, stride, inputs, mode, hidden, proj, layers, first, both):
        assert (stride, proj, layers, first, both) == (len(weights), 0, 1, True, False)
        assert weights[0].shape[1] == inputs
        assert weights[1].shape[1] == hidden
        return torch.ones(3)

    def forward(x, weights, stride, buffer, h, c, mode, hidden, proj, layers, first, *others):
        assert (stride, hidden, proj, layers, first) == (len(weights), h.shape[2], 0, 1, True)
        assert h.shape == (1, len(x), hidden)
        assert h.is_contiguous()
        dropout, train, both, sizes, drops = others
        assert torch.equal(buffer, torch.ones(3))
        assert (dropout, both, sizes, drops) == (0.0, False, [], None)
        precisions.append(settings.fp32_precision)
        with torch.no_grad():
            return *run(x, weights, h, c, mode), torch.full((2,), float(train)), torch.ones(3)

    def backward(x, weights, stride, buffer, h, c, y, of_y, of_h, of_c, mode, *others):
        assert torch.equal(buffer, torch.ones(3))
        assert stride == len(weights)
        *_, reserve, (of_x, of_first, of_other, of_weights) = others
        assert torch.equal(reserve, torch.ones(2)), "the notes of a call that was trained, unused"
        reserve.fill_(float("nan"))
        precisions.append(settings.fp32_precision)
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, h, c, *weights)]
        with torch.enable_grad():
            found = run(leaves[0], leaves[3:], leaves[1], leaves[2], mode)
        pairs = [(f, g) for f, g in zip(found, (of_y, of_h, of_c)) if g is not None]  # noqa: B905
        results, given = zip(*pairs)  # noqa: B905
        asked = [t for t in leaves if t is not None]
        grads = iter(torch.autograd.grad(results, asked, given))
        grads = [None if t is None else next(grads) for t in leaves]
        of = [g if m else None for g, m in zip(grads[:3], (of_x, of_first, of_other), strict=True)]
        return (*of, grads[3:] if of_weights else [])

    monkeypatch.setattr(torch.ops.aten, "_cudnn_rnn_flatten_weight", flatten)
    monkeypatch.setattr(torch.ops.aten, "_cudnn_rnn", forward)
    monkeypatch.setattr(torch.ops.aten, "_cudnn_rnn_backward", backward)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    with pretend_gpu():
        yield precisions


@pytest.mark.parametrize("second", [False, True], ids="second={}".format)
@pytest.mark.parametrize("bias", [True, False], ids="bias={}".format)
@pytest.mark.parametrize("name", CELLS)
def test_cudnn_equals_the_loop(name, bias, second, calls, cudnn):
    cell = CELLS[name](bias=bias)
    x, state = tensors_of(cell, torch.float32)
    actual = outcome(RNN(cell), cell, x, state, second)
    assert len(calls) == 1
    assert cudnn == ["ieee"] * (1 if second else 2)
    assert torch.backends.cudnn.rnn.fp32_precision == "tf32"
    assert torch.backends.cudnn.enabled
    assert_same(actual, outcome(functools.partial(loop, cell), cell, x, state, second), 1e-5)


def test_cudnn_computes_what_is_asked_for(calls, cudnn):
    """A loss on some of the results, gradients of some tensors, and more than one backward pass."""
    cell = nn.LSTMCell(3, 5)
    x, state = tensors_of(cell, torch.float32)
    for wanted in ([x], [state[1], cell.weight_hh], [cell.bias_ih, x]):
        for tensor in (x, *state, *cell.parameters()):
            tensor.requires_grad_(any(tensor is w for w in wanted))
        y, (h, c) = RNN(cell)(x, given_as(state))
        expected, (_, last) = loop(cell, x, given_as(state))
        for actual, reference in ((y, expected), (c, last)):
            found = torch.autograd.grad(actual.square().sum(), wanted, retain_graph=True)
            theirs = torch.autograd.grad(reference.square().sum(), wanted, retain_graph=True)
            assert_same([found], [theirs], 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(RNN(cell)(x, given_as(state))[0], y)
    assert not y.isnan().any()
    assert not h.isnan().any()


def test_cudnn_keeps_nothing_after_a_backward_pass(calls, cudnn):
    cell = nn.GRUCell(3, 5)
    x, (state,) = tensors_of(cell, torch.float32)
    y, _ = RNN(cell)(x, state)
    y.sum().backward()
    gc.collect()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cudnn_runs_in_float32_for_half_precision(dtype, calls, cudnn):
    cell = nn.GRUCell(3, 5).to(dtype)
    x, state = tensors_of(cell, dtype)
    actual = outcome(RNN(cell), cell, x, state)
    assert len(calls) == 1
    assert all(v.dtype is dtype for v in sum(map(list, actual), []))  # noqa: RUF017
    exact = nn.GRUCell(3, 5)
    exact.load_state_dict(cell.state_dict())
    x, *state = (t.detach().float().requires_grad_() for t in (x, *state))
    assert_same(actual, outcome(functools.partial(loop, exact), exact, x, state), 1e-2)


def test_cudnn_runs_in_float32_under_autocast(calls, cudnn, monkeypatch):
    cell = nn.LSTMCell(3, 5)
    x, state = tensors_of(cell, torch.float32)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    is_enabled = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: is_enabled("cpu"))
    with torch.autocast("cuda", torch.bfloat16):
        y, last = RNN(cell)(x, given_as(state))
    assert_same([[y, *last]], expected[:1], 1e-5)
    assert len(calls) == 1


def test_cudnn_may_round_where_products_may(calls, cudnn):
    rnn, x = RNN(nn.GRUCell(3, 5)), torch.randn(4, 7, 3)
    torch.set_float32_matmul_precision("high")
    try:
        rnn(x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert cudnn == ["tf32"]


def test_cudnn_is_not_called_where_it_may_not_be(calls, cudnn, monkeypatch):
    x = torch.randn(4, 7, 3)
    own = torch.float32
    assert library_of(nn.GRUCell(3, 5), [own, own], own, "cuda") == "cudnn"
    assert library_of(nn.GRUCell(3, 5), [torch.float64], torch.float64, "cuda") is None
    torch.backends.cudnn.enabled = False
    try:
        assert library_of(nn.GRUCell(3, 5), [own], own, "cuda") is None
    finally:
        torch.backends.cudnn.enabled = True
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert library_of(nn.GRUCell(3, 5), [own], own, "cuda") is None
    assert RNN(nn.GRUCell(3, 5)).plan(x.shape).path != "pytorch"


# decisions


def test_milliseconds_of_steps():
    times = (1.0, 0.1, 2.0, 0.2, 0.02, 0.3, 0.03)
    one = 2.0 + 0.2 * 30 + 0.02 * 300 + 5 * (0.3 * 30 + 0.03 * 300)
    assert milliseconds(times, 300, 30, 5, 7) == pytest.approx((1.0 + 0.1 * 300 + 7 * one) / 1e3)


def test_times_follow_costs():
    sizes = 300, 10, 5, 100, 20, 8
    costs = replace(COSTS, kept_sweeps=((0, 0, 1, 0, 0, 0, 0),) * 4)
    assert compare("cudnn", "kept", *sizes, False, False, costs).ours == 28 / 1e3
    by_rows = replace(COSTS, kept_sweeps=((0, 0, 0, 0, 0, 1, 0),) * 4)
    assert compare("cudnn", "kept", *sizes, False, False, by_rows).ours == 28 * 25 * 30 / 1e3
    assert compare("cudnn", "graphs", *sizes, False, False) is None
    small, large = ((1e3,) + (0,) * 6,) * 4, ((2e3,) + (0,) * 6,) * 4
    costs = replace(COSTS, cudnn_kept=small, cudnn=large, cudnn_on_chip=(384, 192))
    for gates, hidden, expected in ((3, 192, 1), (3, 193, 2), (1, 384, 1), (1, 385, 2)):
        sizes = gates * hidden**2, hidden, 1, 10, 10, 0
        assert compare("cudnn", "kept", *sizes, True, False, costs).theirs == expected


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("steps", ["kept", "spread", "streamed"])
def test_every_kind_of_call_has_its_own_times(steps, tracked, captured):
    rows = tuple((1e3 * (i + 1),) + (0,) * 6 for i in range(4))
    costs = replace(COSTS, **{"cudnn": rows, f"{steps}_sweeps": rows})
    found = compare("cudnn", steps, 10**7, 1000, 1, 10, 10, 0, tracked, captured, costs)
    assert found.ours == found.theirs == 1 + tracked + 2 * captured
