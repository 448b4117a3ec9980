"""Reads prompts of any lengths, in as few passes over all of their tokens as possible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pararnn._words import counted
from pararnn.lm.catalogue import ATTENTION
from pararnn.lm.decoding.snapshot import Snapshot
from pararnn.lm.decoding.states import Layer, join_rows, select_rows
from pararnn.lm.models.cache import ParaRNNCache
from pararnn.lm.models.modeling import ParaRNNForCausalLM

Prompts = Sequence[Sequence[int]]


def check_prompts(prompts: Prompts, batch_size: int, vocab_size: int) -> None:
    """Refuse what cannot be read.

    Raises:
        TypeError: A token is no whole number.
        ValueError: There are more or fewer prompts than texts, one is empty, or a token is unknown.
    """
    if len(prompts) != batch_size:
        raise ValueError(
            f"got {counted(len(prompts), 'prompt')} but batch_size is {batch_size}; pass as many, "
            "or make another Decoder."
        )
    lengths = [len(prompt) for prompt in prompts]
    if 0 in lengths:
        raise ValueError(
            f"prompt {lengths.index(0)} is empty; begin it with the token that begins a text."
        )
    for place, prompt in enumerate(prompts):
        _check_tokens(place, prompt)
    least, largest = (extreme(map(extreme, prompts)) for extreme in (min, max))
    if least < 0 or largest >= vocab_size:
        raise ValueError(
            f"the prompts hold tokens from {least} to {largest} but the model has {vocab_size}; "
            "encode them with the tokenizer that it was trained with."
        )


def _check_tokens(place: int, prompt: Sequence[int]) -> None:
    """Refuse a text, and numbers that are none of tokens."""
    wanted = "pass its tokens, whole numbers, as a tokenizer encodes them."
    if isinstance(prompt, (str, bytes)):
        raise TypeError(f"prompt {place} is a text, {prompt[:20]!r}; {wanted}")
    try:
        kind = torch.as_tensor(prompt).dtype
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"prompt {place} holds what is no number ({error}); {wanted}") from None
    if kind.is_floating_point or kind.is_complex or kind is torch.bool:
        raise TypeError(f"prompt {place} holds numbers of {kind}; {wanted}")


def read_prompts(
    model: ParaRNNForCausalLM, prompts: Prompts, after: Snapshot | None
) -> tuple[Tensor, list[Layer], int]:
    """The last logits, (texts, vocabulary), the states of all blocks, and the tokens read.

    Args:
        model: Reads the prompts.
        prompts: Of all texts.
        after: What was read before: of one text, for all prompts, or of as many as there are.

    Raises:
        ValueError: `after` has another number of texts; or prompts of different lengths come after
            it and the model has attention, whose state cannot hold padding in the middle.
    """
    if after is None:
        tokens, mask = _padded(prompts)
        return _read(model, tokens, mask, None)
    if after.batch_size not in (1, len(prompts)):
        raise ValueError(
            f"after has {counted(after.batch_size, 'text')} for {counted(len(prompts), 'prompt')}; "
            "pass "
            "a snapshot of one text, or as many texts (Snapshot.select)."
        )
    if after.batch_size < len(prompts):
        after = after.select([0] * len(prompts))
    lengths = [len(prompt) for prompt in prompts]
    if len(set(lengths)) > 1 and ATTENTION in model.config.mixers:
        raise ValueError(
            f"the prompts have {min(lengths)} to {max(lengths)} tokens, and the model has blocks "
            "of attention; after a snapshot pass prompts of one length, or one text at a time."
        )
    parts, order = [], []
    for length in sorted(set(lengths)):
        rows = [row for row, other in enumerate(lengths) if other == length]
        tokens, _ = _padded([prompts[row] for row in rows])
        past = after if len(rows) == len(prompts) else after.select(rows)
        parts.append(_read(model, tokens, None, past))
        order += rows
    if len(parts) == 1:
        return parts[0]
    back = torch.tensor(order).argsort()
    logits = torch.cat([part[0] for part in parts])[back.to(model.device)]
    layers = select_rows(join_rows([part[1] for part in parts]), back)
    return logits, layers, max(part[2] for part in parts)


def _read(
    model: ParaRNNForCausalLM, tokens: Tensor, mask: Tensor | None, after: Snapshot | None
) -> tuple[Tensor, list[Layer], int]:
    past = {}
    if after is not None:
        layers: list[Any] = list(after.layers)
        past["cache_params"] = ParaRNNCache(layers, after.num_tokens)
    output = model(
        input_ids=tokens.to(model.device),
        attention_mask=None if mask is None else mask.to(model.device),
        use_cache=True,
        logits_to_keep=1,
        **past,
    )
    cache = output.cache_params
    return output.logits[:, -1], cache.layers, cache.num_tokens


def _padded(prompts: Prompts) -> tuple[Tensor, Tensor | None]:
    """Tokens with padding on the left, and the mask of the tokens; None without padding."""
    tokens = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt) :] = torch.as_tensor(prompt)
        mask[row, -len(prompt) :] = 1
    return tokens, None if mask.all() else mask
