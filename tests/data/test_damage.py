"""Prepared data, damaged or changed by hand: one line that names the file and what to do."""

import hashlib
import json
import os
import shutil

import pytest

from pararnn.cli import main
from pararnn.lm.data import PrepareConfig, open_tokens, prepare, units
from pararnn.lm.data.index import write_sealed
from pararnn.lm.training import RunError

from .conftest import contents, sentence

SETTINGS = {"tokenizer": "train:300", "held_out": 0.2, "unit_bytes": 100, "units_per_shard": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for number in range(12):
        (folder / f"{number}.txt").write_bytes(sentence(number).encode())
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A finished folder."""
    folder = tmp_path_factory.mktemp("made") / "tokens"
    prepare(PrepareConfig(sources=source, **SETTINGS), folder, workers=1)
    return folder


@pytest.fixture(scope="module")
def stopped(source, tmp_path_factory):
    """A folder with a shard, and parts of the next."""
    folder = tmp_path_factory.mktemp("made") / "tokens"
    with pytest.MonkeyPatch.context() as patch:
        write, calls = units.write_part, []

        def stop(*arguments):
            calls.append(arguments)
            write(*arguments)
            if len(calls) == 7:
                raise KeyboardInterrupt

        patch.setattr(units, "write_part", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(PrepareConfig(sources=source, **SETTINGS), folder, workers=1)
    assert (folder / "train-00000.bin").exists()
    assert len(list(folder.glob("parts/*.npz"))) == 3
    return folder


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"\xff\x00\xfe{" * 50)


def nested(path):
    path.write_text("[" * 100_000 + "]" * 100_000)


def replaced(make):
    def damage(path):
        remove(path)
        make(path)

    damage.__name__ = make.__name__
    return damage


folder = replaced(lambda path: path.mkdir())
pipe = replaced(os.mkfifo)
device = replaced(lambda path: path.symlink_to("/dev/zero"))
FILES = {"folder": folder, "pipe": pipe, "device": device} | {
    f.__name__: f for f in (remove, truncate, flip, empty, garbage)
}


def one_line(capsys, arguments, message):
    """The command fails with one line; returns it."""
    capsys.readouterr()
    assert main(["data", *arguments]) == 1
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if "Preparing:" not in line]
    assert len(lines) == 1, printed
    assert message in lines[0]
    assert any(
        advice in lines[0] for advice in ("restore", "anew", "remove", "continues", "delete")
    )
    return lines[0]


@pytest.mark.parametrize("damage", FILES)
@pytest.mark.parametrize(
    "name",
    ["index.json", "train-00000.bin", "validation-00001.bin", "tokenizer/tokenizer.json"],
)
def test_damaged_file_is_named(name, damage, whole, tmp_path, capsys):
    copy = shutil.copytree(whole, tmp_path / "copy")
    FILES[damage](copy / name)
    one_line(capsys, ["check", str(copy)], name.partition("/")[2] or name)
    with pytest.raises(RunError, match=name):
        open_tokens(copy)


def change(*keys, to):
    def edit(index):
        for key in keys[:-1]:
            index = index[key]
        index[keys[-1]] = to

    return edit


SHARD = ("splits", "train", 0)
EDITS = {
    "vocabulary is text": (change("vocab_size", to="300"), "vocab_size is '300', not of type int"),
    "vocabulary is true": (change("vocab_size", to=True), "vocab_size is True, not of type int"),
    "vocabulary is none": (change("vocab_size", to=0), "vocab_size is 0, not from 1"),
    "vocabulary is huge": (change("vocab_size", to=10**30), "vocab_size is 1000000000"),
    "vocabulary is smaller": (
        change("vocab_size", to=290),
        r"holds token \d+ of a vocabulary of 2",
    ),
    "vocabulary is larger": (change("vocab_size", to=310), "310, but that of the tokenizer is 300"),
    "separator is another": (change("separator", to=40), r"holds \d+ separators \(token 40\)"),
    "separator is beyond": (change("separator", to=300), "separator is 300, beyond the vocabulary"),
    "dtype is another": (change("dtype", to="uint32"), "dtype is 'uint32' for a vocabulary of 300"),
    "dtype is no dtype": (change("dtype", to=["i4"]), r"dtype is \['i4'\]"),
    "name leaves the folder": (
        change(*SHARD, "file", to="../key"),
        "file is '../key', not train-0",
    ),
    "name is absolute": (
        change(*SHARD, "file", to="/dev/zero"),
        "'/dev/zero', not train-00000.bin",
    ),
    "name is another": (change(*SHARD, "file", to="train-00001.bin"), "'train-00001.bin', not"),
    "name is no name": (change(*SHARD, "file", to=7), "file is 7, not train-00000.bin"),
    "size is negative": (change(*SHARD, "num_tokens", to=-1), "num_tokens is -1"),
    "size is huge": (
        change(*SHARD, "num_tokens", to=10**18),
        r"train-00000.bin has \d+ bytes inst",
    ),
    "size is infinite": (
        change(*SHARD, "num_tokens", to=float("inf")),
        "num_tokens is inf, not of type int",
    ),
    "bytes are others": (change(*SHARD, "num_bytes", to=1), "does not match its own checksum"),
    "documents are more": (
        change(*SHARD, "num_documents", to=99),
        "does not match the 99 documents",
    ),
    "checksum is no checksum": (change(*SHARD, "sha256", to="ab"), "sha256 is 'ab', not a SHA-256"),
    "checksum is another": (change(*SHARD, "sha256", to="0" * 64), "does not have the checksum"),
    "shard has more": (change(*SHARD, "more", to=1), "does not have the fields file, num_tokens"),
    "shard is a number": (change(*SHARD, to=1), r"splits.train\[0\] is 1, not of type dict"),
    "split is missing": (
        change("splits", to={"train": []}),
        r"splits are \['train'\], not train an",
    ),
    "split is empty": (change("splits", "train", to=[]), "it has no documents for train"),
    "splits are a list": (change("splits", to=[]), r"splits is \[\], not of type dict"),
    "tokenizer is bytes": (change("tokenizer", to="bytes"), "tokenizer is 'bytes', but has"),
    "file of another kind": (
        change("tokenizer_files", ".metadata", to="0" * 64),
        "tokenizer_files names '.metadata', which no tokenizer has",
    ),
    "file elsewhere": (
        change("tokenizer_files", "../config.json", to="0" * 64),
        "tokenizer_files names '../config.json', which no tokenizer has",
    ),
    "settings are text": (change("settings", to="none"), "settings is 'none', not of type dict"),
    "skipped is deep": (change("skipped", to={"a": {"count": {}, "first": []}}), "not of type int"),
    "version is another": (change("version", to=99), "is of format pararnn-tokens 99, but"),
}


@pytest.mark.parametrize(
    ("name", "sealed"),
    [(name, False) for name in EDITS]
    + [(name, True) for name in EDITS if name not in ("bytes are others", "version is another")],
)
def test_edited_index_is_refused(name, sealed, whole, tmp_path, capsys):
    """With a checksum of its own that fits, too: data of others may be made with care."""
    edit, message = EDITS[name]
    copy = shutil.copytree(whole, tmp_path / "copy")
    index = json.loads((copy / "index.json").read_text())
    edit(index)
    if sealed:
        del index["sha256"]
        write_sealed(copy / "index.json", index)
    else:
        (copy / "index.json").write_text(json.dumps(index))
    before = contents(copy)
    line = one_line(capsys, ["check", str(copy)], str(copy))
    if sealed or "own checksum" in message:
        with pytest.raises(RunError, match=message):
            open_tokens(copy)
    assert "index.json" in line or ".bin" in line
    assert contents(copy) == before


def test_nested_index(whole, tmp_path, capsys):
    copy = shutil.copytree(whole, tmp_path / "copy")
    nested(copy / "index.json")
    one_line(capsys, ["check", str(copy)], "index.json is damaged (RecursionError")


def reseal(path, **changes):
    values = json.loads(path.read_text()) | changes
    del values["sha256"]
    write_sealed(path, values)


def test_changed_tokenizer_is_refused(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    (copy / "tokenizer/added_tokens.json").write_text('{"<|endoftext|>": 5}')
    with pytest.raises(RunError, match=r"added_tokens.json was added to the tokenizer; remove it"):
        open_tokens(copy)
    (copy / "tokenizer/added_tokens.json").unlink()
    path = copy / "tokenizer/tokenizer_config.json"
    config = json.loads(path.read_text())
    config["eos_token"] = "a"
    path.write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"tokenizer_config.json does not have its checksum"):
        open_tokens(copy)
    files = {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted((copy / "tokenizer").iterdir())
    }
    reseal(copy / "index.json", tokenizer_files=files)
    with pytest.raises(RunError, match=r"separator 0, but that of the tokenizer is \d+"):
        open_tokens(copy)


def test_a_tokenizer_that_cannot_be_loaded(whole, tmp_path):
    copy = shutil.copytree(whole, tmp_path / "copy")
    path = copy / "tokenizer/tokenizer.json"
    path.write_text('{"model": 1}')
    files = json.loads((copy / "index.json").read_text())["tokenizer_files"]
    files["tokenizer.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    reseal(copy / "index.json", tokenizer_files=files)
    with pytest.raises(RunError, match="cannot load the tokenizer"):
        open_tokens(copy)


WORK = ("progress.json", "parts/00000004.npz", "tokenizer/tokenizer.json")


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in WORK for damage in FILES if damage != "remove"]
    + [("parts", "pipe"), ("parts", "device")],
)
def test_damaged_work_is_named(name, damage, stopped, source, tmp_path):
    copy = shutil.copytree(stopped, tmp_path / "copy")
    FILES[damage](copy / name)
    before = contents(copy)
    with pytest.raises(RunError, match=f"copy/{name}") as failed:
        prepare(PrepareConfig(sources=source, **SETTINGS), copy, workers=1)
    assert "\n" not in str(failed.value)
    after = contents(copy)
    assert {file: after[file] for file in before} == before


@pytest.mark.parametrize("name", ["parts/00000004.npz", "parts/00000005.npz", "parts"])
def test_lost_work_is_done_again(name, stopped, whole, source, tmp_path):
    copy = shutil.copytree(stopped, tmp_path / "copy")
    remove(copy / name)
    prepare(PrepareConfig(sources=source, **SETTINGS), copy, workers=1)
    assert contents(copy) == contents(whole)


def test_lost_progress(stopped, source, tmp_path):
    copy = shutil.copytree(stopped, tmp_path / "copy")
    (copy / "progress.json").unlink()
    before = contents(copy)
    with pytest.raises(
        RunError, match=r"holds token data, but neither index.json nor progress.jso"
    ):
        prepare(PrepareConfig(sources=source, **SETTINGS), copy, workers=1)
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_units": "4"}, "num_units is '4', not of type int"),
        ({"next": [0, 1]}, "does not match its own checksum"),
        ({"source_bytes": None}, "source_bytes is None, not of type int"),
        ({"shards": []}, r"shards is \[\], not of type dict"),
        ({"shards": {"train": [{"file": "../a"}], "validation": []}}, "does not have the fields"),
        ({"tokenizer_files": {"/dev/zero": "0" * 64}}, "names '/dev/zero', which no tokenizer has"),
        ({"settings": 5}, "settings is 5, not of type dict"),
    ],
)
def test_edited_progress(changes, message, stopped, source, tmp_path):
    copy = shutil.copytree(stopped, tmp_path / "copy")
    values = json.loads((copy / "progress.json").read_text())
    (copy / "progress.json").write_text(json.dumps(values | changes))
    before = contents(copy)
    with pytest.raises(RunError, match=f"progress.json is damaged .*{message}.* delete .*anew"):
        prepare(PrepareConfig(sources=source, **SETTINGS), copy, workers=1)
    assert contents(copy) == before


def test_an_unfinished_folder_is_not_opened(stopped, source, capsys):
    line = one_line(
        capsys, ["check", str(stopped)], "is not finished (no index.json); call the sam"
    )
    assert "continues where it stopped" in line
