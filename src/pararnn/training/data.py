"""Batches of byte sequences from a flat memory map, in an order that a seed decides."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped] # has none

from pararnn.training.errors import RunError


def map_bytes(path: Path) -> np.ndarray:
    """A flat file of bytes as a read-only memory map."""
    return np.memmap(path, dtype=np.uint8, mode="r")


class ByteWindows(Dataset[Tensor]):
    """Consecutive windows of a flat file; each overlaps the next by the byte that it predicts.

    Args:
        path: Flat file of bytes.
        sequence_length: Inputs per window; an item has one byte more.

    Raises:
        RunError: The file is shorter than one window.
    """

    def __init__(self, path: Path, sequence_length: int) -> None:
        self.path, self.sequence_length = path, sequence_length
        num_bytes = path.stat().st_size
        self.num_windows = (num_bytes - 1) // sequence_length
        if self.num_windows < 1:
            raise RunError(
                f"the training text has {num_bytes} bytes but a sequence needs "
                f"{sequence_length + 1}; give more text or lower --text.sequence-length."
            )

    def __len__(self) -> int:
        return self.num_windows

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.sequence_length
        window = map_bytes(self.path)[start : start + self.sequence_length + 1]
        return torch.from_numpy(window.astype(np.int64))


class _BatchIterator:
    """Batch `k` is a function of the seed and of `k`, so `k` is all there is to remember."""

    def __init__(self, sampler: "ShuffledBatches") -> None:
        self.sampler, self.num_batches = sampler, 0
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> "_BatchIterator":
        return self

    def __next__(self) -> list[int]:
        size, total = self.sampler.batch_size, self.sampler.num_windows
        epoch, batch = divmod(self.num_batches, max(total // size, 1))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.sampler.order(epoch)
        self.num_batches += 1
        positions = torch.arange(batch * size, (batch + 1) * size) % total
        return self.order[positions].tolist()

    def state_dict(self) -> dict[str, int]:
        return {"num_batches": self.num_batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_batches = state["num_batches"]


class ShuffledBatches(Sampler[list[int]]):
    """Endless batches of window numbers; every epoch has an order of its own.

    The windows that do not fill a batch at the end of an epoch are left out of it.

    Args:
        num_windows: Windows to choose from; fewer than a batch are repeated.
        batch_size: Windows per batch.
        seed: Decides the order.
    """

    def __init__(self, num_windows: int, batch_size: int, seed: int) -> None:
        self.num_windows, self.batch_size, self.seed = num_windows, batch_size, seed

    def __iter__(self) -> _BatchIterator:
        return _BatchIterator(self)

    def order(self, epoch: int) -> Tensor:
        """Permutation of the windows in an epoch."""
        seed = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed >> 1))
        return torch.randperm(self.num_windows, generator=generator)


def build_loader(
    path: Path, sequence_length: int, batch_size: int, seed: int
) -> StatefulDataLoader:
    """Endless loader of (batch_size, sequence_length + 1) int64 batches, exactly resumable."""
    windows = ByteWindows(path, sequence_length)
    batches = ShuffledBatches(len(windows), batch_size, seed)
    with warnings.catch_warnings():
        # torchdata 0.11 calls a function that torch 2.13 calls deprecated
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        return StatefulDataLoader(windows, batch_sampler=batches)
