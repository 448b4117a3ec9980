"""From files to batches: discovery, splitting, refusal, order, exact resumption."""

import json
import signal

import numpy as np
import pytest
import torch

from pararnn.lm.data import PrepareConfig, open_tokens, prepare
from pararnn.lm.data.finding import find_standard_library
from pararnn.lm.data.parts import write_part
from pararnn.lm.data.prepare import write_split
from pararnn.lm.training import RunError, RunFolder
from pararnn.lm.training.config import TextConfig, TrainConfig
from pararnn.lm.training.data import Batches, WindowOrder, Windows
from pararnn.lm.training.text import open_text

from .conftest import byte_split, sentences


def test_standard_library_is_found():
    sources = find_standard_library()
    names = {source.name for source in sources}
    assert {"json/decoder.py", "dataclasses.py"} <= names
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)
    assert [s.name for s in sources] == [s.name for s in find_standard_library()]


@pytest.fixture
def open_it(tmp_path):
    """Opens the text of a run that is made for it."""

    def run(data, name="run", held_out=0.3):
        folder = RunFolder(tmp_path / name)
        return open_text(TrainConfig(data=data, text=TextConfig(held_out=held_out)), folder)

    return run


def documents(split):
    """The documents of a split of bytes."""
    first, *texts, last = bytes(split.read(0, split.num_tokens).tolist()).split(b"\0")
    assert first == last == b""
    return [text.decode() for text in texts]


def test_files_are_split_by_name(text_folder, open_it):
    text = open_it(text_folder)
    train, held_out = documents(text.train), documents(text.validation)
    assert sorted(train + held_out) == sorted(p.read_text() for p in text_folder.iterdir())
    assert text.train.num_bytes == text.train.num_tokens - len(train) - 1
    (text_folder / "more.txt").write_text("one more file")
    assert set(held_out) <= set(documents(open_it(text_folder, "again").validation))


def test_a_run_prepares_what_the_command_does(text_folder, open_it, tmp_path):
    prepare(PrepareConfig(sources=text_folder, held_out=0.3), tmp_path / "tokens", workers=1)
    own, prepared = open_it(text_folder), open_it(tmp_path / "tokens", "prepared")
    assert own.sha256 == prepared.sha256
    assert own.codec == prepared.codec
    names = {path.name for path in (tmp_path / "run/data").iterdir()}
    assert names == {"index.json", "train-00000.bin", "validation-00000.bin"}
    assert not (tmp_path / "prepared/data").exists()


def test_prepared_text_is_kept_and_checked(text_folder, open_it, tmp_path):
    sha256 = open_it(text_folder).sha256
    (text_folder / "0.txt").write_text("changed later")
    assert open_it(text_folder).sha256 == sha256
    shard = tmp_path / "run/data/train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(RunError, match=r"does not have the checksum .*; restore it"):
        open_it(text_folder)


def test_a_single_file_is_split_at_a_line(tmp_path, open_it):
    text = sentences(0)
    (tmp_path / "one.txt").write_text(text)
    opened = open_it(tmp_path / "one.txt", held_out=0.2)
    (train,), (held_out,) = documents(opened.train), documents(opened.validation)
    assert train + held_out == text
    assert train.endswith("\n")
    assert 0.15 < len(held_out) / len(text) < 0.25


@pytest.mark.parametrize("held_out", [1e-6, 1 - 1e-6])
def test_both_sides_get_a_file(text_folder, open_it, held_out):
    text = open_it(text_folder, held_out=held_out)
    assert text.train.num_bytes > 0
    assert text.validation.num_bytes > 0


