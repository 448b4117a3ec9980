"""Attention masks of models of the package transformers, made before their forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate


class PreparedMasks:
    """Makes the masks that a model would make itself, without waiting for a GPU.

    To find documents that share a sequence a model reads positions back. And while a CUDA graph is
    captured some versions of transformers make a mask where attention needs none; so the first pass
    of each shape without documents tells which layers need one. Masks themselves are not kept: they
    grow with the square of the length, and lengths may differ from batch to batch.

    Args:
        model: Any causal language model of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._takes_them = _takes_masks(model)
        self._needless: dict[Hashable, dict[str, None]] = {}

    def __call__(self, tokens: Tensor, resets: Tensor | None) -> dict[str, Any]:
        """The argument of the forward pass that holds them; none where the model makes its own.

        Args:
            tokens: Shape (batch, time).
            resets: Of the same shape, True where a document begins; None for one document.
        """
        if not self._takes_them:
            return {}
        if resets is not None:
            return self._make(tokens, resets)
        key = tokens.shape, tokens.device, self._model.config._attn_implementation
        needless = self._needless.get(key)
        if needless and set(needless) == set(self._model.config.layer_types):
            return {"attention_mask": needless}
        made = self._make(tokens)
        if needless is None:
            masks = made.get("attention_mask", {})
            needless = {kind: None for kind, mask in masks.items() if mask is None}
            self._needless[key] = needless
        return {name: masks | needless for name, masks in made.items()}

    def _make(self, tokens: Tensor, resets: Tensor | None = None) -> dict[str, Any]:
        document = None if resets is None else resets.cumsum(1)

        def share_document(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            assert document is not None
            return document[row, query] == document[row, key]

        # of the embeddings only shape, type and device are looked at
        like = torch.empty((*tokens.shape, 0), dtype=self._model.dtype, device=tokens.device)
        masks = create_masks_for_generate(
            config=self._model.config,
            inputs_embeds=like,
            attention_mask=None,
            past_key_values=None,
            and_mask_function=None if document is None else share_document,
        )
        return {"attention_mask": masks} if isinstance(masks, dict) else {}


def _takes_masks(model: PreTrainedModel) -> bool:
    """Whether a model takes a mask for each type of its layers.

    transformers goes by the same when it generates with a cache of fixed size. A model that takes
    no positions looks for no documents.
    """
    accepted = inspect.signature(model.base_model.forward).parameters
    return (
        {"attention_mask", "position_ids"} <= set(accepted)
        and hasattr(model.config, "layer_types")
        and model._can_compile_fullgraph
        and not hasattr(model, "create_masks_for_generate")  # other masks than all others have
    )
