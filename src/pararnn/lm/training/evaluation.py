"""Bits per byte of a text under a model, with the state carried through the text."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pararnn._whole import check_whole
from pararnn.lm.catalogue import ATTENTION
from pararnn.lm.data import TokenSplit
from pararnn.lm.data.words import bar
from pararnn.lm.models import ParaRNNCache, ParaRNNForCausalLM
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.models.loss import IGNORED
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.sharding import looking
from pararnn.lm.training.text import Codec

MAX_STREAMS = 64
MIN_STREAM = 2048


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        loss: Mean cross-entropy of a predicted token, in nats.
        num_tokens: Tokens predicted, document separators included.
        tokens_per_byte: Of the text.
    """

    loss: float
    num_tokens: int
    tokens_per_byte: float = 1.0

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits, per byte of text."""
        return self.loss / math.log(2) * self.tokens_per_byte

    @property
    def perplexity(self) -> float:
        """The exponential of the loss, per token."""
        return math.exp(self.loss)

    def record(self, step: int, train_seconds: float) -> dict[str, Any]:
        """A line of `validation.jsonl`."""
        return {
            "step": step,
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "num_tokens": self.num_tokens,
            "train_seconds": train_seconds,
        }


def evaluate(
    model: PreTrainedModel,
    split: TokenSplit,
    codec: Codec,
    *,
    limit: int = 0,
    chunk: int = 512,
    carry: bool = True,
) -> Evaluation:
    """Predict every token of a text from those before it.

    The text is cut into up to 64 streams that are evaluated side by side; the first tokens of a
    stream are predicted without what came before the cut. A ParaRNN model carries its state through
    a stream; the baselines, and stacks with attention in them, begin every chunk anew.

    Args:
        model: Trained on such tokens.
        split: At least two tokens.
        codec: Says which token separates documents, and what a token is.
        limit: Tokens to predict, taken from the beginning of every stream; 0 for all.
        chunk: Steps per forward pass.
        carry: Whether a ParaRNN model carries its state; without, it sees as little as the others.

    Raises:
        TypeError: limit or chunk is no whole number.
        ValueError: One of them is too small.
    """
    check_whole(limit=limit, chunk=chunk)
    if limit < 0 or chunk < 1:
        raise ValueError(f"limit is {limit} and chunk {chunk}; pass at least 0 and at least 1.")
    here = Processes(0, 1, model.device)
    return evaluate_together(
        CausalLoss(model), split, codec, here, limit=limit, chunk=chunk, carry=carry
    )


def evaluate_together(
    loss: CausalLoss,
    split: TokenSplit,
    codec: Codec,
    processes: Processes,
    *,
    limit: int = 0,
    chunk: int = 512,
    carry: bool = True,
) -> Evaluation:
    """As `evaluate`, with the streams shared out to processes that hold parts of a model."""
    device = processes.device
    inputs, targets = _streams(split, limit, processes.count)
    inputs, targets = (t[processes.rank :: processes.count] for t in (inputs, targets))
    cache = ParaRNNCache() if carry and carries_state(loss.model) else None
    total = torch.zeros((), dtype=torch.float64, device=device)
    count = 0
    starts = range(0, inputs.shape[1], chunk)
    for start in bar("Evaluating", len(starts), "chunk", iterable=starts, leave=False, delay=2):
        part = inputs[:, start : start + chunk]
        expected = targets[:, start : start + chunk]
        resets = part == codec.separator
        apart = loss.separates_documents and bool(resets.any())
        with looking(loss):
            cross_entropy = loss(
                part.to(device), expected.to(device), resets.to(device) if apart else None, cache
            )[1]
        num_targets = int((expected != IGNORED).sum())
        total += cross_entropy.double() * num_targets
        count += num_targets
    mean, share = processes.mean([total.item(), float(count)])
    num_tokens = round(share * processes.count)
    return Evaluation(mean / share, num_tokens, codec.tokens_per_byte(split))


def carries_state(model: PreTrainedModel) -> bool:
    """Whether a state of fixed size goes from sequence to sequence."""
    return isinstance(model, ParaRNNForCausalLM) and ATTENTION not in model.config.mixers


def _streams(split: TokenSplit, limit: int, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (streams, time); what a stream lacks at its end does not count.

    Rows without anything to predict fill up to a multiple.
    """
    num_targets = split.num_tokens - 1
    num_streams = min(MAX_STREAMS, max(1, num_targets // MIN_STREAM))
    stride = -(-num_targets // num_streams)
    time = min(stride, max(1, limit // num_streams)) if limit else stride
    rows = -(-num_streams // multiple) * multiple
    inputs = torch.zeros(rows, time, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    for row, first in enumerate(range(0, num_streams * stride, stride)):
        tokens = torch.from_numpy(split.read(first, min(first + time, num_targets) + 1))
        inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
    return inputs, targets
