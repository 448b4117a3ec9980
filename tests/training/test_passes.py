"""Steps that wait for nothing: results read late, data read ahead, memory that runs out."""

import json
import threading
import time
import types

import pytest
import torch

from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training import passes, report, train, trainer
from pararnn.lm.training.checkpoints import list_checkpoints
from pararnn.lm.training.config import ArchitectureConfig, ExecutionConfig
from pararnn.lm.training.data import Batches, ReadAhead, WindowOrder
from pararnn.lm.training.language_model import build_model
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.passes import Passes
from pararnn.lm.training.sharding import recomputes, start_compilers
from pararnn.lm.training.step import Measurement, train_step
from pararnn.lm.training.text import Codec
from pararnn.testing import assert_close

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short_report(monkeypatch):
    monkeypatch.setattr(report, "LARGEST_LOOP", 1)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 2)


def losses(folder):
    return [
        json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_step_is_read_once_the_next_one_is_started(make_config, monkeypatch):
    """But not later than a checkpoint, which must not hold what is not finite."""
    events = []
    read = Measurement.read

    def start(*args):
        events.append("start")
        return train_step(*args)

    def note(self):
        events.append("read")
        return read(self)

    monkeypatch.setattr(trainer, "train_step", start)
    monkeypatch.setattr(Measurement, "read", note)
    monkeypatch.setattr(trainer.Trainer, "save", lambda self: events.append("save"))
    with pytest.raises(Exception, match="no checkpoint"):
        train(make_config(steps=4, checkpoint_every=3))
    first = ["start", "start", "read", "start", "read", "read", "save"]
    assert events == ["read", "save", *first, "start", "read", "save"]  # a trial comes before


def test_a_step_does_not_wait_for_the_device(make_config, monkeypatch):
    """No number in a tensor is asked for while a step is started."""
    asked, here = [], threading.get_ident()

    def noting(name, method):
        def ask(tensor, *args):
            if threading.get_ident() == here:
                asked.append(name)
            return method(tensor, *args)

        return ask

    def watched(*args):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
                patch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
            return train_step(*args)

    monkeypatch.setattr(trainer, "train_step", watched)
    train(make_config(steps=2, execution=ExecutionConfig(activation_checkpointing="off")))
    assert asked == []


def test_every_step_has_its_own_time(make_config, monkeypatch):
    """Though the last one before a checkpoint is read at once after the one before it."""
    ends = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    clock = types.SimpleNamespace(perf_counter=lambda: next(ends))
    monkeypatch.setattr("pararnn.lm.training.moment.time", clock)
    config = make_config(steps=5, checkpoint_every=5)
    monkeypatch.setattr("pararnn.lm.training.runs.try_step", lambda *_: None)
    train(config)
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    speeds = [json.loads(line)["tokens_per_second"] for line in lines]
    assert speeds == [pytest.approx(3 * 24 / seconds) for seconds in (1, 2, 3, 4, 5)]


def test_the_next_step_is_read_while_one_is_computed():
    windows = [torch.full((3,), number) for number in range(12)]
    batches, read = Batches(windows, WindowOrder(12, 4, 0), 2), []
    of_step = batches.of_step
    expected = [of_step(step) for step in range(5)]
    batches.of_step = lambda step: read.append(step) or of_step(step)
    with ReadAhead(batches, CPU) as ahead:
        for step in (0, 1, 2):
            found = ahead.of_step(step)
            ahead._next[1].result()
            assert all(torch.equal(*pair) for pair in zip(found, expected[step], strict=True))
        assert read == [0, 1, 2, 3]
        found = ahead.of_step(1)
        assert all(torch.equal(*pair) for pair in zip(found, expected[1], strict=True))


def test_without_memory_activations_are_computed_again(make_config, monkeypatch, capsys):
    """The step is taken again, with the same random numbers; a resumed run goes on likewise."""
    shape = ArchitectureConfig(width=16, num_layers=2, num_heads=2, dropout=0.2)
    plain = ExecutionConfig(activation_checkpointing="on")
    train(make_config("whole", steps=4, architecture=shape, execution=plain))
    capsys.readouterr()
    calls = []

    def full(module, inputs):
        calls.append(module)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    build = trainer.Trainer.__post_init__

    def fill(self):
        build(self)
        self.model.model.model.layers[1].register_forward_pre_hook(full)

    monkeypatch.setattr(trainer.Trainer, "__post_init__", fill)
    config = make_config(steps=4, architecture=shape)
    train(config)
    assert "Memory ran out, so activation checkpointing is on from now" in capsys.readouterr().out
    assert losses(config.out) == losses(make_config("whole").out)
    newest = max((config.out / "checkpoints").glob("step-*"))
    assert json.loads((newest / "progress.json").read_text())["recomputes"]


def test_memory_that_runs_out_although_it_should_not(make_config, monkeypatch):
    def full(self, batches):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("pararnn.lm.training.passes.Passes._run", full)
    with pytest.raises(Exception, match=r"out of memory: CUDA .*Lower --text.batch-size"):
        train(make_config(execution=ExecutionConfig(activation_checkpointing="off")))


@pytest.mark.parametrize(
    ("asked", "count", "expected"),
    [("auto", 1, False), ("auto", 2, True), ("off", 2, False), ("on", 1, True)],
)
def test_what_training_begins_with(asked, count, expected):
    execution = ExecutionConfig(activation_checkpointing=asked)
    assert recomputes(execution, Processes(0, count, CPU)) == expected


def test_compilers_are_started_on_a_gpu_alone(monkeypatch):
    from torch._inductor import async_compile

    started = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: started.append("processes"))
    monkeypatch.setattr(
        async_compile.AsyncCompile, "use_process_pool", lambda: started.append("asked")
    )
    start_compilers(ExecutionConfig(compile=True), CPU)
    start_compilers(ExecutionConfig(), torch.device("cuda"))
    assert started == []
    start_compilers(ExecutionConfig(compile=True), torch.device("cuda"))
    assert started == ["processes", "asked"]


