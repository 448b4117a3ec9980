"""Where sequences begin in a batch: packed documents in one row, and padding before a row."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from pararnn._words import counted


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

    def ends_in_padding(self) -> Tensor | None:
        """Whether a sequence ends in padding, so that no token can follow; None without padding."""
        if self.real is None:
            return None
        real = self.real.squeeze(-1)
        return (real.any(1) & ~real[:, -1]).any()


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Where documents begin, in the four ways that a caller can say it; each may be None.

    Attributes:
        resets: Shape (batch, time), True at the first token of every document.
        position_ids: Shape (batch, time) or (1, time): a document begins where they do not rise by
            one, and where the first of a call that goes on from a cache is 0.
        seq_idx: Shape (batch, time): a document begins where it changes.
        cu_seq_lens_q: Shape (documents + 1,), 0 first and the number of tokens last, of documents
            packed one after another into a single row.
    """

    resets: Tensor | None = None
    position_ids: Tensor | None = None
    seq_idx: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None

    def starts(self, batch: int, time: int, num_past: int) -> list[Tensor]:
        """Where documents begin, each (batch, time); none where nothing begins.

        Raises:
            ValueError: A shape does not match.
        """
        found = []
        if self.position_ids is not None:
            positions = _rows("position_ids", self.position_ids, batch, time)
            first = (positions[:, :1] == 0) & (num_past > 0)
            later = positions[:, 1:] != positions[:, :-1] + 1
            found.append(torch.cat([first, later], 1))
        if self.seq_idx is not None:
            index = _rows("seq_idx", self.seq_idx, batch, time)
            changes = index[:, 1:] != index[:, :-1]
            found.append(torch.cat([torch.zeros_like(changes[:, :1]), changes], 1))
        if self.cu_seq_lens_q is not None:
            found.append(_cut(self.cu_seq_lens_q, batch, time))
        found = [f for f in found if may_hold(f.any())]
        if self.resets is not None:
            found.append(_rows("resets", self.resets, batch, time).bool())
        return found


def find_boundaries(
    documents: Documents, attention_mask: Tensor | None, batch: int, time: int, num_past: int
) -> Boundaries | None:
    """Combine padding and document boundaries.

    Args:
        documents: Where they begin.
        attention_mask: Shape (batch, time) or (batch, num_past + time), 0 at padding.
        batch: Rows of this call.
        time: Tokens of this call.
        num_past: Tokens of earlier calls.

    Returns:
        None when there is nothing to reset or to mask.

    Raises:
        ValueError: A shape does not match, or padding lies between two tokens.
    """
    starts = documents.starts(batch, time, num_past)
    real = None
    if attention_mask is not None:
        real, first_real = _padding(attention_mask, batch, time, num_past)
        if may_hold(~real.all()):
            starts = [s & real for s in starts] + [first_real]
        else:
            real = None
            starts += [first_real] if num_past and first_real.any() else []
    if not starts:
        return None
    resets = functools.reduce(torch.logical_or, starts)
    return Boundaries(resets, resets.cumsum(1), None if real is None else real.unsqueeze(-1))


def may_hold(condition: Tensor) -> bool:
    """Whether a condition holds; True under torch.compile, which cannot read the values."""
    return torch.compiler.is_compiling() or bool(condition)


def require(condition: Tensor, message: str) -> None:
    """Raise ValueError if a condition does not hold; in a compiled program, assert it."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message)


def _rows(name: str, tensor: Tensor, batch: int, time: int) -> Tensor:
    """Rows for all sequences of the batch; a single row is expanded."""
    if tensor.dim() != 2 or tensor.shape[0] not in (1, batch) or tensor.shape[1] != time:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but the input has {counted(time, 'step')}; "
            "pass shape "
            f"({batch}, {time})."
        )
    return tensor.expand(batch, -1)


def _cut(ends: Tensor, batch: int, time: int) -> Tensor:
    """Starts of documents that follow one another in a single row, without the first."""
    wanted = "cu_seq_lens_q must rise from 0 to the number of tokens"
    if batch != 1 or ends.dim() != 1 or len(ends) < 2:
        raise ValueError(
            f"{wanted} {time} of a single row, got shape {tuple(ends.shape)} and "
            f"{counted(batch, 'row')}."
        )
    fits = (ends[0] == 0) & (ends[-1] == time) & (ends.diff() >= 0).all()
    seen = "" if torch.compiler.is_compiling() else f" {time}"  # to name the number would fix it
    require(fits, f"{wanted}{seen} of a single row.")
    starts = torch.zeros(1, time + 1, dtype=torch.bool, device=ends.device)
    starts[0, ends[1:-1].long()] = True
    return starts[:, :time] & (torch.arange(time, device=ends.device) > 0)


def _padding(attention_mask: Tensor, batch: int, time: int, num_past: int) -> tuple[Tensor, Tensor]:
    """Where there is no padding, and the first token after padding on the left."""
    shape = attention_mask.shape
    if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] not in (time, time + num_past):
        whole = f" or ({batch}, {time + num_past})" if num_past else ""
        raise ValueError(
            f"attention_mask has shape {tuple(shape)}; pass ({batch}, {time}){whole}. The cache "
            f"has seen {counted(num_past, 'token')}."
        )
    real = attention_mask.bool().expand(batch, -1)
    before = real[:, -time - 1 : -1]
    if before.shape[1] < time:
        first = torch.full_like(real[:, :1], num_past > 0)
        before = torch.cat([first, real[:, -time:-1]], dim=1)
    real = real[:, -time:]
    first_real = real & ~before
    beginnings = first_real.sum(1) + (before[:, 0] & (num_past > 0))
    require(
        (beginnings <= 1).all(),
        "attention_mask has padding between two tokens of a sequence; padding goes before or after "
        "all of them.",
    )
    return real, first_real
