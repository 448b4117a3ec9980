"""Layers as exported programs."""

import pytest
import torch
from torch import nn

import pararnn
from pararnn.testing import assert_close

LAYERS = {
    "elementwise": lambda: pararnn.ParaGRU(3, 4, batch_first=True),
    "mixing": lambda: pararnn.RNN(nn.GRUCell(3, 4)),
    "Newton": lambda: pararnn.RNN(nn.RNNCell(3, 4), solver=pararnn.Newton(chunk=8)),
    "directions": lambda: pararnn.parallelize(
        nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)
    ),
}


class Net(nn.Module):
    """A layer's outputs alone."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x):
        return self.rnn(x)[0]


def exported(name, strict=False):
    net = Net(LAYERS[name]()).eval()
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("time")},)
    return net, torch.export.export(
        net, (torch.randn(2, 20, 3),), dynamic_shapes=sizes, strict=strict
    )


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("strict", [False, True], ids="strict={}".format)
def test_dynamic_batch_and_time(name, strict):
    net, program = exported(name, strict)
    for shape in ((5, 33, 3), (1, 7, 3)):
        x = torch.randn(shape)
        assert_close("y", program.module()(x), net(x), rtol=1e-5)
