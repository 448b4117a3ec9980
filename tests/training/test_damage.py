"""Run folders that were damaged or edited by hand: right results or one line, and nothing lost."""

import hashlib
import io
import itertools
import json
import math
import os
import random
import shutil
from contextlib import redirect_stderr, redirect_stdout

import pytest

from pararnn.cli.main import main
from pararnn.lm.training import RunFolder, report

from .conftest import sentences

OLDER, NEWEST, LAST = "step-00000003", "step-00000006", "step-00000008"
COMMANDS = {
    "train": ("--resume", "--steps", "8", "--out", "run"),
    "eval": ("run",),
    "generate": ("run", "--num-tokens", "8"),
}
UNIMPORTANT = ("env.txt", "metrics.jsonl", "validation.jsonl", "tensorboard", "loss.png", "sample")


def replace_by_folder(path):
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("something")


EDITS = {
    "deleted": os.unlink,
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "random": lambda path: path.write_bytes(random.Random(0).randbytes(path.stat().st_size)),
    "not UTF-8": lambda path: path.write_bytes(b'{"step": "\xff\xfe"}\n' + path.read_bytes()),
    "nested": lambda path: path.write_bytes(b"[" * 100_000 + b"\n"),
    "folder": replace_by_folder,
}
VALUES = {
    "text": "abc",
    "list": [1],
    "object": {"a": 1},
    "none": None,
    "true": True,
    "negative": -1,
    "huge": 10**30,
    "NaN": math.nan,
    "infinite": math.inf,
    "zero byte": "a\0b",
}


class Place:
    """A copy of the run to damage, and the commands on it."""

    def __init__(self, folder):
        self.run = folder / "run"

    def __call__(self, command):
        """Exit status, what was printed, and the lines of the errors."""
        printed, error = io.StringIO(), io.StringIO()
        with redirect_stdout(printed), redirect_stderr(error):
            status = main([command, *COMMANDS[command]])
        lines = [line for line in error.getvalue().splitlines() if line and "%|" not in line]
        return status, printed.getvalue(), lines

    def contents(self):
        return {
            path.relative_to(self.run).as_posix(): hashlib.sha256(path.read_bytes()).digest()
            for path in self.run.rglob("*")
            if path.is_file() and path.name != ".lock"
        }

    def copy(self, source):
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(source, self.run)

    def outcome(self, command, printed):
        if command != "train":
            return printed.splitlines()[-1]
        return (self.run / "checkpoints" / LAST / "model.safetensors").read_bytes()


@pytest.fixture(autouse=True)
def _short_report(monkeypatch):
    monkeypatch.setattr(report, "LARGEST_LOOP", 1)
    monkeypatch.setattr(report, "SAMPLE_TOKENS", 2)


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Place(tmp_path)
    made.copy(trained)
    return made


@pytest.fixture(scope="module")
def right(trained, tmp_path_factory):
    """What the commands give where nothing is damaged, by the checkpoint that they use."""
    place, results = Place(tmp_path_factory.mktemp("right")), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place.run.parent)
        for used in (NEWEST, OLDER):
            place.copy(trained)
            if used == OLDER:
                shutil.rmtree(place.run / "checkpoints" / NEWEST)
            for command in ("eval", "generate", "train"):
                status, printed, lines = place(command)
                assert (status, lines) == (0, [])
                results[command, used] = place.outcome(command, printed)
    return results


def check(place, trained, right, damage, told, *, works=None):
    """Every command works rightly, or ends with one line; `told` are words that it may name."""
    for command in COMMANDS:
        place.copy(trained)
        damage(place.run)
        before = place.contents()
        status, printed, lines = place(command)
        if status == 0:
            skipped = any(line.startswith("Skipped: ") for line in lines)
            used = OLDER if skipped or f"Set aside: {NEWEST}" in printed else NEWEST
            assert place.outcome(command, printed) == right[command, used], (command, printed)
        else:
            assert status == 1, (command, status)
            (line,) = lines
            assert line.startswith("pararnn: "), line
            assert any(word in line for word in told), (command, line)
            after = place.contents()
            lost = {name for name, digest in before.items() if after.get(name) != digest}
            if f"checkpoints/{LAST}/manifest.json" not in after:  # else it was trained to the end
                assert lost <= {"config.json"}, (command, lost)
            if lost:  # it has the new number of steps
                assert RunFolder(place.run).read_config().steps == 8
        if works is not None:
            assert (status == 0) == (command in works), (command, lines)


def files(trained):
    run = trained
    return sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())


def commands_that_work(name):
    """After any damage to a file."""
    if name.startswith(("checkpoints/", ".lock", *UNIMPORTANT)):
        return COMMANDS
    return ("generate",)


def damage_file(place, trained, right, name, kind):
    works = commands_that_work(name)
    if name == ".lock" and kind == "folder":
        works = ("eval", "generate")
    if name.endswith(("events", ".png", "sample.txt", "env.txt", ".jsonl")) and kind == "folder":
        works = None  # where train writes
    if name == "config.json" and kind in ("deleted", "folder"):
        works = ()  # there is no run
    told = (name, name.rpartition("/")[2])
    check(place, trained, right, lambda run: EDITS[kind](run / name), told, works=works)


def walk(cases, run):
    """Run all cases, then tell all that failed."""
    failed = []
    for case in cases:
        try:
            run(*case)
        except Exception as error:
            failed.append(f"{case}: {error!r}")
    assert not failed, "\n".join(failed)


