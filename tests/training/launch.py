"""Training in several processes, started as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from .conftest import sentences

SETTINGS = """--data text --device cpu --checkpoint-every 5 --architecture.width 16
--architecture.num-layers 2 --architecture.num-heads 2 --text.sequence-length 32
--text.validation-tokens 200 --schedule.length 60 --optimizer.learning-rate 1e-2""".split()
MEASURED = ("step", "loss", "z_loss", "bits_per_byte", "grad_norm", "learning_rate")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


HERE = Path(__file__).parent
# They are needed to kill one of them. Elsewhere runs of one process are tested.
needs_proc = pytest.mark.skipif(
    sys.platform != "linux", reason="finds torchrun's processes in /proc, which only Linux has"
)


class Launch:
    """`torchrun --nproc-per-node N` of this Python, with one thread per process; a context."""

    def __init__(self, num_processes, *arguments, folder):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "PYTHONUNBUFFERED": "1",
        }
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, *TORCHRUN, str(num_processes), *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait(self, timeout=120, *, succeeds=True):
        """Everything printed, once all processes have ended."""
        printed, _ = self.process.communicate(timeout=timeout)
        assert (self.process.returncode == 0) == succeeds, printed
        return printed

    def send(self, rank, number):
        """Send a signal to one of the processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        for child in children.read_text().split():
            if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
                os.kill(int(child), number)
                return
        raise AssertionError(f"no process of rank {rank}")

    def wait_for_step(self, name, step):
        """Wait until a run has done a number of steps."""
        deadline = time.monotonic() + 100
        while len(records(self.folder / name)) < step:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Stop what still runs: torchrun takes its processes with it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with self.process:
            pass


def with_text(folder):
    """The folder, with text for `SETTINGS`."""
    (folder / "text").mkdir()
    for number in range(6):
        (folder / f"text/{number}.txt").write_text(sentences(number))
    return folder


@contextmanager
def trainings(folder):
    """Starts `torchrun ... pararnn.cli train`; what still runs at the end is stopped."""
    with ExitStack() as stack:

        def start(num_processes, *arguments, script=None):
            command = ["-m", "pararnn.cli"] if script is None else [HERE / script]
            launched = Launch(num_processes, *command, "train", *arguments, folder=folder)
            return stack.enter_context(launched)

        yield start


def records(run):
    """Whole lines of a run's metrics."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curve(run):
    """Everything in metrics.jsonl but the speed."""
    return [{name: record[name] for name in MEASURED} for record in records(run)]
