"""What transformers may pass to a forward pass besides the arguments by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pararnn.lm.models.cache import ParaRNNCache

_WITHOUT_EFFECT = (
    "cache_position",  # the cache counts
    "cu_seq_lens_k",  # as cu_seq_lens_q
    "max_length_q",
    "max_length_k",
    "num_items_in_batch",  # the base model has no loss
    "token_type_ids",
)
_INSTEAD = {
    "output_attentions": "no attention weights are kept",
    "head_mask": "there are no heads to mask",
}


def refuse_others(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that have no meaning here; those that change nothing are let through.

    Raises:
        TypeError: One that is neither None nor False, and that is not known to change nothing.
    """
    for name, value in arguments.items():
        if value is None or value is False or name in _WITHOUT_EFFECT:
            continue
        why = _INSTEAD.get(name, "docs/models.md lists the arguments")
        raise TypeError(f"the forward pass takes no {name}={type(value).__name__}: {why}.")


def pop_cache(given: object, arguments: dict[str, Any]) -> ParaRNNCache | None:
    """The cache that was passed, as `cache_params` or by the name that most models have for it.

    Raises:
        TypeError: It is that of another model.
    """
    others = arguments.pop("past_key_values", None)
    cache = others if given is None else given
    if cache is None or isinstance(cache, ParaRNNCache):
        return cache
    raise TypeError(
        f"the cache is a {type(cache).__name__}, but this model goes on from a ParaRNNCache; pass "
        "the cache_params that it returned."
    )


def num_new_tokens(along: Sequence[Tensor | None], num_past: int) -> int:
    """Tokens after those of a cache that the caller of `generate` hands in.

    Args:
        along: Tensors along the text (second axis); the longest is as long as the whole.
        num_past: Tokens that the cache has seen.

    Raises:
        ValueError: None is new.
    """
    whole = max(tensor.shape[1] for tensor in along if tensor is not None)
    if whole <= num_past:
        raise ValueError(
            f"the cache has seen {num_past} tokens but input_ids has only {whole}; pass the whole "
            "text, at least one token longer than the cache, or an attention_mask over all of it."
        )
    return whole - num_past
