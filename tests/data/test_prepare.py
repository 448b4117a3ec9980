"""The work itself: the same for any number of workers, and however often it was stopped."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from pararnn.lm.data import PrepareConfig, open_tokens, prepare, units
from pararnn.lm.data.files import alone_in
from pararnn.lm.data.sources import DatasetReader
from pararnn.lm.training import RunError

from .conftest import byte_texts, contents, sentence

SCRIPT = """
import sys
from pathlib import Path
from pararnn.lm.data import PrepareConfig, prepare

if __name__ == "__main__":
    config = PrepareConfig(
        sources=("texts", "rows.jsonl"), tokenizer="train:300", held_out=0.1,
        unit_bytes=500, units_per_shard=5,
    )
    sys.exit(prepare(config, Path(sys.argv[1]), int(sys.argv[2])))
"""


def test_settings_and_sources_must_stay(texts, make):
    make(texts)
    before = contents(texts.parent / "tokens")
    with pytest.raises(RunError, match=r"would change held_out from 0.2 to 0.3. Leave them"):
        make(texts, held_out=0.3)
    (texts / "0.txt").write_text("changed")
    with pytest.raises(RunError, match="the source files were changed since"):
        make(texts)
    assert contents(texts.parent / "tokens") == before


def test_two_at_a_time_in_one_folder_are_refused(texts, make, tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    with alone_in(folder), pytest.raises(RunError, match=f"another process is writing to {folder}"):
        make(texts)
    assert not contents(folder)
    assert make(texts).train.num_documents


def test_finished_folder_is_left_alone(texts, make, capsys):
    data = make(texts)
    before = {p: p.stat().st_mtime_ns for p in data.folder.iterdir()}
    make(texts)
    assert "is finished already; nothing to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in data.folder.iterdir()} == before


def test_folder_with_other_content_is_refused(texts, make, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine").touch()
    (tmp_path / "file").touch()
    for name in ("folder", "file"):
        with pytest.raises(RunError, match="is a file or a folder with other content"):
            make(texts, name=name)
    (tmp_path / "empty").mkdir()
    make(texts, name="empty")


def test_result_within_the_source_is_refused(texts, make):
    with pytest.raises(RunError, match="lies within the source"):
        make(texts, name="texts/tokens")
    assert not (texts / "tokens").exists()


def test_settings_may_change_before_anything_is_made(lines, make, tmp_path, monkeypatch):
    content = lines.read_text()
    lines.write_text("not JSON")
    with pytest.raises(RunError, match=r"rows.jsonl line 1 is not JSON"):
        make(lines, tokenizer="bytes")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="cannot load the tokenizer"):
        make(lines, tokenizer=str(tmp_path / "empty"))
    lines.write_text(content)
    with monkeypatch.context() as patch:
        patch.setattr(units, "write_part", None)
        with pytest.raises(TypeError):
            make(lines, tokenizer="train:300")
    assert (tmp_path / "tokens/tokenizer").exists()
    data = make(lines, tokenizer="train:290")
    assert data.vocab_size == 290
    assert data.train.num_documents + data.validation.num_documents == 30


def test_damaged_progress(texts, make, tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/progress.json").write_text("{")
    with pytest.raises(RunError, match=r"progress.json is damaged .* or delete .*tokens and s"):
        make(texts)


class Failure(Exception):
    """Stands for a crash at some place."""


@pytest.mark.parametrize("place", ["write_part", "merge", "merge_last"])
@pytest.mark.parametrize("kind", ["texts", "lines", "dataset"])
def test_crashes_at_every_place(kind, place, texts, lines, make, monkeypatch, tmp_path):
    """Crashes after every call in turn, goes on each time, and ends with equal bytes."""
    if kind == "dataset":
        pytest.importorskip("datasets")
        (tmp_path / "set").mkdir()
        lines.rename(tmp_path / "set/a.jsonl")
    source = {"texts": texts, "lines": lines, "dataset": f"datasets:{tmp_path}/set"}[kind]
    expected = contents(make(source, name="whole", units_per_shard=2).folder)
    owner = units if place == "write_part" else units.Merger
    function = getattr(owner, place)
    calls = []

    def crash(*arguments):
        calls.append(arguments)
        function(*arguments)
        raise Failure

    monkeypatch.setattr(owner, place, crash)
    for _ in range(3):
        with pytest.raises(Failure):
            make(source, units_per_shard=2)
    assert len(calls) == 3
    if place != "merge_last":
        assert len({str(arguments) for arguments in calls}) == 3
    monkeypatch.setattr(owner, place, function)
    assert contents(make(source, units_per_shard=2).folder) == expected


def test_a_dataset_is_continued_without_reading_it_again(lines, make, monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    lines.rename(tmp_path / "set/a.jsonl")
    reader = DatasetReader(f"datasets:{tmp_path}/set", "text")
    blocks = list(reader.blocks(None, 400))
    assert len(blocks) > 5
    for number, block in enumerate(blocks):
        start = json.loads(json.dumps(block.next))
        assert [b.content for b in reader.blocks(start, 400)] == [
            b.content for b in blocks[number + 1 :]
        ]


def test_unwritable_folder_is_a_message(texts, make, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device", "tokens/parts/0")

    monkeypatch.setattr("pararnn.lm.data.parts.write_atomically", refuse)
    with pytest.raises(RunError, match=r"No space left on device.*continue with the same command"):
        make(texts)


@pytest.fixture
def start(tmp_path, texts, lines):
    """Starts the script; what still runs at the end of the test is killed."""
    (tmp_path / "prepare.py").write_text(SCRIPT)
    for number in range(300):
        (texts / f"more/{number}.txt").write_bytes(sentence(number).encode())
    for number in range(7):
        (texts / f"{number}.png").write_bytes(b"\0")
    processes = []

    def run(name, workers):
        process = subprocess.Popen(
            [sys.executable, "prepare.py", name, str(workers)],
            cwd=tmp_path,
            env={**os.environ, "OMP_WAIT_POLICY": "passive"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield run
    for process in processes:
        if process.poll() is None:
            process.kill()
        with process:
            pass


def finish(process, status=0):
    out, error = process.communicate(timeout=100)  # also ends the wait for orphans
    assert process.returncode == status, error
    assert "Traceback" not in error
    return out


def wait_for_units(process, folder, number):
    deadline = time.monotonic() + 100
    while not any(int(part.stem) >= number for part in folder.glob("parts/*.npz")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_folder_made_anew_has_its_own_tokenizer(texts, make):
    folder = make(texts, tokenizer="train:300").folder
    shutil.rmtree(folder)
    assert make(texts, tokenizer="train:290").vocab_size == 290


@pytest.mark.timeout(280)
def test_killed_run_goes_on_to_equal_bytes(tmp_path, start):
    whole = start("whole", 1)
    killed = start("killed", 2)
    folder = tmp_path / "killed"
    wait_for_units(killed, folder, random.randrange(1, 30))
    killed.kill()
    finish(killed, -signal.SIGKILL)
    assert not (folder / "index.json").exists()
    finish(whole)
    finish(start("killed", 2))
    assert contents(folder) == contents(tmp_path / "whole")
    data = open_tokens(folder)
    assert len(data.train.shards) > 10
    assert data.skipped.reasons["binary"]["count"] == 7


@pytest.mark.timeout(280)
def test_interrupt_from_the_keyboard_stops_it_in_order(tmp_path, start):
    """It reaches all processes, here while the workers are starting."""
    stopped = start("tokens", 2)
    while not (tmp_path / "tokens/parts").exists():
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.01)
    time.sleep(0.5)
    os.killpg(stopped.pid, signal.SIGINT)
    finish(stopped, signal.SIGINT)  # what `prepare` returned
    assert not (tmp_path / "tokens/index.json").exists()


def test_bad_line_of_a_worker_is_named(lines, make):
    with lines.open("a") as file:
        file.write('{"text": 1}\n')
    with pytest.raises(RunError, match="line 31 holds 1"):
        make(lines, workers=2)


def test_more_text_keeps_the_side_of_every_document(texts, lines, make):
    first = byte_texts(make(texts))
    second = byte_texts(make(texts, lines, name="more"))
    for before, after in zip(first, second, strict=True):
        assert set(before) <= set(after)


def test_settings_are_checked():
    for changes, message in (
        ({"sources": ()}, "no source is given"),
        ({"held_out": 0.0}, "held_out is 0.0; it must be between 0 and 1"),
        ({"unit_bytes": 0}, "must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PrepareConfig(**{"sources": ("a",), **changes})


def test_defaults_work(texts, tmp_path):
    assert prepare(PrepareConfig(sources=(str(texts),)), tmp_path / "tokens") is None
    data = open_tokens(tmp_path / "tokens")
    assert (data.train.num_documents, data.validation.num_documents) == (29, 1)
    assert all(len(split.shards) == 1 for split in (data.train, data.validation))
    assert len(list(itertools.chain(*byte_texts(data)))) == 30
