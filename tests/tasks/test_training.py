"""Training of one model: it learns, is the same after a stop, and ends as it says."""

import dataclasses
import itertools
import json
import math

import pytest
import torch

from pararnn.lm.training import RunError
from pararnn.tasks import TASKS, draw, score, train_step
from pararnn.tasks.settings import settings_for
from pararnn.tasks.training import Samples, Training, Unit, finish, learning_rate, train_unit

CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")


def smoke(task, **changes):
    return settings_for(task, "smoke", changes)


def never():
    return False


def after(calls):
    """Stops at one of the questions."""
    counter = itertools.count(1)
    return lambda: next(counter) == calls


def without_times(result):
    return {k: v for k, v in result.items() if not k.endswith("seconds")}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains(task, tmp_path):
    """A few samples are soon known by heart; the result has all that is promised."""
    settings = smoke(task, train_samples=8, batch_size=8, learning_rate=0.02, steps=60)
    settings = dataclasses.replace(settings, schedule="cosine", evaluate_every=60)
    training = Training(Unit(task, "paragru", 0), settings, tmp_path, CPU)
    first = training.advance().item()
    result = training.run(never)
    assert result["history"][-1]["loss"] < 0.7 * first
    assert list(result["tests"]) == ["20", "40", "80", "320"]
    for test in result["tests"].values():
        assert 0 <= test["sequence_accuracy"] <= test["accuracy"] <= 1
        assert 0 < test["constant_answer"] < 1
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("architecture", "stops"),
    [
        ("paragru", (1,)),
        ("paragru", (17, 40)),
        ("paragru", (46,)),
        ("transformer", (30,)),
        ("m2rnn", (33,)),
    ],
)
def test_goes_on_to_the_bit(architecture, stops, tmp_path):
    """Stopped between evaluations, at one, and while the rate falls after the task was learnt."""
    settings = smoke("parity", length=6, steps=70, learning_rate=0.02, evaluate_every=10)
    settings = dataclasses.replace(settings, decay_steps=25)
    unit = Unit("parity", architecture, 3)
    whole = Training(unit, settings, tmp_path, CPU)
    expected = whole.run(never)
    (tmp_path / "result.json").unlink()
    done = 0
    for stop in stops:
        assert Training(unit, settings, tmp_path, CPU).run(after(stop - done)) is None
        done = stop
    again = Training(unit, settings, tmp_path, CPU)
    result = again.run(never)
    assert without_times(result) == without_times(expected)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name
    assert result["train_seconds"] > 0


@pytest.mark.parametrize("schedule", ["solved", "cosine"])
def test_ends_when_it_is_learnt(schedule, tmp_path):
    settings = smoke("parity", length=6, steps=2000, learning_rate=0.02, evaluate_every=20)
    settings = dataclasses.replace(settings, schedule=schedule)
    result = finish(train_unit(Unit("parity", "paragru", 0), settings, tmp_path, CPU, never))
    assert result["ended"] == "learnt"
    assert result["tests"]["6"]["accuracy"] == result["tests"]["96"]["accuracy"] == 1.0
    learnt = next(h["step"] for h in result["history"][1:] if h["accuracy"] >= 0.9999)
    assert result["steps"] <= learnt + 3 * 20 + settings.decay_steps
    assert finish(train_unit(Unit("parity", "paragru", 0), settings, tmp_path, CPU, None)) == result


def test_a_loss_that_is_not_finite_ends_it(tmp_path):
    settings = smoke("s3")
    training = Training(Unit("s3", "elman", 0), settings, tmp_path, CPU)
    with torch.no_grad():
        next(training.model.parameters()).fill_(math.nan)
    result = training.run(never)
    assert result["ended"] == "loss not finite"
    assert result["steps"] == settings.evaluate_every


def test_batches_depend_on_seed_and_step_alone():
    settings = smoke("1-hop")
    samples = Samples(TASKS["1-hop"], settings, 0, CPU)
    batches = [samples.of_step(step).tokens for step in range(120)]
    for step in (119, 3, 50, 49):
        assert torch.equal(samples.of_step(step).tokens, batches[step])
    assert len({tuple(row) for batch in batches for row in batch.tolist()}) > 0.99 * 120 * 32
    other = Samples(TASKS["1-hop"], settings, 1, CPU)
    assert not torch.equal(other.of_step(0).tokens, batches[0])


def test_epochs_over_a_fixed_set():
    settings = smoke("1-hop", train_samples=70)
    samples = Samples(TASKS["1-hop"], settings, 0, CPU)
    epochs = [
        [tuple(row) for step in (2 * e, 2 * e + 1) for row in samples.of_step(step).tokens.tolist()]
        for e in range(3)
    ]
    every = set(map(tuple, samples._held.tokens.tolist()))
    assert len(every) == 70
    for epoch in epochs:
        assert len(set(epoch)) == 64
        assert set(epoch) <= every
    assert epochs[0] != epochs[1]


