"""The examples run; in a short form where their own takes long."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = {
    "own_cell.py": (["--steps", "2"], "accuracy"),
    "drop_in.py": (["--steps", "1"], r"(?s)Parallelized, logits differ by (0|\de-0[5-9]).*ParaGRU"),
    "long_waveforms.py": (["--steps", "1"], "(?s)accuracy 0.*the recurrence alone: ParaGRU"),
    "not_converging.py": (
        ["--time", "110"],
        r"(?s)converged.*exponent \+0.\d+ before, -0.\d+ after",
    ),
    "functional.py": (["--time", "50"], "step 100: mean rate"),
}


def test_every_example_is_run():
    assert {p.name for p in EXAMPLES.glob("*.py")} == SHORT.keys()


@pytest.mark.parametrize("name", SHORT)
def test_example(name, monkeypatch, capsys):
    arguments, expected = SHORT[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert re.search(expected, capsys.readouterr().out)
