"""Bits per byte of a text under a model, with the state carried through the text."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pararnn.models import ParaRNNCache, ParaRNNForCausalLM
from pararnn.models.causal_loss import CausalLoss
from pararnn.models.loss import IGNORED
from pararnn.training.corpus import DOCUMENT

MAX_STREAMS = 64
MIN_STREAM = 2048


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`.

    Attributes:
        loss: Mean cross-entropy of a predicted byte, in nats.
        num_bytes: Bytes predicted, document separators included.
    """

    loss: float
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits."""
        return self.loss / math.log(2)

    @property
    def perplexity(self) -> float:
        """The exponential of the loss, per byte."""
        return math.exp(self.loss)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, flat: np.ndarray, *, limit: int = 0, chunk: int = 512
) -> Evaluation:
    """Predict every byte of a flat text from those before it.

    The text is cut into up to 64 streams that are evaluated side by side; the first bytes of a
    stream are predicted without what came before the cut. A ParaRNN model carries its state through
    a stream; the baselines begin every chunk anew.

    Args:
        model: Byte-level model.
        flat: Documents as `corpus` writes them, shape (bytes,), uint8, at least two bytes.
        limit: Bytes to predict, taken from the beginning of every stream; 0 for all.
        chunk: Steps per forward pass.
    """
    was_training = model.training
    model.eval()
    inputs, targets = _streams(flat, limit)
    measure = _carrying(model) if isinstance(model, ParaRNNForCausalLM) else _anew(model)
    total, count = 0.0, 0
    for start in range(0, inputs.shape[1], chunk):
        part = inputs[:, start : start + chunk]
        expected = targets[:, start : start + chunk]
        resets = part == DOCUMENT
        cross_entropy = measure(
            part.to(model.device),
            expected.to(model.device),
            resets.to(model.device) if resets.any() else None,
        )
        num_targets = int((expected != IGNORED).sum())
        total += cross_entropy.item() * num_targets
        count += num_targets
    model.train(was_training)
    return Evaluation(total / count, count)


_Measure = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _carrying(model: ParaRNNForCausalLM) -> _Measure:
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


def _streams(flat: np.ndarray, limit: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (streams, time); what a stream lacks at its end does not count."""
    num_targets = len(flat) - 1
    num_streams = min(MAX_STREAMS, max(1, num_targets // MIN_STREAM))
    stride = -(-num_targets // num_streams)
    time = min(stride, max(1, limit // num_streams)) if limit else stride
    position = torch.arange(num_streams).unsqueeze(1) * stride + torch.arange(time)
    inside = position < num_targets
    tokens = torch.from_numpy(flat.astype(np.int64))
    inputs = tokens[position.clamp_max(num_targets - 1)]
    targets = tokens[position.clamp_max(num_targets - 1) + 1]
    return inputs, targets.where(inside, IGNORED)
