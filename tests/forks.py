"""Python processes that tests start, as forks of one that has imported the library already.

To import PyTorch and transformers takes seconds of a processor, far more than what most tests do
in a process of their own.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["pararnn.cli.train", "pararnn.cli.bench", "torch.distributed.run", "torch.utils.tensorboard"]
)


class Fork:
    """A call in a process of its own, with the methods of `subprocess.Popen` that tests use.

    Args:
        function: Of a module, as processes find it by its name.
        arguments: Its arguments.
        folder: The working directory of the process.
        stderr: `subprocess.STDOUT` for one stream of both.
    """

    def __init__(self, function, *arguments, folder, stderr=subprocess.PIPE):
        printed = Path(tempfile.mkdtemp(dir=folder, prefix=".fork-"))
        names = ("out",) if stderr == subprocess.STDOUT else ("out", "error")
        self._files = [printed / name for name in names]
        place = (folder, self._files, dict(os.environ))
        self._process = FORKS.Process(target=_call, args=(place, function, arguments))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    poll = returncode.fget

    def communicate(self, timeout=None):
        """What it printed, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        out, *error = (file.read_text() for file in self._files)
        return out, (error[0] if error else None)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.join()


def _call(place, function, arguments):
    folder, files, environment = place
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in ((1, files[0]), (2, files[-1])):
        opened = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    function(*arguments)


def python(*arguments):
    """Do what `python ARGUMENTS` does: run a script, or the module after `-m`, as the program."""
    run, options = runpy.run_path, {}
    if arguments[0] == "-m":
        run, options, arguments = runpy.run_module, {"alter_sys": True}, arguments[1:]
    sys.argv = [*map(str, arguments)]
    try:
        run(sys.argv[0], run_name="__main__", **options)
    except SystemExit as end:
        if end.code:  # a process of torchrun that has succeeded returns
            raise
