"""benchmarks/quality.py at toy size."""

import json
import random
import runpy
import sys
from pathlib import Path

import pytest

from pararnn.lm.training import RunFolder

SCRIPT = Path(__file__).parents[2] / "benchmarks/quality.py"
TINY = """--steps 3 --batch-size 2 --sequence-length 32 --width 64 --layers 1
--validation-tokens 300 --device cpu""".split()


def test_models_see_the_same_and_are_not_trained_twice(tmp_path, monkeypatch, capsys):
    (tmp_path / "text").mkdir()
    for number in range(6):
        words = random.Random(number).choices(["state", "step", "cell", "of", "the"], k=300)
        (tmp_path / f"text/{number}.txt").write_text(" ".join(words))
    arguments = [*TINY, "--data", str(tmp_path / "text"), "--out", str(tmp_path / "out")]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["quality.py", *arguments, *more])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    run("--architectures", "paragru")
    first = RunFolder.open(tmp_path / "out/paragru")
    written = first.metrics.stat().st_mtime_ns
    printed = run("--architectures", "paragru", "transformer")
    assert first.metrics.stat().st_mtime_ns == written
    second = RunFolder.open(tmp_path / "out/transformer")
    assert (first.data / "train-00000.bin").read_bytes() == (
        second.data / "train-00000.bin"
    ).read_bytes()
    assert first.read_config().text == second.read_config().text
    rows = {
        row["architecture"]: row for row in json.loads((tmp_path / "out/results.json").read_text())
    }
    ours, theirs = rows["paragru"], rows["transformer"]
    assert ours["learning_rate"] == 5e-3
    assert theirs["learning_rate"] == 3e-3
    assert ours["tokens"] == theirs["tokens"] == 3 * 2 * 32
    assert ours["parameters"] == pytest.approx(theirs["parameters"], rel=0.1)
    assert ours["carried"] != ours["validation"]
    assert theirs["carried"] is None
    ratio = ours["validation"] / theirs["validation"]
    assert f"paragru / transformer: {ratio:.3f} of its bits per byte" in printed
    assert "| transformer | " in printed
