"""Writes checkpoints in the background: every process its part, the first one the rest."""

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel

from pararnn.lm.training.checkpoints import (
    PROGRESS,
    STATE,
    CheckpointError,
    begin,
    complete,
    list_checkpoints,
    prune,
    quiet_transformers,
)
from pararnn.lm.training.model_card import add_files
from pararnn.lm.training.parallel import Processes, lost_connection
from pararnn.lm.training.sharding import gather_on_first


class CheckpointWriter:
    """Writes one checkpoint at a time while training goes on.

    All methods must be called by all processes. A context: at its end the thread ends with what it
    writes.

    Args:
        folder: The run's `checkpoints`.
        run: Identity of the run, stored and compared when reading.
        keep: Last checkpoints to keep.
        processes: That hold the tensors.
        tokenizer: Folder of the tokenizer, which goes beside the model; None for bytes.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        keep: int,
        processes: Processes,
        tokenizer: Path | None = None,
    ) -> None:
        self.folder, self.run, self.keep, self.processes = folder, run, keep, processes
        self.tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # Where a process is gone, the thread may wait for others that wait for this process to end.
        self._thread.shutdown(wait=not lost_connection(error))

    def save(
        self,
        step: int,
        model: PreTrainedModel,
        state: dict[str, Any],
        progress: dict[str, Any],
        *,
        weights: dict[str, Tensor] | None = None,
        best: int | None = None,
    ) -> None:
        """Copy everything and write it in the background, once the one before it is written.

        Args:
            step: Optimiser steps done.
            model: Written whole as well, for `from_pretrained`.
            state: Tensors, possibly in parts, by names within names.
            progress: Plain values.
            weights: Written whole in the place of the model's own.
            best: A step whose checkpoint is kept.

        Raises:
            CheckpointError: The one before it could not be written.
        """
        self.wait()
        try:
            temporary = self.processes.on_first(lambda: begin(self.folder, step))
        except OSError as error:
            raise self._failed(step, error) from error
        whole = gather_on_first(model.state_dict() | (weights or {}), self.processes)
        parts = dcp.async_save(
            state, checkpoint_id=temporary / STATE, process_group=self.processes.saving
        )
        future = self._thread.submit(
            self._finish, temporary, step, model, whole, progress, best, _upload(parts)
        )
        self._pending = step, future

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            CheckpointError: The disk is full or not writable; nothing of it is left, and older
                ones are untouched.
            RuntimeError: The connection to another process was lost.
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        problem = future.exception()
        if problem is not None and lost_connection(problem):
            raise problem

        def report() -> None:
            if problem is not None:
                raise self._failed(step, problem) from problem

        self.processes.on_first(report)

    def _finish(
        self,
        temporary: Path,
        step: int,
        model: PreTrainedModel,
        whole: dict[str, Tensor],
        progress: dict[str, Any],
        best: int | None,
        parts: "Future[Any]",
    ) -> None:
        """Runs in the thread; that the first process's part is written means that all are."""
        if not self.processes.is_first:
            parts.result()
            return
        try:
            parts.result()
            with quiet_transformers():
                model.save_pretrained(temporary, state_dict=whole)
            add_files(temporary, self.folder, step, model, self.tokenizer)
            (temporary / PROGRESS).write_text(json.dumps(progress))
            complete(temporary, step, self.run)
            prune(self.folder, self.keep, best)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _failed(self, step: int, problem: BaseException) -> CheckpointError:
        kept = [path.name for path in list_checkpoints(self.folder)]
        return CheckpointError(
            f"cannot save a checkpoint at step {step}: {root_cause(problem)}. Make room in "
            f"{self.folder} or make it writable. "
            f"{f'Last good checkpoint: {kept[-1]}.' if kept else ''}".strip()
        )


def _upload(parts: Any) -> "Future[Any]":
    """The future of the writing itself: what `async_save` returns depends on how it copies."""
    return getattr(parts, "upload_completion", parts)


def root_cause(problem: BaseException) -> str:
    """The error in one line, without the processes and tracebacks around it."""
    if isinstance(problem, CheckpointException) and problem.failures:
        problem, _ = next(iter(problem.failures.values()))
    cause: BaseException | None = problem
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    problem = cause or problem
    return (str(problem).splitlines() or [type(problem).__name__])[0].rstrip(".")
