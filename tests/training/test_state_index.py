"""The index of a checkpoint's state: read as PyTorch reads it, and never run."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    MetadataIndex,
)

from pararnn.lm.catalogue import architectures
from pararnn.lm.data.files import digest
from pararnn.lm.models.architectures import Shape, foreign_fields, make_config
from pararnn.lm.training import RunError, RunFolder, report, train
from pararnn.lm.training.checkpoints import CheckpointError, verify
from pararnn.lm.training.state_index import is_plain, part_names, read_index


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """Settings of a copy of a run, to be resumed for two more steps."""
    monkeypatch.setattr(report, "LARGEST_LOOP", 1)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 2)
    shutil.copytree(trained, tmp_path / "run")
    config = RunFolder(tmp_path / "run").read_config()
    return dataclasses.replace(config, out=tmp_path / "run", steps=8)


def newest(config):
    return config.out / "checkpoints/step-00000006"


def seal(checkpoint):
    """Make all checksums of a checkpoint right."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"] = {name: digest(checkpoint / name) for name in manifest["files"]}
    path.write_text(json.dumps(manifest))


class Runs:
    """Unpickled by the usual means, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def inside(path):
    return {"storage_data": {"a": Runs(path)}, "state_dict_metadata": {}}


def test_an_index_of_an_older_python(run, monkeypatch):
    """Python 3.11.2 stores a member of an enumeration as an attribute of its class."""
    content = (newest(run) / "state/.metadata").read_bytes()
    index = pickle.loads(content)

    def as_attribute(member, _):
        return getattr, (type(member), member.name)

    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", as_attribute)
    older = pickle.dumps(index)
    assert b"getattr" in older
    assert part_names(read_index(older)) == part_names(read_index(content))


class Attribute:
    """Unpickled by the usual means, it is an attribute of something else."""

    def __reduce__(self):
        return getattr, (torch.Size, "__class__")


def test_an_attribute_of_anything_else_is_refused():
    with pytest.raises(ValueError, match=r"builtins.getattr.*nothing was run"):
        read_index(pickle.dumps({"storage_data": Attribute(), "state_dict_metadata": {}}))


def test_it_says_what_pytorch_says(run):
    content = (newest(run) / "state/.metadata").read_bytes()
    index, expected = read_index(content), pickle.loads(content)
    assert index.state_dict_metadata == expected.state_dict_metadata
    assert index.storage_data == expected.storage_data
    assert part_names(index) == {"__0_0.distcp"}


@pytest.mark.parametrize("make", [Runs, inside, lambda path: [torch.load, Runs(path)]])
def test_code_in_it_is_not_run(run, tmp_path, capsys, make):
    """All checksums are right; the older checkpoint is used."""
    mark = tmp_path / "was here"
    (newest(run) / "state/.metadata").write_bytes(pickle.dumps(make(mark)))
    seal(newest(run))
    result = train(run, resume=True)
    printed = capsys.readouterr().out
    assert "Set aside: step-00000006/state/.metadata names" in printed
    assert "which no index of tensors holds; nothing was run." in printed
    assert "Resumed at step 3" in printed
    assert result.step == 8
    assert not mark.exists()


def change_index(config, change):
    path = newest(config) / "state/.metadata"
    index = pickle.loads(path.read_bytes())
    change(index)
    path.write_bytes(pickle.dumps(index))
    seal(newest(config))


def as_bytes(index):
    """Such entries are unpickled from the parts."""
    index.state_dict_metadata["random.cpu-0"] = BytesStorageMetadata()


def elsewhere(index):
    key = MetadataIndex("model.lm_head.weight", torch.Size((0, 0)))
    index.storage_data[key] = _StorageInfo("../../secret", 0, 10)


def incomplete(index):
    index.state_dict_metadata["model.lm_head.weight"].chunks.clear()


@pytest.mark.parametrize("change", [as_bytes, elsewhere, incomplete])
def test_what_pytorch_would_follow_is_refused(run, change):
    change_index(run, change)
    with pytest.raises(CheckpointError, match=r"state/.metadata (names|is no index of tensors)"):
        verify(newest(run))


def test_tensors_of_another_model_are_one_message(run):
    def rename(index):
        names = index.state_dict_metadata
        names["surplus"] = names.pop("model.lm_head.weight")
        for key in [key for key in index.storage_data if key.fqn == "model.lm_head.weight"]:
            index.storage_data[MetadataIndex("surplus", key.offset)] = index.storage_data.pop(key)

    change_index(run, rename)
    message = r"step-00000006 cannot be loaded: Missing key .* move it away. Continue with"
    with pytest.raises(RunError, match=message):
        train(run, resume=True)


@pytest.mark.parametrize(
    "field", ["attn_implementation", "auto_map", "quantization_config", "model_type"]
)
def test_settings_that_fetch_code_are_refused(run, field):
    path = newest(run) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), field: "someone/kernel"}))
    seal(newest(run))
    with pytest.raises(CheckpointError, match=rf"config.json sets {field}, which no model made"):
        verify(newest(run))


@pytest.mark.parametrize("architecture", architectures())
def test_settings_of_every_architecture_are_known(architecture):
    shape = Shape(vocab_size=256, width=16, num_layers=1, num_heads=2)
    assert foreign_fields(make_config(architecture, shape).to_dict()) == []


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "state/../../x", "state/a/b", "a/b", "C:x", "..", "", "a\\b"]
)
def test_names_in_manifests_are_plain(run, name):
    path = newest(run) / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["files"][name] = "0"
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"names .* which is no plain name"):
        verify(newest(run))


def test_what_plain_names_are():
    assert all(map(is_plain, ("a", "a.b", ".metadata", "__0_0.distcp")))
    assert not any(map(is_plain, ("", ".", "..", "/a", "a/", "a/b", "C:a", "a\\b")))


@pytest.mark.parametrize("name", ["config.json", "progress.json", "state/.metadata"])
def test_manifests_list_what_is_read(run, name):
    path = newest(run) / "manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["files"][name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"manifest.json lacks {name}"):
        verify(newest(run))
