"""`checkpoint_every`: the results are those of a call that keeps everything, and little is kept."""

import copy
import math
import pickle

import pytest
import torch
from core.cells import make_cell
from core.conftest import needs_triton
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import pararnn
from pararnn import RNN, Jacobi, Newton, Sequential
from pararnn.testing import assert_close

FEATURES, TIME = 5, 50


class Dropout(nn.GRUCell):
    """Draws random numbers in the input part."""

    def forward(self, x, h):
        return super().forward(nn.functional.dropout(x, 0.5, self.training), h)


class Tokens(nn.Module):
    """Takes token numbers."""

    hidden_size, num_components = 6, 1

    def __init__(self):
        super().__init__()
        self.table, self.decay = nn.Embedding(5, 6), nn.Parameter(torch.rand(6))

    def forward(self, x, h):
        return torch.tanh(self.decay * h + self.table(x))


def normed():
    return parametrizations.spectral_norm(nn.GRUCell(FEATURES, 4), "weight_hh")


def memory():
    return pararnn.cells.M2RNNCell(FEATURES, 3, 4, num_heads=2)


LAYERS = {
    "elementwise in C": lambda **o: RNN(make_cell("paralstm"), backend="c", **o),
    "elementwise in chunks": lambda **o: RNN(
        make_cell("slow_gates"), solver=Newton(chunk=4), backend="torch", **o
    ),
    "mixing in C": lambda **o: RNN(nn.LSTMCell(FEATURES, 4), backend="c", **o),
    "mixing, PyTorch's own": lambda **o: RNN(nn.GRUCell(FEATURES, 4), **o),
    "mixing, Newton": lambda **o: RNN(nn.RNNCell(FEATURES, 4), solver=Newton(chunk=3), **o),
    "mixing, Jacobi": lambda **o: RNN(nn.RNNCell(FEATURES, 4), solver=Jacobi(chunk=9), **o),
    "mixing, time first": lambda **o: RNN(nn.GRUCell(FEATURES, 4), batch_first=False, **o),
    "matrix state, readout": lambda **o: RNN(memory(), **o),
    "parametrised": lambda **o: RNN(normed().eval(), **o),
}
IN_TRITON = {
    "elementwise in Triton": lambda **o: RNN(
        make_cell("paralstm"), backend="triton", solver=Newton(chunk=3), **o
    ),
    "matrix state in Triton": lambda **o: RNN(memory(), backend="triton", **o),
}


def pair(make, every):
    """The same layer without the option and with it."""
    plain = make().double()
    other = make(checkpoint_every=every).double()
    other.load_state_dict(plain.state_dict())
    return plain, other


def parts_of(state):
    return state if isinstance(state, tuple) else (state,)


def random_state(rnn, rows):
    parts = [
        torch.randn(rows, *shape, dtype=torch.float64, requires_grad=True)
        for shape in rnn.state_shapes
    ]
    return tuple(parts) if len(parts) > 1 else parts[0]


def outcome(rnn, x, **options):
    """Outputs, last states, and gradients of everything, with random cotangents."""
    torch.manual_seed(1)
    y, last = rnn(x, **options)
    results = [y, *parts_of(last)]
    cotangents = [torch.randn(r.shape, dtype=r.dtype) for r in results]
    states = [
        part
        for name in ("state", "reset_state")
        if options.get(name) is not None
        for part in parts_of(options[name])
    ]
    inputs = [t for t in (x, *states, *rnn.parameters()) if t.requires_grad]
    return results + list(torch.autograd.grad(results, inputs, cotangents))


def assert_same(found, expected):
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"value {i}", one, other, rtol=1e-12)


def inputs_for(rnn, batch=2, time=TIME):
    shape = (batch, time) if rnn.batch_first else (time, batch)
    return torch.randn(*shape, FEATURES, dtype=torch.float64, requires_grad=True)


