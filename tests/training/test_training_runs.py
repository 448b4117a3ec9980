"""Whole runs in this process: they learn, stop, resume to the bit, and survive trouble."""

import dataclasses
import errno
import json
import math
import os
import signal

import pytest
import torch
from transformers import PreTrainedModel

from pararnn.cli.main import main
from pararnn.lm.catalogue import BASELINES, architectures
from pararnn.lm.models import ParaRNNForCausalLM
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.models.flops import train_flops_per_token
from pararnn.lm.training import RunError, RunFolder, metrics, report, runs, saving, train, trainer
from pararnn.lm.training.checkpoints import CheckpointError, complete
from pararnn.lm.training.config import (
    ArchitectureConfig,
    ExecutionConfig,
    OptimizerConfig,
    ScheduleConfig,
    TextConfig,
)
from pararnn.lm.training.language_model import build_model
from pararnn.lm.training.optimizer import build_optimizer
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.step import train_step
from pararnn.lm.training.text import Codec

HERE = Processes(0, 1, torch.device("cpu"))
MEASURED = ("step", "loss", "z_loss", "bits_per_byte", "grad_norm", "learning_rate")
LOOP, SAMPLE = report.LARGEST_LOOP, report.SAMPLE_TOKENS


@pytest.fixture(autouse=True)
def _short_report(monkeypatch):
    """A report takes longer than the run before it."""
    monkeypatch.setattr(report, "LARGEST_LOOP", 1)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 2)


