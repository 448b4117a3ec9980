"""What all tasks have in common: samples from a seed, three splits that share none, the metric."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from pararnn._whole import check_whole, check_whole_fields
from pararnn._words import counted

Split = Literal["train", "validation", "test"]
_QUARTERS: dict[Split, tuple[int, ...]] = {"train": (0, 1), "validation": (2,), "test": (3,)}
_PIECE = 1 << 22  # tokens drawn at once: 32 MiB of each tensor
_MOST_DRAWS = 200  # times the expected number; only tiny sample spaces come near it


class Batch(NamedTuple):
    """Samples of a task.

    Attributes:
        tokens: What the model reads, (batch, time), int64.
        targets: The class that it must name after reading each token, (batch, time), int64; 0 where
            nothing counts.
        counts: Which positions count, (batch, time), bool.
    """

    tokens: Tensor
    targets: Tensor
    counts: Tensor


@dataclass(frozen=True, kw_only=True)
class Known:
    """A published figure.

    Attributes:
        architecture: Whose.
        accuracy: Per cent.
        source: Where it is printed, and under which conditions.
    """

    architecture: str
    accuracy: float
    source: str


def table_6(settings: str, *, transformer: float, mamba2: float) -> tuple[Known, ...]:
    """A column of Table 6 of Danieli et al. 2025, in which both of their RNNs have 100 %."""
    source = f"Danieli et al. 2025, arXiv 2510.21450, Table 6: {settings}, best of 3 seeds"
    return tuple(
        Known(architecture=name, accuracy=accuracy, source=source)
        for name, accuracy in (
            ("transformer", transformer),
            ("mamba2", mamba2),
            ("paragru", 100.0),
            ("paralstm", 100.0),
        )
    )


@dataclass(frozen=True)
class Task(ABC):
    """A synthetic task. Subclasses are frozen dataclasses; their fields are what defines them."""

    source: ClassVar[str]
    """Where it comes from."""

    def __post_init__(self) -> None:
        check_whole_fields(self)

    @property
    def known(self) -> tuple[Known, ...]:
        """Published figures for just these settings."""
        return ()

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of different tokens."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of different targets."""

    @property
    def min_length(self) -> int:
        """Shortest sequences that it has, in tokens."""
        return 1

    @abstractmethod
    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:
        """Draw samples on the generator's device, without regard to splits.

        Args:
            size: Number of sequences.
            length: Tokens of each, at least `min_length`.
            generator: Source of all that is random.
        """


def draw(
    task: Task, size: int, length: int, *, split: Split, seed: int, device: torch.device | str
) -> Batch:
    """Samples of one split; the same arguments give the same samples on one type of device.

    A hash of its tokens says to which split a sequence belongs: half of all are for training, a
    quarter for validation and a quarter for tests. So no two splits share a sequence, whatever the
    seeds.

    Args:
        task: What to draw from.
        size: Number of sequences.
        length: Tokens of each.
        split: "train", "validation" or "test".
        seed: Any whole number.
        device: Where to draw them.

    Raises:
        TypeError: A number is no whole number.
        ValueError: The sequences are too short for the task, or for the split to have any.
    """
    check_whole(size=size, length=length, seed=seed)
    if length < task.min_length:
        raise ValueError(
            f"length is {length}, but the shortest sequences of {type(task).__name__} have "
            f"{counted(task.min_length, 'token')}; choose a longer one."
        )
    generator = torch.Generator(device).manual_seed(_mixed(split, seed, length))
    quarters = _QUARTERS[split]
    wanted = torch.tensor(quarters, device=device)
    expected = 4 * size // len(quarters)  # draws until enough of them are in the split
    piece = min(max(1, _PIECE // length), expected + expected // 8 + 64)
    found: list[Batch] = []
    missing = size
    for _ in range(_MOST_DRAWS * -(-expected // piece)):
        batch = task.sample(piece, length, generator)
        own = torch.isin(quarter(batch.tokens), wanted).nonzero().squeeze(1)[:missing]
        found.append(Batch._make(part[own] for part in batch))
        missing -= len(own)
        if not missing:
            return Batch._make(torch.cat(parts) for parts in zip(*found, strict=True))
    raise ValueError(
        f"{type(task).__name__} has too few sequences of {counted(length, 'token')} for the "
        f"{split} split; "
        "choose a longer length."
    )


def quarter(tokens: Tensor) -> Tensor:
    """The quarter, 0 to 3, of each sequence: a hash of its tokens.

    Args:
        tokens: Shape (batch, time), int64.

    Returns:
        Shape (batch,), int64.
    """
    time = tokens.shape[1]
    place = torch.arange(1, time + 1, device=tokens.device)
    value = (_scrambled(tokens + place * 0x1000003) * (2 * place + 1)).sum(1)
    return _scrambled(value + time) & 3


def _scrambled(value: Tensor) -> Tensor:
    """Mix the bits of whole numbers (the finaliser of SplitMix64); products wrap around."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def _mixed(split: str, seed: int, length: int) -> int:
    """A seed of 63 bits for the generator."""
    digest = hashlib.sha256(f"{split} {seed} {length}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


class Score(NamedTuple):
    """How many answers are right.

    Attributes:
        right: Positions answered right.
        counted: Positions that count.
        whole: Sequences in which every one of them is right.
        sequences: All sequences.
    """

    right: int
    counted: int
    whole: int
    sequences: int

    @property
    def accuracy(self) -> float:
        """Share of the positions that count which are right, 0 to 1."""
        return self.right / self.counted

    @property
    def sequence_accuracy(self) -> float:
        """Share of the sequences without a mistake, 0 to 1."""
        return self.whole / self.sequences

    def plus(self, other: Score) -> Score:
        """The score of both together."""
        return Score._make(a + b for a, b in zip(self, other, strict=True))


def score(answers: Tensor, batch: Batch) -> Score:
    """Compare answers, (batch, time), with the targets.

    Raises:
        ValueError: The shapes differ.
    """
    if answers.shape != batch.targets.shape:
        raise ValueError(
            f"answers have shape {tuple(answers.shape)}, targets {tuple(batch.targets.shape)}; "
            "give one answer for every token."
        )
    right = (answers == batch.targets) & batch.counts
    whole = (right | ~batch.counts).all(1)
    parts = torch.stack([right.sum(), batch.counts.sum(), whole.sum()]).tolist()
    return Score(parts[0], parts[1], parts[2], len(whole))


def chance(batch: Batch) -> float:
    """Accuracy of the best answer that is always the same, 0 to 1."""
    return batch.targets[batch.counts].bincount().max().item() / int(batch.counts.sum())
