"""How much work a command does before it answers: CPU time of whole processes."""

import os
import subprocess
import sys

import pytest


def cpu_seconds(*arguments):
    """Of `pararnn ARGUMENTS` in a process of its own, with its children."""
    command = [sys.executable, "-m", "pararnn.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, _, used = os.wait4(process.pid, 0)
    process.returncode = 0  # it has been waited for
    return used.ru_utime + used.ru_stime


def test_version_is_answered_at_once():
    assert cpu_seconds("--version") < 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "trian",
        "train --help",
        "train --stpes 3",
        "train --model paragro",
        "train --print-config",
        "generate --help",
        "eval --help",
        "data prepare --help",
        "bench train --help",
        "reproduce --help",
        "reproduce figure-7",
    ],
)
def test_help_and_typos_are_answered_without_loading_pytorch(arguments):
    assert cpu_seconds(*arguments.split()) < 1.5


def test_the_package_loads_pytorch_when_a_name_is_used():
    script = """
import sys, pararnn, pararnn.lm.training
assert pararnn.__version__ and "torch" not in sys.modules
assert not hasattr(pararnn, "__wrapped__") and "torch" not in sys.modules
from pararnn.lm.training import TrainConfig
assert callable(pararnn.explain) and callable(pararnn.diagnose) and "torch" in sys.modules
names = {}
exec("from pararnn import *", names)
assert {"RNN", "cells", "explain", "testing"} <= set(names) & set(dir(pararnn))
try:
    pararnn.Nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "module 'pararnn' has no attribute 'Nothing'\n"
