"""The byte-level language model of a run: building, text in and out."""

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pararnn.models import CELLS
from pararnn.models.architectures import Shape, make_config, make_model
from pararnn.training.config import TrainConfig
from pararnn.training.corpus import DOCUMENT

NUM_BYTES = 256


def build_model(config: TrainConfig) -> PreTrainedModel:
    """A new model on the CPU, its weights decided by the seed alone."""
    torch.manual_seed(config.seed)
    size = config.architecture
    shape = Shape(
        vocab_size=NUM_BYTES,
        width=size.width,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        initializer_range=size.initializer_std,
        max_length=config.text.sequence_length,
    )
    options: dict[str, object] = {}
    if config.model != "transformer":
        options["conv_kernel"] = size.conv_kernel
    if config.model in CELLS:
        options["backend"] = config.backend
        options["z_loss_weight"] = config.optimizer.z_loss_weight
    return make_model(
        make_config(
            config.model,
            shape,
            bos_token_id=DOCUMENT,
            eos_token_id=DOCUMENT,
            pad_token_id=DOCUMENT,
            **options,
        )
    )


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model; transformers wraps `to` in a way that hides its types."""
    return model.to(device)  # type: ignore[arg-type] # see above


def encode(text: str) -> Tensor:
    """Tokens of a document that begins with text: shape (1, bytes + 1)."""
    return torch.tensor([[DOCUMENT, *text.encode()]])


def decode(tokens: Tensor) -> str:
    """Text of tokens, shape (time,): without document bytes, U+FFFD where it is no UTF-8."""
    content = bytes(token for token in tokens.tolist() if token != DOCUMENT)
    return content.decode(errors="replace")


def generate_text(
    model: PreTrainedModel,
    prompt: str,
    *,
    num_bytes: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continue a document.

    Args:
        model: Trained on bytes.
        prompt: Beginning of the document; may be empty.
        num_bytes: Most bytes to add; the model may end the document before.
        temperature: Of the sampling; 0 takes the most probable byte.
        seed: Of the sampling; the global random state is left as it was.

    Returns:
        The prompt and what follows it.
    """
    tokens = encode(prompt).to(model.device)
    settings = GenerationConfig(
        max_new_tokens=num_bytes,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        eos_token_id=DOCUMENT,
        pad_token_id=DOCUMENT,
    )
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        result = model.generate(  # type: ignore[operator] # a mixin of it has it
            tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
        )
    return decode(result[0])
