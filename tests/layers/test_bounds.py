"""Bounds on recurrent weights: a layer keeps them after every step of an optimiser."""

import copy
import gc
import io

import pytest
import torch
from torch import nn

import pararnn

X = torch.randn(2, 20, 4)


class Clipped(nn.Module):
    """A cell of one's own with a bound."""

    input_size, hidden_size = 4, 6

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(6))
        self.project = nn.Linear(4, 6)

    def project_(self):
        with torch.no_grad():
            self.gain.clamp_(-0.25, 0.25)

    def forward(self, x, state):
        return torch.tanh(self.gain * state + self.project(x))


LAYERS = {
    "ParaGRU": lambda: pararnn.ParaGRU(4, 6, num_layers=2, max_recurrent_weight=0.25),
    "RNN of a cell of one's own": lambda: pararnn.RNN(Clipped()),
    "inside of a model": lambda: nn.Sequential(nn.Linear(4, 4), pararnn.RNN(Clipped())),
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e4),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=10.0),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=1e3, max_iter=1),
}


def bounded(model):
    return [p for n, p in model.named_parameters() if n.endswith(("diagonal", "gain"))]


def train_once(model, optimizer):
    def loss():
        optimizer.zero_grad()
        y = model(X)
        value = (y[0] if isinstance(y, tuple) else y).square().sum()
        value.backward()
        return value

    loss()
    optimizer.step(loss) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_step_of_an_optimiser(name, optimizer):
    model = LAYERS[name]()
    before = [p.clone() for p in bounded(model)]
    train_once(model, OPTIMIZERS[optimizer](model.parameters()))
    for weight, old in zip(bounded(model), before, strict=True):
        assert not torch.equal(weight, old)
        assert weight.abs().max() <= 0.25


@pytest.mark.parametrize("way", ["copied", "pickled"])
def test_copies(way):
    model = pararnn.RNN(Clipped())
    if way == "copied":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    train_once(other, OPTIMIZERS["SGD"](other.parameters()))
    assert 0 < other.cell.gain.abs().max() <= 0.25


def test_other_optimisers_change_nothing():
    """One that has no weight of the layer leaves it as it is, also beyond its bound."""
    model, other = pararnn.RNN(Clipped()), nn.Linear(3, 3)
    with torch.no_grad():
        model.cell.gain.fill_(2.0)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model.cell.gain, torch.full((6,), 2.0))
    gone = len(pararnn.layers.constraints._layers)
    del model
    gc.collect()
    assert len(pararnn.layers.constraints._layers) < gone  # nothing is kept alive


def test_without_a_bound():
    layer = pararnn.ParaGRU(4, 6, max_recurrent_weight=None)
    train_once(layer, OPTIMIZERS["SGD"](layer.parameters()))
    assert layer.layers[0].cell.diagonal.abs().max() > 0.5
