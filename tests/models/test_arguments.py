"""Every argument of a causal model of transformers does here what it does there, or is refused."""

import itertools

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, GenerationConfig

from pararnn.lm.models import ParaRNNCache

from .test_document_boundaries import pad_left

EXACT = {"rtol": 1e-9, "atol": 1e-11}
LENGTHS = (4, 1, 6)
MIXERS = {"recurrent": None, "hybrid": ["paragru", "attention", "paralstm"]}


@pytest.fixture(params=MIXERS)
def model(request, make_model):
    return make_model(num_hidden_layers=3, mixers=MIXERS[request.param], attention_heads=2)


def restarting(lengths, first=0):
    return torch.cat([torch.arange(n) + first for n in lengths])[None]


WAYS = {
    "position_ids": restarting(LENGTHS),
    "positions from two": restarting(LENGTHS, 2),
    "seq_idx": torch.tensor([[0] * 4 + [1] + [2] * 6]),
    "cu_seq_lens_q": torch.tensor([0, 4, 4, 5, 11, 11], dtype=torch.int32),
}


@pytest.mark.parametrize("way", WAYS)
def test_documents_are_kept_apart(model, tokens, way):
    name = "position_ids" if way.startswith("position") else way
    row = tokens[:1]
    packed = model(row, **{name: WAYS[way]}).logits
    alone = torch.cat([model(part).logits for part in row.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(packed, alone, **EXACT)
    weight = torch.randn_like(packed)
    parameters = list(model.parameters())
    found, expected = (torch.autograd.grad((y * weight).sum(), parameters) for y in (packed, alone))
    torch.testing.assert_close(found, expected, **EXACT)
    assert not torch.allclose(packed, model(row).logits)


def test_positions_restart_in_every_row_on_their_own(model, tokens):
    rows = [(11,), (3, 8), (5, 5, 1)]
    positions = torch.cat([restarting(lengths) for lengths in rows])
    found = model(tokens, position_ids=positions).logits
    for row, lengths in enumerate(rows):
        parts = tokens[row : row + 1].split(lengths, 1)
        alone = torch.cat([model(part).logits for part in parts], 1)
        torch.testing.assert_close(found[row : row + 1], alone, **EXACT)


def test_a_flattened_batch(model, tokens):
    rows = [{"input_ids": t.tolist()} for t in tokens[0].split(LENGTHS)]
    for options in itertools.product([False, True], repeat=3):
        names = ("return_position_ids", "return_flash_attn_kwargs", "return_seq_idx")
        chosen = dict(zip(names, options, strict=True))
        if any(options):
            batch = DataCollatorWithFlattening(return_tensors="pt", **chosen)(rows)
            batch.pop("labels")
            alone = torch.cat([model(torch.tensor([r["input_ids"]])).logits for r in rows], 1)
            torch.testing.assert_close(model(**batch).logits, alone, **EXACT)


def test_positions_that_go_on_change_nothing(model, tokens):
    whole = model(tokens).logits
    for positions in (torch.arange(11)[None], torch.arange(5, 16).expand(3, -1)):
        assert torch.equal(model(tokens, position_ids=positions).logits, whole)
    padded, mask = pad_left(tokens, [4, 11, 1])
    expected = model(padded, attention_mask=mask).logits
    for fill in (0, 1):  # as transformers fills positions of padding, and as it did before
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
        found = model(padded, attention_mask=mask, position_ids=positions).logits
        assert torch.equal(found[mask.bool()], expected[mask.bool()])


def test_positions_with_a_cache(model, tokens):
    """They go on, unless the first is zero."""
    padded, mask = pad_left(tokens, [3, 11, 8])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    whole = model(padded, attention_mask=mask).logits
    cache, pieces = ParaRNNCache(), []
    for start, stop in ((0, 2), (2, 8), (8, 9), (9, 11)):
        given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        pieces.append(model(padded[:, start:stop], cache_params=cache, **given).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], **EXACT)
    again = model(tokens, position_ids=torch.arange(11)[None], cache_params=cache).logits
    torch.testing.assert_close(again, model(tokens).logits, **EXACT)


def test_a_full_mask_changes_nothing(model, tokens):
    cache = model(tokens[:, :6], attention_mask=torch.ones(3, 6)).cache_params
    rest = model(tokens[:, 6:], attention_mask=torch.ones(3, 11), cache_params=cache)
    assert torch.equal(rest.logits, model(tokens[:, 6:], cache_params=prefix(model, tokens)).logits)


def prefix(model, tokens):
    return model(tokens[:, :6]).cache_params


def test_caches_that_are_passed(model, tokens):
    """They are updated in training as well, unless the caller says no."""
    for training in (False, True):
        model.train(training)
        cache = ParaRNNCache()
        assert model(tokens, cache_params=cache).cache_params is cache
        assert cache.num_tokens == 11
        assert model(tokens, cache_params=cache, use_cache=False).cache_params is None
        assert cache.num_tokens == 11


def test_a_cache_through_checkpoints(make_model, tokens):
    model, found = make_model().train(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        cache = ParaRNNCache()
        model(tokens[:, :5], cache_params=cache)
        model(tokens[:, 5:], labels=tokens[:, 5:], cache_params=cache).loss.backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, **EXACT)
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"use_reentrant\": False}, or no cache"):
        model(tokens, use_cache=True)


