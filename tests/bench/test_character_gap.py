"""benchmarks/character_gap.py at toy size."""

import re
import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/character_gap.py"


def test_runs_are_trained_and_printed(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 100)
    arguments = [str(text), "--steps", "2", "--cosine", "--runs", "output-gate", "paralstm-open"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    out = capsys.readouterr().out
    for name in ("output-gate", "paralstm-open"):
        assert re.search(rf"{name} +seed 0: held out \d\.\d{{3}} \d\.\d{{3}}, train \d\.\d", out)
