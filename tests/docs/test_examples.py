"""The examples run; in a short form where their own takes long."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = {
    "own_cell.py": (["--steps", "2"], "accuracy"),
    "drop_in.py": (["--steps", "1"], "ParaGRU"),
    "functional.py": (["--time", "50"], "step 100: mean rate"),
}


def test_every_example_is_run():
    assert {p.name for p in EXAMPLES.glob("*.py")} == SHORT.keys()


@pytest.mark.parametrize("name", SHORT)
def test_example(name, monkeypatch, capsys):
    arguments, expected = SHORT[name]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert expected in capsys.readouterr().out