def test_files_that_are_no_text_are_skipped_in_a_folder(text_folder, open_it, tmp_path):
    (text_folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (text_folder / "old.txt").write_bytes("für".encode("latin1"))
    (text_folder / "empty.txt").write_text("")
    (text_folder / ".hidden").write_text("not read")
    text = open_it(text_folder)
    assert "8 documents (skipped: " in text.description
    skipped = open_tokens(tmp_path / "run/data").skipped
    reasons = {"binary", "not UTF-8", "empty", "hidden"}
    assert {reason: entry["count"] for reason, entry in skipped.reasons.items()} == dict.fromkeys(
        reasons, 1
    )
    split, left_out = write_split(text_folder, None, tmp_path)
    assert sorted(documents(split)) == sorted(documents(text.train) + documents(text.validation))
    assert left_out.reasons == skipped.reasons


def test_rows_are_read_as_rows(tmp_path, open_it):
    rows = [sentences(n) for n in range(9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    text = open_it(path)
    assert sorted(documents(text.train) + documents(text.validation)) == sorted(rows)
    split, _ = write_split(path, None, tmp_path)
    assert documents(split) == rows


REFUSED = {
    "missing": (None, r"there is no file or folder .*data.txt"),
    "empty": (b"", r"there is no text in .*Skipped: empty"),
    "binary": (b"GIF\0", r"is a binary file \(zero byte at offset 3\); give UTF-8 text"),
    "latin1": ("für".encode("latin1"), r"not UTF-8 text \(byte 0xfc at offset 1\); convert it"),
    "tiny": (b"x", r"has 1 byte; that is too little to split"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unusable_data_is_refused_with_advice(tmp_path, open_it, kind):
    content, message = REFUSED[kind]
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=message):
        open_it(path)
    if kind != "tiny":
        with pytest.raises(RunError, match=message):
            write_split(path, None, tmp_path)


def test_folder_without_text_is_refused(tmp_path, open_it):
    (tmp_path / "texts").mkdir()
    with pytest.raises(RunError, match="holds no files; put text files into it"):
        open_it(tmp_path / "texts")
    (tmp_path / "texts/a.bin").write_bytes(b"\0")
    with pytest.raises(RunError, match=r"no text in .*Skipped: binary: 1"):
        open_it(tmp_path / "texts")


def test_a_run_inside_its_own_text_is_refused(text_folder, open_it):
    with pytest.raises(RunError, match=r"lies within the source .*name a folder elsewhere"):
        open_it(text_folder, text_folder / "run")


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_stops_the_preparation(text_folder, open_it, monkeypatch, number, raised):
    """As it would stop the process anywhere else before the training begins."""

    def leave(number, frame):
        raise SystemExit

    def write_and_signal(*arguments):
        write_part(*arguments)
        signal.raise_signal(number)

    monkeypatch.setattr("pararnn.lm.data.units.write_part", write_and_signal)
    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(raised):
            open_it(text_folder)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def flat_file(tmp_path):
    path = tmp_path / "flat.bin"
    path.write_bytes(bytes(range(1, 102)))
    return path


def test_windows_cover_the_file_and_overlap_by_one(flat_file):
    windows = Windows(byte_split(flat_file), 10)
    assert len(windows) == 10
    assert windows[0].tolist() == list(range(1, 12))
    assert windows[9].tolist() == list(range(91, 102))
    with pytest.raises(RunError, match="has 101 tokens but a sequence needs 201"):
        Windows(byte_split(flat_file), 200)


def test_an_epoch_visits_every_window_once():
    order = WindowOrder(12, 4, seed=1)
    epochs = [[order.of_step(3 * epoch + i) for i in range(3)] for epoch in range(2)]
    assert [sorted(sum(epoch, [])) for epoch in epochs] == [list(range(12))] * 2  # noqa: RUF017
    assert epochs[0] != epochs[1]
    assert WindowOrder(12, 4, seed=2).of_step(0) != epochs[0][0]


def test_fewer_windows_than_a_step_are_repeated():
    chosen = WindowOrder(3, 8, seed=0).of_step(0)
    assert len(chosen) == 8
    assert np.bincount(chosen).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_a_step_is_the_same_wherever_one_starts():
    order = WindowOrder(10, 4, seed=3)
    expected = [order.of_step(step) for step in range(9)]
    for step in (8, 0, 5):
        assert WindowOrder(10, 4, seed=3).of_step(step) == expected[step]


@pytest.mark.parametrize(("num_processes", "batch_size"), [(1, 8), (1, 2), (2, 4), (4, 1)])
def test_processes_share_a_step(flat_file, num_processes, batch_size):
    windows, order = Windows(byte_split(flat_file), 10), WindowOrder(10, 8, seed=3)
    expected = torch.stack([windows[i] for i in order.of_step(4)])
    shares = [
        Batches(windows, order, batch_size, rank, num_processes).of_step(4)
        for rank in range(num_processes)
    ]
    assert all(batch.shape == (batch_size, 11) for share in shares for batch in share)
    assert torch.equal(torch.cat([torch.cat(share) for share in shares]), expected)
