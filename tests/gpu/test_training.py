"""Train steps on a GPU: nothing waits for it, and memory that runs out."""

import itertools
import json

import pytest
import torch
from training.conftest import sentences

from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training import report, train
from pararnn.lm.training.config import (
    ArchitectureConfig,
    ExecutionConfig,
    OptimizerConfig,
    ScheduleConfig,
    TextConfig,
    TrainConfig,
)
from pararnn.lm.training.data import Batches, ReadAhead, WindowOrder
from pararnn.lm.training.language_model import build_model
from pararnn.lm.training.optimizer import build_optimizer
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.replay import Replay
from pararnn.lm.training.sharding import lay_out
from pararnn.lm.training.step import train_step
from pararnn.lm.training.text import Codec

pytestmark = pytest.mark.gpu


@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("model", "least"), [("paragru", 0), ("transformer", 0), ("transformer", 1)]
)
def test_a_train_step_never_waits_for_the_gpu(model, least, compiled):
    """Also where documents are separated: token 0 begins one."""
    here = Processes(0, 1, torch.device("cuda"))
    settings = OptimizerConfig(precision="bfloat16")
    shape = ArchitectureConfig(width=64, num_layers=2, num_heads=2)
    config = TrainConfig(model=model, architecture=shape, optimizer=settings)
    loss = CausalLoss(build_model(config, Codec()), 1e-4)
    lay_out(loss, ExecutionConfig(activation_checkpointing="off", compile=compiled), here)
    optimizer = build_optimizer(loss.model, settings)
    windows = [torch.randint(least, 256, (129,)) for _ in range(32)]
    measured = []
    with ReadAhead(Batches(windows, WindowOrder(32, 8, 0), 4), here.device) as data:
        for step in range(4):
            batches = data.of_step(step)
            assert all(batch.is_pinned() for batch in batches)
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            try:
                measured.append(train_step(loss, optimizer, batches, settings, here))
            finally:
                torch.cuda.set_sync_debug_mode("default")
    results = [step.read() for step in measured]
    assert all(result.is_finite for result in results)
    assert all(0 < b.end.seconds_since(a.end) < 60 for a, b in itertools.pairwise(measured))


@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
@pytest.mark.parametrize(
    ("model", "shape", "text"),
    [
        ("paragru", {"dropout": 0.1}, {}),
        ("paragru+delta", {}, {"carry_state": True}),
        ("mgu+attention", {}, {"global_batch_size": 8}),
        ("transformer", {}, {"global_batch_size": 8}),
    ],
)
def test_a_replayed_run_is_that_of_launched_kernels(tmp_path, monkeypatch, model, shape, text):
    """A run goes on from a checkpoint to the bit, though every process makes its own graph."""
    monkeypatch.setattr(report, "LARGEST_LOOP", 1)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 2)
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / f"text/{number}.txt").write_text(sentences(number, 2000))

    def config(name, steps=6):
        return TrainConfig(
            data=tmp_path / "text",
            out=tmp_path / name,
            model=model,
            steps=steps,
            checkpoint_every=3,
            device="cuda",
            architecture=ArchitectureConfig(width=64, num_layers=2, num_heads=2, **shape),
            text=TextConfig(sequence_length=128, batch_size=4, validation_tokens=2000, **text),
            optimizer=OptimizerConfig(precision="bfloat16"),
            schedule=ScheduleConfig(length=6),
            execution=ExecutionConfig(compile=True),
        )

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    recorded = []
    record = Replay._record

    def noting(self, *args):
        found = record(self, *args)
        recorded.append(self.reason)
        return found

    monkeypatch.setattr(Replay, "_record", noting)
    train(config("whole"))
    assert recorded
    assert set(recorded) == {None}
    train(config("parts", 3))
    train(config("parts"), resume=True)
    assert losses("parts") == losses("whole")
    if not shape:  # random numbers of a graph are others
        monkeypatch.setattr(Replay, "__call__", lambda _, run, batches, form=None: run(batches))
        train(config("launched"))
        assert losses("whole") == pytest.approx(losses("launched"), rel=1e-3)


def test_memory_that_runs_out_turns_checkpointing_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "LARGEST_LOOP", 1)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 2)
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / f"text/{number}.txt").write_text(sentences(number, 20_000))
    curves = []
    total = torch.cuda.get_device_properties(0).total_memory
    for name, limit in (("enough", total), ("little", 6 * 2**30)):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
        config = TrainConfig(
            data=tmp_path / "text",
            out=tmp_path / name,
            steps=2,
            device="cuda",
            architecture=ArchitectureConfig(width=512, num_layers=8),
            text=TextConfig(sequence_length=1024, batch_size=32, validation_tokens=2000),
        )
        try:
            train(config)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        said = "Memory ran out, so activation checkpointing is on" in capsys.readouterr().out
        assert said == (name == "little")
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
