"""Every ready-made cell: equations, structure, and the parallel result with all its gradients."""

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from core.compare import RTOL, assert_same, outcome, random_state
from torch import nn

import pararnn
from pararnn import RNN, Newton, cells
from pararnn.testing import assert_close, loop

CELLS = {
    "ClosedFormContinuousCell": cells.ClosedFormContinuousCell,
    "DiagonalElmanCell": cells.DiagonalElmanCell,
    "IndRNN": functools.partial(cells.DiagonalElmanCell, nonlinearity="relu"),
    "DiagonalLSTMCell": cells.DiagonalLSTMCell,
    "ForgetGateCell": cells.ForgetGateCell,
    "MinimalGatedCell": cells.MinimalGatedCell,
    "MinGRUCell": cells.MinGRUCell,
    "SLSTMCell": cells.SLSTMCell,
}


MIXING = {
    "one head": (functools.partial(cells.HeadSLSTMCell, num_heads=1), "dense"),
    "2 heads": (functools.partial(cells.HeadSLSTMCell, num_heads=2), "heads (size 4)"),
    "without bias": (
        functools.partial(cells.HeadSLSTMCell, num_heads=2, bias=False),
        "heads (size 4)",
    ),
    "block GRU": (functools.partial(cells.BlockGRUCell, num_blocks=2), "dense"),
    "layer norm LSTM": (cells.LayerNormLSTMCell, "dense"),
}


def make(name, **options):
    torch.manual_seed(5)
    cell = (CELLS[name] if name in CELLS else MIXING[name][0])(6, 8, **options).double()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return cell


def inputs(cell, time=40):
    x = torch.randn(2, time, cell.input_size, dtype=torch.float64)
    if isinstance(cell, cells.ClosedFormContinuousCell):
        x[..., -1] = torch.rand(2, time, dtype=torch.float64) * 3  # irregular times
    return x


@pytest.mark.parametrize("chunk", [1, 7, 40], ids="chunk={}".format)
@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("name", CELLS)
def test_equals_the_loop(name, backend, chunk):
    cell = make(name)
    rnn = RNN(cell, backend=backend, solver=Newton(chunk=chunk))
    assert rnn.runner().traced.structure == "elementwise"
    x = inputs(cell)
    state = random_state(cell.num_components, 2, 8)
    if name == "SLSTMCell":
        state = (*state[:2], state[2].abs() + 0.1, state[3])  # a normaliser is positive
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, RTOL[torch.float64] * 10)


@pytest.mark.parametrize("name", MIXING)
def test_cells_that_mix_channels_equal_the_loop(name):
    cell = make(name)
    rnn = RNN(cell)
    assert rnn.runner().traced.structure == MIXING[name][1]
    x = inputs(cell)
    state = random_state(cell.num_components, 2, 8)
    if isinstance(cell, cells.HeadSLSTMCell):
        state = (*state[:2], state[2].abs() + 0.1, state[3])
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(rnn, cell, x, state), expected, 1e-10)


@pytest.mark.parametrize("name", MIXING)
def test_cells_that_mix_channels_pass_the_check_with_resets(name):
    assert pararnn.testing.check_cell(make(name), rtol=1e-11).structure == MIXING[name][1]


@pytest.mark.parametrize("name", ["block GRU", "layer norm LSTM"])
def test_norms_start_from_nothing_in_float32(name):
    cell = make(name).float()
    x = inputs(cell, 100).float()
    zeros = torch.zeros(2, 8)
    state = zeros if cell.num_components == 1 else (zeros, zeros)
    expected = outcome(functools.partial(loop, cell), cell, x, state)
    assert_same(outcome(RNN(cell), cell, x, state), expected, 1e-4)
    assert_close("from None", RNN(cell)(x)[0], expected["y"], rtol=1e-4)


@pytest.mark.parametrize("name", CELLS)
def test_starts_from_nothing_in_float32_with_heads(name):
    cell = make(name, num_heads=2).float()
    x = inputs(cell).float()
    y, _ = RNN(cell)(x)
    zeros = torch.zeros(2, 8)
    state = zeros if cell.num_components == 1 else (zeros,) * cell.num_components
    assert_close("y", y, loop(cell, x, state)[0], rtol=1e-5)


