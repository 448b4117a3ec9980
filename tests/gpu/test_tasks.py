"""Synthetic tasks on a CUDA device: samples against the solvers, training, models side by side."""

import gc
import os
import signal
import weakref

import pytest
import torch
from tasks.solvers import SOLVERS
from tasks.test_training import after, never, without_times

from pararnn.tasks import TASKS, draw
from pararnn.tasks.settings import SuiteConfig, settings_for
from pararnn.tasks.side_by_side import Stream, side_by_side
from pararnn.tasks.suite import run_suite
from pararnn.tasks.train_step import TrainStep
from pararnn.tasks.training import Training, Unit, finish
from pararnn.testing import assert_close

pytestmark = [
    pytest.mark.gpu,
    # the first product of a process may be one of a backward pass, in a thread of its own
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current"),
]
GPU = torch.device("cuda")


@pytest.mark.parametrize("name", TASKS)
def test_samples(name):
    task = TASKS[name]
    batch = draw(task, 50, 60, split="test", seed=0, device="cuda")
    assert batch.tokens.is_cuda
    for tokens, targets, counts in zip(*(part.tolist() for part in batch), strict=True):
        answers = {t: a for t, a in enumerate(targets) if counts[t]}
        assert answers == SOLVERS[name](task, tokens)


@pytest.mark.parametrize("architecture", ["paragru", "dense-gru", "m2rnn"])
def test_goes_on_to_the_bit(architecture, tmp_path):
    settings = settings_for("parity", "smoke", {"steps": 40})
    unit = Unit("parity", architecture, 0)
    whole = Training(unit, settings, tmp_path, GPU)
    expected = whole.run(never)
    (tmp_path / "result.json").unlink()
    assert Training(unit, settings, tmp_path, GPU).run(after(17)) is None
    again = Training(unit, settings, tmp_path, GPU)
    assert without_times(again.run(never)) == without_times(expected)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def suite(out, **changes):
    """Kernels of all kinds: elementwise, of programs that wait for each other, of tiles."""
    defaults = {
        "tasks": ("parity", "1-hop", "s3"),
        "architectures": ("paragru", "paralstm", "dense-gru", "block-gru", "m2rnn"),
        "seeds": 1,
        "preset": "smoke",
        "device": "cuda",
        "out": out,
    }
    return run_suite(SuiteConfig(**{**defaults, **changes}))


def test_side_by_side_gives_the_same(tmp_path):
    """To the bit: losses and validations of all steps, and tests."""
    alone = suite(tmp_path / "alone", side_by_side=1)
    together = suite(tmp_path / "together", side_by_side=7)
    assert alone.failed == together.failed == {}
    assert len(together.results) == 15
    for one, other in zip(alone.results, together.results, strict=True):
        assert without_times(one) == without_times(other)


def test_models_that_take_turns(tmp_path):
    """Weights beyond a multiprocessor: programs that wait for each other, of three models."""
    settings = settings_for("s3", "smoke", {"width": 256, "steps": 40})
    trainings = {}

    def start(unit, place):
        folder = tmp_path / place / str(unit)
        folder.mkdir(parents=True)
        training = trainings[place, unit] = Training(unit, settings, folder, GPU)
        return training.pieces(never)

    units = [Unit("s3", "layer-norm-lstm", seed) for seed in range(3)]
    alone = {u: finish(start(u, "alone")) for u in units}
    lanes = [Stream(GPU, i) for i in range(len(units))]
    for unit, result, error in side_by_side(units, lambda u: start(u, "beside"), lanes, never):
        assert error is None
        assert without_times(result) == without_times(alone[unit])
    assert all(training.step.graph.takes_turns for training in trainings.values())


@pytest.mark.filterwarnings("ignore:.*determinis")
def test_side_by_side_with_attention(tmp_path):
    """Whose backward pass adds up in any order."""
    result = suite(tmp_path, architectures=("paragru", "transformer", "paragru+attention"))
    assert result.failed == {}
    assert len(result.results) == 9
    assert {r["device"] for r in result.results} == {torch.cuda.get_device_name()}


def test_a_signal_stops_all_and_they_go_on(tmp_path, monkeypatch):
    expected = suite(tmp_path / "whole", seeds=2, tasks=("parity",))
    advance, steps = Training.advance, []

    def interrupting(self):
        steps.append(self.unit)
        if len(steps) == 60:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    monkeypatch.setattr(Training, "advance", interrupting)
    stopped = suite(tmp_path / "stopped", seeds=2, tasks=("parity",), side_by_side=4)
    assert stopped.stopped_by == signal.SIGINT
    assert len(list(tmp_path.glob("stopped/models/*/checkpoint.pt"))) == 4
    monkeypatch.setattr(Training, "advance", advance)
    again = suite(tmp_path / "stopped", seeds=2, tasks=("parity",), side_by_side=10)
    for one, other in zip(again.results, expected.results, strict=True):
        assert without_times(one) == without_times(other)


def test_without_memory_there_are_fewer(tmp_path, monkeypatch, capsys):
    """Also while others are in the middle of a step; nothing is left of any model."""
    advance, asked, alive = Training.advance, [], weakref.WeakSet()

    def greedy(self):
        alive.add(self)
        loss = advance(self)
        if self.unit.architecture == "dense-gru" and self.progress.step == 9 and not asked:
            asked.append(True)
            torch.empty(1 << 45, device="cuda")
        return loss

    monkeypatch.setattr(Training, "advance", greedy)
    result = suite(tmp_path, tasks=("parity",), side_by_side=4)
    assert result.failed == {}
    assert len(result.results) == 5
    assert "The GPU has no memory for 4 models at once" in capsys.readouterr().out
    gc.collect()
    assert len(alive) == 0


@pytest.mark.parametrize(
    ("task", "preset", "architecture"),
    [("1-hop", "smoke", name) for name in ("paragru", "dense-gru", "m2rnn", "transformer")]
    # cuDNN steps are faster where they are captured, and only there: none warmed up
    + [("s5-swaps", "full", "dense-gru")],
)
@pytest.mark.filterwarnings("ignore:Memory Efficient attention")
def test_steps_of_a_graph_are_those_of_pytorch(task, preset, architecture, tmp_path, monkeypatch):
    """Losses and parameters of 20 steps, captured and launched one by one; nothing is left out."""
    settings = settings_for(task, preset, {"steps": 20, "decay_steps": 10})
    losses, models = [], []
    for captured in (True, False):
        training = Training(Unit(task, architecture, 0), settings, tmp_path, GPU)
        if not captured:
            monkeypatch.setattr(TrainStep, "_capture", lambda self, batch: None)
        losses.append([training.advance().item() for _ in range(20)])
        assert (training.step.graph is not None) == captured
        models.append(training.model.state_dict())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    for name, value in models[1].items():
        assert_close(name, models[0][name], value, rtol=1e-3)