SOME_FILES = [
    (f"checkpoints/{NEWEST}/manifest.json", "nested"),
    (f"checkpoints/{NEWEST}/manifest.json", "not UTF-8"),
    (f"checkpoints/{NEWEST}/manifest.json", "folder"),
    (f"checkpoints/{NEWEST}/state/.metadata", "random"),
    (f"checkpoints/{NEWEST}/state/__0_0.distcp", "deleted"),
    (f"checkpoints/{NEWEST}/config.json", "emptied"),
    (f"checkpoints/{OLDER}/model.safetensors", "cut"),
    ("config.json", "cut"),
    ("config.json", "nested"),
    ("config.json", "not UTF-8"),
    ("data/index.json", "not UTF-8"),
    ("data/index.json", "deleted"),
    ("data/index.json", "folder"),
    ("data/train-00000.bin", "deleted"),
    ("data/validation-00000.bin", "random"),
    ("data/validation-00000.bin", "folder"),
    ("metrics.jsonl", "not UTF-8"),
    ("metrics.jsonl", "random"),
    ("metrics.jsonl", "folder"),
    ("validation.jsonl", "nested"),
    ("validation.jsonl", "emptied"),
    (".lock", "random"),
    (".lock", "folder"),
]


@pytest.mark.parametrize(("name", "kind"), SOME_FILES)
def test_a_damaged_file(place, trained, right, name, kind):
    damage_file(place, trained, right, name, kind)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_damage_to_every_file(place, trained, right):
    cases = itertools.product(files(trained), EDITS)
    walk(cases, lambda name, kind: damage_file(place, trained, right, name, kind))


def leaves(value, path=()):
    """Paths to everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else ()
    for key, part in inside:
        yield (*path, key)
        yield from leaves(part, (*path, key))


def edit_json(file, path, change):
    content = json.loads(file.read_bytes())
    part = content
    for key in path[:-1]:
        part = part[key]
    change(part, path[-1])
    file.write_text(json.dumps(content))


def change_value(place, trained, right, name, path, kind):
    def change(part, key):
        if kind == "missing":
            del part[key]
        elif kind == "unknown":
            part["surplus"] = part[key]
        else:
            part[key] = VALUES[kind]

    told = (name, name.rpartition("/")[2], path[-1], "config.json and data/")
    check(place, trained, right, lambda run: edit_json(run / name, path, change), told)


MANIFEST = f"checkpoints/{NEWEST}/manifest.json"
SOME_VALUES = [
    ("config.json", "seed", "huge"),
    ("config.json", "seed", "NaN"),
    ("config.json", "backend", "text"),
    ("config.json", "device", "text"),
    ("config.json", "model", "list"),
    ("config.json", "data", "true"),
    ("config.json", "data", "zero byte"),
    ("config.json", "text", "none"),
    ("config.json", "architecture.width", "huge"),
    ("config.json", "text.batch_size", "huge"),
    ("config.json", "text.held_out", "NaN"),
    ("config.json", "optimizer.learning_rate", "huge"),
    ("config.json", "optimizer.precision", "object"),
    ("config.json", "steps", "missing"),
    ("config.json", "execution.compile", "unknown"),
    ("data/index.json", "splits", "list"),
    ("data/index.json", "sha256", "none"),
    ("data/index.json", "vocab_size", "text"),
    ("data/index.json", "splits.train", "text"),
    (MANIFEST, "step", "huge"),
    (MANIFEST, "step", "infinite"),
    (MANIFEST, "files", "list"),
    (MANIFEST, "format", "negative"),
]


@pytest.mark.parametrize(("name", "path", "kind"), SOME_VALUES)
def test_a_changed_value(place, trained, right, name, path, kind):
    change_value(place, trained, right, name, tuple(path.split(".")), kind)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("default")  # the compiler's own, where a change asks for it
@pytest.mark.parametrize(
    "name",
    ["config.json", "data/index.json", MANIFEST, f"checkpoints/{NEWEST}/progress.json"],
)
def test_every_change_of_every_value(place, trained, right, name):
    paths = leaves(json.loads((trained / name).read_bytes()))
    cases = itertools.product(paths, (*VALUES, "missing", "unknown"))
    walk(cases, lambda path, kind: change_value(place, trained, right, name, path, kind))


def test_nothing_usable_is_one_line_and_nothing_is_renamed(place):
    for name in (OLDER, NEWEST):
        EDITS["cut"](place.run / "checkpoints" / name / "model.safetensors")
    before = place.contents()
    for command in COMMANDS:
        status, _, (line,) = place(command)
        assert status == 1
        assert f"{OLDER}/model.safetensors is damaged" in line
    assert place.contents() == before


def test_records_of_other_lines_are_kept(place):
    path = place.run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:2], b"\xff\n", b"[]\n", *lines[2:]])
    path.write_bytes(damaged)
    status, printed, _ = place("train")
    assert status == 0
    assert "because of 2 lines, the first being line 3, without a record of a step" in printed
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == list(
        range(1, 9)
    )
    assert (place.run / "unusable-metrics.jsonl").read_bytes() == damaged


def test_other_data_in_the_place_of_the_text(place):
    """Other text, all checksums right: not what the run was trained on."""
    shutil.rmtree(place.run / "data")
    path = place.run / "config.json"
    other = place.run.parent / "other.txt"
    other.write_text(sentences(9))
    config = RunFolder(place.run).read_config()
    path.write_text(path.read_text().replace(str(config.data), str(other)))
    for command in ("train", "eval"):
        status, _, (line,) = place(command)
        assert status == 1
        assert "; restore config.json and data/" in line
