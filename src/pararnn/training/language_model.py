"""The byte-level language model of a run: building, text in and out."""

import torch
from torch import Tensor
from transformers import GenerationConfig

from pararnn.models import ParaRNNConfig, ParaRNNForCausalLM
from pararnn.training.config import TrainConfig
from pararnn.training.corpus import DOCUMENT

NUM_BYTES = 256


def build_model(config: TrainConfig, device: torch.device) -> ParaRNNForCausalLM:
    """A new model, its weights decided by the seed alone."""
    torch.manual_seed(config.seed)
    shape = config.architecture
    model_config = ParaRNNConfig(
        vocab_size=NUM_BYTES,
        hidden_size=shape.width,
        num_hidden_layers=shape.num_layers,
        num_heads=shape.num_heads,
        conv_kernel=shape.conv_kernel,
        cell=config.model,
        initializer_range=shape.initializer_std,
        z_loss_weight=config.optimizer.z_loss_weight,
        backend=config.backend,
        bos_token_id=DOCUMENT,
        eos_token_id=DOCUMENT,
        pad_token_id=DOCUMENT,
    )
    return to_device(ParaRNNForCausalLM(model_config), device)


def to_device(model: ParaRNNForCausalLM, device: torch.device) -> ParaRNNForCausalLM:
    """Move a model; transformers wraps `to` in a way that hides its types."""
    return model.to(device)  # type: ignore[arg-type] # see above


def choose_device(name: str) -> torch.device:
    """The device that a configuration names; "auto" is CUDA when there is one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def encode(text: str) -> Tensor:
    """Tokens of a document that begins with text: shape (1, bytes + 1)."""
    return torch.tensor([[DOCUMENT, *text.encode()]])


def decode(tokens: Tensor) -> str:
    """Text of tokens, shape (time,): without document bytes, U+FFFD where it is no UTF-8."""
    content = bytes(token for token in tokens.tolist() if token != DOCUMENT)
    return content.decode(errors="replace")


def generate_text(
    model: ParaRNNForCausalLM,
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
        result = model.generate(  # type: ignore[misc] # its narrow protocol
            tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
        )
    return decode(result[0])