def calls(rnn, time):
    """Ways to call a layer: a state given, resets, packed sequences, one sequence."""
    resets = torch.rand(2, time) < 0.1
    resets[0, 0] = resets[1, -1] = True
    resets[1, 0] = False
    if not rnn.batch_first:
        resets = resets.T
    lengths = torch.tensor([0, 3, 0, time - 5, 1, 1, 0])
    yield inputs_for(rnn, time=time), {"state": random_state(rnn, 2)}
    yield (
        inputs_for(rnn, time=time),
        {
            "state": random_state(rnn, 2),
            "resets": resets,
            "reset_state": random_state(rnn, 2),
        },
    )
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    packed = {"cu_seqlens": bounds, "state": random_state(rnn, len(lengths))}
    yield inputs_for(rnn, batch=1, time=time), packed
    yield torch.randn(time, FEATURES, dtype=torch.float64, requires_grad=True), {}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("every", [1, 7, TIME - 1, TIME, 3 * TIME], ids="every={}".format)
def test_equals_without(name, every):
    time = 12 if every == 1 else TIME
    plain, other = pair(LAYERS[name], every)
    for x, options in calls(plain, time):
        assert_same(outcome(other, x, **options), outcome(plain, x, **options))
        assert len(other.report) == len(plain.report)


@needs_triton
@pytest.mark.parametrize("name", IN_TRITON)
def test_equals_without_in_triton(name):
    plain, other = pair(IN_TRITON[name], 5)
    for x, options in list(calls(plain, 9))[1:3]:
        assert_same(outcome(other, x, **options), outcome(plain, x, **options))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "parametrised"])
def test_same_bits_as_the_parts_one_after_another(name):
    """Also the gradients: segments that run again are those that ran before.

    But for computed weights, which are computed once, so that PyTorch's kernel does not read them.
    """
    plain, other = pair(LAYERS[name], 16)
    x, state = inputs_for(plain), random_state(plain, 2)
    axis = int(plain.batch_first)

    class Parts(nn.Module):
        def forward(self, x, state):
            outputs = []
            for part in x.split(16, axis):
                y, state = plain(part, state)
                outputs.append(y)
            return torch.cat(outputs, axis), state

        def parameters(self):
            return plain.parameters()

    expected = outcome(Parts(), x, state=state)
    for one, wanted in zip(outcome(other, x, state=state), expected, strict=True):
        assert torch.equal(one, wanted)


LAYERS_OF_LAYERS = {
    "ParaGRU": lambda **o: pararnn.ParaGRU(FEATURES, 4, 2, bidirectional=True, **o),
    "ParaLSTM": lambda **o: pararnn.ParaLSTM(FEATURES, 4, **o),
    "parallelize": lambda **o: pararnn.parallelize(nn.LSTM(FEATURES, 4, bidirectional=True), **o),
}


@pytest.mark.parametrize("name", LAYERS_OF_LAYERS)
def test_layers_of_layers(name):
    plain, other = pair(LAYERS_OF_LAYERS[name], 9)
    x = torch.randn(TIME, 2, FEATURES, dtype=torch.float64, requires_grad=True)
    assert_same(outcome(other, x), outcome(plain, x))
    lengths = torch.tensor([TIME, 20])
    packed = nn.utils.rnn.pack_padded_sequence(x.detach(), lengths)
    assert_close("packed", other(packed)[0].data, plain(packed)[0].data, rtol=1e-12)