def test_a_checkpoint_is_written_before_a_graph_is_made(make_config, monkeypatch):
    """Its thread waits for the GPU, which is an error while it is tried whether passes do."""
    config, whole = make_config(steps=1), []

    class Settles:
        """A stand-in for `Replay`, which settles as that one does before a graph is made."""

        def __init__(self, *_):
            self.settle = None

        def __call__(self, run, batches, form):
            self.settle()
            whole.append([path.name for path in list_checkpoints(config.out / "checkpoints")])
            return run(batches)

    monkeypatch.setattr(passes, "replays", lambda *_: True)
    monkeypatch.setattr(passes, "Replay", Settles)
    save = trainer.CheckpointWriter._finish

    def slowly(*args):
        time.sleep(0.5)
        save(*args)

    monkeypatch.setattr(trainer.CheckpointWriter, "_finish", slowly)
    train(config)
    assert whole == [["step-00000000"]]


def test_passes_of_mixed_batches_have_one_form(make_config, monkeypatch):
    """Documents are separated in all batches of a step or in none, so there are two graphs."""
    forms = []

    class Notes:
        def __init__(self, *_):
            pass

        def __call__(self, run, batches, form):
            forms.append(form)
            return run(batches)

    config = make_config(model="transformer")
    model = CausalLoss(build_model(config, Codec()))
    plain, parted = torch.randint(1, 256, (2, 2, 12))
    parted[1, 5] = begin = model.model.config.bos_token_id
    early = plain.clone()
    early[:, 0] = early[:, -1] = begin  # nothing comes before the one, nothing after the other
    launched = Passes(config, model, Processes(0, 1, CPU))([plain, parted])
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    monkeypatch.setattr(passes, "replays", lambda *_: True)
    monkeypatch.setattr(passes, "Replay", Notes)
    run = Passes(config, model, Processes(0, 1, CPU))
    assert_close("losses", run([plain, parted]), launched, rtol=1e-6)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert_close("gradient", p.grad, gradient, rtol=1e-5)
    for batches in ([parted, plain], [parted, parted], [plain, early]):
        run(batches)
    assert forms == [(True, True)] * 3 + [(False, False)]
