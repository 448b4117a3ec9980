"""The language models that are timed, of the sizes of the paper or smaller ones for a trial."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pararnn._whole import check_whole_fields
from pararnn.lm.catalogue import BASELINES, parts, unused_options
from pararnn.lm.models.architectures import Shape, make_config
from pararnn.lm.models.presets import VOCAB_SIZE, preset


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """One size for all architectures.

    Attributes:
        name: A preset of `pararnn.lm.models.presets`.
        width: Channels; None for those of the preset.
        num_layers: Blocks; None for those of the preset.
        vocab_size: Tokens.
        memory_options: As of `ParaRNNConfig`, for the models that have a memory.
    """

    name: str = "1b"
    width: int | None = None
    num_layers: int | None = None
    vocab_size: int = VOCAB_SIZE
    memory_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole_fields(self)

    def config(self, architecture: str, max_length: int) -> PreTrainedConfig:
        """The configuration of a model whose attention reaches `max_length` steps.

        Raises:
            TypeError: A size of a memory is no whole number.
            ValueError: There is no such architecture or preset, its blocks do not fit the number
                of layers, or its memories do not take the options.
        """
        chosen = preset(architecture, self.name)
        width = self.width or chosen.width
        shape = Shape(
            vocab_size=self.vocab_size,
            width=width,
            num_layers=self.num_layers or chosen.num_layers,
            num_heads=math.gcd(chosen.num_heads, width),
            state_size=chosen.state_size,
            max_length=max_length,
        )
        options: dict[str, Any] = {}
        if architecture not in BASELINES:
            options = {"memory_options": self.memory_options}
            options |= dict.fromkeys(unused_options(parts(architecture)))
        return make_config(architecture, shape, **options)

    def build(
        self, architecture: str, device: torch.device, dtype: torch.dtype, max_length: int
    ) -> PreTrainedModel:
        """A new model, made on its device and in its type."""
        with torch.device(device):
            config = self.config(architecture, max_length)
            return AutoModelForCausalLM.from_config(config, dtype=dtype)

    def __str__(self) -> str:
        changes = {"width": self.width, "layers": self.num_layers}
        changes |= {"vocabulary": None if self.vocab_size == VOCAB_SIZE else self.vocab_size}
        given = [f"{name} {value}" for name, value in changes.items() if value is not None]
        given += [f"{name}={value}" for name, value in self.memory_options.items()]
        return ", ".join([f"preset {self.name}", *given])


def release() -> None:
    """Free the memory of the last model, so that the next starts on an empty device."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