def kept(run):
    """What a call returns, and the bytes of all tensors that it keeps for the backward pass."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = run()
    return y, storages


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        ("elementwise in C", False),
        ("mixing in C", False),
        ("matrix state, readout", False),
        pytest.param(
            "elementwise in C",
            True,
            marks=pytest.mark.skipif(
                torch.__version__ < torch.torch_version.TorchVersion("2.10"),
                reason="compiled by PyTorch 2.9, a call keeps all, with checkpoints too",
            ),
        ),
    ],
)
def test_bytes_that_are_kept(name, compiled):
    """x, parameters, and one state for every segment; without the option several times x."""
    plain, other = pair(LAYERS[name], 128)
    x = inputs_for(plain, time=1024)
    call = torch.compile(other, backend="aot_eager", fullgraph=True) if compiled else other
    y, storages = kept(lambda: call(x))
    given = [x, *other.parameters()]
    own = {t.untyped_storage().data_ptr() for t in given}
    state = 2 * sum(map(math.prod, plain.state_shapes)) * 8  # bytes, of two rows
    numbers = sum(s.nbytes() for place, s in storages.items() if place not in own)
    assert numbers <= 8 * state + 64
    _, without = kept(lambda: plain(x))
    assert sum(s.nbytes() for place, s in without.items() if place not in own) > 100 * state
    y.sum().backward()


def test_nothing_is_kept_without_gradients():
    _, rnn = pair(LAYERS["mixing in C"], 8)
    with torch.no_grad():
        y, storages = kept(lambda: rnn(inputs_for(rnn)))
    assert not storages
    assert not y.requires_grad


def test_random_numbers_are_drawn_again():
    """The backward pass computes with the numbers that the forward pass has drawn."""
    rnn = RNN(Dropout(FEATURES, 4), checkpoint_every=7, backend="torch").double()
    x = torch.randn(2, 20, FEATURES, dtype=torch.float64, requires_grad=True)

    def value(x):
        torch.manual_seed(3)
        return rnn(x)[0].square().sum()

    assert torch.autograd.gradcheck(value, x)


def test_spectral_norm_turns_its_vectors_once():
    plain, other = pair(lambda **o: RNN(normed(), **o), 7)
    for rnn in (plain, other):
        rnn(inputs_for(rnn))[0].sum().backward()
    vectors = [list(rnn.buffers()) for rnn in (plain, other)]
    assert all(map(torch.equal, *vectors))


def test_whole_numbers():
    plain, other = (RNN(Tokens(), checkpoint_every=every) for every in (None, 4))
    other.load_state_dict(plain.state_dict())
    x = torch.randint(5, (2, 11))
    (y, last), (z, other_last) = plain(x), other(x)
    assert torch.equal(y, z)
    assert torch.equal(last, other_last)
    assert "segments" in str(other.plan(x.shape))


def test_the_cell_of_the_backward_pass_is_that_of_the_forward_pass():
    """Parameters that are given for one call hold in its backward pass, or it is refused."""
    x = torch.randn(2, 20, FEATURES, dtype=torch.float64)
    for solver in (Sequential(), None):
        plain, other = pair(lambda s=solver, **o: RNN(nn.GRUCell(FEATURES, 4), solver=s, **o), 7)
        given = {n: (p * 0.5).requires_grad_() for n, p in plain.named_parameters()}
        loss = functional_call(other, given, (x,))[0].square().sum()
        if solver is None:  # PyTorch's kernel reads the cell itself
            assert other.plan(x.shape).path == "pytorch"
            with pytest.raises(RuntimeError, match="are not those of the forward pass"):
                loss.backward()
            continue
        found = torch.autograd.grad(loss, list(given.values()))
        expected = functional_call(plain, given, (x,))[0].square().sum()
        expected = torch.autograd.grad(expected, list(given.values()))
        assert_same(found, expected)


def test_weights_that_are_overwritten_are_noticed():
    _, rnn = pair(LAYERS["elementwise in C"], 7)
    loss = rnn(inputs_for(rnn))[0].sum()
    with torch.no_grad():
        next(rnn.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_transforms_and_second_derivatives():
    plain, other = pair(LAYERS["elementwise in C"], 7)
    x = inputs_for(plain, time=12).detach()
    ones = [vmap(grad(lambda x, r=r: r(x)[0].square().sum()))(x) for r in (plain, other)]
    assert_close("gradients per sample", ones[1], ones[0], rtol=1e-12)
    x.requires_grad_()
    twice = []
    for rnn in (plain, other):
        (first,) = torch.autograd.grad(rnn(x)[0].square().sum(), x, create_graph=True)
        twice.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert_close("second derivatives", twice[1], twice[0], rtol=1e-10)


def test_checkpointed_once_more():
    plain, other = pair(LAYERS["mixing in C"], 7)
    x = inputs_for(plain)
    expected = torch.autograd.grad(plain(x)[0].square().sum(), x)
    for reentrant in (False, True):
        loss = checkpoint(lambda x: other(x)[0], x, use_reentrant=reentrant).square().sum()
        if reentrant:
            x.grad = None
            loss.backward()
            assert_close("gradient", x.grad, expected[0], rtol=1e-12)
        else:
            assert_close("gradient", torch.autograd.grad(loss, x)[0], expected[0], rtol=1e-12)


def test_an_exported_program_takes_any_time():
    _, rnn = pair(LAYERS["elementwise in C"], 7)
    time = torch.export.Dim("time", min=2, max=4096)
    x = inputs_for(rnn).detach()
    program = torch.export.export(rnn, (x,), dynamic_shapes=({1: time},))
    longer = inputs_for(rnn, time=TIME + 30).detach()
    assert_close("output", program.module()(longer)[0], rnn(longer)[0], rtol=1e-12)


def test_copies_keep_the_option():
    _, rnn = pair(LAYERS["elementwise in C"], 7)
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert other.checkpoint_every == 7
        x = inputs_for(rnn)
        assert torch.equal(other(x)[0], rnn(x)[0])


def test_plan_and_explanation_show_segments(capsys):
    rnn = RNN(pararnn.cells.ParaLSTMCell(FEATURES, 8), checkpoint_every=1024)
    plan = rnn.plan((4, 10_000, FEATURES))
    first = plan.choices[0]
    assert (first.what, first.value) == ("segments", 10)
    assert "of 1,024 steps" in first.because
    kept = 10 * 4 * 16 * 4 / 2**20
    assert f"{kept:.3g} MiB are kept" in first.because
    assert plan.choices[1:] == RNN(rnn.cell).plan((4, 1024, FEATURES)).choices
    pararnn.explain(rnn, (4, 10_000, FEATURES))
    assert "segments" in capsys.readouterr().out


def test_the_report_is_of_the_worst_segment():
    rnn = RNN(make_cell("slow_gates"), solver=Newton(chunk=5), checkpoint_every=20)
    rnn(torch.randn(3, 110, FEATURES, dtype=torch.float64))
    assert (len(rnn.report), rnn.report.chunks, rnn.report.status) == (3, 4, "converged")
    rnn = RNN(make_cell("slow_gates"), solver=Sequential(), checkpoint_every=20)
    loss = rnn(torch.randn(3, 50, FEATURES, dtype=torch.float64))[0].sum()
    before = str(rnn.report)
    loss.backward()
    assert str(rnn.report) == before


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (0, ValueError, "at least 1 step, got 0"),
        (-3, ValueError, "at least 1 step, got -3"),
        (2.5, TypeError, "a number of steps, or None, got 2.5"),
        (True, TypeError, "a number of steps, or None, got True"),
        ("auto", TypeError, "a number of steps, or None, got 'auto'"),
    ],
)
def test_refused(given, error, said):
    with pytest.raises(error, match=said):
        RNN(nn.GRUCell(2, 3), checkpoint_every=given)


def test_boundaries_are_checked_for_the_whole_call():
    rnn = RNN(nn.GRUCell(FEATURES, 4), checkpoint_every=7)
    with pytest.raises(ValueError, match="the number of steps 20"):
        rnn(torch.randn(1, 20, FEATURES), cu_seqlens=torch.tensor([0, 5, 19]))
