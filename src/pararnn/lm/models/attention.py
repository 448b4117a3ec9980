"""Attention as a mixer, for hybrid stacks of attention and recurrences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pararnn.distributed import Ranks, exchange
from pararnn.lm.models.boundaries import Boundaries
from pararnn.lm.models.configuration import ParaRNNConfig
from pararnn.lm.models.projection import ResidualProjection
from pararnn.planning.costs import COSTS

_ROTARY_BASE = 10_000.0
_PADDING = -1


@dataclass(frozen=True)
class AttentionState:
    """The state of an attention mixer, which grows with every token.

    Attributes:
        keys: Shape (batch, steps, heads, channels per head), rotated.
        values: Of the same shape.
        document: Shape (batch, steps): number of the document of each step, -1 for padding.
        used: Number of steps that hold something, int64 of shape (), where there is room for more:
            further ones are then written in place. None if all do.
    """

    keys: Tensor
    values: Tensor
    document: Tensor
    used: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> AttentionState:
        """The same state with a function applied to every tensor of it that has a batch."""
        grown = (function(self.keys), function(self.values), function(self.document))
        return AttentionState(*grown, self.used)

    @property
    def past(self) -> int | Tensor:
        """Number of steps that hold something."""
        return self.keys.shape[1] if self.used is None else self.used

    def with_room(self, steps: int) -> AttentionState:
        """A copy of a state without room, with room for so many steps in all."""
        count = self.keys.shape[1]
        used = torch.full((), count, dtype=torch.int64, device=self.keys.device)

        def placed(tensor: Tensor) -> Tensor:
            room = tensor.new_zeros(tensor.shape[0], steps, *tensor.shape[2:])
            room[:, :count] = tensor
            return room

        return replace(self.map(placed), used=used)

    def cut(self, count: int) -> AttentionState:
        """A copy of the first steps, without room."""
        return replace(self.map(lambda tensor: tensor[:, :count].clone()), used=None)

    def followed_by(self, keys: Tensor, values: Tensor, document: Tensor) -> AttentionState:
        """The state after more steps: in new tensors, or written in place where there is room."""
        if self.used is None:
            pairs = (self.keys, keys), (self.values, values), (self.document, document)
            return AttentionState(*(torch.cat(pair, 1) for pair in pairs))
        places = self.used + torch.arange(keys.shape[1], device=keys.device)
        for held, new in (self.keys, keys), (self.values, values), (self.document, document):
            held.index_copy_(1, places, new.to(held.dtype))
        return replace(self, used=self.used + keys.shape[1])


class AttentionMixer(nn.Module):
    """Causal self-attention with rotary positions and normed queries and keys.

    Args:
        config: Shape of the model.
    """

    def __init__(self, config: ParaRNNConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.attention_heads
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.query_norm = nn.RMSNorm(width // self.heads, eps=config.rms_norm_eps)
        self.key_norm = nn.RMSNorm(width // self.heads, eps=config.rms_norm_eps)
        self.out_proj = ResidualProjection(width, width, bias=False)
        self.ranks: Ranks | None = None  # among which time is split

    def forward(
        self, x: Tensor, boundaries: Boundaries | None, state: AttentionState | None
    ) -> tuple[Tensor, AttentionState]:
        """Mix x, shape (batch, time, hidden_size). Returns the result and the state after it."""
        queries, keys, values = self.in_proj(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        past: int | Tensor = 0 if state is None else state.past
        if self.ranks is not None:
            past = self._steps_before(self.ranks, x.shape[1], state)
        queries = _rotated(self.query_norm(queries), past)
        keys = _rotated(self.key_norm(keys), past)
        document = _documents(x, boundaries, state)
        new = (keys, values, document)
        after = AttentionState(*new) if state is None else state.followed_by(*new)
        alone = boundaries is None and state is None and self.ranks is None
        if self.ranks is not None:
            after, document = _from_all_ranks(self.ranks, after)
        if alone:
            y = _attention(queries, after.keys, after.values, None)
        else:
            y = _attention_of_documents(queries, document, after, past)
        return self.out_proj(y.flatten(2)), after

    def _steps_before(self, ranks: Ranks, time: int, state: AttentionState | None) -> int:
        """Steps of the ranks before this one."""
        if state is not None:
            raise ValueError(
                "attention does not go on from a cache where time is split over ranks; pass none."
            )
        return ranks.position * time


def _from_all_ranks(ranks: Ranks, own: AttentionState) -> tuple[AttentionState, Tensor]:
    """Keys and values of all ranks, and the documents of the own steps as all count them.

    By PyTorch's context parallelism: the operator that gathers them for its attention with masks.
    """
    try:
        from torch.distributed.tensor.experimental._context_parallel import flex_cp_allgather
    except ImportError as error:
        raise RuntimeError(
            f"attention over ranks needs the context parallelism of a later PyTorch than "
            f"{torch.__version__}; install one, or use a stack without attention."
        ) from error
    documents = exchange(own.document, ranks)
    counts = documents[:, :, -1:].cumsum(0)
    documents = documents + torch.cat([torch.zeros_like(counts[:1]), counts[:-1]])
    group = ranks.group.group_name
    keys, values = flex_cp_allgather(own.keys, own.values, 1, group)
    every = documents.transpose(0, 1).flatten(1)
    return AttentionState(keys, values, every), documents[ranks.position]


def _rotated(x: Tensor, first: int | Tensor) -> Tensor:
    """Rotate pairs of channels by an angle that grows with the step (arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    exact = torch.promote_types(x.dtype, torch.float32)
    steps = torch.arange(x.shape[1], device=x.device, dtype=exact) + first
    powers = torch.arange(half, device=x.device, dtype=exact) / half
    angles = (steps[:, None] * _ROTARY_BASE**-powers)[:, None]  # (time, 1, half)
    a, b = x[..., :half], x[..., half : 2 * half]
    cosine, sine = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine, x[..., 2 * half :]], -1)


