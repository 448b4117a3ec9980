"""Processes of one gloo group that do what a test asks for, one job after another."""

import datetime
import os

import torch
import torch.distributed as dist
from forks import FORKS

TIMEOUT_S = 60


class Group:
    """Processes that wait for jobs; a context.

    Args:
        count: Processes. A job may take the first two of them alone.
        folder: Where they find each other.
        timeout_s: After which an exchange fails.
    """

    def __init__(self, count, folder, timeout_s=TIMEOUT_S):
        self.count, self.pipes, self.processes = count, [], []
        store = str(folder / f"store-{os.urandom(4).hex()}")
        for rank in range(count):
            here, there = FORKS.Pipe()
            arguments = (there, rank, count, store, timeout_s)
            process = FORKS.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, job, *arguments, count=None):
        """Call `job(group, rank, *arguments)` in every process; what each returns.

        An error becomes `(type, message)`, and so does the end of a process: `("dead", "")`.
        """
        pipes = self.pipes[:count]
        for pipe in pipes:
            pipe.send((job, arguments, len(pipes)))
        return [_received(pipe) for pipe in pipes]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _received(pipe):
    assert pipe.poll(2 * TIMEOUT_S), "a process hangs"
    try:
        return pipe.recv()
    except EOFError:
        return "dead", ""


def _serve(pipe, rank, count, store, timeout_s):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=timeout_s)
    options = {"rank": rank, "world_size": count, "timeout": timeout}
    dist.init_process_group("gloo", init_method=f"file://{store}", **options)
    groups = {count: dist.group.WORLD}
    if count > 2:
        groups[2] = dist.new_group([0, 1], timeout=timeout)
    while True:
        try:
            job, arguments, wanted = pipe.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(rank)
            pipe.send(job(groups[wanted], rank, *arguments))
        except Exception as error:
            pipe.send((type(error).__name__, str(error)))
    os._exit(0)  # others may be gone
