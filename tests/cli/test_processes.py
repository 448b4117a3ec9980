"""Whole processes: killed and resumed, stopped by a signal, out of disk space, bare imports."""

import json
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from forks import Fork, python

from pararnn.cli.main import main

SETTINGS = """--data text --device cpu --checkpoint-every 4 --architecture.width 16
--architecture.num-layers 2 --architecture.num-heads 2 --text.sequence-length 64
--text.batch-size 4 --text.validation-tokens 200""".split()
STEPS = 60


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    choose = random.Random(0)
    for number in range(6):
        words = (choose.choice(["state", "step", "gate", "cell"]) for _ in range(500))
        (tmp_path / f"text/{number}.txt").write_text(" ".join(words))
    return tmp_path


@pytest.fixture
def start(folder):
    """Starts `pararnn train` in the folder; what still runs at the end of the test is killed.

    As a user starts it, or, with `fork`, without the imports.
    """
    processes = []

    def begin(*arguments, fork=True, run=python):
        command = ["-m", "pararnn.cli", "train", *arguments]
        if fork:
            process = Fork(run, *command, folder=folder)
        else:
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process = subprocess.Popen([sys.executable, *command], cwd=folder, **streams)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        with process:
            pass


def records(folder, name):
    path = folder / name / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(process, folder, name, step):
    deadline = time.monotonic() + 100
    while len(records(folder, name)) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def curve(folder, name):
    measured = ("step", "loss", "z_loss", "grad_norm", "learning_rate", "bits_per_byte")
    return [[record[key] for key in measured] for record in records(folder, name)]


@pytest.mark.timeout(280)
def test_killed_stopped_and_resumed_runs_have_the_same_curve(folder, start, monkeypatch, capsys):
    killed = start(*SETTINGS, "--steps", str(STEPS), "--out", "killed", fork=False)
    wait_for_step(killed, folder, "killed", random.randrange(1, STEPS - 20))
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    lost = len(records(folder, "killed"))
    monkeypatch.chdir(folder)
    assert main(["train", *SETTINGS, "--steps", str(STEPS), "--out", "whole"]) == 0
    assert "bits per byte" in capsys.readouterr().out

    stopped = start("--resume", "--out", "killed")
    wait_for_step(stopped, folder, "killed", min(lost + 6, STEPS - 8))
    stopped.send_signal(signal.SIGTERM)
    out, error = stopped.communicate()
    assert stopped.returncode == 128 + signal.SIGTERM, error
    assert "checkpoint saved. Continue with: pararnn train --resume --out killed" in out
    assert "Traceback" not in error

    resumed = start("--resume", "--out", "killed")
    out, error = resumed.communicate()
    assert resumed.returncode == 0, error
    assert "Resumed at step" in out
    assert [record["step"] for record in records(folder, "killed")] == list(range(1, STEPS + 1))
    assert curve(folder, "killed") == curve(folder, "whole")


def with_a_full_disk(*arguments):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    python(*arguments)


def test_a_full_disk_is_a_message(start):
    process = start(*SETTINGS, "--steps", "3", "--out", "run", run=with_a_full_disk)
    _, error = process.communicate()
    assert process.returncode == 1
    assert "cannot save a checkpoint at step 0" in error
    assert "Continue with: pararnn train --resume --out run" in error
    assert "Traceback" not in error


BARE = """
import sys
import pararnn, pararnn.cli
heavy = {"transformers", "tyro", "torchdata", "tensorboard", "safetensors", "matplotlib"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""


def test_importing_the_package_needs_no_extra():
    result = subprocess.run(
        [sys.executable, "-c", BARE], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
