"""Training in several processes, under torchrun."""

import json
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from forks import Fork, python
from torch.distributed import TCPStore

from .conftest import sentences

SETTINGS = """--data text --device cpu --checkpoint-every 5 --architecture.width 16
--architecture.num-layers 2 --architecture.num-heads 2 --text.sequence-length 32
--text.validation-tokens 200 --schedule.length 60 --optimizer.learning-rate 1e-2""".split()
MEASURED = ("step", "loss", "z_loss", "bits_per_byte", "grad_norm", "learning_rate")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

HERE = Path(__file__).parent
# They are needed to kill one of them. Elsewhere runs of one process are tested.
needs_proc = pytest.mark.skipif(
    sys.platform != "linux", reason="finds torchrun's processes in /proc, which only Linux has"
)


def processes(count, *arguments):
    """What torchrun does: processes that find each other, and all end once one of them fails."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": count}
    found |= {"LOCAL_WORLD_SIZE": count, "TORCHELASTIC_USE_AGENT_STORE": True}
    forks = multiprocessing.get_context("fork")
    running = []
    for rank in range(count):
        # the others get SIGTERM when this process exits, as they are daemons
        process = forks.Process(target=_process, args=(rank, found, arguments), daemon=True)
        process.start()
        running.append(process)
    while running:
        multiprocessing.connection.wait([process.sentinel for process in running])
        if any(process.exitcode for process in running):
            sys.exit(1)
        running = [process for process in running if process.exitcode is None]


def _process(rank, found, arguments):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    own = {"RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in {**found, **own}.items()})
    python(*arguments)


class Launch:
    """N processes, as `torchrun --nproc-per-node N` starts them; a context.

    Args:
        num_processes: N.
        arguments: A script, or `-m` and a module, then its own arguments.
        folder: The working directory.
        torchrun: True to start it as a user does; False for forks, which need no imports.
    """

    def __init__(self, num_processes, *arguments, folder, torchrun=False):
        self.folder = folder
        count, output = str(num_processes), {"stderr": subprocess.STDOUT}
        if torchrun:
            command = [sys.executable, *TORCHRUN, count, *arguments]
            settings = {"cwd": folder, "env": ENVIRONMENT, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen(command, **settings, **output)
        else:
            self.process = Fork(processes, num_processes, *arguments, folder=folder, **output)

    def wait(self, timeout=120, *, succeeds=True):
        """Everything printed, once all processes have ended."""
        printed, _ = self.process.communicate(timeout=timeout)
        assert (self.process.returncode == 0) == succeeds, printed
        return printed

    def send(self, rank, number):
        """Send a signal to one of the processes, which were started in the order of their ranks."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        os.kill(int(children.read_text().split()[rank]), number)

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
def trainings(folder, torchrun=False):
    """Starts `pararnn train` in several processes; what still runs at the end is stopped."""
    with ExitStack() as stack:

        def start(num_processes, *arguments, script=None, torchrun=torchrun):
            command = ["-m", "pararnn.cli"] if script is None else [HERE / script]
            command += ["train", *arguments]
            launched = Launch(num_processes, *command, folder=folder, torchrun=torchrun)
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
