"""Speed of generation, token by token, against the speed of reading the weights."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from pararnn.bench.problem import Row
from pararnn.bench.timing import steps_milliseconds
from pararnn.layers.stepping import captured_step, compile_options
from pararnn.lm.bench.models import ModelSize, release
from pararnn.lm.catalogue import CELLS
from pararnn.lm.decoding import int8_weights
from pararnn.lm.decoding.decoder import Decoder, largest
from pararnn.lm.decoding.int8 import Int8Linear
from pararnn.lm.models import ParaRNNForCausalLM
from pararnn.lm.models.architectures import missing_kernels
from pararnn.lm.models.flops import multiplied_parameters

_STEPS = 16  # timed together


def decode_rows(
    size: ModelSize,
    architectures: Sequence[str],
    batches: Sequence[int],
    contexts: Sequence[int],
    device: torch.device,
    rate: float,
    weights: Sequence[str] = ("stored",),
    compiled: bool = True,
) -> Iterator[Row]:
    """Time single steps of generation in bfloat16, greedily.

    A model whose state does not grow with the text has one row for all contexts. No text is read
    first: the time of attention depends on the length of the cache, not on its content.

    Args:
        size: Size of the models.
        architectures: Names of presets.
        batches: Texts side by side.
        contexts: Numbers of tokens before the generated one.
        device: Where to run; on a GPU a step is captured in a CUDA graph.
        rate: Speed at which the device copies, in GB/s.
        weights: "stored" or "int8"; other models than ours have the first only.
        compiled: Whether a step is compiled on a GPU.
    """
    for architecture in architectures:
        grows = hasattr(size.config(architecture, max(contexts)), "num_key_value_heads")
        kinds = weights if architecture in CELLS else ["stored"]
        sizes = itertools.product(kinds, batches, contexts if grows else [None])
        for kind, batch, context in sizes:
            row: Row = {"architecture": architecture, "weights": kind}
            row |= {"batch": batch, "context": context}
            row["note"] = missing_kernels(architecture, size.memory_options)
            release()
            try:
                model = make_ready(size, architecture, kind, context, device)
                row |= measure(model, batch, context, rate, compiled)
            except torch.OutOfMemoryError:
                row["skipped"] = "out of memory"
            yield row


def make_ready(
    size: ModelSize, architecture: str, weights: str, context: int | None, device: torch.device
) -> PreTrainedModel:
    """A new model in bfloat16, or with int8 weights; arguments as for `decode_rows`."""
    model = size.build(architecture, device, torch.bfloat16, (context or 0) + _STEPS).eval()
    if weights == "int8":
        assert isinstance(model, ParaRNNForCausalLM)
        return int8_weights(model)
    return model


def measure(
    model: PreTrainedModel, batch: int, context: int | None, rate: float, compiled: bool
) -> Row:
    """What is measured of a step, and its limit; arguments as for `decode_rows`."""
    run, state_bytes = _steps(model, batch, context, compiled and model.device.type == "cuda")
    milliseconds = steps_milliseconds(run, model.device) / _STEPS
    rounded = [m for m in model.modules() if isinstance(m, Int8Linear)]
    weight_bytes = multiplied_parameters(model) * model.dtype.itemsize
    weight_bytes += sum(m.codes.nbytes + m.scale.nbytes for m in rounded)
    limit = (weight_bytes + state_bytes) / rate / 1e6
    return {
        "weight_bytes": weight_bytes,
        "state_bytes": state_bytes,
        "token_ms": milliseconds,
        "tokens_per_second": batch / milliseconds * 1e3,
        "limit_ms": limit,
        "share_of_limit": limit / milliseconds,
    }


def _steps(
    model: PreTrainedModel, batch: int, context: int | None, compiled: bool
) -> tuple[Callable[[], None], int]:
    """A function that runs `_STEPS` steps, and the bytes of state that a step reads and writes."""
    if isinstance(model, ParaRNNForCausalLM):
        decoder = Decoder(model, batch, compiled=compiled)
        decoder.start([[1]] * batch)
        return _repeated(decoder.step), 2 * decoder.state_bytes
    cache = StaticCache(config=model.config, max_cache_len=(context or 0) + _STEPS)
    layers: list[Any] = cache.layers
    repeated = _repeated(_cached_step(model, batch, cache, compiled))
    if context is None:
        kinds = [kind for layer in layers for kind in (layer.conv_states, layer.recurrent_states)]
        return repeated, 2 * sum(state.nbytes for kind in kinds for state in kind.values())
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def from_context() -> None:
        for layer in layers:
            layer.cumulative_length.fill_(context)
        repeated()

    return from_context, held * context // (context + _STEPS)


def _cached_step(
    model: PreTrainedModel, batch: int, cache: StaticCache, compiled: bool
) -> Callable[[], None]:
    """One greedy step of a model of transformers, as `Decoder.step` is for our models."""
    accepted = inspect.signature(model.forward).parameters
    name = "cache_params" if "cache_params" in accepted else "past_key_values"
    tokens = torch.ones(batch, 1, dtype=torch.int64, device=model.device)

    @torch.no_grad()
    def step() -> None:
        output = model(input_ids=tokens, use_cache=True, **{name: cache})
        tokens.copy_(largest(output.logits[:, -1]))

    step()  # the cache makes its tensors
    if compiled:
        step = torch.compile(step, dynamic=False, options=compile_options())
    return captured_step(step, model.device)


def _repeated(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(_STEPS):
            step()

    return run
