"""Configurations of our language models and of the baselines of transformers, from one shape."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.mamba2 import Mamba2Config
from transformers.models.qwen3 import Qwen3Config

from pararnn._words import counted
from pararnn.lm import linear
from pararnn.lm.catalogue import BASELINES as BASELINES
from pararnn.lm.catalogue import LINEAR, MAMBA2, check_used, parts, repeated
from pararnn.lm.catalogue import architectures as architectures
from pararnn.lm.catalogue import check_architecture as check_architecture
from pararnn.lm.models.configuration import ParaRNNConfig, default_mlp_size, options_of_memory


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes that all architectures have in common.

    Attributes:
        vocab_size: Number of tokens.
        width: Channels of the residual stream.
        num_layers: Blocks.
        num_heads: Heads of the input projection of a cell, of attention, or of the state of Mamba2.
        initializer_range: Standard deviation of linear and embedding weights.
        state_size: State entries of Mamba2 per channel.
        conv_kernel: Width of the causal convolution in steps; attention has none.
        max_length: Longest sequence for attention, in steps; the others have no limit.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    initializer_range: float = 0.02
    state_size: int = 128
    conv_kernel: int = 4
    max_length: int = 2048


def _transformer(shape: Shape, **options: Any) -> PreTrainedConfig:
    """RMSNorm, SwiGLU, rotary positions, normed queries and keys, one key head per query head."""
    return Qwen3Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        head_dim=shape.width // shape.num_heads,
        intermediate_size=default_mlp_size(shape.width),
        initializer_range=shape.initializer_range,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=False,
        **options,
    )


def _mamba2(shape: Shape, **options: Any) -> PreTrainedConfig:
    """Mamba2 with twice the width inside. Its default initializer_range is 5 times ours."""
    return Mamba2Config(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.num_layers,
        num_heads=shape.num_heads,
        head_dim=2 * shape.width // shape.num_heads,
        n_groups=1,
        state_size=shape.state_size,
        conv_kernel=shape.conv_kernel,
        initializer_range=shape.initializer_range,
        tie_word_embeddings=False,
        **options,
    )


_KERNELS = {MAMBA2: {"mamba-ssm": "mamba_ssm.ops.triton.ssd_combined", "causal-conv1d": ""}}
"""Packages with the fast kernels of an architecture, and the module that transformers imports."""

_BASELINES: dict[str, Callable[..., PreTrainedConfig]] = dict(
    zip(BASELINES, (_transformer, _mamba2), strict=True)
)


_CONFIGS = {kind.model_type: kind for kind in (ParaRNNConfig, Qwen3Config, Mamba2Config)}


def foreign_fields(stored: dict[str, Any]) -> list[str]:
    """Fields of a stored configuration that none of our models has.

    Some fields make transformers fetch code, for example `attn_implementation` and `auto_map`.
    """
    kind = _CONFIGS.get(str(stored.get("model_type")))
    return ["model_type"] if kind is None else sorted(set(stored) - set(kind().to_dict()))


def missing_kernels(architecture: str, memory_options: Mapping[str, Any] | None = None) -> str:
    """Why an architecture has no fast kernels, such as a package that is missing; empty if it has.

    Args:
        architecture: As of `make_config`.
        memory_options: As of `ParaRNNConfig`.
    """
    if architecture not in BASELINES:
        return _missing_of_memories(parts(architecture), memory_options or {})
    for package, module in _KERNELS.get(architecture, {}).items():
        name = package.replace("-", "_")
        if importlib.util.find_spec(name) is None:
            return f"transformers' slow path: {package} is not installed"
        try:
            importlib.import_module(module or name)
        except ImportError as error:
            return f"transformers' slow path: {package} cannot be imported ({error})"
    return ""


def _missing_of_memories(stack: list[str], given: Mapping[str, Any]) -> str:
    """Linear memories of a stack that run in our kernels on a GPU, and why."""
    found = {}
    for name in dict.fromkeys(stack):
        if name in LINEAR:
            options = options_of_memory(name, given)
            size = options["key_size"], options["value_size"]
            if reason := linear.missing(LINEAR[name], *size):
                found[name] = reason
    if not found or not torch.cuda.is_available():
        return ""
    return f"our step by step kernels for {', '.join(found)}: {next(iter(found.values()))}"


def make_config(architecture: str, shape: Shape, **options: Any) -> PreTrainedConfig:
    """The configuration of a language model.

    Args:
        architecture: A baseline, or a stack of mixers as in `pararnn.lm.catalogue`.
        shape: Its size.
        options: Further arguments of the configuration's class, such as `eos_token_id`.

    Raises:
        ValueError: A name is unknown, the heads do not divide the width, a stack has more parts
            than there are blocks, or there are options that no block takes.
    """
    check_architecture(architecture)
    if shape.width % shape.num_heads:
        raise ValueError(
            f"width {shape.width} cannot be split into {shape.num_heads} heads; choose a number "
            "of heads that divides it."
        )
    if architecture in _BASELINES:
        check_used([], architecture, options)
        return _BASELINES[architecture](shape, **options)
    stack = parts(architecture)
    if len(stack) > shape.num_layers:
        raise ValueError(
            f"architecture {architecture!r} has {counted(len(stack), 'block')} but the model has "
            f"{shape.num_layers}; give it as many layers, or name fewer."
        )
    options.setdefault("mixers", repeated(stack, shape.num_layers))
    return ParaRNNConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.num_layers,
        num_heads=shape.num_heads,
        cell=stack[0],
        conv_kernel=shape.conv_kernel,
        initializer_range=shape.initializer_range,
        **options,
    )


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A new model of a configuration, on the default device and of the default dtype."""
    return AutoModelForCausalLM.from_config(config)
