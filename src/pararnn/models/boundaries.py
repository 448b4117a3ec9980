"""Where sequences begin inside a batch: documents packed into one row, and padding before a row."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Boundaries:
    """Boundaries of one call, computed once and shared by all blocks.

    Attributes:
        resets: Shape (batch, time), True where the state before this step is the initial one.
        document: Shape (batch, time), resets up to and including this step; 0 is whatever the
            cache carried in.
        real: Shape (batch, time, 1), False at padding; None without padding.
    """

    resets: Tensor
    document: Tensor
    real: Tensor | None

    def check_can_continue(self) -> None:
        """Raise ValueError when a sequence ends in padding, so that nothing can follow it."""
        if self.real is None:
            return
        real = self.real.squeeze(-1)
        if (real.any(1) & ~real[:, -1]).any():
            raise ValueError(
                "attention_mask is 0 at the end of some sequence, so the cache would hold padding; "
                "pad on the left, or pass use_cache=False."
            )


def find_boundaries(
    attention_mask: Tensor | None, resets: Tensor | None, time: int, num_past: int
) -> Boundaries | None:
    """Combine padding and document boundaries.

    Args:
        attention_mask: Shape (batch, time) or (batch, num_past + time), 0 at padding.
        resets: Shape (batch, time), bool.
        time: Tokens of this call.
        num_past: Tokens of earlier calls.

    Returns:
        None when there is nothing to reset or to mask.

    Raises:
        ValueError: A shape does not fit.
    """
    if resets is not None and resets.shape[1] != time:
        raise ValueError(
            f"resets has {resets.shape[1]} steps but the input has {time}; pass shape "
            f"({resets.shape[0]}, {time})."
        )
    if attention_mask is None:
        return None if resets is None else _boundaries(resets.bool(), None)
    if attention_mask.dim() != 2 or attention_mask.shape[1] not in (time, time + num_past):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; pass (batch, {time})"
            + (f" or (batch, {time + num_past})." if num_past else ".")
        )
    real = attention_mask.bool()
    before = real[:, -time - 1 : -1]
    if before.shape[1] < time:
        first = torch.full_like(real[:, :1], num_past > 0)
        before = torch.cat([first, real[:, -time:-1]], dim=1)
    real = real[:, -time:]
    first_real = real & ~before
    if (first_real.sum(1) + (before[:, 0] & (num_past > 0)) > 1).any():
        raise ValueError(
            "attention_mask has padding between two tokens of a sequence; padding goes before or "
            "after all of them."
        )
    return _boundaries(first_real if resets is None else first_real | resets.bool(), real)


def _boundaries(resets: Tensor, real: Tensor | None) -> Boundaries:
    return Boundaries(resets, resets.cumsum(1), None if real is None else real.unsqueeze(-1))