def test_generation_from_embeddings(model, tokens):
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    embeddings = model.get_input_embeddings()(tokens)
    expected = model.generate(tokens, generation_config=settings)
    found = model.generate(inputs_embeds=embeddings, generation_config=settings)
    assert torch.equal(found, expected[:, 11:])
    both = model.generate(tokens, inputs_embeds=embeddings, generation_config=settings)
    assert torch.equal(both, expected)
    padded, mask = pad_left(tokens, [4, 11, 1])
    batch = {"attention_mask": mask, "generation_config": settings}
    expected = model.generate(padded, **batch)[:, 11:]
    embeddings = model.get_input_embeddings()(padded)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **batch), expected)


def test_generation_after_packed_documents(model, tokens):
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = model.generate(tokens[:1, 5:], generation_config=settings)[:, 6:]
    for use_cache in (True, False):
        settings.use_cache = use_cache
        found = model.generate(
            tokens[:1], position_ids=restarting(LENGTHS), generation_config=settings
        )
        assert torch.equal(found[:, 11:], expected)


def test_generation_goes_on_with_new_tokens_alone(model, tokens):
    """Given the mask of the whole text, as for models of transformers."""
    settings = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = model.generate(tokens, generation_config=settings)[:, 11:]
    padded, mask = pad_left(tokens, [8, 11, 10])
    for text, given in ((tokens, torch.ones_like(tokens)), (padded, mask)):
        expected = model.generate(text, attention_mask=given, generation_config=settings)[:, 11:]
        cache = model(text[:, :4], attention_mask=given[:, :4], use_cache=True).cache_params
        options = {"attention_mask": given, "cache_params": cache, "generation_config": settings}
        assert torch.equal(model.generate(text[:, 4:], **options)[:, 7:], expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_lookup_num_tokens": 2}, "assisted generation is not supported with stateful"),
        ({"prefill_chunk_size": 4}, "Cannot use prefill chunking without a cache"),
        ({"guidance_scale": 1.5}, r"attention_mask has shape \(1, 2\); .* cache has seen 0 tokens"),
        ({"attention_mask": (torch.arange(11) < 8)[None].long()}, "pad on the left"),
    ],
)
def test_generation_that_is_refused(model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(tokens[:1], max_new_tokens=5, do_sample=False, pad_token_id=0, **options)


def test_guidance(model, tokens):
    """Without a cache it is that of transformers: both kinds of logits, mixed."""
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    found = model.generate(tokens, guidance_scale=1.5, **options)
    scores, free = (model(t).logits[:, -1].log_softmax(-1) for t in (tokens, tokens[:, -1:]))
    assert torch.equal(found[:, -1], (1.5 * (scores - free) + free).argmax(-1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"past_key_values": DynamicCache()}, "a DynamicCache, .* pass the cache_params that it"),
        ({"output_attentions": True}, "output_attentions=bool: no attention weights are kept"),
        ({"atention_mask": 1}, r"takes no atention_mask=int: docs/reference/models.md lists"),
    ],
)
def test_arguments_without_meaning_are_refused(make_model, tokens, given, message):
    with pytest.raises(TypeError, match=message):
        make_model()(tokens, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": torch.arange(5)[None]}, r"position_ids has shape \(1, 5\) but .* 11"),
        ({"seq_idx": torch.zeros(2, 11)}, r"seq_idx has shape \(2, 11\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 11])}, r"of a single row, got shape \(2,\) and 3 rows"),
        (
            {"attention_mask": torch.ones(3, 1, 11, 11)},
            r"shape \(3, 1, 11, 11\); pass \(3, 11\)\. The",
        ),
        ({"labels": torch.ones(3, 11).long(), "logits_to_keep": 1}, "labels need all logits"),
        ({"labels": torch.ones(1, 11).long()}, r"labels have shape \(1, 11\) .* for \(3, 11\)"),
    ],
)
def test_wrong_values_are_refused(make_model, tokens, given, message):
    with pytest.raises(ValueError, match=message):
        make_model()(tokens, **given)


def test_one_text_without_a_batch_is_refused(make_model, tokens):
    with pytest.raises(ValueError, match=r"shape \(11,\); pass \(batch, time\), input_ids\[None\]"):
        make_model()(tokens[0])


def test_arguments_without_effect(make_model, tokens):
    model = make_model()
    given = {"cache_position": torch.arange(11), "token_type_ids": torch.zeros_like(tokens)}
    off = {"output_attentions": False, "past_key_values": None}
    assert torch.equal(model(tokens, **given, **off).logits, model(tokens).logits)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        model(tokens, labels=torch.full_like(tokens, -1))


@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "cu_seq_lens_q"])
def test_compiled_as_one_graph(model, tokens, name):
    """With boundaries, whose checks are then the device's."""
    row = tokens[:1]
    mask = (torch.arange(11) > 3)[None]
    given = {name: mask if name == "attention_mask" else WAYS[name]}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    real = mask[0] | (name != "attention_mask")
    expected = model(row, **given).logits[:, real]
    torch.testing.assert_close(compiled(row, **given).logits[:, real], expected, **EXACT)
    if name == "attention_mask":
        with pytest.raises(RuntimeError, match=r"pad on the left, or pass use_cache=False"):
            compiled(row, attention_mask=mask.flip(1), use_cache=True)
