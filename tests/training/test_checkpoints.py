"""Checkpoints: atomic, verified, never fewer than one good one."""

import errno
import json
import os
import shutil

import pytest
import torch

from pararnn.models import ParaRNNConfig, ParaRNNForCausalLM
from pararnn.training.checkpoints import (
    CheckpointError,
    newest_checkpoint,
    prune,
    save_checkpoint,
    set_aside,
    verify,
)


@pytest.fixture(scope="module")
def model():
    shape = ParaRNNConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_heads=1)
    return ParaRNNForCausalLM(shape)


@pytest.fixture
def folder(tmp_path, model):
    path = tmp_path / "checkpoints"
    for step in (10, 20, 30):
        save_checkpoint(path, step, "mine", model, {"step": step, "tensor": torch.ones(2) * step})
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_newest_is_used_and_oldest_deleted(folder):
    checkpoint, problems = newest_checkpoint(folder, "mine")
    assert (checkpoint.step, problems) == (30, [])
    assert checkpoint.load_state()["tensor"].tolist() == [30, 30]
    prune(folder, 2)
    assert names(folder) == ["step-00000020", "step-00000030"]
    assert newest_checkpoint(folder.parent / "none") == (None, [])


def test_saving_again_replaces(folder, model):
    save_checkpoint(folder, 20, "mine", model, {"step": "new"})
    assert verify(folder / "step-00000020").load_state() == {"step": "new"}
    assert len(names(folder)) == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "truncated weights": (
        lambda path: truncate(path / "model.safetensors"),
        "model.safetensors is damaged",
    ),
    "flipped bit": (lambda path: flip_bit(path / "training_state.pt"), "pt is damaged"),
    "missing file": (
        lambda path: (path / "training_state.pt").unlink(),
        "training_state.pt is missing or unreadable",
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
            (path / "manifest.json").read_text().replace("checkpoint-1", "checkpoint-9")
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
    save_checkpoint(folder, 40, "other", model, {})
    checkpoint, problems = newest_checkpoint(folder, "mine")
    assert checkpoint.step == 30
    assert "step-00000040 belongs to a run with other settings or other data" in str(problems[0])
    assert newest_checkpoint(folder)[0].step == 40


def test_nothing_usable_is_an_error(folder):
    for path in folder.iterdir():
        flip_bit(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint in .* Restore one"):
        newest_checkpoint(folder, "mine")


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FAILURES = {
    "fsync": ("os.fsync", FULL),
    "state": ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data/0: file")),
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
            save_checkpoint(folder, 40, "mine", model, {})
    assert "cannot save a checkpoint at step 40" in str(caught.value)
    assert names(folder) == before
    assert newest_checkpoint(folder, "mine")[0].step == 30
    save_checkpoint(folder, 40, "mine", model, {})
    assert newest_checkpoint(folder, "mine")[0].step == 40


def test_leftovers_of_a_killed_save_do_not_matter(folder, model):
    shutil.copytree(folder / "step-00000030", folder / ".saving-step-00000040")
    assert newest_checkpoint(folder, "mine")[0].step == 30
    save_checkpoint(folder, 40, "mine", model, {})
    assert names(folder)[-1] == "step-00000040"
    assert len(names(folder)) == 4


def test_a_checkpoint_is_a_pretrained_model(folder):
    path = folder / "step-00000030"
    again = ParaRNNForCausalLM.from_pretrained(path)
    assert again.config.vocab_size == 8
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert {"model.safetensors", "config.json", "training_state.pt"} <= set(files)
