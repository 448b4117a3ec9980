"""Models for the tasks, of the parts of language models."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pararnn import RNN
from pararnn.lm.catalogue import (
    ATTENTION,
    BASELINES,
    CELLS,
    MAMBA2,
    MEMORIES,
    TRANSFORMER,
    cell_options,
    parts,
    repeated,
    unused_options,
)
from pararnn.lm.models.architectures import Shape, make_config, make_model
from pararnn.lm.models.attention import AttentionMixer
from pararnn.lm.models.block import make_mixer
from pararnn.lm.models.configuration import ParaRNNConfig
from pararnn.lm.models.convolution import CausalConvolution
from pararnn.tasks import architectures as architectures  # registers its cells
from pararnn.tasks.settings import Settings
from pararnn.tasks.task import Task

_CONV = 4  # steps, as in the paper
_MAMBA_STATE = 64  # entries per channel: as many as there are channels in the paper's tasks
_MAMBA: dict[str, Any] = {
    "chunk_size": 32,  # steps; 256, the default, are more than most sequences have
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,  # by default all three are tokens that a task may not have
}


def build_model(task: Task, architecture: str, settings: Settings) -> nn.Module:
    """A new model: tokens (batch, time) to logits (batch, time, classes or more).

    Its weights come from PyTorch's default generator.

    Args:
        task: Decides the numbers of tokens and classes.
        architecture: A name, or a hybrid, as in `pararnn.tasks.architectures`.
        settings: Form and sizes.

    Raises:
        ValueError: There is no such architecture.
    """
    stack = [architecture] if architecture in BASELINES else parts(architecture)
    if settings.form == "blocks":
        return _LanguageModel(task, architecture, stack, settings)
    return _Stack(task, architecture, stack, settings)


class _LanguageModel(nn.Module):
    """A whole language model; where there are fewer classes than tokens, some logits are idle."""

    def __init__(self, task: Task, architecture: str, stack: list[str], settings: Settings) -> None:
        super().__init__()
        layers = max(settings.num_layers, len(stack))
        shape = Shape(
            vocab_size=max(task.vocab_size, task.num_classes),
            width=settings.width,
            # Mamba2 has no MLPs, and twice the layers, as in the paper's language models.
            num_layers=2 * layers if architecture == MAMBA2 else layers,
            num_heads=settings.num_heads,
            # Inputs of a sum of `width` terms keep their variance; 0.02 is for a width of 2,500.
            initializer_range=1 / math.sqrt(settings.width),
            state_size=_MAMBA_STATE,
            conv_kernel=_CONV,
        )
        options: dict[str, Any] = _MAMBA if architecture == MAMBA2 else {}
        if architecture not in BASELINES:
            options = {
                "attention_heads": settings.num_heads,
                "cell_options": cell_options(stack, _options(settings)),
                "memory_options": _memory_options(settings),
            } | dict.fromkeys(unused_options(stack))
        self.model = make_model(make_config(architecture, shape, **options))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


class _Stack(nn.Module):
    """Embedding, layers, norm, linear: one layer is the model of the paper's tasks (C.2)."""

    def __init__(self, task: Task, architecture: str, stack: list[str], settings: Settings) -> None:
        super().__init__()
        self.positions = settings.positions
        self.embedding = nn.Embedding(task.vocab_size, settings.width)
        names = repeated(stack, max(settings.num_layers, len(stack)))
        if architecture in BASELINES:
            make: Callable[[str], nn.Module] = functools.partial(_baseline, settings=settings)
        else:
            options = cell_options(stack, _options(settings))
            make = functools.partial(_mixer, settings=settings, options=options)
        self.layers = nn.ModuleList(_Layer(make(name), settings) for name in names)
        self.norm = nn.RMSNorm(settings.width)
        self.head = nn.Linear(settings.width, task.num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.positions:
            x = x + sinusoids(x.shape[1], x.shape[2], x.device)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class _Layer(nn.Module):
    """Norm and mixer; in the form "mixer" a residual with a learnable scale as well (Figure 9)."""

    def __init__(self, mixer: nn.Module, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.norm = nn.RMSNorm(width)
        self.mixer = mixer
        scale = torch.ones(width) if settings.form == "mixer" else None
        self.residual_scale = None if scale is None else nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(self.norm(x))
        return y if self.residual_scale is None else self.residual_scale * x + y


def _baseline(name: str, settings: Settings) -> nn.Module:
    """What mixes over time in a baseline."""
    width, heads = settings.width, settings.num_heads
    if name == TRANSFORMER:
        return _mixer(ATTENTION, settings, {})
    shape = Shape(
        vocab_size=1,
        width=width,
        num_layers=1,
        num_heads=heads,
        initializer_range=1 / math.sqrt(width),
        state_size=_MAMBA_STATE,
        conv_kernel=_CONV,
    )
    whole: Any = make_model(make_config(name, shape, **_MAMBA))
    return whole.backbone.layers[0].mixer


def _mixer(name: str, settings: Settings, options: dict[str, Any]) -> nn.Module:
    width, heads = settings.width, settings.num_heads
    if settings.form == "cell" and name != ATTENTION:
        return _Cell(RNN(_cell(name, settings, options)))
    given: dict[str, Any] = {"cell_options": options, "memory_options": _memory_options(settings)}
    given |= dict.fromkeys(unused_options([name]))
    config = ParaRNNConfig(
        vocab_size=1,
        hidden_size=width,
        num_hidden_layers=1,
        num_heads=heads,
        conv_kernel=_CONV,
        cell=name,
        attention_heads=heads,
        **given,
    )
    if name == ATTENTION:
        return _Attention(config, convolution=settings.form == "mixer")
    return _OfLanguageModel(make_mixer(config, name))


def _cell(name: str, settings: Settings, options: dict[str, Any]) -> nn.Module:
    """A cell alone, or a memory with a projection of its own."""
    width, heads = settings.width, settings.num_heads
    if name in CELLS:
        return CELLS[name](width, width, num_heads=heads, **options)
    return MEMORIES[name](width, num_heads=heads, **_memory_options(settings))


class _Cell(nn.Module):
    """A recurrence alone: its outputs, heads side by side."""

    def __init__(self, rnn: RNN) -> None:
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0].flatten(2)


class _OfLanguageModel(nn.Module):
    """A mixer of the language models, without documents and states."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, None, None)[0]


class _Attention(nn.Module):
    """Attention of the language models, in the form "mixer" behind the convolution of a mixer.

    One layer of attention that sees single tokens cannot know what followed a token: it ends at
    35 % in 1-hop, and behind the convolution at 99.9 % (800 and 1,500 steps of 64 sequences). The
    82 % of the paper are between the two, and it does not say which it has.
    """

    def __init__(self, config: ParaRNNConfig, convolution: bool) -> None:
        super().__init__()
        size = config.hidden_size
        self.conv = CausalConvolution(size, config.conv_kernel) if convolution else None
        self.attention = AttentionMixer(config)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            x = self.conv(x, None, None)[0]
        return self.attention(x, None, None)[0]


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "max_recurrent_weight": settings.max_recurrent_weight,
        "max_timescale": settings.max_timescale,
    }


def _memory_options(settings: Settings) -> dict[str, Any]:
    """As many keys as values, so that the outputs have `width` numbers."""
    size = settings.width // settings.num_heads
    return {"key_size": size, "value_size": size, "shared_keys": False}


def sinusoids(time: int, width: int, device: torch.device) -> Tensor:
    """Sines and cosines of every position (Vaswani et al. 2017), (time, width); for any length."""
    half = width // 2
    steps = torch.arange(time, device=device, dtype=torch.float32)
    powers = torch.arange(half, device=device, dtype=torch.float32) / half
    angles = steps[:, None] * 10_000.0**-powers
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(waves, (0, width - 2 * half))
