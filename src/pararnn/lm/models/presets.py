"""The models of the paper (Danieli et al. 2025, Table 3); `pararnn.lm.presets` has their sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from pararnn.lm.models.architectures import Shape, make_config, make_model
from pararnn.lm.presets import ARCHITECTURES as ARCHITECTURES
from pararnn.lm.presets import SEQUENCE_LENGTH as SEQUENCE_LENGTH
from pararnn.lm.presets import SIZES as SIZES
from pararnn.lm.presets import VOCAB_SIZE as VOCAB_SIZE
from pararnn.lm.presets import Preset as Preset
from pararnn.lm.presets import preset as preset


def configuration(architecture: str, size: str, **options: Any) -> PreTrainedConfig:
    """The configuration of a model of the paper.

    Args:
        architecture: "paragru", "paralstm", "transformer", "mamba2", or another stack of mixers.
        size: "400m", "1b", "2.9b" or "7b".
        options: Fields of `Shape` to change, and arguments of the configuration's class.
    """
    chosen = preset(architecture, size)
    shape = Shape(
        vocab_size=VOCAB_SIZE,
        width=chosen.width,
        num_layers=chosen.num_layers,
        num_heads=chosen.num_heads,
        state_size=chosen.state_size,
        max_length=SEQUENCE_LENGTH,
    )
    names = {field.name for field in dataclasses.fields(Shape)}
    changes = {name: value for name, value in options.items() if name in names}
    others = {name: value for name, value in options.items() if name not in names}
    return make_config(architecture, dataclasses.replace(shape, **changes), **others)


def build(
    architecture: str,
    size: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A new model of the paper.

    Args:
        architecture: "paragru", "paralstm", "transformer", "mamba2", or another stack of mixers.
        size: "400m", "1b", "2.9b" or "7b".
        device: Device of the parameters; "meta" for parameters without values.
        dtype: Type of the parameters; None for PyTorch's default.
        options: Fields of `Shape` to change, and arguments of the configuration's class.

    Raises:
        ValueError: There is no such architecture or size.
    """
    config = configuration(architecture, size, **options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device or torch.get_default_device()):
            return make_model(config)
    finally:
        torch.set_default_dtype(before)