def test_full_lstm_is_pytorchs_with_diagonal_weights():
    cell = make("DiagonalLSTMCell", max_recurrent_weight=None)
    theirs = nn.LSTMCell(6, 8).double()
    with torch.no_grad():
        cell.peephole.zero_()
        theirs.weight_ih.copy_(cell.weight.flatten(0, 2))
        theirs.weight_hh.copy_(torch.cat([torch.diag(a) for a in cell.diagonal]))
        theirs.bias_ih.copy_(cell.bias.flatten())
        theirs.bias_hh.zero_()
    x, state = torch.randn(3, 6).double(), random_state(2, 3, 8)
    for a, e in zip(cell(x, state), theirs(x, state), strict=True):
        assert_close("state", a, e, rtol=1e-12)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_elman_is_pytorchs_with_diagonal_weights(nonlinearity):
    cell = cells.DiagonalElmanCell(6, 8, nonlinearity=nonlinearity).double()
    theirs = nn.RNNCell(6, 8, nonlinearity=nonlinearity).double()
    with torch.no_grad():
        theirs.weight_ih.copy_(cell.weight.flatten(0, 2))
        theirs.weight_hh.copy_(torch.diag(cell.diagonal[0]))
        theirs.bias_ih.copy_(cell.bias.flatten())
        theirs.bias_hh.zero_()
    x, h = torch.randn(3, 6).double(), torch.randn(3, 8).double()
    assert_close("state", cell(x, h), theirs(x, h), rtol=1e-12)


def rms_norm(v, scale):
    return v / (v.square().mean(-1, keepdim=True) + 1e-4).sqrt() * scale


def layer_norm(v, gain, bias=0.0):
    centred = v - v.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias


def test_block_gru_is_written_out_block_by_block():
    cell, size = make("block GRU"), 4
    x, h = torch.randn(3, 6).double(), torch.randn(3, 8).double()
    e = F.silu(rms_norm(h @ cell.brief.weight.T + cell.brief.bias, cell.brief_norm.weight))
    from_x = x @ cell.input.weight.T + cell.input.bias
    blocks = [slice(0, size), slice(size, None)]
    summed = torch.cat(
        [
            from_x[:, b] + h[:, b] @ cell.recurrent[i, 0].T + e @ cell.spread.weight[b].T
            for i, b in enumerate(blocks)
        ],
        1,
    )
    u = F.silu(rms_norm(summed, cell.norm.weight))
    new = []
    for i, b in enumerate(blocks):
        reset, candidate, update = (
            u[:, b] @ weight.T + bias[b]
            for weight, bias in zip(cell.gates[i], cell.bias, strict=True)
        )
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        update = torch.sigmoid(update - 1)
        new.append(update * candidate + (1 - update) * h[:, b])
    assert_close("state", cell(x, h), torch.cat(new, 1), rtol=1e-12)


