"""Sizes of the models and settings of their training: all choices, each with its reason."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pararnn._whole import check_whole_fields
from pararnn._words import counted
from pararnn.lm.catalogue import TRANSFORMER, OwnName, check_architecture
from pararnn.tasks.catalogue import TASKS, check_task

Form = Literal["cell", "mixer", "blocks"]
MULTIPLES = (1, 2, 4, 16)
"""Tests have these times the length of training."""
SOLVED = 0.9999
"""Validation accuracy from which on a task counts as learnt: 5 mistakes in 50,000 answers."""
_ON_GPU, _MOST_ON_GPU = 12, 15  # models side by side
SOLVED_TWICE = 2
"""Evaluations in a row that must reach it; one alone may be luck while the rate is high."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one architecture is trained on one task.

    Attributes:
        form: "cell": embedding, norm, cell, norm, linear. "mixer": the cell within the mixer of a
            language model, with convolution, gate and norm, and a residual. "blocks": a whole
            language model, with an MLP after every mixer.
        width: Channels, of the recurrence as well.
        num_layers: Layers; a hybrid has at least one for each of its parts.
        num_heads: Heads of a cell's input projection, of attention, of a memory or of Mamba2.
        positions: Add sinusoidal positions to the embedding.
        max_recurrent_weight: Bound on recurrent weights, for cells that have one; None for none.
        max_timescale: Longest memory that gates begin with, in steps, for cells that have such a
            gate; None for 2 steps, as in the paper.
        length: Tokens of the sequences in training.
        batch_size: Sequences per step.
        steps: Most steps.
        learning_rate: Peak, after the warm-up.
        weight_decay: Times the learning rate, per step, on all parameters.
        warmup_steps: Over which the rate rises.
        schedule: "solved": constant, then down to zero over `decay_steps` as soon as the task is
            learnt, or at the end. "cosine": half a wave down to zero at the last step; times the
            same fall as soon as the task is learnt.
        decay_steps: See `schedule`.
        max_grad_norm: Gradients are scaled down to this norm.
        train_samples: Size of a fixed set of training sequences; None for new ones at every step.
        evaluate_every: Steps between validations.
        validation_samples: Sequences of one validation.
        test_samples: Sequences of the test at each length.
    """

    form: Form
    width: int
    num_layers: int
    length: int
    positions: bool = False
    max_recurrent_weight: float | None = None
    max_timescale: float | None = None
    num_heads: int = 4
    batch_size: int = 128
    steps: int = 10_000
    learning_rate: float = 2e-3
    weight_decay: float = 1e-6
    warmup_steps: int = 200
    schedule: Literal["solved", "cosine"] = "solved"
    decay_steps: int = 1000
    max_grad_norm: float = 1.0
    train_samples: int | None = None
    evaluate_every: int = 250
    validation_samples: int = 512
    test_samples: int = 2048

    def __post_init__(self) -> None:
        check_whole_fields(self)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and field.name not in ("positions", "weight_decay"):
                least = "at least 1" if isinstance(value, int) else "more than 0"
                if not math.isfinite(value) or value <= 0:
                    name = field.name.replace("_", "-")
                    raise ValueError(f"{name} is {value}; it must be {least}.")
        if self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} cannot be split into {self.num_heads} heads; choose a "
                "multiple of it."
            )


# The paper's five (Danieli et al. 2025, C.2): one layer of width 64 with 4 heads, 100 tokens, which
# are 2 to 60 thousand parameters. Recurrent weights are bounded by 0.9, but not in Parity. Minutes
# with new samples, larger batches and a higher rate take the place of 3,000 epochs over 10,000
# samples.
_CELL = Settings(
    form="cell", width=64, num_layers=1, length=100, max_recurrent_weight=0.9, learning_rate=5e-3
)
_MIXER = dataclasses.replace(_CELL, form="mixer")

# State tracking: whole language models of two layers, 0.3 to 1 million parameters. Two, because S3
# is not commutative and cells without mixing channels need one layer for signs and one for
# rotations; not more, because deep Transformers imitate short walks. Nothing bounds the recurrent
# weights: a state that must never be forgotten needs weights beyond 1.
_TRACKING = Settings(form="blocks", width=128, num_layers=2, length=32)

# Looking up and copying: the same models. A bound and long memories from the start, as for
# language: what is asked for lies as far back as the sequence is long.
_RECALL = Settings(
    form="blocks",
    width=128,
    num_layers=2,
    length=64,
    max_recurrent_weight=0.9,
    max_timescale=1000.0,
)

_FULL: dict[str, Settings] = {
    # Where all channels forget over 2 steps, nothing of the 5th token is left at the 100th, and no
    # gradient says what to keep: 1,500 steps end at a guess, also with memories of 100 steps. With
    # those of 1,000 they end at 99 %.
    "keep-nth": dataclasses.replace(_CELL, positions=True, max_timescale=1000.0),
    "parity": dataclasses.replace(_CELL, max_recurrent_weight=None),
    # As above. Two layers: one must compare a query with both keys and choose a value at once, and
    # ends at 87 to 99 % after 60,000 to 88,000 steps; two have 100 % after 10,000 to 25,000.
    "mqar": dataclasses.replace(_MIXER, num_layers=2, max_timescale=1000.0, steps=40_000),
    "1-hop": _MIXER,
    # Two layers: where channels do not mix, one has no way from the first hop to the second. It
    # ends near 90 %, and two have 100 % after 500 steps on 40 tokens.
    "2-hop": dataclasses.replace(_MIXER, num_layers=2),
    "s3": _TRACKING,
    # 120 x 120 products must be learnt first: a GRU of 256 channels needs 6,000 steps for those of
    # two, and a word is right only after all of its parts are.
    "s5": dataclasses.replace(_TRACKING, width=256, batch_size=512, steps=20_000),
    "s5-swaps": _TRACKING,
    "modular-counting": _TRACKING,
    "automaton": _TRACKING,
    "dyck-2": dataclasses.replace(_TRACKING, length=64),  # deep enough to fill the stack
    "needle": _RECALL,
    "selective-copying": _RECALL,
}
PAPER_TASKS = ("keep-nth", "parity", "mqar", "1-hop", "2-hop")
_EPOCHS, _PAPER_SAMPLES, _PAPER_BATCH = 3000, 10_000, 16
_PAPER: dict[str, Any] = {
    "batch_size": _PAPER_BATCH,
    "steps": _EPOCHS * _PAPER_SAMPLES // _PAPER_BATCH,
    "learning_rate": 5e-4,
    "weight_decay": 1e-6,
    "schedule": "cosine",
    "max_timescale": None,
    "num_layers": 1,
    "train_samples": _PAPER_SAMPLES,
    "test_samples": 100_000,
}
# A look at every part in seconds on one processor core; nothing is learnt but what is easy.
_SMOKE: dict[str, Any] = {
    "width": 32,
    "length": 20,
    "batch_size": 32,
    "steps": 30,
    "warmup_steps": 5,
    "decay_steps": 10,
    "evaluate_every": 15,
    "validation_samples": 64,
    "test_samples": 64,
}
PRESETS = ("full", "smoke", "paper")


def settings_for(task: str, preset: str, changes: dict[str, Any] | None = None) -> Settings:
    """The settings of a task.

    Args:
        task: A name in `TASKS`.
        preset: "full" for minutes on a GPU; "smoke" for seconds on a CPU; "paper" for the training
            of Danieli et al. 2025, with up to 1.9 million steps.
        changes: Settings to take instead.

    Raises:
        ValueError: There is no such preset for the task, or a setting is refused.
    """
    full = _FULL[task]
    if preset == "paper" and task not in PAPER_TASKS:
        raise ValueError(
            f"the paper has no task {task!r}, so that preset 'paper' does not; choose among "
            f"{', '.join(PAPER_TASKS)}, or another preset."
        )
    changes = changes or {}
    chosen = {"full": {}, "smoke": _SMOKE, "paper": _PAPER}[preset] | changes
    settings = dataclasses.replace(full, **chosen)
    if settings.length == full.length:
        return settings
    shortest = TASKS[task].min_length
    if settings.length < shortest:
        raise ValueError(
            f"length is {settings.length}, but sequences of {task} have at least "
            f"{counted(shortest, 'token')}; choose a longer one."
        )
    return settings


@dataclass(kw_only=True)
class SuiteConfig:
    """Which architectures are trained on which tasks."""

    tasks: tuple[str, ...] = tuple(TASKS)
    """Names of tasks."""
    architectures: tuple[str, ...] = ("paragru", "paralstm", TRANSFORMER)
    """Names of architectures, and stacks such as paragru+attention, whose parts take turns."""
    seeds: int = 3
    """Models of each architecture on each task, from seeds 0, 1 and so on."""
    preset: Literal["full", "smoke", "paper"] = "full"
    """Sizes and training: full for minutes on a GPU, smoke for seconds on a CPU, paper for the
    3,000 epochs of the paper on its five tasks."""
    length: int | None = None
    """Tokens of the sequences in training, instead of the preset's."""
    steps: int | None = None
    """Most training steps, instead of the preset's."""
    batch_size: int | None = None
    """Sequences per step, instead of the preset's."""
    learning_rate: float | None = None
    """Peak of the learning rate, instead of the preset's."""
    test_samples: int | None = None
    """Sequences of the test at each length, instead of the preset's."""
    out: Path = Path("runs/tasks")
    """Folder for results and checkpoints; the same again goes on, and takes more tasks,
    architectures and seeds."""
    device: str = "auto"
    """A torch device; auto for CUDA when there is one, else the CPU."""
    side_by_side: int | None = None
    """Models that are trained at the same time: on a GPU on a stream each, 15 at most, on a CPU in
    a process each. None for 12 on a GPU and one on a CPU."""

    def __post_init__(self) -> None:
        check_whole_fields(self)
        for name, values in (("tasks", self.tasks), ("architectures", self.architectures)):
            if not values:
                raise ValueError(f"{name} is empty; name at least one.")
        for task in self.tasks:
            check_task(task)
            self.settings(task)
        for architecture in self.architectures:
            check_architecture(architecture)
            if OwnName.of(architecture):
                raise ValueError(
                    f"architecture {architecture!r} is a cell in a file, which tasks do not take; "
                    "name it by register_cell in Python, as the page on tasks shows."
                )
        for name in ("seeds", "side_by_side"):
            value = getattr(self, name)
            if value is not None and value < 1:
                shown = name.replace("_", "-")
                raise ValueError(f"{shown} is {value}; it must be at least 1.")

    def settings(self, task: str) -> Settings:
        """The settings of a task."""
        names = ("length", "steps", "batch_size", "learning_rate", "test_samples")
        given = {name: getattr(self, name) for name in names}
        changes = {name: value for name, value in given.items() if value is not None}
        return settings_for(task, self.preset, changes)


def models_at_once(asked: int | None, models: int, device_type: str) -> tuple[int, str]:
    """How many models are trained side by side, and how.

    A step of a model as small as these keeps a part of a GPU busy, whatever the architecture. To
    launch it takes Python less than a tenth of its time there, so that it can serve 12. More than
    15 would need more streams than the 32 of PyTorch: each model takes one to run on and one for
    captures, and samples are drawn on another. Stacked parameters (`torch.func.vmap`) would share
    launches instead, but only elementwise cells keep their kernels there. On a CPU one model has
    all cores.

    Args:
        asked: By the user, if at all.
        models: That are to be trained.
        device_type: Where.
    """
    on_gpu = device_type == "cuda"
    if not on_gpu:
        return max(1, min(asked or 1, models)), "each in a process"
    count = max(1, min(asked or _ON_GPU, _MOST_ON_GPU, models))
    return count, "each on a stream of the GPU, most of which one leaves idle"
