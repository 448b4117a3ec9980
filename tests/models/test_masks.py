"""Masks made before a model of transformers are those that it would make, and nothing waits."""

import copy
import weakref

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, Qwen3Config, masking_utils

from pararnn.lm.models.architectures import Shape, make_config, make_model
from pararnn.lm.models.causal_loss import CausalLoss, positions_in_documents
from pararnn.testing import assert_close

OURS = Shape(vocab_size=23, width=16, num_layers=2, num_heads=4, initializer_range=0.3)
SIZES = {
    "vocab_size": 23,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "initializer_range": 0.3,
    "pad_token_id": None,
}
WINDOWS = {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1}
CONFIGS = {
    "transformer": make_config("transformer", OURS),
    "windows": Qwen3Config(**SIZES, **WINDOWS),
    "capped": Gemma2Config(**SIZES, sliding_window=3),
    "mamba2": make_config("mamba2", OURS),
    "llama": LlamaConfig(**SIZES),
}
TAKING = [("transformer", "sdpa"), ("transformer", "eager"), ("windows", "sdpa")]
TAKING += [("windows", "eager"), ("capped", "eager")]
TEXT = torch.randint(23, (2, 2, 12), generator=torch.Generator().manual_seed(0))
BEGINS = torch.zeros(2, 12, dtype=torch.bool)
BEGINS[0, [0, 4, 5]] = BEGINS[1, 7] = True


def loss_of(name, attention=None):
    config = copy.deepcopy(CONFIGS[name]) if name in CONFIGS else make_config(name, OURS)
    model = make_model(config)
    if attention is not None:
        model.set_attn_implementation(attention)
    return CausalLoss(model.double())


def results(loss, resets):
    """Hidden states, loss and gradients."""
    hidden = []
    handle = loss.model.base_model.register_forward_hook(
        lambda *given: hidden.append(given[2].last_hidden_state)
    )
    value = loss(*TEXT, resets)[0]
    handle.remove()
    return [*hidden, value, *torch.autograd.grad(value, list(loss.parameters()))]


@pytest.mark.parametrize("resets", [None, BEGINS], ids=["one document", "documents"])
@pytest.mark.parametrize(("name", "attention"), TAKING)
def test_results_are_those_of_masks_that_the_model_makes(name, attention, resets):
    loss = loss_of(name, attention)
    given = results(loss, resets)
    assert loss.masks(TEXT[0], resets)
    loss.masks = lambda *_: {}
    for ours, theirs in zip(given, results(loss, resets), strict=True):
        assert torch.equal(ours, theirs)


def test_attention_without_documents_has_no_mask():
    (masks,) = loss_of("transformer").masks(TEXT[0], None).values()
    assert masks == {"full_attention": None}


@pytest.mark.parametrize("name", ["mamba2", "llama", "paragru"])
def test_other_models_make_their_own(name):
    assert loss_of(name).masks(TEXT[0], None) == {}


@pytest.mark.parametrize("resets", [None, BEGINS], ids=["one document", "documents"])
@pytest.mark.parametrize("name", ["transformer", "windows"])
def test_no_value_is_read_back(name, resets):
    """On the meta device there are none."""
    loss = loss_of(name).to("meta")
    tokens, resets = TEXT[0].to("meta"), None if resets is None else resets.to("meta")
    given = {"input_ids": tokens, "use_cache": False}
    if resets is not None:
        given["position_ids"] = positions_in_documents(resets)
    hidden = loss.model.base_model(**given, **loss.masks(tokens, resets)).last_hidden_state
    hidden.sum().backward()
    with pytest.raises(RuntimeError, match=r"item\(\)"):
        loss.model.base_model(**given)


@pytest.mark.parametrize("resets", [None, BEGINS], ids=["one document", "documents"])
@pytest.mark.parametrize("name", ["transformer", "windows"])
def test_a_capture_changes_no_mask(monkeypatch, name, resets):
    loss = loss_of(name)
    (launched,) = loss.masks(TEXT[0], resets).values()
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
    (captured,) = loss.masks(TEXT[0], resets).values()
    assert launched.keys() == captured.keys()
    for kind, mask in launched.items():
        assert (mask is captured[kind]) or torch.equal(mask, captured[kind])


def test_masks_follow_shape_and_attention():
    loss = loss_of("windows")
    for time in (12, 5):
        (masks,) = loss.masks(TEXT[0, :, :time], None).values()
        assert masks["sliding_attention"].shape[2:] == (time, time)
    loss.model.set_attn_implementation("eager")
    (masks,) = loss.masks(TEXT[0], None).values()
    assert_close(
        "mask",
        masks["full_attention"][1, 0] == 0,
        torch.ones(12, 12, dtype=torch.bool).tril(),
        rtol=0,
    )


@pytest.mark.parametrize(("name", "attention"), TAKING)
def test_no_mask_stays_in_memory(name, attention):
    """Batches of text may have a new length each, and masks grow with its square."""
    loss = loss_of(name, attention)
    (masks,) = loss.masks(TEXT[0], None).values()
    left = [weakref.ref(mask) for mask in masks.values() if mask is not None]
    assert left or (name, attention) == ("transformer", "sdpa")
    del masks
    assert not any(mask() is not None for mask in left)