def _documents(x: Tensor, boundaries: Boundaries | None, state: AttentionState | None) -> Tensor:
    """Number of the document of every new step, counted on from the state."""
    batch, time, _ = x.shape
    last: int | Tensor = 0
    if state is not None:
        last = state.document[:, -1:]
        if state.used is not None:
            last = state.document.index_select(1, (state.used - 1).view(1))
    if boundaries is None:
        return torch.zeros(batch, time, dtype=torch.int64, device=x.device) + last
    document = boundaries.document + last
    if boundaries.real is None:
        return document
    return torch.where(boundaries.real.squeeze(-1), document, _PADDING)


def _attention_of_documents(
    queries: Tensor, document: Tensor, state: AttentionState, past: int | Tensor
) -> Tensor:
    """Attention of each query to the earlier keys of its own document.

    A mask has an entry for each query and key. Where there are many, some queries come at a time,
    and the backward pass makes their mask and their scores again.

    Args:
        queries: Shape (batch, queries, heads, channels per head).
        document: Of each query, (batch, queries).
        state: Holds keys, values and their documents.
        past: Number of keys before the first query.
    """
    batch, count = document.shape

    def some(start: int, stop: int, *tensors: Tensor) -> Tensor:
        asked, keys, values, documents = tensors
        mask = _visible(document[:, start:stop], documents, past + start)
        return _attention(asked, keys, values, mask)

    size = max(1, COSTS.mask_entries // max(1, batch * state.keys.shape[1]))
    if count <= size or torch.compiler.is_exporting():  # whose program is for any length
        return some(0, count, queries, state.keys, state.values, state.document)
    parts = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        seen = slice(past + stop if isinstance(past, int) else None)
        held = (state.keys[:, seen], state.values[:, seen], state.document[:, seen])
        given = (start, stop, queries[:, start:stop], *held)
        parts.append(checkpoint(some, *given, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(parts, 1)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention, or as a mask says, of tensors (batch, steps, heads, channels)."""
    y = F.scaled_dot_product_attention(
        queries.transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
    )
    return y.transpose(1, 2)


def _visible(queries: Tensor, keys: Tensor, past: int | Tensor) -> Tensor:
    """Which keys a query sees, (batch, 1, queries, keys): earlier ones of its own document.

    Args:
        queries: The documents of the queries, (batch, queries).
        keys: Those of the keys, (batch, keys).
        past: Number of keys before the first query.
    """
    step = torch.arange(keys.shape[1], device=keys.device)
    own = torch.arange(queries.shape[1], device=keys.device) + past
    before = step <= own[:, None]
    return ((queries[:, :, None] == keys[:, None, :]) & before).unsqueeze(1)
