"""Plans and reports of whole stacks: those of their layers, with names."""

import copy
import pickle

import pytest
import torch
from torch import nn

import pararnn
from pararnn import Newton

X = torch.randn(2, 64, 3)
CUT = Newton(chunk=8)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", [pararnn.ParaGRU, pararnn.ParaLSTM, nn.GRU, nn.LSTM, nn.RNN])
def test_they_are_those_of_the_layers(kind, directions):
    stack = kind(3, 4, 3, batch_first=True, bidirectional=directions == 2)
    if isinstance(stack, nn.RNNBase):
        stack = pararnn.parallelize(stack, solver=CUT)
    assert stack.report is None
    plans = stack.plan(X.shape)
    stack(X)
    assert len(plans) == len(stack.report) == len(stack.layers) == 3 * directions
    for i, layer in enumerate(stack.layers):
        size = 3 if i < directions else 4 * directions
        assert plans[i] == layer.plan((2, 64, size))
        assert torch.equal(stack.report[i].values, layer.report.values)


def test_one_sequence_and_time_first_are_laid_out_as_calls_are():
    stack = pararnn.ParaGRU(3, 4, 2, solver=CUT)
    first = pararnn.ParaGRU(3, 4, 2, solver=CUT, batch_first=True)
    assert stack.plan((64, 2, 3)) == first.plan((2, 64, 3))
    assert stack.plan((64, 3)) == first.plan((64, 3)) == first.plan((1, 64, 3))
    assert stack.plan((64, 2, 3))[0].forward.solver.chunk == 8


def test_what_is_printed():
    stack = pararnn.ParaGRU(3, 4, 3)
    stack(X)
    plan = str(stack.layers[0].plan((64, 2, 3)))
    assert str(stack.plan((2, 64, 3))).splitlines()[0] == "layers 0 to 2"
    assert str(stack.plan((2, 64, 3))).splitlines()[1:] == [f"  {n}" for n in plan.splitlines()]
    assert str(stack.report) == f"layers 0 to 2: {stack.report[0]}"
    both = pararnn.ParaGRU(3, 4, 2, bidirectional=True, batch_first=True)
    both.layers[1].solver = CUT
    both(X)
    assert str(both.report).splitlines() == [
        f"layer 0 forwards: {both.report[0]}",
        f"layer 0 backwards: {both.report[1]}",
        f"layers 1 forwards to 1 backwards: {both.report[2]}",
    ]
    for shown in (both.report, both.plan(X.shape)):
        html = shown._repr_html_()
        assert html.count("layer 0 backwards") == 1
        assert html.startswith("<table>")
        assert [*copy.copy(shown)] == [*shown]


def test_they_can_be_stored():
    stack = pararnn.ParaGRU(3, 4, 2, bidirectional=True)
    plans = stack.plan((5, 2, 3))
    again = pickle.loads(pickle.dumps(plans))
    assert str(again) == str(plans)
    assert again == plans


@pytest.mark.parametrize("shape", [(3,), (2, 64, 4), (2, 64, 3, 1)])
def test_shapes_that_are_refused(shape):
    with pytest.raises(ValueError, match=r"shape is .*; pass that of x: \(time, batch, 3\), or"):
        pararnn.ParaGRU(3, 4).plan(shape)
    with pytest.raises(TypeError, match="shape must be sizes"):
        pararnn.ParaGRU(3, 4).plan(X)
