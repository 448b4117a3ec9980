"""Memory and time of training the presets on 1, 8 and 64 GPUs: computed, not measured.

    python benchmarks/scale.py

Bytes that autograd keeps per token are those of one block of the real model at its real width, run
in eager PyTorch on the CPU under bfloat16 autocast; compiled blocks keep less. Parameters,
gradients and AdamW's moments are float32 and sharded over all GPUs; two blocks and the embeddings
are gathered in bfloat16. A step takes 6 floating-point operations per parameter and token, 8 with
activation checkpointing, at 40 % of an H100's 989 TFLOP/s, and no time for communication.
"""

import torch

from pararnn.lm.models import CausalLoss, presets
from pararnn.lm.models.architectures import Shape, make_config, make_model

GIB = 2**30
FLOPS = 0.4 * 989e12
TOKENS = 256  # no other size of the models, so that it marks what grows with them
GPUS = (1, 8, 64)
ARCHITECTURES = ("paragru", "paralstm", "transformer")
HEADER = (
    "model",
    "batch per GPU",
    "parameters and AdamW on 1 / 8 / 64 GPUs",
    "kept for the backward pass",
    "the same, checkpointed",
    "all, checkpointed, on 1 / 8 / 64 GPUs",
    "step, ms",
    "step, checkpointed, ms",
)


def kept_bytes(architecture, chosen, layers):
    """Bytes per token that autograd keeps in a model of so many layers."""
    shape = Shape(vocab_size=64, width=chosen.width, num_layers=layers, num_heads=chosen.num_heads)
    model = CausalLoss(make_model(make_config(architecture, shape)))
    kept = {}

    def keep(tensor):
        if TOKENS in tensor.shape:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    tokens = torch.randint(64, (1, TOKENS))
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        model(tokens, tokens)
    return sum(size for size, _ in kept.values()) / TOKENS


def row(architecture, size):
    """The cells of one line of the table; memory in GiB."""
    chosen = presets.preset(architecture, size)
    model = presets.build(architecture, size, device="meta")
    parameters = sum(p.numel() for p in model.parameters())
    embedding = presets.VOCAB_SIZE * chosen.width
    block = (parameters - 2 * embedding) / chosen.num_layers
    gathered = {n: 2 * (parameters if n == 1 else 2 * embedding + 2 * block) for n in GPUS}
    states = [(16 * parameters / n + gathered[n]) / GIB for n in GPUS]
    tokens = chosen.batch_size * presets.SEQUENCE_LENGTH
    per_block = kept_bytes(architecture, chosen, 2) - kept_bytes(architecture, chosen, 1)
    kept = tokens * per_block * chosen.num_layers / GIB
    checkpointed = tokens * (per_block + 2 * chosen.width * chosen.num_layers) / GIB
    step_ms = 1000 * 6 * (parameters - embedding) * tokens / FLOPS
    return [
        f"{architecture} {size}",
        str(chosen.batch_size),
        " / ".join(f"{s:.1f}" for s in states),
        f"{kept:.0f}",
        f"{checkpointed:.1f}",
        " / ".join(f"{s + checkpointed:.0f}" for s in states),
        f"{step_ms:,.0f}",
        f"{step_ms * 8 / 6:,.0f}",
    ]


def main():
    print("|", " | ".join(HEADER), "|")
    print("|---" * len(HEADER) + "|")
    for size in presets.SIZES:
        for architecture in ARCHITECTURES:
            print("|", " | ".join(row(architecture, size)), "|", flush=True)


if __name__ == "__main__":
    main()
