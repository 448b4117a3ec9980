"""Training in several processes, started as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SETTINGS = """--data text --device cpu --checkpoint-every 5 --architecture.width 16
--architecture.num-layers 2 --architecture.num-heads 2 --text.sequence-length 32
--text.validation-tokens 200 --schedule.length 60 --optimizer.learning-rate 1e-2""".split()
MEASURED = ("step", "loss", "z_loss", "bits_per_byte", "grad_norm", "learning_rate")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


class Launch:
    """`torchrun --nproc-per-node N` of this Python, with one thread per process."""

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

    def end(self):
        """Stop what still runs: torchrun takes its processes with it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with self.process:
            pass


def records(run):
    """Whole lines of a run's metrics."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def curve(run):
    """Everything in metrics.jsonl but the speed."""
    return [{name: record[name] for name in MEASURED} for record in records(run)]
