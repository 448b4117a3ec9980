"""Checkpoints: atomic, verified, never fewer than one good one."""

import errno
import json
import os
import shutil
from concurrent.futures import Future

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pararnn.lm.models import ParaRNNConfig, ParaRNNForCausalLM
from pararnn.lm.training.checkpoints import (
    CheckpointError,
    newest_checkpoint,
    prune,
    set_aside,
    verify,
)
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.saving import CheckpointWriter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def model():
    shape = ParaRNNConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_heads=1)
    return ParaRNNForCausalLM(shape)


def save(folder, step, run, model, value=0.0):
    """Write a checkpoint whose state is one tensor, and wait for it."""
    with CheckpointWriter(folder, run, 9, Processes(0, 1, torch.device("cpu"))) as writer:
        writer.save(step, model, {"part": {"tensor": torch.full((2,), value)}}, {"step": step})
        writer.wait()


def load(checkpoint):
    state = {"part": {"tensor": torch.zeros(2)}}
    dcp.load(state, checkpoint_id=checkpoint.state)
    return state["part"]["tensor"].tolist()


@pytest.fixture
def folder(tmp_path, model):
    path = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        save(path, step, "mine", model, step)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_newest_is_used_and_oldest_deleted(folder):
    checkpoint, problems = newest_checkpoint(folder, "mine")
    assert (checkpoint.step, problems) == (30, [])
    assert load(checkpoint) == [30, 30]
    assert checkpoint.read_progress() == {"step": 30}
    prune(folder, 2)
    assert names(folder) == ["step-00000020", "step-00000030"]
    assert newest_checkpoint(folder.parent / "none") == (None, [])


def test_saving_again_replaces(folder, model):
    save(folder, 20, "mine", model, 21)
    assert load(verify(folder / "step-00000020")) == [21, 21]
    assert len(names(folder)) == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


PART = "state/__0_0.distcp"
DAMAGE = {
    "truncated weights": (
        lambda path: truncate(path / "model.safetensors"),
        "model.safetensors is damaged",
    ),
    "flipped bit": (lambda path: flip_bit(path / PART), f"{PART} is damaged"),
    "missing file": (
        lambda path: (path / PART).unlink(),
        f"{PART} is missing or unreadable",
    ),
    "damaged manifest": (lambda path: truncate(path / "manifest.json"), "json is damaged"),
    "foreign folder": (
        lambda path: (path / "manifest.json").unlink(),
        "has no manifest.json: not a ParaRNN checkpoint",
    ),
    "foreign manifest": (
        lambda path: (path / "manifest.json").write_text('{"weights": 3}'),
        "json is damaged",
    ),
    "other format": (
        lambda path: (path / "manifest.json").write_text(
            (path / "manifest.json").read_text().replace("checkpoint-2", "checkpoint-9")
        ),
        "has format 'pararnn-checkpoint-9'",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_unusable_checkpoints_are_passed_over(folder, kind):
    damage, message = DAMAGE[kind]
    damage(folder / "step-00000030")
    checkpoint, problems = newest_checkpoint(folder, "mine")
    assert checkpoint.step == 20
    assert len(problems) == 1
    assert message in str(problems[0])
    set_aside(folder, checkpoint)
    prune(folder, 1)
    assert names(folder) == ["step-00000020", "unusable-step-00000030"]


def test_checkpoints_of_other_runs_are_passed_over(folder, model):
    save(folder, 40, "other", model)
    checkpoint, problems = newest_checkpoint(folder, "mine")
    assert checkpoint.step == 30
    assert "step-00000040 belongs to a run with other settings or other data" in str(problems[0])
    assert newest_checkpoint(folder)[0].step == 40


def test_nothing_usable_is_an_error(folder):
    for path in folder.iterdir():
        flip_bit(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .* restore one"):
        newest_checkpoint(folder, "mine")


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAILURES = {
    "fsync": ("os.fsync", FULL),
    "state": ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data/0: file")),
    "folder": ("pathlib.Path.mkdir", FULL),
    "weights": ("transformers.PreTrainedModel.save_pretrained", FULL),
    "rename": ("pathlib.Path.replace", FULL),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_full_disk_leaves_the_older_ones(folder, model, monkeypatch, kind):
    target, error = FAILURES[kind]
    before = names(folder)

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(CheckpointError, match="Last good checkpoint: step-00000030") as caught:
            save(folder, 40, "mine", model)
    assert "cannot save a checkpoint at step 40" in str(caught.value)
    assert names(folder) == before
    assert newest_checkpoint(folder, "mine")[0].step == 30
    save(folder, 40, "mine", model)
    assert newest_checkpoint(folder, "mine")[0].step == 40


def test_the_cause_of_a_failed_write_is_named(folder, model, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("unexpected pos 704 vs 598") from FULL

    monkeypatch.setattr("torch.save", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save(folder, 40, "mine", model)


LOST = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711")


def test_a_lost_connection_is_no_full_disk(folder, model, monkeypatch):
    before = names(folder)
    parts = Future()
    parts.set_exception(LOST)
    monkeypatch.setattr("torch.distributed.checkpoint.async_save", lambda *args, **options: parts)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        save(folder, 40, "mine", model)
    assert names(folder) == before


@pytest.mark.timeout(60)
def test_after_a_lost_connection_the_thread_is_not_waited_for(folder, model, monkeypatch):
    """It may wait for another process that waits for this one to end."""
    before = names(folder)
    parts = Future()
    monkeypatch.setattr("torch.distributed.checkpoint.async_save", lambda *args, **options: parts)
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        lose_connection_while_saving(folder, model)
    assert [name for name in names(folder) if name.startswith("step-")] == before
    parts.set_exception(LOST)


def lose_connection_while_saving(folder, model):
    with CheckpointWriter(folder, "mine", 9, Processes(0, 1, torch.device("cpu"))) as writer:
        writer.save(40, model, {}, {})
        raise LOST


def test_a_checkpoint_holds_the_values_of_its_step(tmp_path, model):
    """Training goes on while it is written."""
    with CheckpointWriter(tmp_path, "mine", 2, Processes(0, 1, torch.device("cpu"))) as writer:
        tensor = torch.ones(1_000_000)
        before = model.lm_head.weight.detach().clone()
        writer.save(1, model, {"part": {"tensor": tensor}}, {})
        tensor.zero_()
        with torch.no_grad():
            model.lm_head.weight += 1
        writer.save(2, model, {"part": {"tensor": tensor}}, {})
        assert names(tmp_path)[-1] == "step-00000001"
        state = {"part": {"tensor": torch.empty(1_000_000)}}
        dcp.load(state, checkpoint_id=tmp_path / "step-00000001/state")
        assert state["part"]["tensor"].eq(1).all()
        saved = ParaRNNForCausalLM.from_pretrained(tmp_path / "step-00000001").lm_head.weight
        assert torch.equal(saved, before)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_leftovers_of_a_killed_save_do_not_matter(folder, model):
    for name in (".saving-step-00000040", ".saving-step-00000035", ".deleting-step-00000010"):
        shutil.copytree(folder / "step-00000030", folder / name)
    assert newest_checkpoint(folder, "mine")[0].step == 30
    save(folder, 40, "mine", model)
    assert names(folder)[-1] == "step-00000040"
    assert len(names(folder)) == 4


def test_a_checkpoint_is_a_pretrained_model(folder):
    path = folder / "step-00000030"
    again = ParaRNNForCausalLM.from_pretrained(path)
    assert again.config.vocab_size == 8
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert {"model.safetensors", "config.json", PART, "state/.metadata"} <= set(files)
