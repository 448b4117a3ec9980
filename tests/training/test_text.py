"""From files to batches: discovery, splitting, refusal, order, exact resumption."""

import json

import numpy as np
import pytest
import torch

from pararnn.lm.data.corpus import prepare_corpus, read_documents
from pararnn.lm.data.finding import find_standard_library
from pararnn.lm.training import RunError
from pararnn.lm.training.data import Batches, WindowOrder, Windows
from pararnn.lm.training.text import flat_bytes

from .conftest import sentences


def test_standard_library_is_found():
    sources = find_standard_library()
    names = {source.name for source in sources}
    assert {"json/decoder.py", "dataclasses.py"} <= names
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)
    assert [s.name for s in sources] == [s.name for s in find_standard_library()]


def test_files_are_split_by_name(text_folder, tmp_path):
    corpus = prepare_corpus(text_folder, tmp_path / "a", held_out=0.3)
    listing = json.loads((tmp_path / "a/files.json").read_text())
    assert sorted(listing["train"] + listing["validation"]) == [f"{n}.txt" for n in range(8)]
    for name in ("train", "validation"):
        documents = (tmp_path / f"a/{name}.bin").read_bytes().split(b"\0")
        assert documents[0] == documents[-1] == b""
        expected = [(text_folder / file).read_bytes() for file in listing[name]]
        assert documents[1:-1] == expected
    assert corpus.num_train_bytes + 7 > corpus.train.stat().st_size - 3
    (text_folder / "more.txt").write_text("one more file")
    prepare_corpus(text_folder, tmp_path / "b", held_out=0.3)
    again = json.loads((tmp_path / "b/files.json").read_text())
    assert set(listing["validation"]) <= set(again["validation"])


def test_prepared_text_is_kept_and_checked(text_folder, tmp_path):
    folder = tmp_path / "data"
    corpus = prepare_corpus(text_folder, folder, held_out=0.3)
    (text_folder / "0.txt").write_text("changed later")
    assert prepare_corpus(text_folder, folder, held_out=0.3) == corpus
    content = bytearray(corpus.train.read_bytes())
    content[5] ^= 1
    corpus.train.write_bytes(content)
    with pytest.raises(RunError, match="was changed or damaged; restore it"):
        prepare_corpus(text_folder, folder, held_out=0.3)


def test_a_single_file_is_split_at_a_line(tmp_path):
    text = sentences(0)
    (tmp_path / "one.txt").write_text(text)
    corpus = prepare_corpus(tmp_path / "one.txt", tmp_path / "data", held_out=0.2)
    train, held_out = (p.read_bytes()[1:-1].decode() for p in (corpus.train, corpus.validation))
    assert train + held_out == text
    assert train.endswith("\n")
    assert 0.15 < len(held_out) / len(text) < 0.25


@pytest.mark.parametrize("held_out", [1e-6, 1 - 1e-6])
def test_both_sides_get_a_file(text_folder, tmp_path, held_out):
    corpus = prepare_corpus(text_folder, tmp_path / "data", held_out=held_out)
    assert corpus.num_train_bytes > 0
    assert corpus.num_validation_bytes > 0


def test_files_that_are_no_text_are_skipped_in_a_folder(text_folder, tmp_path):
    (text_folder / "picture.png").write_bytes(b"\x89PNG\0\0")
    (text_folder / "old.txt").write_bytes("für".encode("latin1"))
    (text_folder / "empty.txt").write_text("")
    (text_folder / ".hidden").write_text("not read")
    corpus = prepare_corpus(text_folder, tmp_path / "data", held_out=0.3)
    assert (corpus.num_files, corpus.num_skipped) == (8, 2)
    reasons = {"binary", "not UTF-8", "empty", "hidden"}
    assert {reason: entry["count"] for reason, entry in corpus.skipped.items()} == dict.fromkeys(
        reasons, 1
    )
    texts, skipped = read_documents(text_folder)
    assert b"not read" not in texts
    assert skipped.reasons == corpus.skipped


REFUSED = {
    "missing": (None, r"there is no file or folder .*data.txt"),
    "empty": (b"", r"every file is empty. Give a UTF-8 text file"),
    "binary": (b"GIF\0", r"is a binary file \(zero byte at offset 3\); give UTF-8 text"),
    "latin1": ("für".encode("latin1"), r"not UTF-8 text \(byte 0xfc at offset 1\); convert it"),
    "tiny": (b"x", r"has 1 bytes; that is too little to split"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_unusable_data_is_refused_with_advice(tmp_path, kind):
    content, message = REFUSED[kind]
    path = tmp_path / "data.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunError, match=message):
        prepare_corpus(path, tmp_path / "out", held_out=0.1)


def test_folder_without_text_is_refused(tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(RunError, match="holds no files; put text files into it"):
        prepare_corpus(tmp_path / "texts", tmp_path / "out", held_out=0.1)
    (tmp_path / "texts/a.bin").write_bytes(b"\0")
    with pytest.raises(RunError, match=r"no text in .*: .* is a binary file"):
        prepare_corpus(tmp_path / "texts", tmp_path / "out", held_out=0.1)


@pytest.fixture
def flat_file(tmp_path):
    path = tmp_path / "flat.bin"
    path.write_bytes(bytes(range(1, 102)))
    return path


def test_windows_cover_the_file_and_overlap_by_one(flat_file):
    windows = Windows(flat_bytes(flat_file), 10)
    assert len(windows) == 10
    assert windows[0].tolist() == list(range(1, 12))
    assert windows[9].tolist() == list(range(91, 102))
    with pytest.raises(RunError, match="has 101 tokens but a sequence needs 201"):
        Windows(flat_bytes(flat_file), 200)


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
    windows, order = Windows(flat_bytes(flat_file), 10), WindowOrder(10, 8, seed=3)
    expected = torch.stack([windows[i] for i in order.of_step(4)])
    shares = [
        Batches(windows, order, batch_size, rank, num_processes).of_step(4)
        for rank in range(num_processes)
    ]
    assert all(batch.shape == (batch_size, 11) for share in shares for batch in share)
    assert torch.equal(torch.cat([torch.cat(share) for share in shares]), expected)
