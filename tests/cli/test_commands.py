"""Commands in this process: help, settings, messages without tracebacks, results."""

import json
import re
import sys

import pytest

import pararnn
from pararnn.cli.main import COMMANDS, EXTRA, main

TINY = """--device cpu --steps 4 --checkpoint-every 2 --architecture.width 8
--architecture.num-layers 1 --architecture.num-heads 1 --text.sequence-length 16
--text.batch-size 2 --text.validation-tokens 200""".split()


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 40)


def train_tiny(*more):
    return main(["train", "--data", "text.txt", *TINY, *more])


def test_help_and_version(capsys):
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pararnn {pararnn.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: pararnn {command}" in capsys.readouterr().out


def test_misspelt_command(capsys):
    assert main(["trian"]) == 2
    assert "there is no command 'trian'; perhaps you meant 'train'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["train", "--stpes", "3"], "--steps"),
        (["train", "--checkpoint-evry", "3"], "--checkpoint-every"),
        (["train", "--optimizer.learning-rat", "1"], "--optimizer.learning-rate"),
        (["generate", "run", "--promt", "a"], "--prompt"),
        (["eval", "run", "--dat", "a"], "--data"),
    ],
)
def test_misspelt_flag_is_answered_with_the_nearest(arguments, nearest, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "Perhaps you meant" in printed
    assert nearest in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--model", "paragro"], "perhaps you meant 'paragru'"),
        (["train", "--steps", "0"], "steps is 0; it must be >= 1"),
        (
            ["generate", "run", "--temperature", "-1"],
            "temperature is -1.0; it must be >= 0",
        ),
        (["generate", "run", "--temperature", "inf"], "temperature is inf; it must be >= 0"),
        (["generate", "run", "--num-tokens", "0"], "num-tokens is 0; it must be >= 1"),
        (["eval", "run", "--task-folder", "tasks"], "--task-folder needs --tasks"),
        (["eval", "run", "--limit", "3"], "--limit needs --tasks"),
        (["eval", "run", "--tasks", "piqa", "--data", "a"], "--data does not work with --tasks"),
        (["eval", "run", "--tasks", "piqa,"], "--tasks 'piqa,' has an empty name"),
        (["eval", "run", "--tasks", "piqa", "--limit", "0"], "limit is 0; it must be >= 1"),
    ],
)
def test_refused_value(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "none.txt"], "none.txt. Besides these, pararnn data"),
        (["train", "--resume", "--out", "none"], "none holds no run"),
        (["train", "--resume"], "no run to resume in runs/; name its folder with --out"),
        (["generate", "none"], "none holds no run"),
        (["eval", "none"], "none holds no run"),
        (["generate", "none", "--prompt", "a\0b"], "the prompt holds a zero byte"),
    ],
)
def test_failure_is_one_line(arguments, message, capsys):
    assert main(arguments) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("pararnn: ")
    assert printed.count("\n") == 1


def test_printed_settings_are_resolved_and_start_nothing(tmp_path, capsys):
    assert main(["train", "--print-config", "--steps", "7", "--data", "text.txt"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert (settings["steps"], settings["model"]) == (7, "paragru")
    assert settings["schedule"]["length"] > 7
    assert settings["data"] == str(tmp_path / "text.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("package", sorted(EXTRA))
def test_missing_extra_is_named(package, monkeypatch, capsys):
    for name in list(sys.modules):
        if name.startswith("pararnn.cli.train"):
            monkeypatch.delitem(sys.modules, name)

    def absent(name):
        raise ModuleNotFoundError(f"No module named {package!r}", name=f"{package}.part")

    monkeypatch.setattr("importlib.import_module", absent)
    assert main(["train"]) == 1
    printed = capsys.readouterr().err
    assert f"train needs the package {package}, which is not installed" in printed
    assert 'pip install "pararnn[train]"' in printed


def test_a_broken_import_is_not_hidden(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'pararnn.gone'", name="pararnn.gone")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(ModuleNotFoundError):
        main(["train"])


def test_extra_is_what_the_package_declares():
    from importlib.metadata import requires

    declared = [line for line in requires("pararnn") or [] if re.search(r"extra == .train.", line)]
    assert {re.match(r"[\w-]+", line)[0] for line in declared} == EXTRA


def test_train_then_generate_and_evaluate(capsys):
    assert train_tiny() == 0
    assert train_tiny() == 0
    assert "Run: runs/paragru-2" in capsys.readouterr().out
    command = ["generate", "runs/paragru-1", "--prompt", "to be", "--num-tokens", "12"]
    assert main([*command, "--weights", "int8"]) == 0
    assert capsys.readouterr().out.startswith("to be")
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("to be")
    assert main(["eval", "runs/paragru-1", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert re.fullmatch(
        r"\d\.\d{4} bits per byte \(\d\.\d{4} nats, perplexity \d+\.\d{4} per byte\) "
        r"on \d+ held-out bytes\n",
        printed,
    )
    assert main(["eval", "runs/paragru-1", "--data", "text.txt"]) == 0
    assert "on 1,641 bytes of text.txt" in capsys.readouterr().out


def test_resume_takes_the_last_run_and_its_settings(capsys):
    assert train_tiny("--model", "paralstm", "--seed", "5") == 0
    assert main(["train", "--resume", "--steps", "6"]) == 0
    printed = capsys.readouterr().out
    assert "Resumed at step 4 from runs/paralstm-1/checkpoints/step-00000004" in printed
    lines = open_lines("runs/paralstm-1/metrics.jsonl")
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert main(["train", "--resume", "--print-config"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    assert main(["train", "--resume", "--seed", "6"]) == 1
    assert "would change seed from 5 to 6" in capsys.readouterr().err


def open_lines(path):
    with open(path) as file:
        return file.read().splitlines()


def test_an_untrained_checkpoint_does_not_stand_for_a_damaged_one(tmp_path, capsys):
    assert train_tiny("--steps", "2", "--checkpoint-every", "2", "--out", "run") == 0
    newest = tmp_path / "run/checkpoints/step-00000002/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    capsys.readouterr()
    assert main(["eval", "run"]) == 1
    printed = capsys.readouterr().err
    assert "step-00000002/model.safetensors is damaged" in printed
    assert "is not trained. If you want that one" in printed
    assert main(["eval", "run/checkpoints/step-00000000", "--data", "text.txt"]) == 0


def test_generate_uses_the_last_good_checkpoint(tmp_path, capsys):
    assert train_tiny("--out", "run") == 0
    newest = tmp_path / "run/checkpoints/step-00000004/model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    capsys.readouterr()
    assert main(["eval", "run"]) == 0
    printed = capsys.readouterr().err
    assert "Skipped: step-00000004/model.safetensors is damaged" in printed
    assert "Using step-00000002." in printed
    other = tmp_path / "run/checkpoints/step-00000002/manifest.json"
    other.unlink()
    assert main(["eval", "run"]) == 1
    assert "no usable checkpoint in run/checkpoints" in capsys.readouterr().err
