"""Sizes and training of the models of the paper (Danieli et al. 2025, Table 3); without PyTorch.

The table prints no widths; with vocabulary 50,432, untied embeddings and a SwiGLU of 8/3 of the
width rounded up to a multiple of 256, those below give its parameter counts. Nor does it print the
entries that Mamba2 remembers per channel: 16 is the only number that gives its count at 400M and
also fits at 1B, and 128, transformers' own, that of the two larger ones.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from pararnn.lm.catalogue import check_architecture

VOCAB_SIZE = 50_432
SEQUENCE_LENGTH = 2048
ARCHITECTURES = ("paragru", "paralstm", "transformer", "mamba2")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One size of one architecture, with the settings of its training.

    Attributes:
        width: Channels of the residual stream.
        num_layers: Blocks.
        num_heads: See `Shape`.
        state_size: See `Shape`.
        learning_rate: Peak of the schedule: 10 % linear warm-up, then a cosine to zero.
        weight_decay: Weight decay of matrices.
        z_loss_weight: Weight of the mean squared log-partition.
        batch_size: Sequences of 2,048 tokens per GPU.
        global_batch_size: Sequences per optimiser step.
        steps: Optimiser steps.
    """

    width: int
    num_layers: int
    num_heads: int
    state_size: int
    learning_rate: float
    weight_decay: float
    z_loss_weight: float
    batch_size: int
    global_batch_size: int
    steps: int


_PER_ARCHITECTURE = ("num_layers", "num_heads", "learning_rate")
_SIZES: dict[str, dict[str, Any]] = {  # tuples: a value for each of `ARCHITECTURES`
    "400m": {
        "width": 1024,
        "num_layers": (24, 24, 24, 48),
        "num_heads": (4, 4, 8, 32),
        "state_size": 16,
        "learning_rate": (5e-3, 3e-3, 3e-3, 5e-3),
        "weight_decay": 1e-3,
        "z_loss_weight": 1e-4,
        "batch_size": 32,
        "global_batch_size": 256,
        "steps": 20_000,
    },
    "1b": {
        "width": 2048,
        "num_layers": (24, 24, 24, 48),
        "num_heads": (4, 4, 16, 64),
        "state_size": 16,
        "learning_rate": (3e-3, 3e-3, 2e-3, 5e-3),
        "weight_decay": 1e-4,
        "z_loss_weight": 1e-4,
        "batch_size": 32,
        "global_batch_size": 256,
        "steps": 55_000,
    },
    "2.9b": {
        "width": 2560,
        "num_layers": (32, 32, 32, 64),
        "num_heads": (2, 2, 32, 80),
        "state_size": 128,
        "learning_rate": (2e-3, 2e-3, 3e-3, 3e-3),
        "weight_decay": 1e-4,
        "z_loss_weight": 1e-4,
        "batch_size": 16,
        "global_batch_size": 512,
        "steps": 55_000,
    },
    "7b": {
        "width": 4096,
        "num_layers": (32, 32, 32, 64),
        "num_heads": (4, 4, 32, 128),
        "state_size": 128,
        "learning_rate": (3e-3, 3e-3, 3e-3, 3e-3),
        "weight_decay": 1e-4,
        "z_loss_weight": 5e-6,
        "batch_size": 8,
        "global_batch_size": 2048,
        "steps": 33_000,
    },
}
SIZES = tuple(_SIZES)


def preset(architecture: str, size: str) -> Preset:
    """The settings of a model of the paper; of another stack of mixers, those of its ParaGRU.

    Raises:
        ValueError: There is no such architecture or size.
    """
    check_architecture(architecture)
    column = ARCHITECTURES.index(architecture if architecture in ARCHITECTURES else "paragru")
    if size not in SIZES:
        nearest = difflib.get_close_matches(size, SIZES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"size {size!r} has no preset; perhaps you meant {nearest!r}. There are: "
            f"{', '.join(SIZES)}."
        )
    row = _SIZES[size]
    return Preset(**row | {name: row[name][column] for name in _PER_ARCHITECTURE})