def curve(folder):
    """Everything in metrics.jsonl but the speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: json.loads(line)[name] for name in MEASURED} for line in lines]


def weights(folder):
    newest = max((folder / "checkpoints").glob("step-*"))
    return ParaRNNForCausalLM.from_pretrained(newest).state_dict()


def test_thirty_steps_lower_the_loss(make_config, monkeypatch, capsys):
    monkeypatch.setattr(report, "LARGEST_LOOP", LOOP)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", SAMPLE)
    config = make_config(steps=30)
    result = train(config)
    losses = [record["loss"] for record in curve(config.out)]
    assert len(losses) == 30
    assert sum(losses[-5:]) / 5 < 0.7 * losses[0]
    assert result.step == 30
    assert result.validation.loss < 0.8 * losses[0]
    printed = capsys.readouterr().out
    for part in (
        "Text: ",
        "Model: paragru, ",
        "held out",
        "bits per byte",
        "run step by step: ",
        "times as long",
        "Plot: ",
        "Sample:\n",
    ):
        assert part in printed
    names = {path.name for path in config.out.iterdir()}
    assert names == {
        ".lock",
        "checkpoints",
        "config.json",
        "data",
        "env.txt",
        "loss.png",
        "metrics.jsonl",
        "sample.txt",
        "tensorboard",
        "validation.jsonl",
    }
    stored = json.loads((config.out / "config.json").read_text())
    assert stored["steps"] == 30
    assert stored["schedule"]["length"] == 40
    validation = json.loads((config.out / "validation.jsonl").read_text())
    assert validation["loss"] == result.validation.loss


@pytest.mark.parametrize("model", ["paragru", "paralstm"])
def test_resumed_run_equals_an_uninterrupted_one(make_config, model):
    whole = make_config("whole", steps=9, model=model)
    train(whole)
    pieces = make_config("pieces", steps=4, model=model)
    for steps in (4, 7, 9):
        train(dataclasses.replace(pieces, steps=steps), resume=steps > 4)
    assert curve(pieces.out) == curve(whole.out)
    expected = weights(whole.out)
    for name, value in weights(pieces.out).items():
        assert torch.equal(value, expected[name]), name
    lines = (pieces.out / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 7, 9]


def test_damaged_checkpoint_is_passed_over_and_the_curve_is_the_same(make_config, capsys):
    whole = make_config("whole")
    train(whole)
    broken = make_config("broken", steps=6)
    train(broken)
    (broken.out / "checkpoints/step-00000006/model.safetensors").write_bytes(b"rubbish")
    train(dataclasses.replace(broken, steps=8), resume=True)
    printed = capsys.readouterr().out
    assert "Set aside: step-00000006/model.safetensors is damaged" in printed
    assert "Resumed at step 3" in printed
    assert curve(broken.out) == curve(whole.out)


class _Interrupt:
    """Raises a signal in the middle of the given step."""

    def __init__(self, monkeypatch, step, number):
        self.calls, self.step, self.number = 0, step, number
        monkeypatch.setattr(trainer, "train_step", self)

    def __call__(self, *args):
        self.calls += 1
        if self.calls == self.step:
            os.kill(os.getpid(), self.number)
        return train_step(*args)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(make_config, monkeypatch, capsys, number):
    whole = make_config("whole")
    train(whole)
    config = make_config()
    with monkeypatch.context() as patch:
        _Interrupt(patch, 5, number)
        result = train(config)
    assert (result.stopped_by, result.step, result.validation) == (number, 5, None)
    message = f"{number.name} at step 5: checkpoint saved. Continue with: pararnn train --resume"
    assert f"{message} --out {config.out}" in capsys.readouterr().out
    train(config, resume=True)
    assert curve(config.out) == curve(whole.out)


def test_a_loss_that_is_not_finite_stops_the_run(make_config, monkeypatch):
    calls = []

    def spoil(model, *others):
        calls.append(model)
        if len(calls) == 2:
            model.model.model.norm.weight.register_hook(lambda grad: grad * math.nan)
        return train_step(model, *others)

    monkeypatch.setattr(trainer, "train_step", spoil)
    config = make_config()
    message = r"step 2 gave loss \d.* norm nan, first in model.norm.weight; .*lower --optimizer"
    with pytest.raises(RunError, match=message):
        train(config)
    assert [record["step"] for record in curve(config.out)] == [1]
    assert [p.name for p in (config.out / "checkpoints").iterdir()] == ["step-00000000"]


def test_full_disk_keeps_the_last_good_checkpoint(make_config, monkeypatch, capsys):
    whole = make_config("whole")
    train(whole)
    config = make_config()
    save, calls = PreTrainedModel.save_pretrained, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(CheckpointError) as caught:
            train(config)
    message = str(caught.value)
    assert "cannot save a checkpoint at step 6: [Errno 28] No space left on device" in message
    assert "Last good checkpoint: step-00000003. Continue with: pararnn train --resume" in message
    train(config, resume=True)
    assert curve(config.out) == curve(whole.out)


def test_killed_while_it_saves_a_run_resumes_from_the_last_whole_checkpoint(
    make_config, monkeypatch, capsys
):
    whole = make_config("whole")
    train(whole)
    config = make_config()

    def die(folder, step, run):
        if step == 6:
            raise KeyboardInterrupt
        return complete(folder, step, run)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "complete", die)
        patch.setattr(saving.shutil, "rmtree", lambda *args, **options: None)
        with pytest.raises(CheckpointError):
            train(config)
    half = config.out / "checkpoints/.saving-step-00000006"
    assert (half / "model.safetensors").exists()
    train(config, resume=True)
    assert "Resumed at step 3" in capsys.readouterr().out
    assert curve(config.out) == curve(whole.out)
    assert not half.exists()


def test_utilisation_is_noted_where_the_peak_is_known(make_config, monkeypatch):
    monkeypatch.setattr(trainer, "peak_flops", lambda device: 1e12)
    config = make_config(steps=1)
    train(config)
    record = json.loads((config.out / "metrics.jsonl").read_text())
    flops = train_flops_per_token(build_model(config, Codec()), config.text.sequence_length)
    assert record["mfu"] == pytest.approx(flops * record["tokens_per_second"] / 1e12)


def test_full_disk_while_measuring(make_config, monkeypatch):
    def full(self, record):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics.MetricsFile, "write", full)
    with pytest.raises(RunError, match=r"cannot write to .*: No space left on device. Make room"):
        train(make_config())


def test_killed_before_the_first_checkpoint(make_config, monkeypatch, capsys):
    config = make_config()

    def die(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "save", die)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    train(config, resume=True)
    assert "No checkpoint was saved yet; starting from step 0" in capsys.readouterr().out
    assert len(curve(config.out)) == 8


def test_accumulated_batches_are_one_large_batch(make_config):
    config = make_config(optimizer={"max_grad_norm": 0.0})
    batch = torch.randint(1, 256, (4, 9))
    norms, updated = [], []
    for batches in ([batch], list(batch.split(1))):
        model = CausalLoss(build_model(config, Codec()), config.optimizer.z_loss_weight)
        optimizer = build_optimizer(model, config.optimizer)
        norms.append(train_step(model, optimizer, batches, config.optimizer, HERE).read())
        updated.append(model.model.lm_head.weight.detach().clone())
    assert norms[0].loss == pytest.approx(norms[1].loss, rel=1e-5)
    assert norms[0].grad_norm == pytest.approx(norms[1].grad_norm, rel=1e-4)


def test_gradients_are_clipped_and_weights_projected(make_config):
    config = make_config(optimizer={"max_grad_norm": 1e-3})
    model = CausalLoss(build_model(config, Codec()), config.optimizer.z_loss_weight)
    optimizer = build_optimizer(model, config.optimizer)
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(sum(p.grad.square().sum() for p in model.parameters()).sqrt())
    )
    cell = model.model.model.layers[0].mixer.rnn.cell
    with torch.no_grad():
        cell.diagonal.fill_(0.7)
    batch = torch.randint(1, 256, (2, 9))
    result = train_step(model, optimizer, [batch], config.optimizer, HERE).read()
    assert result.grad_norm > 1e-3
    assert seen[0].item() == pytest.approx(1e-3, rel=1e-3)
    assert cell.diagonal.abs().max() <= 0.5


def test_bfloat16_learns(make_config):
    config = make_config(steps=12, optimizer={"precision": "bfloat16"})
    train(config)
    losses = [record["loss"] for record in curve(config.out)]
    assert losses[-1] < losses[0]
    assert weights(config.out)["lm_head.weight"].dtype == torch.float32


@pytest.mark.parametrize("model", architectures())
def test_every_architecture_trains_under_the_same_command(make_config, monkeypatch, capsys, model):
    config = make_config(steps=2, model=model)
    with monkeypatch.context() as patch:
        patch.setattr(report, "LARGEST_LOOP", LOOP)
        train(config)
    printed = capsys.readouterr().out
    train(dataclasses.replace(config, steps=3), resume=True)
    assert len(curve(config.out)) == 3
    assert "run step by step: " not in capsys.readouterr().out
    assert ("cannot keep documents apart" in printed) == (model == "mamba2")
    assert ("run step by step: " in printed) == (model not in BASELINES)
    assert "Sample:\n" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_options": ("heads=2",)}, "^m2rnn cannot be built: memory 'm2rnn' does not take"),
        (
            {"memory_options": ("value_size=abc",)},
            "memory_options' value_size must be a whole number, got 'abc'.$",
        ),
        (
            {"memory_options": ("shared_keys=false", "value_size=8")},
            r"'shared_keys': 'false'}: shared_keys must be True or False, got 'false'\. They are",
        ),
        (
            {"model": "3xm2rnn+attention", "memory_options": ("value_size=8",)},
            "cannot be built: architecture '3xm2rnn.attention' has 4 blocks but the model has",
        ),
        ({"memory_options": ("value_size=5",)}, "cannot be split into heads of 5 values"),
        ({"model": "elman", "cell_options": ("gates=2",)}, "cannot be built: .*'gates'"),
    ],
)
def test_options_that_a_mixer_does_not_take(make_config, options, message):
    config = make_config(**{"model": "m2rnn", **options})
    with pytest.raises(RunError, match=message):
        train(config)
    assert not config.out.exists()


def test_a_run_from_before_unused_options_were_refused(make_config, monkeypatch, capsys):
    """It is resumed, by Python and by the command, and evaluated; a new one is refused."""
    config = make_config(steps=2, memory_options=("key_size=8",))
    with pytest.raises(RunError, match="key_size=8, but no block of paragru has a memory"):
        train(config)
    assert not config.out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(runs, "check_new", lambda config: None)
        train(config)
    train(dataclasses.replace(config, steps=3), resume=True)
    assert main(["train", "--resume", "--out", str(config.out), "--steps", "4"]) == 0
    assert len(curve(config.out)) == 4
    assert RunFolder(config.out).read_config().memory_options == ("key_size=8",)
    assert main(["eval", str(config.out), "--device", "cpu"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    for given in (
        ["--memory-options", "key_size=8"],
        ["--model", "m2rnn", "--cell-options", "a=1"],
    ):
        with pytest.raises(SystemExit) as raised:
            main(["train", *given, "--print-config"])
        assert raised.value.code == 2
        assert "leave it out" in capsys.readouterr().err


def test_a_stack_of_memories_and_cells(make_config):
    """With the state carried from step to step; it goes on as if it had not been stopped."""
    options = {"model": "paragru+m2rnn", "memory_options": ("key_size=4", "nonlinearity=linear")}
    shape = ArchitectureConfig(width=16, num_layers=3, num_heads=2)
    text = TextConfig(sequence_length=24, batch_size=3, validation_tokens=500, carry_state=True)
    options |= {"architecture": shape, "text": text}
    whole = make_config("whole", steps=4, **options)
    train(whole)
    parted = make_config("parted", steps=2, **options)
    train(parted)
    train(dataclasses.replace(parted, steps=4), resume=True)
    assert curve(parted.out) == curve(whole.out)
    newest = max((whole.out / "checkpoints").glob("step-*"))
    config = ParaRNNForCausalLM.from_pretrained(newest).config
    assert config.mixers == ["paragru", "m2rnn", "paragru"]
    assert config.memory_options["key_size"] == 4


def test_attention_takes_the_place_of_some_cells(make_config, capsys):
    shape = ArchitectureConfig(width=16, num_layers=5, num_heads=2, attention_every=2)
    config = make_config(steps=2, architecture=shape)
    train(config)
    newest = max((config.out / "checkpoints").glob("step-*"))
    mixers = ParaRNNForCausalLM.from_pretrained(newest).config.mixers
    assert mixers == ["paragru", "attention", "paragru", "attention", "paragru"]
    assert "Sample:\n" in capsys.readouterr().out


def test_how_steps_are_computed_does_not_change_the_curve(make_config):
    whole = make_config("whole", steps=5)
    train(whole)
    text = TextConfig(sequence_length=24, batch_size=1, global_batch_size=3, validation_tokens=500)
    execution = ExecutionConfig(activation_checkpointing="on", profile_steps=2)
    config = make_config("cut", steps=5, text=text, execution=execution)
    train(config)
    for found, expected in zip(curve(config.out), curve(whole.out), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    trace = json.loads((config.out / "profile/process-0.json").read_text())
    names = {event["name"] for event in trace["traceEvents"]}
    assert {"ProfilerStep#2", "ProfilerStep#3"} <= names
    assert "ProfilerStep#4" not in names


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
def test_compiled_blocks_give_the_same_losses(make_config):
    whole = make_config("whole", steps=3)
    train(whole)
    config = make_config("compiled", steps=3, execution=ExecutionConfig(compile=True))
    train(config)
    for found, expected in zip(curve(config.out), curve(whole.out), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_documents_do_not_mix(make_config):
    """The loss of two documents in a row is the mean of their losses."""
    config = make_config()
    model = CausalLoss(build_model(config, Codec()), config.optimizer.z_loss_weight)
    first, second = torch.randint(1, 256, (2, 8))
    zero = torch.zeros(1, dtype=torch.int64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def loss(*parts):
        batch = torch.cat(parts).unsqueeze(0)
        return train_step(model, optimizer, [batch], OptimizerConfig(), HERE).read().loss

    together = loss(zero, first, zero, second)
    apart = (loss(zero, first, zero) * 9 + loss(zero, second) * 8) / 17
    assert together == pytest.approx(apart, rel=1e-5)


def test_run_folder_refuses_what_is_not_its_own(make_config, tmp_path):
    config = make_config(steps=1)
    train(config)
    with pytest.raises(RunError, match=r"already holds a run; continue it with --resume --out"):
        train(config)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(RunError, match="holds no run"):
        train(dataclasses.replace(config, out=other), resume=True)
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        train(dataclasses.replace(config, out=other))
    with pytest.raises(RunError, match="is a file; name a folder"):
        train(dataclasses.replace(config, out=other / "thesis.tex"))
    assert (other / "thesis.tex").read_text() == "mine"
    changed = dataclasses.replace(config, schedule=ScheduleConfig(length=99))
    with pytest.raises(RunError, match=r"would change schedule.length from 40 to 99"):
        train(changed, resume=True)
    (config.out / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config.json cannot be read .* damaged"):
        RunFolder.open(config.out).read_config()


def test_unusable_data_leaves_no_folder(make_config, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    config = make_config(data=tmp_path / "empty.txt")
    with pytest.raises(RunError, match=r"there is no text in .*Skipped: empty: 1"):
        train(config)
    assert not config.out.exists()


def test_a_run_after_its_schedule_says_so(make_config, capsys):
    config = make_config(steps=2, schedule=ScheduleConfig(length=1))
    train(config)
    assert "the learning rate is zero after step 1" in capsys.readouterr().out
    assert curve(config.out)[1]["learning_rate"] == 0.0
    train(config, resume=True)
    assert "All steps are done; raise --steps" in capsys.readouterr().out
    assert len(curve(config.out)) == 2
