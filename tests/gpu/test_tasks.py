"""Synthetic tasks on a CUDA device: samples against the solvers, training, models side by side."""

import pytest
import torch
from tasks.solvers import SOLVERS
from tasks.test_training import after, never, without_times

from pararnn.tasks import TASKS, draw
from pararnn.tasks.settings import SuiteConfig, settings_for
from pararnn.tasks.suite import run_suite
from pararnn.tasks.train_step import TrainStep
from pararnn.tasks.training import Training, Unit
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


def test_side_by_side(tmp_path):
    """Each process has a context of its own on the device."""
    config = SuiteConfig(
        tasks=("parity", "1-hop", "s3"),
        architectures=("paragru", "transformer"),
        seeds=1,
        preset="smoke",
        device="cuda",
        processes=3,
        out=tmp_path,
    )
    result = run_suite(config)
    assert result.failed == {}
    assert len(result.results) == 6
    assert {r["device"] for r in result.results} == {torch.cuda.get_device_name()}


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
