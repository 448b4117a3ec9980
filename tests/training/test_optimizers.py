"""Muon, the mean of the weights and dropout: what they do, and runs that go on to the bit."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from pararnn.lm.models import ParaRNNConfig, ParaRNNForCausalLM
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training import report, train
from pararnn.lm.training.config import ArchitectureConfig, OptimizerConfig, TrainConfig
from pararnn.lm.training.optimizer import build_optimizer, named_state

DROPOUT = ArchitectureConfig(width=16, num_layers=1, num_heads=2, dropout=0.3)


@pytest.fixture(autouse=True)
def _short_report(monkeypatch):
    monkeypatch.setattr(report, "LARGEST_LOOP", 1)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 2)


def curve(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(record["loss"], record["grad_norm"]) for record in records]


def weights(folder, step):
    path = folder / "checkpoints" / f"step-{step:08d}"
    return ParaRNNForCausalLM.from_pretrained(path).state_dict()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"algorithm": "muon"}},
        {"optimizer": {"average_decay": 0.8}},
        {"architecture": DROPOUT},
    ],
    ids=["muon", "mean", "dropout"],
)
def test_runs_go_on_to_the_bit(make_config, changes):
    whole = make_config("whole", steps=7, **changes)
    train(whole)
    pieces = make_config("pieces", steps=4, **changes)
    train(pieces)
    train(dataclasses.replace(pieces, steps=7), resume=True)
    assert curve(pieces.out) == curve(whole.out)
    expected = weights(whole.out, 7)
    for name, value in weights(pieces.out, 7).items():
        assert torch.equal(value, expected[name]), name


def test_muon_learns(make_config):
    config = make_config(steps=25, optimizer={"algorithm": "muon"})
    train(config)
    losses = [loss for loss, _ in curve(config.out)]
    assert losses[-1] < 0.8 * losses[0]


def test_muon_takes_the_products_of_blocks():
    """Their updates have singular values of about one size; all others are AdamW's."""
    torch.manual_seed(0)
    shape = ParaRNNConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_heads=2)
    loss = CausalLoss(ParaRNNForCausalLM(shape))
    optimizer = build_optimizer(loss, OptimizerConfig(algorithm="muon", weight_decay=0.0))
    muon = {
        name.removeprefix("model.model.layers.")
        for name, p in loss.named_parameters()
        if "momentum_buffer" in optimizer.state[p]
    }
    parts = ("mixer.in_proj", "mixer.gate_proj", "mixer.out_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert muon == {f"{layer}.{part}.weight" for layer in (0, 1) for part in parts}
    assert {f"{n}.momentum_buffer" for n, p in loss.named_parameters()} & set(
        named_state(loss, optimizer)
    )
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    for p in loss.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for name, p in loss.named_parameters():
        assert p.grad is None
        moved = p.detach() - before[name]
        if name.removeprefix("model.model.layers.") in muon:
            values = torch.linalg.svdvals(moved)
            assert values.max() < 2.5 * values.min(), name
            size = moved.square().mean().sqrt().item()  # as AdamW's steps by their root mean square
            assert size == pytest.approx(0.2 * 3e-3, rel=0.35), name
        else:
            assert moved.abs().max() == pytest.approx(3e-3, rel=1e-2), name


def test_the_saved_model_is_the_mean(make_config):
    often = {"steps": 5, "checkpoint_every": 1, "keep_checkpoints": 9}
    plain = make_config("plain", **often)
    train(plain)
    averaged = make_config("averaged", optimizer={"average_decay": 0.5}, **often)
    train(averaged)
    assert curve(averaged.out) == curve(plain.out)
    mean = weights(plain.out, 0)
    for step in range(1, 6):
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in weights(plain.out, step).items():
            mean[name] = decay * mean[name] + (1 - decay) * value
        for name, value in weights(averaged.out, step).items():
            torch.testing.assert_close(value, mean[name], rtol=1e-5, atol=1e-7, msg=name)


def test_dropout_is_for_training_alone():
    torch.manual_seed(0)
    shape = ParaRNNConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_heads=2, dropout=0.5
    )
    model, tokens = ParaRNNForCausalLM(shape), torch.randint(0, 16, (2, 9))
    plain = ParaRNNForCausalLM(ParaRNNConfig(**{**shape.to_dict(), "dropout": 0.0}))
    plain.load_state_dict(model.state_dict())
    expected = plain.train()(tokens).logits
    assert torch.equal(model.eval()(tokens).logits, expected)
    first, second = (model.train()(tokens).logits for _ in range(2))
    assert not torch.equal(first, second)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert rates == [0.5, 0.5]
    with pytest.raises(ValueError, match="dropout is 1; give a number from 0 to below 1"):
        ParaRNNConfig(dropout=1)
    with pytest.raises(ValueError, match=r"architecture.dropout is 0.3; it must be 0 for mamba2"):
        TrainConfig(model="mamba2", architecture=ArchitectureConfig(dropout=0.3))
