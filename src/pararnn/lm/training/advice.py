"""Turns errors of the machine into messages with the cause and the way to continue."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pararnn.layers.runner import BackendError
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.words import shell_word
from pararnn.lm.training.checkpoints import CheckpointError
from pararnn.lm.training.parallel import train_command
from pararnn.lm.training.run_folder import RunFolder
from pararnn.lm.training.saving import root_cause

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def how_to_resume(run: RunFolder) -> str:
    """One sentence for whoever must continue a run."""
    return f"Continue with: {train_command()} --resume --out {shell_word(run.path)}"


@contextmanager
def explained(run: RunFolder | None, *, training: bool = True) -> Iterator[None]:
    """Errors of the disk, of memory and of backends, as RunErrors.

    Args:
        run: What is worked on; None before there is a folder.
        training: Say how to continue it, if it is still there.
    """
    try:
        yield
    except Exception as error:
        words = _explanation(error, run, training)
        if words is None:
            raise
        kind = CheckpointError if isinstance(error, CheckpointError) else RunError
        raise kind(words) from error


def _explanation(error: Exception, run: RunFolder | None, training: bool) -> str | None:
    """What is wrong and what to do; None where that is not known, or said already."""
    exists = run is not None and training and run.config.is_file()
    go_on = f" {how_to_resume(run)}" if exists and run is not None else ""
    if isinstance(error, CheckpointError):
        return f"{error}{go_on}"
    if isinstance(error, OSError):
        where = error.filename or (run.path if run is not None else "a file")
        what = f"{where}: {error.strerror or error}."
        if error.errno in _FULL:
            return f"cannot write to {what} Make room.{go_on}"
        remedy = " Make it readable and writable." if error.errno in _FORBIDDEN else ""
        return f"cannot use {what}{remedy}{go_on}"
    if isinstance(error, BackendError):
        return str(error)
    if isinstance(error, (MemoryError, RuntimeError)) and _is_out_of_memory(error):
        smaller = " Lower --text.batch-size or take a smaller model." if training else ""
        return f"out of memory: {root_cause(error)}.{smaller}{go_on}"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, for Python or for a tensor on any device."""
    said = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "allocate" in said or "Storage size calculation" in said
    )
