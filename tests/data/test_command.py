"""`pararnn data` as it is called."""

import io
import signal
import sys

import pytest

from pararnn.cli import main
from pararnn.lm.data.parts import write_part

from .conftest import contents


@pytest.fixture(autouse=True)
def _folder(texts, monkeypatch):
    monkeypatch.chdir(texts.parent)


def prepare(*more):
    return main(["data", "prepare", "texts", "--out", "tokens", "--workers", "1", *more])


def test_prepare_and_check(capsys):
    assert prepare("--tokenizer", "train:300", "--held-out", "0.2") == 0
    printed = capsys.readouterr().out
    assert "tokens: vocabulary of 300 tokens; all checksums match" in printed
    assert "train: " in printed
    assert "validation: " in printed
    assert main(["data", "check", "tokens"]) == 0
    assert capsys.readouterr().out in printed


def test_a_stopped_command_says_how_to_continue(capsys, monkeypatch):
    def write_and_signal(*arguments):
        write_part(*arguments)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("pararnn.lm.data.units.write_part", write_and_signal)
        assert prepare() == 128 + signal.SIGTERM
    printed = capsys.readouterr().out
    assert "Stopped by SIGTERM; what is prepared is kept. Continue with the same" in printed
    assert prepare() == 0


def test_failures_are_one_line(texts, capsys):
    assert prepare() == 0
    (texts.parent / "tokens/train-00000.bin").write_bytes(b"short")
    capsys.readouterr()
    for arguments, message in (
        (["check", "tokens"], "train-00000.bin has 5 bytes instead of"),
        (["check", "texts"], "holds no prepared data"),
        (["prepare", "none", "--out", "new"], "there is no file or folder none"),
        (["prepare", "texts", "--out", "tokens", "--held-out", "0.5"], "would change held_out"),
    ):
        assert main(["data", *arguments]) == 1
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.startswith("pararnn: ")
        assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "--out", "new"], "no source is given"),
        (["prepare", "texts"], "--out"),
        (["prepare", "texts", "--out", "new", "--workers", "0"], "workers is 0"),
        (["prepare", "texts", "--out", "new", "--tokenizer", "train:9"], "write train:VOCAB_SIZE"),
        (["prepare", "texts", "--out", "new", "--hold-out", "0.1"], "--held-out"),
        (["prepair", "texts"], "prepare, check"),
        ([], "prepare, check"),
    ],
)
def test_misuse(arguments, message, texts, capsys):
    before = contents(texts.parent)
    with pytest.raises(SystemExit) as stop:
        main(["data", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert contents(texts.parent) == before


def test_a_terminal_that_is_not_utf8(texts, monkeypatch):
    (texts / "Grüße.png").write_bytes(b"\0")
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, "ascii"))
    assert prepare() == 0
    sys.stdout.flush()
    assert rb"skipped: binary: 1 (texts/Gr\xfc\xdfe.png)" in printed.getvalue()
