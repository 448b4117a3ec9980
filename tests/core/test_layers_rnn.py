"""The layer among PyTorch's other machinery: autocast, compile, copies, checkpointing, DDP."""

import copy
import functools
import io
import pickle
import socket

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pararnn import RNN, Newton
from pararnn.cells import ParaGRUCell
from pararnn.testing import assert_close, loop

from .cells import make_cell
from .compare import as_tuple, assert_same, one_by_one, outcome, random_state, twice


@pytest.fixture(params=["paralstm", "surroundings"])
def rnn(request, backend):
    return RNN(make_cell(request.param), backend=backend, solver=Newton(chunk=5))


@pytest.fixture
def example(rnn):
    x = torch.randn(3, 12, rnn.cell.input_size, dtype=torch.float64)
    return x, random_state(rnn.num_components, 3, rnn.hidden_size)


def test_autocast_keeps_the_type_of_x(backend):
    cell = make_cell("paralstm", torch.float32)
    rnn = RNN(cell, backend=backend)
    x = torch.randn(3, 12, 5)
    state = random_state(2, 3, 7, dtype=torch.float32)
    expected = outcome(functools.partial(loop, cell), cell, x, state)

    def cast(x, state):
        with torch.autocast("cpu", torch.bfloat16):
            return rnn(x, state)

    actual = outcome(cast, cell, x, state)
    assert_same(actual, expected, 0.03)
    worst = (actual["y"] - expected["y"]).abs().amax()
    assert worst > 1e-6, "the projection did not run in bfloat16"


@pytest.mark.parametrize("make", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))])
def test_copies_compute_the_same(rnn, example, make):
    rnn(*example)
    expected = outcome(rnn, rnn.cell, *example)
    twin = make(rnn)
    assert_same(outcome(twin, twin.cell, *example), expected, 1e-14)


def test_state_dict_round_trip(rnn, example):
    buffer = io.BytesIO()
    torch.save(rnn.state_dict(), buffer)
    buffer.seek(0)
    other = copy.deepcopy(rnn)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(buffer))
    assert_same(outcome(other, other.cell, *example), outcome(rnn, rnn.cell, *example), 1e-14)


def test_functional_call_uses_given_parameters(rnn, example):
    changed = copy.deepcopy(rnn)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.3)
    given = dict(changed.named_parameters())
    expected = outcome(changed, changed, *example)
    actual = outcome(lambda *a: torch.func.functional_call(rnn, given, a), changed, *example)
    assert_same(actual, expected, 1e-14)


@pytest.mark.parametrize("reentrant", [False, True], ids="reentrant={}".format)
def test_activation_checkpointing(rnn, example, reentrant):
    expected = outcome(rnn, rnn.cell, *example)
    run = lambda x, s: checkpoint(rnn, x, s, use_reentrant=reentrant)  # noqa: E731
    if reentrant:
        x, state = example
        x = x.clone().requires_grad_()
        (y, _) = run(x, state)
        cotangent = torch.randn_like(y)
        y.backward(cotangent)
        other = x.detach().clone().requires_grad_()
        rnn(other, state)[0].backward(cotangent)
        assert_close("gradient of x", x.grad, other.grad, rtol=1e-14)
    else:
        assert_same(outcome(run, rnn.cell, *example), expected, 1e-14)


@pytest.mark.parametrize("name", ["paralstm", "weight_norm"])
def test_compile_fullgraph(name, backend):
    rnn = RNN(make_cell(name), backend=backend, solver=Newton(chunk=5))
    x = torch.randn(3, 12, 5, dtype=torch.float64)
    state = random_state(rnn.num_components, 3, 7)
    expected = outcome(rnn, rnn.cell, x, state)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    assert_same(outcome(compiled, rnn.cell, x, state), expected, 1e-13)


@pytest.mark.parametrize("name", ["paralstm", "lstm"])
def test_compile_packed(name):
    """Values of boundaries are checked on the device; sequences without steps among them."""
    cell = nn.LSTMCell(5, 7).double() if name == "lstm" else make_cell(name)
    rnn = RNN(cell, solver=Newton(chunk=5))
    lengths = [0, 5, 0, 7, 0]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x, state = torch.randn(1, 12, 5, dtype=torch.float64), random_state(2, 5, 7)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager")
    actual = outcome(lambda x, s: compiled(x, s, cu_seqlens=bounds), rnn.cell, x, state)
    assert_same(actual, outcome(one_by_one(cell, lengths), rnn.cell, x, state), 1e-12)
    for wrong in ([0, 5, 4, 12, 12, 12], [1, 5, 5, 12, 12, 12], [0, 5, 5, 11, 11, 11]):
        for layer, error in ((rnn, ValueError), (compiled, RuntimeError)):
            with pytest.raises(error, match="cu_seqlens must rise from 0 to the number of"):
                layer(x, state, cu_seqlens=torch.tensor(wrong))


