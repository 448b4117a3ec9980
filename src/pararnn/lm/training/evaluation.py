"""Bits per byte of a text under a model, with the state carried through the text."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pararnn.lm.data import TokenSplit
from pararnn.lm.models import ParaRNNCache, ParaRNNForCausalLM
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.models.configuration import ATTENTION
from pararnn.lm.models.loss import IGNORED
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


@torch.no_grad()
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
    """
    was_training = model.training
    model.eval()
    inputs, targets = _streams(split, limit)
    carries = isinstance(model, ParaRNNForCausalLM) and ATTENTION not in model.config.mixers
    measure = _carrying(model) if carry and carries else _anew(model)
    total, count = 0.0, 0
    for start in range(0, inputs.shape[1], chunk):
        part = inputs[:, start : start + chunk]
        expected = targets[:, start : start + chunk]
        resets = part == codec.separator
        cross_entropy = measure(
            part.to(model.device),
            expected.to(model.device),
            resets.to(model.device) if resets.any() else None,
        )
        num_targets = int((expected != IGNORED).sum())
        total += cross_entropy.item() * num_targets
        count += num_targets
    model.train(was_training)
    return Evaluation(total / count, count, codec.tokens_per_byte(split))


_Measure = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _carrying(model: PreTrainedModel) -> _Measure:
    """Cross-entropy of chunk after chunk."""
    cache = ParaRNNCache()

    def measure(tokens: Tensor, targets: Tensor, resets: Tensor | None) -> Tensor:
        output = model(
            input_ids=tokens,
            shift_labels=targets,
            resets=resets,
            cache_params=cache,
            use_cache=True,
        )
        return output.cross_entropy

    return measure


def _anew(model: PreTrainedModel) -> _Measure:
    """Cross-entropy of a chunk without what came before it."""
    loss = CausalLoss(model)

    def measure(tokens: Tensor, targets: Tensor, resets: Tensor | None) -> Tensor:
        return loss(tokens, targets, resets if loss.separates_documents else None)[1]

    return measure


def _streams(split: TokenSplit, limit: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (streams, time); what a stream lacks at its end does not count."""
    num_targets = split.num_tokens - 1
    num_streams = min(MAX_STREAMS, max(1, num_targets // MIN_STREAM))
    stride = -(-num_targets // num_streams)
    time = min(stride, max(1, limit // num_streams)) if limit else stride
    inputs = torch.zeros(num_streams, time, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED)
    for row, first in enumerate(range(0, num_streams * stride, stride)):
        tokens = torch.from_numpy(split.read(first, min(first + time, num_targets) + 1))
        inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
    return inputs, targets
