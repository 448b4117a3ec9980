"""Batches of token sequences, in an order that a seed decides."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pararnn._words import counted
from pararnn.lm.data import TokenSplit
from pararnn.lm.data.errors import RunError


class Windows(Dataset[Tensor]):
    """Consecutive windows of a split; each overlaps the next by the token that it predicts.

    Args:
        split: Tokens.
        sequence_length: Inputs per window; an item has one token more.

    Raises:
        RunError: The split is shorter than one window.
    """

    def __init__(self, split: TokenSplit, sequence_length: int) -> None:
        self.split, self.sequence_length = split, sequence_length
        self.num_windows = (split.num_tokens - 1) // sequence_length
        if self.num_windows < 1:
            raise RunError(
                f"the training text has {counted(split.num_tokens, 'token')} but a sequence needs "
                f"{sequence_length + 1}; give more text or lower --text.sequence-length."
            )

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.sequence_length
        return torch.from_numpy(self.split.read(start, start + self.sequence_length + 1))


class WindowOrder:
    """The windows of each optimiser step: a function of the seed and the step alone.

    Every epoch has an order of its own; the windows at its end that do not fill a step are left
    out of it. Fewer windows than a step takes are repeated.

    Args:
        num_windows: Windows to choose from.
        per_step: Windows of one optimiser step.
        seed: Decides the order.
    """

    def __init__(self, num_windows: int, per_step: int, seed: int) -> None:
        self.num_windows, self.per_step, self.seed = num_windows, per_step, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def begins(self, step: int) -> bool:
        """Whether its windows follow no others."""
        return True

    def of_step(self, step: int) -> list[int]:
        """The windows of the optimiser step after `step` others."""
        epoch, index = divmod(step, max(self.num_windows // self.per_step, 1))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        first = index * self.per_step
        positions = torch.arange(first, first + self.per_step) % self.num_windows
        return self._order[positions].tolist()

    def _shuffle(self, epoch: int) -> Tensor:
        return torch.randperm(self.num_windows, generator=_generator(self.seed, epoch))


class StreamOrder:
    """Windows that follow one another in every row of a batch, from step to step.

    The text is cut into as many streams of equal length as a step has rows; an epoch reads them
    side by side. Every epoch cuts at other places, which the seed decides. At the end of the text a
    stream goes on at its beginning, where a document begins.

    Args:
        num_windows: Windows of the text, at least one for each row.
        per_step: Rows.
        seed: Decides where streams begin.

    Raises:
        RunError: There are too few windows.
    """

    def __init__(self, num_windows: int, per_step: int, seed: int) -> None:
        if num_windows < per_step:
            raise RunError(
                f"the training text has {counted(num_windows, 'sequence')}, but with "
                "--text.carry-state "
                f"each of the {per_step} sequences of a step reads a part of its own; give more "
                "text, "
                "or lower --text.sequence-length or --text.global-batch-size."
            )
        self.num_windows, self.per_step, self.seed = num_windows, per_step, seed
        self.length = num_windows // per_step

    def begins(self, step: int) -> bool:
        """Whether its windows follow no others."""
        return step % self.length == 0

    def of_step(self, step: int) -> list[int]:
        """The windows of the optimiser step after `step` others."""
        epoch, index = divmod(step, self.length)
        generator = _generator(self.seed, epoch)
        first = int(torch.randint(self.num_windows, (), generator=generator)) + index
        return [(first + row * self.length) % self.num_windows for row in range(self.per_step)]


def _generator(seed: int, epoch: int) -> torch.Generator:
    state = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


class Batches:
    """The share of one process in every optimiser step, cut into forward passes.

    The step is all there is to remember. Process r of n takes the r-th of n equal parts of the
    step's windows, so together they read the same windows whatever their number. Where processes
    share sequences, those that follow one another have the same windows, and each a part of time.

    Args:
        windows: All sequences, each a tensor (time + 1,) int64.
        order: Which of them a step takes.
        batch_size: Sequences per forward pass.
        rank: This process, from 0.
        num_processes: Processes that share a step; they and the batch size divide it.
        parts: Processes that share a sequence.
    """

    def __init__(
        self,
        windows: Dataset[Tensor],
        order: WindowOrder | StreamOrder,
        batch_size: int,
        rank: int = 0,
        num_processes: int = 1,
        parts: int = 1,
    ) -> None:
        self.windows, self.order, self.batch_size = windows, order, batch_size
        self.share = order.per_step * parts // num_processes
        self.first, self.part, self.parts = rank // parts * self.share, rank % parts, parts

    def of_step(self, step: int) -> list[Tensor]:
        """The forward passes of the optimiser step after `step` others: (batch, time + 1) each."""
        mine = self.order.of_step(step)[self.first : self.first + self.share]
        rows = torch.stack([self.windows[index] for index in mine])
        time = (rows.shape[1] - 1) // self.parts
        rows = rows[:, self.part * time : (self.part + 1) * time + 1]
        return list(rows.split(self.batch_size))


class ReadAhead:
    """Reads the batches of the next step while one is computed; a context that ends the reading.

    Args:
        batches: What to read.
        device: Where they will go: for a GPU they lie in memory that is copied in the background.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches, self.pinned = batches, device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "data")
        self._next: tuple[int, Future[list[Tensor]]] | None = None

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def of_step(self, step: int) -> list[Tensor]:
        """As `Batches.of_step`; reading goes on with the step after it."""
        if self._next is None or self._next[0] != step:
            self._next = step, self._thread.submit(self._read, step)
        batches = self._next[1].result()
        self._next = step + 1, self._thread.submit(self._read, step + 1)
        return batches

    def _read(self, step: int) -> list[Tensor]:
        batches = self.batches.of_step(step)
        return [batch.pin_memory() for batch in batches] if self.pinned else batches
