"""Suites of models: one after another and side by side, stopped, continued, reported."""

import importlib.util
import json
import os
import signal

import pytest
import torch

from pararnn.lm.training import RunError
from pararnn.tasks import TASKS, suite
from pararnn.tasks.report import accuracy_line, percent, tables
from pararnn.tasks.settings import SuiteConfig, models_at_once
from pararnn.tasks.suite import run_suite
from pararnn.tasks.training import Training

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers.*")


def config(out, **changes):
    defaults = {
        "tasks": ("parity", "s3"),
        "architectures": ("paragru", "elman"),
        "seeds": 1,
        "preset": "smoke",
        "steps": 6,
        "test_samples": 8,
        "device": "cpu",
        "out": out,
    }
    return SuiteConfig(**{**defaults, **changes})


def names(result):
    return [(r["task"], r["architecture"], r["seed"]) for r in result.results]


def test_writes_all(tmp_path, capsys):
    result = run_suite(config(tmp_path, seeds=2), "the command")
    expected = [(t, a, s) for t in ("parity", "s3") for a in ("paragru", "elman") for s in (0, 1)]
    assert names(result) == expected
    assert result.failed == {}
    assert result.stopped_by is None
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["results"] == result.results
    assert stored["facts"]["command"] == "the command"
    assert stored["facts"]["torch"] == torch.__version__
    one = stored["results"][0]
    assert (one["device"], one["settings"]["steps"], one["steps"]) == ("CPU", 6, 6)
    assert one["task_settings"] == {}
    page = (tmp_path / "results.md").read_text()
    printed = capsys.readouterr().out
    assert tables(result.results) in page
    assert tables(result.results) in printed
    assert "[8/8] s3, elman, seed 1: " in printed
    assert "- parity: transformer 53, mamba2 52, paragru 100, paralstm 100 (Danieli" in page
    for name in ("heat-map.png", "lengths.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_grows(tmp_path, monkeypatch, capsys):
    """More seeds, tasks and architectures come to what is there; nothing is trained twice."""
    run_suite(config(tmp_path))
    trained = []
    pieces = Training.pieces
    monkeypatch.setattr(
        Training, "pieces", lambda self, ask: trained.append(self.unit) or pieces(self, ask)
    )
    result = run_suite(config(tmp_path, tasks=("parity", "1-hop"), architectures=("paragru",)))
    assert [str(unit) for unit in trained] == ["1-hop-paragru-0"]
    assert len(result.results) == 5
    assert "1 of 2 models are finished" in capsys.readouterr().out
    with pytest.raises(RunError, match="made with steps 6, but now it is 7"):
        run_suite(config(tmp_path, steps=7))


def test_side_by_side_gives_the_same(tmp_path):
    alone = run_suite(config(tmp_path / "alone"))
    together = run_suite(config(tmp_path / "together", side_by_side=2))
    for one, other in zip(alone.results, together.results, strict=True):
        for result in (one, other):
            result.pop("train_seconds"), result.pop("test_seconds")
        assert one == other


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_signal_stops_it_and_it_goes_on(processes, tmp_path, monkeypatch, capsys):
    """As Ctrl-C does; the result is that of a suite that was not stopped."""
    expected = run_suite(config(tmp_path / "whole"))
    say = suite.say

    def interrupting(text):
        say(text)
        if text.startswith("[1/4]"):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(suite, "say", interrupting)
    options = {"side_by_side": processes, "steps": 6}
    stopped = run_suite(config(tmp_path / "stopped", **options))
    assert stopped.stopped_by == signal.SIGINT
    assert 1 <= len(stopped.results) < 4
    assert "the same command goes on" in capsys.readouterr().out
    monkeypatch.setattr(suite, "say", say)
    again = run_suite(config(tmp_path / "stopped", **options))
    assert again.stopped_by is None
    assert [r["tests"] for r in again.results] == [r["tests"] for r in expected.results]


def test_a_model_that_fails_leaves_the_others(tmp_path, monkeypatch, capsys):
    def advance(self):
        if self.unit.architecture == "elman":
            raise RuntimeError("this is broken")
        return run(self)

    run = Training.advance
    monkeypatch.setattr(Training, "advance", advance)
    result = run_suite(config(tmp_path))
    assert set(result.failed) == {"parity-elman-0", "s3-elman-0"}
    assert names(result) == [("parity", "paragru", 0), ("s3", "paragru", 0)]
    assert "parity-elman-0 failed: RuntimeError: this is broken" in capsys.readouterr().out
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["failed"] == result.failed


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    absent = lambda name, *more: None if name == "matplotlib" else find(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    run_suite(config(tmp_path, tasks=("parity",), architectures=("elman",)))
    assert 'Install it with pip install "pararnn[plots]"' in capsys.readouterr().out
    assert not (tmp_path / "heat-map.png").exists()
    assert (tmp_path / "results.json").exists()


def test_mamba2_without_its_kernels_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "missing_kernels", lambda name: f"the slow path of {name}")
    monkeypatch.setattr(suite, "_train", lambda *arguments: iter(()))
    run_suite(config(tmp_path, architectures=("mamba2",)))
    assert "Note: mamba2 takes the slow path of mamba2." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ()}, "tasks is empty; name at least one"),
        ({"tasks": ("pairty",)}, "no task 'pairty'; perhaps you meant 'parity'"),
        ({"architectures": ("gru",)}, "no architecture 'gru'; perhaps you meant"),
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"side_by_side": -1}, "side-by-side is -1"),
        ({"length": 1, "tasks": ("dyck-2",)}, "length is 1, but sequences of dyck-2"),
        ({"preset": "paper"}, "the paper has no task 's3'"),
    ],
)
def test_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_models_at_once():
    assert models_at_once(None, 6, "cpu")[0] == models_at_once(None, 0, "cpu")[0] == 1
    assert models_at_once(4, 6, "cpu") == (4, "each in a process")
    assert models_at_once(None, 6, "cuda")[0] == 6
    assert models_at_once(None, 40, "cuda")[0] == 12
    assert models_at_once(40, 40, "cuda")[0] == 15


def test_only_what_is_right_is_100():
    assert percent(100.0) == "100"
    assert percent(99.99) == "99.9"
    assert percent(52.04) == "52.0"


def test_a_line_about_a_model():
    result = {
        "task": "parity",
        "architecture": "paragru",
        "seed": 2,
        "tests": {"100": {"accuracy": 1.0}, "1600": {"accuracy": 0.987}},
        "ended": "learnt",
        "steps": 1500,
        "train_seconds": 12.3,
    }
    assert accuracy_line(result) == (
        "parity, paragru, seed 2: 100 % at 100, 98.7 % at 1,600 tokens; learnt after 1,500 steps, "
        "12 s"
    )


def test_all_tasks_have_settings(tmp_path):
    every = config(tmp_path, tasks=tuple(TASKS), steps=None)
    assert {every.settings(task).steps for task in TASKS} == {30}
