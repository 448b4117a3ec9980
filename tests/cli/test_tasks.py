"""`pararnn tasks` in this process."""

import json
import subprocess
import sys

import pytest

from pararnn.cli.main import main
from pararnn.tasks import TASKS
from pararnn.tasks.architectures import ARCHITECTURES

TINY = """tasks --tasks parity --architectures paragru --seeds 1 --preset smoke --steps 4
--test-samples 8 --device cpu""".split()


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_runs(tmp_path, capsys):
    assert main(TINY) == 0
    printed = capsys.readouterr().out
    assert "[1/1] parity, paragru, seed 0: " in printed
    assert "Written to runs/tasks" in printed
    stored = json.loads((tmp_path / "runs/tasks/results.json").read_text())
    assert stored["facts"]["command"] == "pararnn " + " ".join(TINY)
    assert main(TINY) == 0
    assert "1 of 1 models are finished" in capsys.readouterr().out


def test_list(capsys):
    assert main(["tasks", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in (*TASKS, *ARCHITECTURES):
        assert name in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "pairty"], "no task 'pairty'; perhaps you meant 'parity'"),
        (["--architectures", "paragur"], "perhaps you meant 'paragru'"),
        (["--seeds", "0"], "seeds is 0; it must be at least 1"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--preset", "paper"], "the paper has no task 's3'"),
        (["--seds", "3"], "--seeds"),
    ],
)
def test_misuse(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tasks", *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_unknown_device(capsys):
    assert main([*TINY, "--device", "abacus"]) == 1
    assert "device 'abacus' is not one of PyTorch's" in capsys.readouterr().err


def test_other_settings_in_the_same_folder(capsys):
    assert main(TINY) == 0
    assert main([*TINY, "--learning-rate", "0.1"]) == 1
    assert "name another folder with --out" in capsys.readouterr().err


def test_help_loads_no_models():
    """It is quick: PyTorch and transformers would take longer than all the rest."""
    script = """
import sys
from pararnn.cli.main import main
try:
    main(["tasks", "--help"])
finally:
    loaded = [name for name in ("torch", "transformers", "matplotlib") if name in sys.modules]
    print(*loaded, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.split() == []
