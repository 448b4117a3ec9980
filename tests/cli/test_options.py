"""Settings from a file, short names, where messages go, what TensorBoard shows."""

import json
import logging
import os
import signal
import warnings

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pararnn.cli.main import main
from pararnn.lm.data.signals import StopSignals
from pararnn.lm.data.words import LOGGER, bar, logged, say, warn
from pararnn.lm.training.config import TrainConfig, from_dict, read_settings

TINY = """--device cpu --steps 4 --checkpoint-every 2 --width 8 --layers 1 --heads 1 --seq-len 16
--batch-size 2 --text.validation-tokens 200 --data text.txt""".split()


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 40)


def printed_settings(capsys, *arguments):
    assert main(["train", "--print-config", *arguments]) == 0
    return capsys.readouterr().out


def test_short_names(capsys):
    short = printed_settings(capsys, *TINY, "--lr", "0.5", "--cell", "elman")
    long = printed_settings(
        capsys,
        *"--device cpu --steps 4 --checkpoint-every 2 --architecture.width 8".split(),
        *"--architecture.num-layers 1 --architecture.num-heads 1 --text.sequence-length 16".split(),
        *"--text.batch-size 2 --text.validation-tokens 200 --data text.txt".split(),
        *"--optimizer.learning-rate 0.5 --model elman".split(),
    )
    assert short == long


def test_printed_settings_are_read_again(tmp_path, capsys):
    printed = printed_settings(capsys, *TINY, "--model", "lstm", "--cell-options", "a=1")
    (tmp_path / "settings.json").write_text(printed)
    assert printed_settings(capsys, "--config", "settings.json") == printed
    changed = printed_settings(capsys, "--config", "settings.json", "--steps", "7")
    assert json.loads(changed) == json.loads(printed) | {"steps": 7}
    assert read_settings(tmp_path / "settings.json") == from_dict(TrainConfig, json.loads(printed))


def test_a_file_may_hold_some_settings(tmp_path, capsys):
    (tmp_path / "few.json").write_text('{"model": "elman", "architecture": {"width": 8}}')
    settings = json.loads(printed_settings(capsys, "--config", "few.json"))
    expected = TrainConfig()
    assert settings["model"] == "elman"
    assert settings["architecture"]["width"] == 8
    assert settings["architecture"]["num_layers"] == expected.architecture.num_layers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"modle": "elman"}', "TrainConfig has no field modle"),
        ('{"architecture": {"wdth": 3}}', "ArchitectureConfig has no field wdth"),
        ('{"steps": "many"}', "steps is 'many'"),
        ('{"steps": 0}', "steps is 0; it must be >= 1"),
        ("[]", "TrainConfig is [], no object"),
        ("{", "cannot take settings from settings.json"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_is_refused(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    assert main("train --config settings.json".split()) == 1
    assert message in capsys.readouterr().err


def test_settings_come_from_one_place(capsys):
    for arguments, names in {
        "--resume --config a.json": "--resume does not work with --config",
        "--size 400m --config a.json": "--size does not work with --config",
        "--resume --size 400m": "--resume does not work with --size",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(["train", *arguments.split()])
        assert stop.value.code == 2
        printed = " ".join(capsys.readouterr().err.replace("│", "").split())
        assert names in printed


def test_quiet_with_a_log_file_and_without_comparison(tmp_path, capsys):
    options = "--out run --quiet --log-file logs/run.log --no-comparison".split()
    assert main(["train", *TINY, *options]) == 0
    assert capsys.readouterr() == ("", "")
    log = (tmp_path / "logs/run.log").read_text()
    assert "INFO Validation: " in log
    assert "step by step" not in log
    assert main(["train", *TINY, *options]) == 1  # is there already
    assert "ERROR run already holds a run" in (tmp_path / "logs/run.log").read_text()
    assert not any("run.log" in str(handler) for handler in LOGGER.handlers)


def test_data_is_prepared_quietly(capsys):
    assert main("data prepare text.txt --out tokens --quiet --workers 1".split()) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("tokens: vocabulary")


def test_messages_and_bars(tmp_path, capsys):
    say("one")
    warn("two")
    assert capsys.readouterr() == ("one\n", "two\n")
    with logged(tmp_path / "log", quiet=True), warnings.catch_warnings():
        warnings.simplefilter("always")
        say("three")
        warn("four")
        warnings.warn("five", UserWarning, stacklevel=1)
        assert bar("", 1, "step").disable
    printed, error = capsys.readouterr()
    assert (printed, error.splitlines()[0]) == ("", "four")
    log = (tmp_path / "log").read_text()
    assert all(f"{word}" in log for word in ("INFO three", "WARNING four", "UserWarning: five"))
    with bar("", 1, "step") as shown:
        assert not shown.disable
    LOGGER.setLevel(logging.ERROR)  # as a user may
    say("six")
    LOGGER.setLevel(logging.INFO)
    assert "six" not in capsys.readouterr().out


def test_tensorboard_has_validation_sample_and_settings(tmp_path):
    assert main(["train", *TINY, "--out", "run", "--no-comparison"]) == 0
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"train/loss", "validation/bits_per_byte", "validation/loss"} <= set(tags["scalars"])
    assert tags["tensors"] == ["sample/text_summary"]
    assert "_hparams_/session_start_info" in board.summary_metadata


def test_the_first_interrupt_says_what_a_second_does(capfd):
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        assert "Ctrl-C again stops at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
