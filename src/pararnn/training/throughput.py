"""How much of a GPU's arithmetic a training run uses."""

import torch
from transformers import PreTrainedModel

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}
"""Dense bfloat16 operations per second by a part of the device's name (NVIDIA's data sheets); the
first that fits counts."""


def peak_flops(device: torch.device) -> float | None:
    """The most a device can do in bfloat16 per second; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def flops_per_token(model: PreTrainedModel, sequence_length: int) -> float:
    """Operations that training on one token needs: two per multiply-add, forward and backward.

    6 N + 12 L W T with N parameters that multiply something (all but the input embedding), and for
    attention L layers of W channels (heads x head size) over T steps; recomputation does not count.
    The elementwise operations of a recurrence are left out.

    Source: PaLM, arXiv 2204.02311, appendix B, where model FLOPs utilisation (MFU) is this times
    tokens per second over the peak of all devices.
    """
    embedding = model.get_input_embeddings()
    looked_up = sum(p.numel() for p in embedding.parameters())
    flops = 6.0 * (sum(p.numel() for p in model.parameters()) - looked_up)
    head_size = getattr(model.config, "head_dim", None)
    if getattr(model.config, "num_attention_heads", None) and head_size:
        channels = model.config.num_attention_heads * head_size
        flops += 12.0 * model.config.num_hidden_layers * channels * sequence_length
    return flops
