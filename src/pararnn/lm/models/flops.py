"""Floating-point operations of training, and peaks of GPUs, for the utilisation (MFU)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from pararnn.lm.catalogue import ATTENTION

_PEAK_FLOPS = {  # the first name that fits counts
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}


def train_flops_per_token(model: PreTrainedModel, time: int) -> float:
    """Floating-point operations of a train step per token, without recomputed activations.

    6 for every parameter that is multiplied with (2 forward, 4 backward): all but the input
    embedding, which is only read from, unless it is the output projection as well. Attention adds
    12 per layer, channel and step of the sequence. What recurrences and convolutions do per
    channel is left out: it is no matrix product.

    Args:
        model: Any causal language model of transformers.
        time: Tokens per sequence.

    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, Appendix B, which counts all parameters.
    """
    config = model.config
    return 6.0 * multiplied_parameters(model) + 12.0 * time * _attention_channels(config)


def multiplied_parameters(model: PreTrainedModel) -> int:
    """Number of parameters that multiply every token."""
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    total = sum(parameter.numel() for parameter in model.parameters())
    tied = output is not None and output.weight is embedding.weight
    return total if tied else total - sum(parameter.numel() for parameter in embedding.parameters())


def peak_flops(device: torch.device) -> float | None:
    """Peak of a GPU in dense bfloat16 operations per second, by its maker; None if unknown."""
    if device.type != "cuda":
        return None
    full_name = torch.cuda.get_device_name(device)
    return next((peak for name, peak in _PEAK_FLOPS.items() if name in full_name), None)


def _attention_channels(config: Any) -> int:
    """Channels of all heads of all attention layers together; 0 for models without attention."""
    if hasattr(config, "mixers"):
        return config.mixers.count(ATTENTION) * config.hidden_size
    heads = getattr(config, "num_attention_heads", 0)
    if not heads:
        return 0
    per_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers * heads * per_head
