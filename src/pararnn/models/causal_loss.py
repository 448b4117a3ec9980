"""The training loss of any causal language model of transformers, without holding all logits."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pararnn.models.loss import IGNORED

_LOGITS_AT_ONCE = 2**27  # entries: half a GiB in float32


class CausalLoss(nn.Module):
    """A causal language model whose forward pass is its training loss.

    The logits of a batch of 64 sequences of 2,048 tokens and 50,000 entries would take 26 GiB; here
    they exist for some rows at a time, and their gradients are taken there and then.

    Args:
        model: With a `base_model` and an output embedding.
        z_loss_weight: Weight of the mean squared log-partition (PaLM, arXiv 2204.02311).
    """

    def __init__(self, model: PreTrainedModel, z_loss_weight: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.z_loss_weight = z_loss_weight
        accepted = inspect.signature(model.base_model.forward).parameters
        self.knows_resets = "resets" in accepted
        self.knows_positions = "position_ids" in accepted

    @property
    def separates_documents(self) -> bool:
        """Whether documents that share a sequence can be kept from seeing each other."""
        return self.knows_resets or self.knows_positions

    def forward(
        self, tokens: Tensor, targets: Tensor, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of predicting `targets`.

        Args:
            tokens: Shape (batch, time), int64.
            targets: What each step must predict, of the same shape; -100 does not count.
            resets: Shape (batch, time), bool, True at the first token of every document: it is
                then evaluated as if it stood alone.

        Returns:
            The loss, and without gradients its parts: cross-entropy in nats per token and z-loss
            before its weight; means over the targets that count.

        Raises:
            ValueError: The model cannot keep documents apart.
        """
        hidden = self.model.base_model(
            input_ids=tokens, use_cache=False, **self._documents(resets)
        ).last_hidden_state
        weight = self.model.get_output_embeddings().weight
        return linear_cross_entropy(
            hidden.flatten(0, 1), weight, targets.flatten(), self.z_loss_weight
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


def positions_in_documents(resets: Tensor) -> Tensor:
    """Steps since the document began, shape (batch, time): transformers sees documents in them."""
    step = torch.arange(resets.shape[1], device=resets.device).expand_as(resets)
    return step - torch.where(resets, step, 0).cummax(1).values


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z_loss_weight: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of `hidden @ weight.T` with its z-loss, some rows of logits at a time.

    Args:
        hidden: Shape (rows, width).
        weight: Shape (vocab_size, width).
        targets: Shape (rows,), int64; -100 does not count.
        z_loss_weight: Of the z-loss in the result.

    Returns:
        The loss, and without gradients cross-entropy and z-loss, all float32.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, targets, z_loss_weight)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        counted = targets != IGNORED
        count = counted.sum().clamp_min(1)
        differentiate = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if differentiate else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if differentiate else None
        cross_entropy = z_loss = hidden.new_zeros((), dtype=exact)
        rows = max(1, _LOGITS_AT_ONCE // weight.shape[0])
        for start in range(0, len(hidden), rows):
            some = slice(start, start + rows)
            logits = (hidden[some] @ weight.T).to(exact)
            log_partition = logits.logsumexp(1)
            chosen = targets[some].clamp_min(0).unsqueeze(1)
            share = counted[some].to(exact) / count
            nats = log_partition - logits.gather(1, chosen).squeeze(1)
            cross_entropy = cross_entropy + (nats * share).sum()
            z_loss = z_loss + (log_partition.square() * share).sum()
            if grad_hidden is None or grad_weight is None:
                continue
            grad = logits.sub_(log_partition.unsqueeze(1)).exp_()
            grad *= (share * (1 + 2 * z_loss_weight * log_partition)).unsqueeze(1)
            grad.scatter_add_(1, chosen, -share.unsqueeze(1))
            grad = grad.to(hidden.dtype)
            grad_hidden[some] = grad @ weight
            grad_weight += grad.T @ hidden[some]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(cross_entropy, z_loss)
        return cross_entropy + z_loss_weight * z_loss, cross_entropy, z_loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        found = [g * grads[0] for g in ctx.saved_tensors]
        grad_hidden, grad_weight = (g.to(t) for g, t in zip(found, ctx.dtypes, strict=True))
        return grad_hidden, grad_weight, None, None
