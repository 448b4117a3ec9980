"""One process at a time trains in a run folder."""

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.words import say

try:
    import fcntl
except ImportError:  # not on this system
    fcntl = None  # type: ignore[assignment] # see above

LOCK = ".lock"
_held: set[int] = set()


@contextlib.contextmanager
def alone_in_run(folder: Path) -> Iterator[None]:
    """Keep other trainings out of a run folder.

    The system ends the lock with this process, however that ends; its children do not hold it. The
    file stays, and says whose the lock is or was.

    Raises:
        RunError: Another process trains in it; the message names it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    _held.add(descriptor)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    obstacle = "this system has none"
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            obstacle = ""
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunError(
                f"{folder} is in use by {_holder(descriptor)}; wait for it to end, or end it, or "
                "choose another --out."
            ) from error
        obstacle = error.strerror or str(error)
    if obstacle:
        say(f"Note: no lock on {folder} ({obstacle}); see that no other process trains in it.")
    if os.fstat(descriptor).st_nlink == 0:
        raise RunError(f"another process has just deleted {folder}; start again.")
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()} (started {now})\n".encode(), 0)


def _holder(descriptor: int) -> str:
    """The text of the lock file, written by the process that holds the lock."""
    line = os.pread(descriptor, 200, 0).decode(errors="replace").partition("\n")[0]
    return f"process {line}" if line.isprintable() and line else "another process"


def _let_go() -> None:
    """A forked child would keep the lock of its parent after the parent's end."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)