def test_training_never_sees_a_test():
    """The samples that are tested are in the test split, those of training are not."""
    settings = smoke("parity", length=10)
    samples = Samples(TASKS["parity"], settings, 0, CPU)
    seen = {tuple(row) for step in range(60) for row in samples.of_step(step).tokens.tolist()}
    for split in ("test", "validation"):
        held = draw(TASKS["parity"], 200, 10, split=split, seed=0, device="cpu").tokens
        assert not seen & set(map(tuple, held.tolist()))


def test_rates():
    solved = dataclasses.replace(smoke("parity", steps=100), warmup_steps=10, decay_steps=20)
    rate = solved.learning_rate
    found = [learning_rate(solved, step, None) / rate for step in range(100)]
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10:81] == pytest.approx([1.0] * 71)
    assert found[90] == pytest.approx(0.5)
    assert learning_rate(solved, 40, 30) == pytest.approx(0.5 * rate)
    assert learning_rate(solved, 90, 85) == pytest.approx(0.5 * rate)  # it must end at the end
    cosine = dataclasses.replace(solved, schedule="cosine")
    assert learning_rate(cosine, 50, None) == pytest.approx(0.5 * rate)
    assert learning_rate(cosine, 50, 40) == pytest.approx(0.25 * rate)
    assert learning_rate(cosine, 60, 40) == 0.0
    assert learning_rate(cosine, 99, None) > 0.0


def test_other_settings_are_refused(tmp_path):
    unit, settings = Unit("parity", "paragru", 0), smoke("parity", steps=3, test_samples=8)
    Training(unit, settings, tmp_path, CPU).run(after(2))
    other = dataclasses.replace(settings, learning_rate=0.5)
    with pytest.raises(RunError, match=r"made with learning_rate 0\.005, but now it is 0\.5"):
        finish(train_unit(unit, other, tmp_path, CPU, never))
    finish(train_unit(unit, settings, tmp_path, CPU, never))
    with pytest.raises(RunError, match="name another folder with --out"):
        finish(train_unit(unit, other, tmp_path, CPU, never))
    with pytest.raises(RunError, match="with architecture paragru, but now it is elman"):
        finish(train_unit(Unit("parity", "elman", 0), settings, tmp_path, CPU, never))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"task": "parity"', b'{"a": 1}'])
def test_damaged_results(content, tmp_path):
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(RunError, match=r"result\.json"):
        finish(train_unit(Unit("parity", "paragru", 0), smoke("parity"), tmp_path, CPU, never))


def test_damaged_checkpoint(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(RunError, match="delete it, and the model is trained from the start"):
        finish(train_unit(Unit("parity", "paragru", 0), smoke("parity"), tmp_path, CPU, never))


def test_evaluation_is_the_score_of_the_model(tmp_path):
    """In several passes as in one."""
    settings = smoke("1-hop")
    training = Training(Unit("1-hop", "paragru", 0), settings, tmp_path, CPU)
    found, always = finish(training._score("test", 20, 64))
    batch = draw(TASKS["1-hop"], 64, 20, split="test", seed=0, device="cpu")
    with torch.no_grad():
        expected = score(training.model(batch.tokens).argmax(-1), batch)
    assert found == expected
    assert 0.1 < always < 0.2
    long, _ = finish(training._score("test", 5000, 60))
    assert long.sequences == 60


def test_what_comes_before_a_capture_leaves_nothing_behind(tmp_path, monkeypatch):
    """Two runs of the step at a rate of 0: parameters and optimizer are as without them."""

    class Replay:
        def __init__(self, run):
            self.run = run
            run(), run()

        def __call__(self):
            self.kept = self.run()

    monkeypatch.setattr(train_step, "captured", Replay)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    settings, unit = smoke("parity"), Unit("parity", "paragru", 0)
    plain, other = (Training(unit, settings, tmp_path, CPU) for _ in range(2))
    other.step._on_gpu = True
    for number in range(12):
        if number == 6:  # as in another process
            plain._save()
            other = Training(unit, settings, tmp_path, CPU)
            other._load()
            other.step._on_gpu = True
        assert plain.advance().item() == other.advance().item()
    assert other.step.graph is not None
    for name, value in plain.model.state_dict().items():
        assert torch.equal(other.model.state_dict()[name], value), name


@pytest.mark.parametrize("error", [RuntimeError("not here"), torch.OutOfMemoryError("too much")])
def test_a_step_that_cannot_be_captured(error, tmp_path, monkeypatch, capsys):
    """It is launched piece by piece; but not where memory is what is missing."""

    def refuse(run):
        run()
        raise error

    monkeypatch.setattr(train_step, "captured", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    settings, unit = smoke("parity"), Unit("parity", "paragru", 0)
    plain, other = (Training(unit, settings, tmp_path, CPU) for _ in range(2))
    other.step._on_gpu = True
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError, match="too much"):
            other.advance()
        return
    for _ in range(3):
        assert plain.advance().item() == other.advance().item()
    assert other.step.graph is None
    assert "steps are not captured in a CUDA graph, and slower: not here" in capsys.readouterr().out
