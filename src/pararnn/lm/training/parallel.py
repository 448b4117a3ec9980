"""The processes that train one model together: who they are and what they tell each other.

`torchrun` starts them and says through the environment who is who; without it there is one, and
nothing of `torch.distributed` is used.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pararnn.lm.data.errors import LostConnectionError, OtherProcessError, RunError
from pararnn.lm.data.words import say

Result = TypeVar("Result")

_TOLD_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """One process and its place among all.

    Attributes:
        rank: This process, from 0; the first one prints and writes for all.
        count: All processes.
        device: Where this one computes.
        saving: Group for a thread that writes checkpoints while this one trains; None when alone.
    """

    rank: int
    count: int
    device: torch.device
    saving: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes for all."""
        return self.rank == 0

    def print(self, text: str) -> None:
        """Print once for all processes."""
        if self.is_first:
            say(text)

    def mean(self, values: list[float]) -> list[float]:
        """Mean of every value over all processes, the same on each."""
        if self.count == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return (total / self.count).tolist()

    def largest(self, value: int) -> int:
        """The largest value that a process gives."""
        if self.count == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def on_first(self, function: Callable[[], Result]) -> Result:
        """Call a function in the first process only, and return its result in all.

        Raises:
            RunError: As the function did, and OtherProcessError in the other processes.
            OSError: The same.
        """
        if self.count == 1:
            return function()
        outcome: list[Any] = [None, True]
        error: RunError | OSError | None = None
        if self.is_first:
            try:
                outcome[0] = function()
            except (RunError, OSError) as caught:
                error, outcome[1] = caught, False
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        if error is not None:
            raise error
        if not outcome[1]:
            raise OtherProcessError("the first process failed; it says why.")
        return outcome[0]


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the processes that `torchrun` started, until the end of the block.

    Args:
        device: A torch device without an index, or "auto"; with an index only when alone.

    Raises:
        RunError: There is no such device for this process, or the environment is incomplete.
        LostConnectionError: Another process is gone.
    """
    with _expected_warnings():
        yield from _join(device)


def _join(device: str) -> Iterator[Processes]:
    count = num_processes()
    if count == 1:
        yield Processes(0, 1, choose_device(device))
        return
    missing = [name for name in _TOLD_BY_TORCHRUN if name not in os.environ]
    if missing:
        raise RunError(
            f"WORLD_SIZE is {count} but these are not set: {', '.join(missing)}. Start the "
            "processes with torchrun --nproc-per-node N -m pararnn.cli train."
        )
    chosen = _own_device(choose_device(device), int(os.environ["LOCAL_RANK"]))
    on_cuda = chosen.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(chosen)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    try:
        yield Processes(dist.get_rank(), count, chosen, dist.new_group(backend="gloo"))
    except RuntimeError as error:
        if lost_connection(error):
            raise LostConnectionError(
                "lost the connection to another process, which failed or was killed; what it "
                "printed says why. Resuming continues from the last checkpoint."
            ) from error
        raise
    # Only now: after an error the others may wait for this process, and it must end for them to.
    dist.destroy_process_group()


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Silence warnings of PyTorch about things that are intended here."""
    with warnings.catch_warnings():
        # One process saves and loads alone.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # A block's last state may be a view of its output; no code writes into either.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        yield


def lost_connection(error: BaseException | None) -> bool:
    """Whether an error of PyTorch means that another process is gone."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


def num_processes() -> int:
    """Number of processes that `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def train_command() -> str:
    """The command that starts as many processes on a machine as there are now."""
    if num_processes() == 1:
        return "pararnn train"
    per_machine = os.environ["LOCAL_WORLD_SIZE"]
    return f"torchrun --nproc-per-node {per_machine} -m pararnn.cli train"


def choose_device(name: str) -> torch.device:
    """The device that a configuration names; "auto" is CUDA when there is one, else the CPU.

    Raises:
        RunError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"device {name!r} is not one of PyTorch's; use cpu or cuda.") from error
    if device.type == "cuda":
        _check_gpu(name)
        return device
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise RunError(f"device {name!r} cannot be used: {reason}. Use cpu or cuda.") from error
    return device


def _check_gpu(name: str) -> None:
    """Raise RunError where PyTorch sees no such GPU, without touching one.

    By the name, for `torch.device` takes "cuda:256" for "cuda:0".
    """
    if not torch.cuda.is_available():
        raise RunError(f"device {name!r} cannot be used: PyTorch sees no GPU. Use --device cpu.")
    known = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if name not in ("cuda", *known):
        raise RunError(
            f"device {name!r} cannot be used: PyTorch sees {', '.join(known)}. Use one of these."
        )


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    """The GPU of one of several processes on a machine; the CPU is shared."""
    if device.index is not None:
        raise RunError(
            f"device {device} would be used by every process; name it without a number: "
            f"--device {device.type}."
        )
    if device.type != "cuda":
        return device
    if local_rank >= torch.cuda.device_count():
        raise RunError(
            f"process {local_rank} of this machine has no GPU: PyTorch sees "
            f"{torch.cuda.device_count()}. Start as many with --nproc-per-node, or use "
            "--device cpu."
        )
    return torch.device("cuda", local_rank)
