"""`ParaGRU` and `ParaLSTM` against `nn.GRU`'s rules and against their own cells, step by step."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import pararnn
from pararnn.testing import assert_close, loop

LAYERS = {"gru": (pararnn.ParaGRU, nn.GRU), "lstm": (pararnn.ParaLSTM, nn.LSTM)}


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


def first_of(state):
    return state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_shapes_are_those_of_torch(kind, batch_first, bidirectional, batched):
    ours, theirs = (
        make(6, 8, 2, batch_first=batch_first, bidirectional=bidirectional) for make in LAYERS[kind]
    )
    x = torch.randn(3, 5, 6) if batched else torch.randn(5, 6)
    y, last = ours(x)
    y_torch, last_torch = theirs(x)
    assert y.shape == y_torch.shape
    assert type(last) is type(last_torch)
    assert first_of(last).shape == first_of(last_torch).shape
    again, _ = ours(x, last)
    assert again.shape == y.shape


def test_layers_are_the_cell_applied_in_turn(kind):
    layer = LAYERS[kind][0](6, 8, 3, batch_first=True, num_heads=2).double()
    x = torch.randn(2, 17, 6, dtype=torch.float64)
    y, last = layer(x)
    expected, lasts = x, []
    for rnn in layer.layers:
        zeros = torch.zeros(2, 8, dtype=torch.float64)
        expected, state = loop(rnn.cell, expected, zeros if kind == "gru" else (zeros, zeros))
        lasts.append(first_of(state))
    assert_close("y", y, expected, rtol=1e-12)
    assert_close("last", first_of(last), torch.stack(lasts), rtol=1e-12)


def test_backward_direction_is_the_reversed_sequence(kind):
    layer = LAYERS[kind][0](6, 8, batch_first=True, bidirectional=True).double()
    x = torch.randn(2, 17, 6, dtype=torch.float64)
    y, last = layer(x)
    back, state = layer.layers[1](x.flip(1))
    assert_close("y", y[..., 8:], back.flip(1), rtol=1e-12)
    assert_close("last", first_of(last)[1], first_of(state), rtol=1e-12)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_packed_sequences_equal_single_ones(kind, bidirectional):
    layer = LAYERS[kind][0](6, 8, 2, bidirectional=bidirectional).double()
    sequences = [torch.randn(n, 6, dtype=torch.float64) for n in (5, 9, 1)]
    first = torch.randn(4 if bidirectional else 2, 3, 8, dtype=torch.float64)
    first = first if kind == "gru" else (first, first / 2)
    packed, last = layer(pack_sequence(sequences, enforce_sorted=False), first)
    padded, lengths = pad_packed_sequence(packed)
    for i, sequence in enumerate(sequences):
        own = first[:, i] if kind == "gru" else tuple(f[:, i] for f in first)
        y, state = layer(sequence, own)
        assert lengths[i] == len(sequence)
        assert_close(f"y {i}", padded[: len(sequence), i], y, rtol=1e-12)
        assert_close(f"last {i}", first_of(last)[:, i], first_of(state), rtol=1e-12)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_resets_equal_separate_sequences(kind, bidirectional):
    layer = LAYERS[kind][0](6, 8, 2, batch_first=True, bidirectional=bidirectional).double()
    x = torch.randn(1, 11, 6, dtype=torch.float64)
    resets = torch.zeros(1, 11, dtype=torch.bool)
    resets[0, 4] = True
    y, _ = layer(x, None, resets)
    apart = torch.cat([layer(x[:, :4])[0], layer(x[:, 4:])[0]], 1)
    assert_close("y", y, apart, rtol=1e-12)
    count = len(layer.layers)
    carried, fresh = torch.randn(2, count, 1, 8, dtype=torch.float64)
    state, reset_state = (s if kind == "gru" else (s, s / 2) for s in (carried, fresh[:, 0]))
    resets[0, 0] = True  # for layers that run backwards, after their last step
    y, last = layer(x, state, resets, reset_state=reset_state)
    backwards = (torch.arange(count) % 2 == 1).view(count, 1, 1) & torch.tensor(bidirectional)
    early = fresh
    late = torch.where(backwards, carried, fresh)
    early, late = (s if kind == "gru" else (s, s / 2) for s in (early, late))
    (one, end), (two, begin) = layer(x[:, :4], early), layer(x[:, 4:], late)
    assert_close("y", y, torch.cat([one, two], 1), rtol=1e-12)
    expected = torch.where(backwards, first_of(end), first_of(begin))
    assert_close("last", first_of(last), expected, rtol=1e-12)


def test_resets_with_a_packed_sequence_are_refused(kind):
    layer = LAYERS[kind][0](6, 8)
    packed = pack_sequence([torch.randn(3, 6)])
    with pytest.raises(ValueError, match="says itself where sequences begin"):
        layer(packed, resets=torch.zeros(1, 3, dtype=torch.bool))


def test_cu_seqlens_equal_separate_sequences(kind):
    layer = LAYERS[kind][0](6, 8, batch_first=True, bidirectional=True).double()
    x = torch.randn(1, 11, 6, dtype=torch.float64)
    y, last = layer(x, cu_seqlens=torch.tensor([0, 4, 11]))
    one, last_one = layer(x[:, :4])
    two, last_two = layer(x[:, 4:])
    assert_close("y", y, torch.cat([one, two], 1), rtol=1e-12)
    both = torch.cat([first_of(last_one), first_of(last_two)], 1)
    assert_close("last", first_of(last), both, rtol=1e-12)


def test_steps_equal_the_whole(kind):
    layer = LAYERS[kind][0](6, 8, 2, batch_first=True).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    y, last = layer(x)
    state, outputs = None, []
    for t in range(7):
        out, state = layer.step(x[:, t], state)
        outputs.append(out)
    assert_close("y", torch.stack(outputs, 1), y, rtol=1e-12)
    assert_close("last", first_of(state), first_of(last), rtol=1e-12)


def test_dropout_between_layers_only_in_training(kind):
    layer = LAYERS[kind][0](6, 8, 2, batch_first=True, dropout=0.5)
    x = torch.randn(2, 7, 6)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


def test_initialisation_is_the_papers():
    cell = pararnn.cells.ParaLSTMCell(512, 256, num_heads=2)
    bound = (6 / 256) ** 0.5
    assert 0.98 * bound < cell.weight.abs().max() <= bound
    assert not cell.bias.any()
    assert abs(cell.diagonal.std() * 16 - 1) < 0.1
    assert abs(cell.peephole.std() * 16 - 1) < 0.2
    assert cell.diagonal.abs().max() <= 0.5


def test_projection_after_the_step_bounds_weights_and_keeps_gradients():
    layer = pararnn.ParaGRU(4, 6, max_recurrent_weight=0.1)
    cell = layer.layers[0].cell
    with torch.no_grad():
        cell.diagonal.fill_(0.7)
    pararnn.project_parameters(layer)
    assert torch.equal(cell.diagonal, torch.full_like(cell.diagonal, 0.1))
    layer(torch.randn(5, 2, 4))[0].square().sum().backward()
    assert cell.diagonal.grad.abs().min() > 0
    free = pararnn.cells.ParaGRUCell(4, 6, max_recurrent_weight=None)
    with torch.no_grad():
        free.diagonal.fill_(0.7)
    pararnn.project_parameters(free)
    assert torch.equal(free.diagonal, torch.full_like(free.diagonal, 0.7))


def test_heads_are_blocks_of_the_projection():
    cell = pararnn.cells.ParaGRUCell(6, 8, num_heads=2).double()
    dense = pararnn.cells.ParaGRUCell(6, 8).double()
    with torch.no_grad():
        blocks = [torch.block_diag(*gate) for gate in cell.weight.transpose(0, 1)]
        dense.weight.copy_(torch.stack(blocks).unsqueeze(0))
        dense.diagonal.copy_(cell.diagonal)
        dense.bias.copy_(cell.bias.normal_())
    x, h = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    assert_close("h", cell(x, h), dense(x, h), rtol=1e-12)


def test_messages(kind):
    make = LAYERS[kind][0]
    with pytest.raises(ValueError, match=r"input_size 6 cannot be split into 4 heads"):
        make(6, 8, num_heads=4)
    with pytest.raises(ValueError, match=r"num_layers must be at least 1, got 0"):
        make(6, 8, 0)
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 5\); pass \(time, batch, 6\)"):
        make(6, 8)(torch.randn(2, 3, 5))
    first = torch.zeros(1, 3, 8)
    first = first if kind == "gru" else (first, first)
    with pytest.raises(ValueError, match=r"state has shape \(1, 3, 8\); pass \(2, 3, 8\)"):
        make(6, 8, 2)(torch.randn(4, 3, 6), first)
    with pytest.raises(ValueError, match=r"needs the future"):
        make(6, 8, bidirectional=True).step(torch.randn(3, 6))
