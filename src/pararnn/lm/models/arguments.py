"""Further arguments that transformers passes to the forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pararnn._words import counted
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
    """Refuse arguments that the model does not support; ignore those that change nothing.

    Raises:
        TypeError: An argument is set (neither None nor False) and would change the result.
    """
    for name, value in arguments.items():
        if value is None or value is False or name in _WITHOUT_EFFECT:
            continue
        why = _INSTEAD.get(name, "docs/reference/models.md lists the arguments")
        raise TypeError(f"the forward pass takes no {name}={type(value).__name__}: {why}.")


def pop_cache(given: object, arguments: dict[str, Any]) -> ParaRNNCache | None:
    """The cache that was passed as `cache_params` or, as for most models, `past_key_values`.

    Raises:
        TypeError: The cache is not a `ParaRNNCache`.
    """
    others = arguments.pop("past_key_values", None)
    cache = others if given is None else given
    if cache is None or isinstance(cache, ParaRNNCache):
        return cache
    raise TypeError(
        f"the cache is a {type(cache).__name__}, but this model continues from a ParaRNNCache; "
        "pass the cache_params that it returned."
    )


def num_new_tokens(along: Sequence[Tensor | None], num_past: int) -> int:
    """Number of tokens after those that the cache has seen, in a call of `generate`.

    Args:
        along: Tensors whose second axis is time; the longest covers the whole text.
        num_past: Tokens that the cache has seen.

    Raises:
        ValueError: There is no new token.
    """
    whole = max(tensor.shape[1] for tensor in along if tensor is not None)
    if whole <= num_past:
        raise ValueError(
            f"the cache has seen {counted(num_past, 'token')} but input_ids has only {whole}; pass "
            "the whole "
            "text, at least one token longer than the cache, or an attention_mask over all of it."
        )
    return whole - num_past
