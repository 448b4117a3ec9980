"""A layer inside activation checkpointing, also when it is traced there for the first time."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import pararnn


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_traced_inside(backend):
    rnn = pararnn.ParaGRU(4, 6, batch_first=True, backend=backend)
    x = torch.randn(2, 9, 4)
    rnn(x)[0].sum().backward()
    expected = [parameter.grad.clone() for parameter in rnn.parameters()]
    rnn.zero_grad()
    for module in rnn.modules():
        module.changed = True  # so that the cell is traced anew
    checkpoint(lambda x: rnn(x)[0], x, use_reentrant=False).sum().backward()
    for parameter, gradient in zip(rnn.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
