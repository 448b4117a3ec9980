"""Batches of token sequences, in an order that a seed decides."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

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
                f"the training text has {split.num_tokens} tokens but a sequence needs "
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

    def of_step(self, step: int) -> list[int]:
        """The windows of the optimiser step after `step` others."""
        epoch, index = divmod(step, max(self.num_windows // self.per_step, 1))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        first = index * self.per_step
        positions = torch.arange(first, first + self.per_step) % self.num_windows
        return self._order[positions].tolist()

    def _shuffle(self, epoch: int) -> Tensor:
        seed = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed >> 1))
        return torch.randperm(self.num_windows, generator=generator)


class Batches:
    """The share of one process in every optimiser step, cut into forward passes.

    The step is all there is to remember. Process r of n takes the r-th of n equal parts of the
    step's windows, so together they read the same windows whatever their number.

    Args:
        windows: All sequences, each a tensor (time + 1,) int64.
        order: Which of them a step takes.
        batch_size: Sequences per forward pass.
        rank: This process, from 0.
        num_processes: Processes that share a step; they and the batch size divide it.
    """

    def __init__(
        self,
        windows: Dataset[Tensor],
        order: WindowOrder,
        batch_size: int,
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.windows, self.order, self.batch_size = windows, order, batch_size
        self.share = order.per_step // num_processes
        self.first = rank * self.share

    def of_step(self, step: int) -> list[Tensor]:
        """The forward passes of the optimiser step after `step` others: (batch, time + 1) each."""
        mine = self.order.of_step(step)[self.first : self.first + self.share]
        rows = torch.stack([self.windows[index] for index in mine])
        return list(rows.split(self.batch_size))
