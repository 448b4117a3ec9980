"""The language model of a run: building it, and continuing a text."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pararnn.lm.catalogue import BASELINES, cell_options, parts, unused_options
from pararnn.lm.data.words import warn
from pararnn.lm.decoding import Decoder, choose_step
from pararnn.lm.models import ParaRNNForCausalLM
from pararnn.lm.models.architectures import Shape, make_config
from pararnn.lm.training.config import TrainConfig
from pararnn.lm.training.initial import outline, start
from pararnn.lm.training.text import Codec


def build_model(config: TrainConfig, codec: Codec) -> PreTrainedModel:
    """A new model on the CPU, its weights decided by the seed alone."""
    return start(outline_model(config, codec), config.seed)


def outline_model(config: TrainConfig, codec: Codec) -> PreTrainedModel:
    """The same model without values."""
    size = config.architecture
    shape = Shape(
        vocab_size=codec.vocab_size,
        width=size.width,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        state_size=size.state_size,
        initializer_range=size.initializer_std,
        conv_kernel=size.conv_kernel,
        max_length=config.text.sequence_length,
    )
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), codec.separator)
    ours: dict[str, Any] = {}
    if config.model not in BASELINES:
        timescale = cell_options(parts(config.model), {"max_timescale": size.max_timescale})
        ours = {
            "backend": config.backend,
            "z_loss_weight": config.optimizer.z_loss_weight,
            "dropout": size.dropout,
            "mixers": config.mixers,
            "cell_options": timescale | config.options_of("cell_options"),
            "memory_options": config.options_of("memory_options"),
        }
        ours |= dict.fromkeys(unused_options(config.mixers))  # stored runs may have them
    return outline(make_config(config.model, shape, **special, **ours))


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model; transformers wraps `to` in a way that hides its types."""
    return model.to(device)  # type: ignore[arg-type] # see above


def generate_text(
    model: PreTrainedModel,
    codec: Codec,
    prompt: str,
    *,
    num_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """Continue a document.

    Args:
        model: Trained on the tokens of `codec`.
        codec: Between text and tokens.
        prompt: Beginning of the document; may be empty.
        num_tokens: Most tokens to add; the model may end the document before.
        temperature: Of the sampling; 0 takes the most probable token.
        seed: Of the sampling; the global random state is left as it was.

    Returns:
        The prompt and what follows it.
    """
    pieces = stream_text(
        model, codec, prompt, num_tokens=num_tokens, temperature=temperature, seed=seed
    )
    return "".join(pieces)


def stream_text(
    model: PreTrainedModel,
    codec: Codec,
    prompt: str,
    *,
    num_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> Iterator[str]:
    """The text that `generate_text` returns, piece by piece as it comes; the prompt comes first.

    Arguments are those of `generate_text`. On a GPU the step of our models is compiled where that
    pays (`choose_step`), which a note says then.
    """
    tokens = codec.encode(prompt)
    settings: dict[str, Any] = {"temperature": temperature, "seed": seed}
    if not isinstance(model, ParaRNNForCausalLM):
        whole = _generate(model, codec, tokens, num_tokens, **settings)
        yield from codec.decode_stream(whole.tolist())
        return
    choice = choose_step(model.device.type, model.config.num_hidden_layers, num_tokens)
    if choice.compiled:
        warn(f"The step of generation is compiled: {choice.because}.")
    decoder = Decoder(model, 1, compiled=choice.compiled)
    settings |= {"max_new_tokens": num_tokens, "end_of_text": codec.separator}

    def all_tokens() -> Iterator[int]:
        yield from tokens[0].tolist()
        for (token,) in decoder.stream(tokens.tolist(), **settings):
            assert token is not None  # the only text has not ended
            yield token

    yield from codec.decode_stream(all_tokens())


def _generate(
    model: PreTrainedModel,
    codec: Codec,
    tokens: Tensor,
    num_tokens: int,
    temperature: float,
    seed: int,
) -> Tensor:
    """The prompt and what follows it by transformers, for its own models."""
    tokens = tokens.to(model.device)
    settings = GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        eos_token_id=codec.separator,
        pad_token_id=codec.separator,
    )
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        result = model.generate(  # type: ignore[operator] # a mixin of it has it
            tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
        )
    return result[0]
