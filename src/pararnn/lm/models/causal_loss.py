"""The training loss of any causal language model of transformers, without storing all logits."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pararnn.lm.models.cache import ParaRNNCache
from pararnn.lm.models.loss import IGNORED
from pararnn.lm.models.masks import PreparedMasks

_LOGITS_AT_ONCE = 2**28  # entries: half a GiB in bfloat16


class CausalLoss(nn.Module):
    """A causal language model whose forward pass is its training loss.

    The logits of 64 sequences of 2,048 tokens with a vocabulary of 50,000 would take 26 GiB. So the
    loss and its gradients are computed for some rows of logits at a time.

    Args:
        model: Must have a `base_model` and an output embedding.
        z_loss_weight: Weight of the mean squared log-partition (PaLM, arXiv 2204.02311).

    Attributes:
        compiled: Fuse the operations on logits with `torch.compile`.
    """

    def __init__(self, model: PreTrainedModel, z_loss_weight: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.z_loss_weight = z_loss_weight
        self.compiled = False
        accepted = inspect.signature(model.base_model.forward).parameters
        self.knows_resets = "resets" in accepted
        self.knows_positions = "position_ids" in accepted
        self.masks = PreparedMasks(model)

    @property
    def separates_documents(self) -> bool:
        """Whether the model can separate documents that share a sequence."""
        return self.knows_resets or self.knows_positions

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor,
        resets: Tensor | None = None,
        cache: ParaRNNCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of predicting `targets`.

        Args:
            tokens: Shape (batch, time), int64.
            targets: The token that each step must predict, of the same shape; -100 is ignored.
            resets: Shape (batch, time), bool, True at the first token of every document.
                Documents then do not see each other.
            cache: State before the tokens, of a ParaRNN model; afterwards the one after them.

        Returns:
            The loss; and its parts without gradients: cross-entropy in nats per token, and z-loss
            before its weight. All are means over the targets that are not ignored.

        Raises:
            ValueError: The model cannot separate documents.
        """
        documents, masks = self._documents(resets), self.masks(tokens, resets)
        hidden = self.model.base_model(
            input_ids=tokens, **documents, **masks, **_cached(cache)
        ).last_hidden_state
        weight = self.model.get_output_embeddings().weight
        return linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets.flatten(), self.z_loss_weight, self.compiled
        )

    def _documents(self, resets: Tensor | None) -> dict[str, Tensor]:
        if resets is None:
            return {}
        if self.knows_resets:
            return {"resets": resets}
        if self.knows_positions:
            return {"position_ids": positions_in_documents(resets)}
        raise ValueError(
            f"{type(self.model).__name__} cannot keep documents of one sequence apart; pass "
            "resets=None and let them see each other."
        )


def _cached(cache: ParaRNNCache | None) -> dict[str, Any]:
    return {"use_cache": False} if cache is None else {"use_cache": True, "cache_params": cache}


def positions_in_documents(resets: Tensor) -> Tensor:
    """Steps since the document began, shape (batch, time). transformers finds documents by them."""
    step = torch.arange(resets.shape[1], device=resets.device).expand_as(resets)
    return step - torch.where(resets, step, 0).cummax(1).values


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss_weight: float = 0.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T` with its z-loss, some rows of logits at a time.

    Args:
        hidden: Shape (rows, width).
        weight: Shape (vocab_size, width).
        targets: Shape (rows,), int64; -100 is ignored.
        z_loss_weight: Weight of the z-loss.
        compiled: Fuse the operations on logits with `torch.compile`, into two passes over them.

    Returns:
        The loss, then cross-entropy and z-loss without gradients; all float32.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, targets, z_loss_weight, compiled)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss_weight: float,
        compiled: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        counted = targets != IGNORED
        share = counted.to(exact) / counted.sum().clamp_min(1)
        chosen = targets.where(counted, 0)
        differentiate = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if differentiate else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if differentiate else None
        measure = _fused(_measure) if compiled else _measure
        slopes = _fused(_slopes) if compiled else _slopes
        cross_entropy = z_loss = hidden.new_zeros((), dtype=exact)
        for some in _slices(len(hidden), weight.shape[0]):
            logits = hidden[some] @ weight.T
            log_partition, nats = measure(logits, chosen[some])
            cross_entropy = cross_entropy + (nats * share[some]).sum()
            z_loss = z_loss + (log_partition.square() * share[some]).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            growth = share[some] * (1 + 2 * z_loss_weight * log_partition)
            grad = slopes(logits, log_partition, chosen[some], growth, share[some])
            grad_hidden[some] = grad @ weight
            grad_weight += grad.T @ hidden[some]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(cross_entropy, z_loss)
        return cross_entropy + z_loss_weight * z_loss, cross_entropy, z_loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        found = [g * grads[0] for g in ctx.saved_tensors]
        grad_hidden, grad_weight = (g.to(t) for g, t in zip(found, ctx.dtypes, strict=True))
        return grad_hidden, grad_weight, None, None, None


def _slices(rows: int, vocab_size: int) -> list[slice]:
    """Rows whose logits are computed together: a power of two, which divides most batches."""
    most = max(1, _LOGITS_AT_ONCE // vocab_size)
    step = 1 << (most.bit_length() - 1)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _measure(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Log-partition of every row, and cross-entropy of its target in nats."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_partition = exact.logsumexp(1)
    return log_partition, log_partition - exact.gather(1, chosen.unsqueeze(1)).squeeze(1)


def _slopes(
    logits: Tensor, log_partition: Tensor, chosen: Tensor, growth: Tensor, share: Tensor
) -> Tensor:
    """Gradient of the loss with respect to the logits, in their type."""
    probability = (logits - log_partition.unsqueeze(1)).exp()
    is_chosen = torch.arange(logits.shape[1], device=logits.device) == chosen.unsqueeze(1)
    at_chosen = torch.where(is_chosen, share.unsqueeze(1), 0.0)
    return (probability * growth.unsqueeze(1) - at_chosen).to(logits.dtype)


@functools.cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
