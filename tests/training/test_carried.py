"""The state that goes on from sequence to sequence."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from pararnn.lm.models import ParaRNNConfig, ParaRNNForCausalLM
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training import RunError, report, train
from pararnn.lm.training.carried import CarriedState
from pararnn.lm.training.comparison import step_by_step
from pararnn.lm.training.config import (
    ArchitectureConfig,
    OptimizerConfig,
    TextConfig,
    TrainConfig,
)
from pararnn.lm.training.data import StreamOrder
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.step import add_gradients

HERE = Processes(0, 1, torch.device("cpu"))
SETTINGS = OptimizerConfig()


@pytest.fixture(autouse=True)
def _short_report(monkeypatch):
    monkeypatch.setattr(report, "LARGEST_LOOP", 1)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 2)


def make_loss(cell):
    torch.manual_seed(0)
    shape = ParaRNNConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_heads=2, cell=cell, bos_token_id=0
    )
    model = ParaRNNForCausalLM(shape).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return CausalLoss(model)


def text(rows, time):
    """Tokens with some documents that begin on the way."""
    tokens = torch.randint(1, 11, (rows, time))
    return tokens.where(torch.rand(rows, time) > 0.1, 0)


@pytest.mark.parametrize("cell", ["paragru", "paralstm"])
def test_sequences_with_the_state_between_are_one_long_sequence(cell):
    loss = make_loss(cell)
    tokens = text(4, 25)
    resets = tokens[:, :-1] == 0
    with torch.no_grad():
        (whole, *_) = loss(tokens[:, :-1], tokens[:, 1:], resets)
    carried = CarriedState(loss, 4, HERE, half=False)
    found = []
    for start in (0, 8, 16):
        caches = carried.caches(2)  # two passes of two rows
        batches = list(tokens[:, start : start + 9].split(2))
        found.append(add_gradients(loss, batches, SETTINGS, HERE, caches)[0].item())
        carried.go_on(caches)
        assert not any(t.requires_grad for layer in carried._layers for t in _all(layer))
    assert sum(found) / 3 == pytest.approx(whole.item(), rel=1e-12)


def _all(layer):
    found = []
    layer.map(lambda tensor: found.append(tensor) or tensor)
    return found


def test_gradients_are_those_of_a_loop_that_stops_at_the_sequence():
    """Truncated backpropagation through time, against the recurrence step by step."""
    loss = make_loss("paragru")
    loop = CausalLoss(step_by_step(loss.model))
    tokens = text(3, 17)
    for model in (loss, loop):
        carried = CarriedState(model, 3, HERE, half=False)
        for start in (0, 8):
            caches = carried.caches(1)
            add_gradients(model, [tokens[:, start : start + 9]], SETTINGS, HERE, caches)
            carried.go_on(caches)
    pairs = zip(loss.named_parameters(), loop.parameters(), strict=True)
    for (name, p), q in pairs:
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)
        assert p.grad.abs().sum() > 0, name


def carried_config(make_config, name, **changes):
    text = TextConfig(sequence_length=24, batch_size=3, validation_tokens=500, carry_state=True)
    shape = ArchitectureConfig(width=16, num_layers=2, num_heads=2, dropout=0.1)
    return make_config(name, text=text, architecture=shape, **changes)


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[name] for name in ("loss", "grad_norm")] for line in lines]


def test_resumed_to_the_bit(make_config):
    whole = carried_config(make_config, "whole", steps=7)
    train(whole)
    pieces = carried_config(make_config, "pieces", steps=4)
    train(pieces)
    train(dataclasses.replace(pieces, steps=7), resume=True)
    assert metrics(pieces.out) == metrics(whole.out)
    without = make_config("without", steps=7, architecture=whole.architecture)
    train(without)
    assert metrics(without.out) != metrics(whole.out)


def test_rows_read_on_and_cover_the_text():
    order = StreamOrder(23, 4, seed=1)
    assert order.length == 5
    steps = np.array([order.of_step(step) for step in range(10)])
    assert [step for step in range(10) if order.begins(step)] == [0, 5]
    for epoch in (steps[:5], steps[5:]):
        assert (np.diff(epoch, axis=0) % 23 == 1).all()
        assert len(np.unique(epoch)) == 20
    assert steps[0, 0] != steps[5, 0]
    with pytest.raises(
        RunError, match=r"has 3 sequences, but with --text.carry-state each of the 4"
    ):
        StreamOrder(3, 4, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "transformer"}, "transformer hands on none"),
        (
            {"architecture": ArchitectureConfig(attention_every=2)},
            "paragru has blocks of attention",
        ),
    ],
)
def test_without_a_state_of_fixed_size_nothing_is_carried(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(text=TextConfig(carry_state=True), **changes)


def test_memory_that_runs_out_leaves_the_state_as_it_was(monkeypatch):
    """The step is taken again from it."""
    loss = make_loss("paragru")
    carried = CarriedState(loss, 2, HERE, half=False)
    caches = carried.caches(1)
    add_gradients(loss, [text(2, 9)], SETTINGS, HERE, caches)
    joined, cat = [], torch.cat

    def runs_out(parts):
        joined.append(parts)
        if len(joined) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return cat(parts)

    monkeypatch.setattr(torch, "cat", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        carried.go_on(caches)
    assert not any(tensor.any() for tensor in carried.tensors())
