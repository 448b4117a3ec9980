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
def explained(run: RunFolder, *, training: bool = True) -> Iterator[None]:
    """Errors of the disk, of memory and of backends, as RunErrors.

    Args:
        run: What is worked on.
        training: Say how to continue it.
    """
    go_on = f" {how_to_resume(run)}" if training else ""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}{go_on}") from error
    except OSError as error:
        what = f"{error.filename or run.path}: {error.strerror or error}."
        if error.errno in _FULL:
            raise RunError(f"cannot write to {what} Make room.{go_on}") from error
        remedy = " Make it readable and writable." if error.errno in _FORBIDDEN else ""
        raise RunError(f"cannot use {what}{remedy}{go_on}") from error
    except BackendError as error:
        raise RunError(str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        smaller = " Lower --text.batch-size or take a smaller model." if training else ""
        raise RunError(f"out of memory: {root_cause(error)}.{smaller}{go_on}") from error


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, for Python or for a tensor on any device."""
    said = str(error)
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "allocate" in said or "Storage size calculation" in said
    )