class SaysNothing(nn.Module):
    """A cell that tells no sizes, as most are written at first; two components."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(5, 14)

    def forward(self, x, state):
        h, c = state
        gate, new = self.project(x).chunk(2, -1)
        z = torch.sigmoid(gate + h)
        c = (1 - z) * c + z * torch.tanh(new)
        return torch.tanh(c), c


@pytest.mark.parametrize("dynamic", [None, True], ids="dynamic={}".format)
@pytest.mark.parametrize("knows", ["nothing", "hidden_size"])
def test_compile_before_any_call(knows, dynamic):
    """What is known when the compiler comes is traced then and there, outside of its graph."""
    cell = SaysNothing().double()
    x, state = torch.randn(3, 12, 5, dtype=torch.float64), random_state(2, 3, 7)
    if knows == "hidden_size":
        cell.hidden_size, state = 7, None
    rnn = RNN(cell)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    cotangent = torch.randn(3, 12, 7, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(layer(x, state)[0], list(cell.parameters()), cotangent)
        for layer in (compiled, rnn)
    )
    for gradient, same in zip(found, expected, strict=True):
        assert_close("gradient", gradient, same, rtol=1e-13)


def test_compile_says_what_is_wrong_with_a_cell():
    cell = SaysNothing()
    cell.hidden_size = 6  # its gates have 7
    compiled = torch.compile(RNN(cell), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="must match the size"):
        compiled(torch.randn(3, 12, 5))


def test_components_are_found_at_the_first_call():
    cell = SaysNothing()
    cell.hidden_size = 7
    rnn = RNN(cell)
    with pytest.raises(TypeError, match="does not say how many tensors its state has; call"):
        rnn.num_components  # noqa: B018 # raises
    _, state = rnn(torch.randn(3, 12, 5))
    assert rnn.num_components == len(state) == 2


@pytest.fixture
def process_group():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_data_parallel(rnn, example):
    x, state = example
    y, _ = rnn(x, state)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected = {n: p.grad.clone() for n, p in rnn.named_parameters()}
    rnn.zero_grad()
    parallel = nn.parallel.DistributedDataParallel(rnn)
    parallel(x, state)[0].backward(cotangent)
    for name, parameter in rnn.named_parameters():
        assert_close(name, parameter.grad, expected[name], rtol=1e-14)


def test_gradient_of_gradient_equals_loop(rnn, example):
    x, state = example
    assert_same(twice(rnn, x, state), twice(functools.partial(loop, rnn.cell), x, state), 1e-10)


def test_gradcheck(rnn, example):
    x, state = (example[0][:2, :6], tuple(s[:2] for s in as_tuple(example[1])))

    def run(x, *state):
        y, last = rnn(x, state if len(state) > 1 else state[0])
        return y, *as_tuple(last)

    if rnn.cell.__class__.__name__ == "Surroundings":
        pytest.skip("it stops gradients on purpose, which finite differences do not see")
    inputs = [t.clone().requires_grad_() for t in (x, *state)]
    assert torch.autograd.gradcheck(run, inputs)


def test_no_grad_and_inference_mode(rnn, example):
    expected, _ = rnn(*example)
    for mode in (torch.no_grad, torch.inference_mode):
        fresh = copy.deepcopy(rnn)
        with mode():
            y, _ = fresh(*example)
        assert not y.requires_grad
        assert_close(mode.__name__, y.clone(), expected.detach(), rtol=1e-14)
        assert fresh(*example)[0].requires_grad, "a later call must have gradients again"


def test_gradients_from_the_last_state_alone(rnn, example):
    x, state = example
    first = tuple(s.clone().requires_grad_() for s in as_tuple(state))
    cotangents = [torch.randn_like(s) for s in first]
    gradients = []
    for run in (rnn, functools.partial(loop, rnn.cell)):
        _, last = run(x, first if len(first) > 1 else first[0])
        total = sum((v * c).sum() for v, c in zip(as_tuple(last), cotangents, strict=True))
        gradients.append(torch.autograd.grad(total, first))
    for i, (actual, expected) in enumerate(zip(*gradients, strict=True)):
        assert_close(f"first[{i}]", actual, expected, rtol=1e-12)


def test_parameters_change_between_calls(rnn, example):
    rnn(*example)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.mul_(0.7)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, *example)
    assert_same(outcome(rnn, rnn.cell, *example), expected, 1e-12)


def test_same_twice(rnn, example):
    one, two = (outcome(rnn, rnn.cell, *example) for _ in range(2))
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_to_another_type(rnn):
    rnn.float()
    x = torch.randn(2, 9, rnn.cell.input_size)
    state = random_state(rnn.num_components, 2, rnn.hidden_size, dtype=torch.float32)
    expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, state)
    assert_same(outcome(rnn, rnn.cell, x, state), expected, 1e-5)


class NoParameters(nn.Module):
    """Divides by what depends on the type of its values."""

    input_size = hidden_size = 6

    def forward(self, x, h):
        return torch.tanh(x + nn.functional.rms_norm(0.001 * h, (6,)))


@pytest.mark.parametrize("compiled", [False, True], ids="compiled={}".format)
def test_a_cell_without_parameters_has_the_type_of_x(compiled):
    rnn = RNN(NoParameters())
    run = torch.compile(rnn, fullgraph=True, backend="aot_eager") if compiled else rnn
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.05)) * 2:
        x, h = torch.randn(2, 9, 6, dtype=dtype), 0.01 * random_state(1, 2, 6, dtype=dtype)
        expected = outcome(functools.partial(loop, rnn.cell), rnn.cell, x, h)
        assert_same(outcome(run, rnn.cell, x, h), expected, rtol)


def test_rows_do_not_mix(rnn, example):
    x, state = example
    y, _ = rnn(x, state)
    x = x.clone()
    x[1] += 1
    changed, _ = rnn(x, state)
    assert torch.equal(y[0], changed[0])
    assert torch.equal(y[2], changed[2])
    assert not torch.equal(y[1], changed[1])


def test_a_cell_that_changes_between_calls_is_seen():
    """Whatever it is: a number, a weight, its type, a part of it."""

    class Layered(nn.Module):
        input_size = hidden_size = 4

        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.Linear(4, 4), 0.5
            self.recurrent = nn.Parameter(torch.rand(4))

        def forward(self, x, h):
            return torch.tanh(self.inner(x) * self.scale + self.recurrent * h)

    cell = Layered()
    rnn, x = RNN(cell), torch.randn(2, 20, 4)

    def shrink():
        cell.recurrent.data = cell.recurrent.data.double()
        cell.inner.double()

    changes = [
        lambda: setattr(cell, "scale", 2.0),
        lambda: setattr(cell, "recurrent", nn.Parameter(torch.rand(4))),
        lambda: setattr(cell.inner, "bias", None),
        lambda: setattr(cell, "inner", nn.Sequential(nn.Linear(4, 4), nn.Tanh())),
        shrink,
    ]
    rnn(x)
    for change in changes:
        change()
        own = x.to(cell.recurrent.dtype)
        for _ in range(2):
            expected, _ = loop(cell, own, own.new_zeros(2, 4))
            assert_close("y", rnn(own)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["elementwise", "mixing"])
def test_what_looks_at_operators_sees_ours(name, grad):
    """Otherwise a call goes past PyTorch's dispatcher, with the same result."""
    cell = nn.GRUCell(3, 4) if name == "mixing" else ParaGRUCell(3, 4)
    rnn = RNN(cell, solver=Newton(chunk=5))
    x = torch.randn(2, 20, 3, requires_grad=grad)
    plain = rnn(x)[0]
    with torch.profiler.profile() as seen:
        y = rnn(x)[0]
    assert "pararnn::solve" in {event.key for event in seen.key_averages()}
    assert torch.equal(y, plain)
    if grad:
        cotangent = torch.randn_like(y)
        inputs = [x, *cell.parameters()]
        pairs = [torch.autograd.grad(out, inputs, cotangent) for out in (y, plain)]
        assert all(map(torch.equal, *pairs))