def test_block_gru_has_a_share_of_a_full_grus_weights_on_the_state():
    cell = cells.BlockGRUCell(16, 512)
    on_state = (cell.brief.weight, cell.recurrent, cell.spread.weight, *cell.gates.unbind(1))
    assert {weight.numel() for weight in on_state} == {512**2 // 8}


def test_layer_norm_lstm_is_written_out():
    cell = make("layer norm LSTM")
    x, (h, c) = torch.randn(3, 6).double(), random_state(2, 3, 8)
    of_x, of_h, of_c = cell.input_norm, cell.recurrent_norm, cell.cell_norm
    gates = layer_norm(x @ cell.input.weight.T, of_x.weight, of_x.bias)
    gates = gates + layer_norm(h @ cell.recurrent.weight.T, of_h.weight)
    f, i, o, z = gates[:, :8], gates[:, 8:16], gates[:, 16:24], gates[:, 24:]
    new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
    new_h = torch.sigmoid(o) * torch.tanh(layer_norm(new_c, of_c.weight, of_c.bias))
    for actual, expected in zip(cell(x, (h, c)), (new_h, new_c), strict=True):
        assert_close("state", actual, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "make_cell", [lambda: cells.BlockGRUCell(32, 64), lambda: cells.LayerNormLSTMCell(32, 64)]
)
def test_new_cells_with_norms_forget(make_cell):
    """A gain of 1 on the state of the LSTM would make it chaotic."""
    found = pararnn.diagnose(RNN(make_cell()), torch.randn(2, 128, 32))
    assert -0.4 < found.lyapunov_exponent < -0.02


def test_stabiliser_changes_nothing_but_the_range():
    """c / n and so h do not depend on m; the plain equations overflow where it does not."""
    cell = make("SLSTMCell")
    x, h = torch.randn(3, 6).double(), torch.randn(3, 8).double()
    c, n = torch.randn(3, 8).double(), torch.rand(3, 8).double() + 0.1
    shift = torch.randn(3, 8).double()
    plain = cell(x, (h, c, n, torch.zeros(3, 8).double()))[0]
    moved = cell(x, (h, c * torch.exp(-shift), n * torch.exp(-shift), shift))[0]
    assert_close("h", moved, plain, rtol=1e-12)
    with torch.no_grad():
        cell.bias[0] += 1000
    assert all(s.isfinite().all() for s in cell(x, (h, c, n, shift)))


def test_heads_with_diagonal_blocks_are_the_diagonal_cell():
    ours, diagonal = make("2 heads"), make("SLSTMCell", num_heads=2)
    with torch.no_grad():
        ours.weight.copy_(diagonal.weight)
        ours.bias.copy_(diagonal.bias)
        blocks = torch.diag_embed(diagonal.diagonal.unflatten(-1, (2, 4)))
        ours.recurrent.copy_(blocks.transpose(0, 1))
    x = torch.randn(3, 6).double()
    state = tuple(torch.rand(3, 8).double() for _ in range(4))
    for a, e in zip(ours(x, state), diagonal(x, state), strict=True):
        assert_close("state", a, e, rtol=1e-12)


def test_heads_start_with_blocks_of_norm_like_a_full_matrix():
    cell = cells.HeadSLSTMCell(64, 512, num_heads=4)
    assert abs(cell.recurrent.std() * 128**0.5 - 1) < 0.02
    assert not cell.bias.any()


FORGETTING = [
    cell for cell in vars(cells).values() if isinstance(cell, type) and getattr(cell, "keeps", None)
]


@pytest.mark.parametrize("num_heads", [1, 2, 8])
@pytest.mark.parametrize("make_cell", FORGETTING)
def test_timescales_are_what_the_cell_forgets_over(make_cell, num_heads):
    """Where nothing else acts on the state, a step keeps 1 - 1 / timescale of its memory."""
    cell = make_cell(8, 8, num_heads=num_heads, max_timescale=100.0).double()
    with torch.no_grad():
        for name, parameter in cell.named_parameters():
            if name != "bias":
                parameter.zero_()
    x, state = torch.zeros(1, 8).double(), torch.zeros(cell.num_components, 1, 8).double()

    def memory(before):
        after = cell(x, tuple(before) if cell.num_components > 1 else before[0])
        return after[1] if cell.num_components > 1 else after

    jacobian = torch.func.jacrev(memory)(state)[0, :, min(1, cell.num_components - 1), 0]
    timescales = 1 / (1 - jacobian.diagonal())
    expected = 2 * 50 ** torch.linspace(0, 1, 8).double()
    assert_close("timescales", timescales.sort().values, expected, rtol=1e-5)
    if num_heads == 2:
        assert_close("of a head", timescales[:4], expected[::2], rtol=1e-5)


def test_without_timescales_biases_are_zero_as_in_the_paper():
    assert not cells.ParaGRUCell(8, 8).bias.any()


def test_timescales_are_set_again_and_reach_the_layers():
    layer = pararnn.ParaLSTM(6, 8, num_layers=2, bidirectional=True, max_timescale=50.0)
    expected = cells.ParaLSTMCell(8, 8, max_timescale=50.0).bias
    for part in layer.layers:
        assert torch.equal(part.cell.bias, expected)
        with torch.no_grad():
            part.cell.bias.zero_()
        part.cell.reset_parameters()
        assert torch.equal(part.cell.bias, expected)


@pytest.mark.parametrize(
    ("make_cell", "options", "message"),
    [
        (cells.DiagonalElmanCell, {}, "DiagonalElmanCell has no gate that keeps the state"),
        (cells.ParaGRUCell, {"bias": False}, "sets biases, but bias=False"),
        (cells.ParaGRUCell, {"max_timescale": 1}, "max_timescale is 1; give at least 2 steps"),
    ],
)
def test_timescales_that_cannot_be(make_cell, options, message):
    with pytest.raises(ValueError, match=message):
        make_cell(8, 8, **{"max_timescale": 64.0} | options)


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize("seed", [1, 15, 21, 26])
def test_an_overshoot_does_not_hide_what_is_wrong(backend, seed):
    """Newton's first states reach 1e109 here; against that size, everything else looked solved."""
    cell = make("SLSTMCell")
    torch.manual_seed(seed)
    x, state = inputs(cell), random_state(4, 2, 8)
    state = (*state[:2], state[2].abs() + 0.1, state[3])
    y, _ = RNN(cell, backend=backend, solver=Newton(chunk=1))(x, state)
    assert_close("y", y, loop(cell, x, state)[0], rtol=1e-11)


@pytest.mark.parametrize("backend", ["c", "torch"])
@pytest.mark.parametrize(("chunk", "time"), [(1, 40), (4, 40), (8, 1000)])
def test_linear_cell_takes_one_iteration(backend, chunk, time):
    """One update: the first sweep is from guesses, the second one finds that nothing is left."""
    cell = make("MinGRUCell")
    with torch.no_grad():
        cell.bias[0] -= 4  # remembers for longer than a chunk, so that guesses are wrong
    x = inputs(cell, time)
    guesses_only = RNN(cell, backend=backend, solver=Newton(chunk=chunk, max_iterations=1))
    guesses_only(x)
    assert guesses_only.report.residual > 1e-3
    rnn = RNN(cell, backend=backend, solver=Newton(chunk=chunk))
    y, _ = rnn(x)
    assert rnn.report.iterations == 2
    assert rnn.report.status == "converged"
    assert_close("y", y, loop(cell, x, torch.zeros(2, 8).double())[0], rtol=1e-12)


def test_elapsed_time_matters():
    cell = make("ClosedFormContinuousCell")
    x = inputs(cell)
    y, _ = RNN(cell)(x)
    x[..., -1] *= 2
    assert (RNN(cell)(x)[0] - y).abs().max() > 1e-3


def test_mistakes():
    with pytest.raises(ValueError, match="nonlinearity is 'gelu'"):
        cells.DiagonalElmanCell(6, 8, nonlinearity="gelu")
    with pytest.raises(ValueError, match="hidden_size 8 cannot be split into 3 heads"):
        cells.MinimalGatedCell(6, 8, num_heads=3)
    with pytest.raises(ValueError, match=r"pass \(batch, time, 7\)"):
        RNN(cells.ClosedFormContinuousCell(6, 8))(torch.randn(2, 5, 6))
    with pytest.raises(ValueError, match="hidden_size 12 cannot be split into 8 blocks"):
        cells.BlockGRUCell(6, 12)
    for make_cell in (cells.BlockGRUCell, cells.LayerNormLSTMCell):
        with pytest.raises(ValueError, match="input_size is 0; it must be at least 1"):
            make_cell(0, 8)
    with pytest.raises(ValueError, match="hidden_size is -8; it must be at least 1"):
        cells.LayerNormLSTMCell(6, -8)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda size: cells.ParaGRUCell(size, 8), "input_size"),
        (lambda size: cells.SLSTMCell(6, size), "hidden_size"),
        (lambda size: cells.HeadSLSTMCell(6, 8, num_heads=size), "num_heads"),
        (lambda size: cells.BlockGRUCell(6, size), "hidden_size"),
        (lambda size: cells.LayerNormLSTMCell(size, 8), "input_size"),
        (lambda size: cells.M2RNNCell(6, size, 3), "key_size"),
        (lambda size: pararnn.ParaGRU(6, 8, num_layers=size), "num_layers"),
    ],
)
@pytest.mark.parametrize("size", [(8,), 8.0, "8"])
def test_sizes_are_whole_numbers(make, name, size):
    words = re.escape(f"{name} must be a whole number, got {size!r}.")
    with pytest.raises(TypeError, match=words):
        make(size)


def test_bounds_hold_after_projection():
    cell = make("DiagonalLSTMCell")
    with torch.no_grad():
        cell.diagonal.fill_(3.0)
        cell.peephole.fill_(-3.0)
    pararnn.project_parameters(cell)
    assert cell.diagonal.max() == 0.5
    assert cell.peephole.min() == -0.5
