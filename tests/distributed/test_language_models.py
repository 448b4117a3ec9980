"""Language models whose sequences are split over processes equal those of one process."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from pararnn.distributed import on_this_rank, sequence_parallel
from pararnn.lm.models import ParaRNNCache, attention
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training.config import ArchitectureConfig, TrainConfig
from pararnn.lm.training.language_model import build_model
from pararnn.lm.training.text import Codec
from pararnn.testing import assert_close

CONTEXT = "torch.distributed.tensor.experimental._context_parallel"
needs_context_parallel = pytest.mark.skipif(
    importlib.util.find_spec(CONTEXT) is None,
    reason="this PyTorch cannot split flex_attention over ranks",
)
ATTENDS = pytest.param("1xattention+1xparagru+1xattention", marks=needs_context_parallel)
MODELS = ["paragru", "1xparalstm+1xm2rnn", ATTENDS]
TIME = 24


def make(name):
    layers = max(2, name.count("+") + 1)
    sizes = ArchitectureConfig(width=16, num_layers=layers, num_heads=2)
    options = ("key_size=4", "value_size=8") if "m2rnn" in name else ()
    config = TrainConfig(model=name, architecture=sizes, memory_options=options)
    model = build_model(config, Codec()).double()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing is left at zero
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
            parameter.add_(drawn.double(), alpha=0.05)
    return CausalLoss(model.train(), 1e-4)


def outcome(loss, tokens, resets, cache):
    """Loss, gradients and the state after the tokens."""
    value, *_ = loss(tokens[:, :-1], tokens[:, 1:], resets, cache)
    value.backward()
    found = {"loss": value.detach()}
    found |= {n: p.grad for n, p in loss.named_parameters() if p.grad is not None}
    if cache is not None:
        for number, layer in enumerate(cache.layers):
            recurrent = layer.recurrent
            parts = recurrent if isinstance(recurrent, tuple) else (recurrent,)
            for i, state in enumerate((layer.window, *parts)):
                found[f"state {number}.{i}"] = state.detach()
    return found


def first_part(loss, tokens, resets, carries):
    """The state after tokens before."""
    if not carries:
        return None
    cache = ParaRNNCache()
    with torch.no_grad(), on_this_rank(loss):
        loss(tokens[:, :-1], tokens[:, 1:], resets, cache)
    return cache


def share(group, rank, name, tokens, resets, carries):
    loss = sequence_parallel(make(name), group)
    cache = first_part(loss, tokens, resets, carries)
    time = TIME // group.size()
    part = slice(rank * time, (rank + 1) * time)
    own = tokens[:, part.start : part.stop + 1]
    found = outcome(loss, own, None if resets is None else resets[:, part], cache)
    return {n: v.contiguous().numpy() for n, v in found.items()}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_one_process(group, name, documents, count):
    tokens = torch.randint(1, 256, (2, TIME + 1))
    carries = "attention" not in name
    resets = torch.rand(2, TIME) < 0.1 if documents else None
    if documents:
        resets[0, 12] = resets[1, 13] = resets[1, 11] = True  # at and around boundaries
    loss = make(name)
    expected = outcome(loss, tokens, resets, first_part(loss, tokens, resets, carries))
    every = group.run(share, name, tokens, resets, carries, count=count)
    for result in every:
        assert isinstance(result, dict), result
    for key, wanted in expected.items():
        parts = torch.stack([torch.from_numpy(found[key]) for found in every])
        found = parts[0] if key.startswith("state") else parts.mean(0)
        assert_close(key, found, wanted, rtol=1e-12)


def share_in_parts(group, rank, *arguments):
    """With masks of two queries at a time."""
    held = attention.COSTS
    attention.COSTS = replace(held, mask_entries=2 * 2 * TIME)
    try:
        return share(group, rank, *arguments)
    finally:
        attention.COSTS = held


@needs_context_parallel
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
def test_masks_in_parts_equal_one_process(group, documents):
    name = "1xattention+1xparagru+1xattention"
    tokens = torch.randint(1, 256, (2, TIME + 1))
    resets = torch.rand(2, TIME) < 0.1 if documents else None
    expected = outcome(make(name), tokens, resets, None)
    every = group.run(share_in_parts, name, tokens, resets, False, count=2)
    for key, wanted in expected.items():
        parts = torch.stack([torch.from_numpy(found[key]) for found in every])
        found = parts[0] if key.startswith("state") else parts.mean(0)
        assert_close(key, found, wanted, rtol=1e-12)


def refused(group, rank, kind):
    loss = sequence_parallel(make("1xattention" if kind == "cache" else "paragru"), group)
    tokens = torch.ones(1, 2 if kind == "short" else 6, dtype=torch.int64)
    model = loss.model.model
    if kind == "mask":
        return model(tokens, attention_mask=torch.ones_like(tokens))
    if kind == "cache":
        return model(tokens, cache_params=model(tokens, use_cache=True).cache_params)
    return model(tokens)


REFUSED = {
    "mask": ("TypeError", "documents are told by resets alone"),
    "cache": ("ValueError", "attention does not go on from a cache"),
    "short": ("ValueError", "a rank has 2 steps, but a convolution looks back 3"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(group, kind):
    expected, words = REFUSED[kind]
    for found, message in group.run(refused, kind, count=2):
        assert found == expected, message
        assert words in message
