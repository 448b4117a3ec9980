"""Validation while a run trains: what is measured, and that the best checkpoint stays."""

import dataclasses
import json

import pytest

from pararnn.lm.training import report, train, validation
from pararnn.lm.training.evaluation import Evaluation


@pytest.fixture(autouse=True)
def _short_report(monkeypatch):
    monkeypatch.setattr(report, "LARGEST_LOOP", 1)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 2)


@pytest.fixture
def pretend(monkeypatch):
    """Losses of validations, in their order."""

    def pretend(*losses):
        left = iter(losses)
        monkeypatch.setattr(
            validation, "evaluate_together", lambda *_, **__: Evaluation(next(left), 10)
        )

    return pretend


def validations(run):
    lines = (run / "validation.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def checkpoints(run):
    return sorted(path.name[-2:] for path in (run / "checkpoints").iterdir())


def test_the_best_checkpoint_is_kept(make_config, pretend, capsys):
    pretend(3.0, 0.5, 2.0, 1.0)
    config = make_config(steps=9, checkpoint_every=3, validate_every=2, keep_checkpoints=2)
    train(config)
    assert list(validations(config.out)) == [2, 4, 6, 8, 9]
    assert checkpoints(config.out) == ["04", "06", "09"]
    printed = capsys.readouterr().out
    assert "Best validation: 0.5000 nats at step 4, kept in " in printed


def test_a_resumed_run_knows_the_best(make_config, pretend):
    pretend(3.0, 0.5)
    config = make_config(steps=5, checkpoint_every=3, validate_every=2, keep_checkpoints=1)
    train(config)
    assert checkpoints(config.out) == ["04", "05"]
    pretend(2.0, 0.4)
    train(dataclasses.replace(config, steps=7), resume=True)
    assert checkpoints(config.out) == ["04", "07"]
    train(dataclasses.replace(config, steps=9), resume=True)
    assert checkpoints(config.out) == ["08", "09"]
    assert list(validations(config.out)) == [2, 4, 5, 6, 7, 8, 9]


def test_validation_changes_nothing(make_config):
    """Its figure is that of the report, and the curve is the same without."""
    configs = [make_config(f"every-{n}", steps=6, validate_every=n) for n in (0, 2)]
    results = [train(config) for config in configs]
    curves = [
        [
            (record["loss"], record["grad_norm"])
            for record in map(json.loads, (c.out / "metrics.jsonl").read_text().splitlines())
        ]
        for c in configs
    ]
    assert curves[0] == curves[1]
    assert results[0].validation == results[1].validation
    train(dataclasses.replace(configs[1], steps=7), resume=True)
    found = validations(configs[1].out)
    assert list(found) == [2, 4, 6, 7]
    shorter = make_config("shorter", steps=4)
    assert train(shorter).validation.loss == pytest.approx(found[4], rel=1e-5)


def test_the_mean_of_the_weights_is_validated(make_config):
    """And put aside again: the curve is the same."""
    averaged = {"average_decay": 0.9}
    configs = [
        make_config(name, steps=6, validate_every=every, optimizer=averaged)
        for name, every in (("whole", 0), ("validated", 3))
    ]
    results = [train(config) for config in configs]
    assert results[0].validation == results[1].validation
    shorter = make_config("shorter", steps=3, optimizer=averaged)
    expected = train(shorter).validation.loss
    assert validations(configs[1].out)[3] == pytest.approx(expected, rel=1e-5)
    plain = train(make_config("plain", steps=3)).validation.loss
    assert plain != pytest.approx(expected, rel=1e-4)
