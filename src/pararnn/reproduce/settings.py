"""What is measured: the two presets, and what a user may choose."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from pararnn._whole import check_whole_fields

PresetName = Literal["full", "smoke"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of all measurements.

    Attributes:
        needs_gpu: Whether a CPU is refused.
        short: Lengths of Figure 1, in steps.
        long: Lengths of Figures 5 and 6.
        longest: Longest length of methods that take too long beyond it, by name.
        warm_ups: Calls before those that are timed.
        repeats: Calls that are timed.
        budget_ms: Fewer calls where they take longer than this together.
        residual_lengths: Lengths of Figure 4.
        residual_batch: Its sequences.
        residual_iterations: Iterations that it shows.
        training: Fields of the `TrainConfig` of its trained models.
        train_sizes: Sizes of Table 3.
        train_model: Fields of their `ModelSize`, beside the name.
        train_batch: Sequences per step; None for the paper's number per GPU.
        train_time: Tokens of a sequence.
        tasks: Fields of the `SuiteConfig` of Table 6.
    """

    needs_gpu: bool
    short: tuple[int, ...]
    long: tuple[int, ...]
    longest: dict[str, int]
    warm_ups: int
    repeats: int
    budget_ms: float
    residual_lengths: tuple[int, ...]
    residual_batch: int
    residual_iterations: int
    training: dict[str, Any]
    train_sizes: tuple[str, ...]
    train_model: dict[str, Any]
    train_batch: int | None
    train_time: int
    tasks: dict[str, Any]


FULL = Preset(
    needs_gpu=True,
    short=tuple(2**n for n in range(2, 10)),
    # where the paper's axes have their numbers, 2^9 where it compares, and its training length
    long=tuple(2**n for n in (2, 5, 8, 9, 11, 14, 17)),
    # 2^9 is the end of the paper's comparison; a loop from Python takes 0.1 ms a step and more
    longest={"loop": 2**9, "loop in a graph": 2**9, "PyTorch layer": 2**14},
    warm_ups=20,
    repeats=100,
    budget_ms=100.0,
    residual_lengths=tuple(2**n for n in range(8, 12)),
    residual_batch=8,
    residual_iterations=10,
    # a language model of bytes with the paper's kind of block, as far as half a minute goes
    training={
        "steps": 150,
        "checkpoint_every": 150,
        "architecture": {"width": 512, "num_layers": 4, "max_timescale": None},
        "text": {"sequence_length": 2048, "batch_size": 8, "validation_tokens": 65_536},
        "optimizer": {"precision": "bfloat16"},
    },
    train_sizes=("400m", "1b", "2.9b", "7b"),
    train_model={},
    train_batch=None,
    train_time=2048,
    tasks={"preset": "full", "seeds": 3},
)
SMOKE = Preset(
    needs_gpu=False,
    short=(4, 16),
    long=(4, 32),
    longest={},
    warm_ups=1,
    repeats=3,
    budget_ms=50.0,
    residual_lengths=(16, 32),
    residual_batch=2,
    residual_iterations=4,
    training={
        "data": Path(json.__file__).parent,  # some source of the standard library
        "steps": 4,
        "checkpoint_every": 4,
        "architecture": {"width": 16, "num_layers": 2, "max_timescale": None},
        "text": {"sequence_length": 32, "batch_size": 2, "validation_tokens": 256},
    },
    train_sizes=("400m",),
    train_model={"width": 32, "num_layers": 2, "vocab_size": 256},
    train_batch=2,
    train_time=16,
    tasks={"preset": "smoke", "seeds": 1, "steps": 4, "test_samples": 16},
)
PRESETS: dict[str, Preset] = {"full": FULL, "smoke": SMOKE}


@dataclass(kw_only=True)
class ReproduceConfig:
    """How figures and tables are measured."""

    preset: PresetName = "full"
    """Sizes: full, as in the paper, on a GPU; smoke for a look in seconds on a CPU."""
    out: Path = Path("runs/reproduce")
    """Folder for results; the same again measures what is missing."""
    device: str = "auto"
    """A torch device; auto for CUDA when there is one, else the CPU."""
    batch_size: int = 1
    """Sequences side by side in Figures 1, 5 and 6; the paper does not quote its number."""
    width: int = 64
    """Channels in Figures 1, 5 and 6; the paper does not quote its number."""
    runs: tuple[Path, ...] = field(default_factory=tuple)
    """Run folders of `pararnn train` whose trained ParaGRU or ParaLSTM Figure 4 takes, instead of
    training a small one."""
    only_draw: bool = False
    """Measure nothing: tables and plots from what the folder holds."""

    def __post_init__(self) -> None:
        self.out = Path(self.out)
        self.runs = tuple(map(Path, self.runs))
        if self.preset not in get_args(PresetName):
            choices = ", ".join(map(repr, get_args(PresetName)))
            raise ValueError(f"preset is {self.preset!r}; it must be one of {choices}.")
        check_whole_fields(self)
        for name in ("batch_size", "width"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
