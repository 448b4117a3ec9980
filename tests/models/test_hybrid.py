"""Stacks of recurrences and attention: pieces, documents, padding, generation, errors."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GenerationConfig

from pararnn.lm.decoding import Decoder, decoder
from pararnn.lm.models import ParaRNNCache, ParaRNNForCausalLM, attention
from pararnn.lm.training.checkpoints import quiet_transformers
from pararnn.planning.costs import COSTS

from .conftest import tiny_config
from .test_document_boundaries import pad_left

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MIXERS = ["paragru", "attention", "paralstm"]


@pytest.fixture
def hybrid(make_model):
    return make_model(num_hidden_layers=3, mixers=MIXERS, attention_heads=2)


def test_every_block_has_its_mixer(hybrid):
    kinds = [type(layer.mixer).__name__ for layer in hybrid.model.layers]
    assert kinds == ["ParaRNNMixer", "AttentionMixer", "ParaRNNMixer"]
    cells = [type(hybrid.model.layers[i].mixer.rnn.cell).__name__ for i in (0, 2)]
    assert cells == ["ParaGRUCell", "ParaLSTMCell"]


@pytest.mark.parametrize("sizes", [[1] * 11, [2, 1, 8], [5, 6]])
def test_pieces_equal_the_whole(hybrid, tokens, sizes):
    cache, pieces = ParaRNNCache(), []
    for piece in tokens.split(sizes, dim=1):
        pieces.append(hybrid(piece, cache_params=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), hybrid(tokens).logits, **EXACT)


def test_attention_sees_no_later_token(hybrid, tokens):
    changed = tokens.clone()
    changed[:, 7] = (changed[:, 7] + 3) % 17
    before, after = (hybrid(t).logits for t in (tokens, changed))
    torch.testing.assert_close(before[:, :7], after[:, :7], **EXACT)
    assert (before[:, 7:] - after[:, 7:]).abs().amin(-1).min() > 0


@pytest.mark.parametrize("sizes", [[11], [3, 8], [1] * 11])
def test_packed_documents_equal_separate_ones(hybrid, tokens, sizes):
    lengths, row = [4, 1, 6], tokens[:1]
    resets = torch.zeros(1, 11, dtype=torch.bool)
    resets[0, [0, 4, 5]] = True
    cache, pieces = ParaRNNCache(), []
    for piece, starts in zip(row.split(sizes, 1), resets.split(sizes, 1), strict=True):
        pieces.append(hybrid(piece, resets=starts, cache_params=cache, use_cache=True).logits)
    separate = torch.cat([hybrid(part).logits for part in row.split(lengths, 1)], 1)
    torch.testing.assert_close(torch.cat(pieces, 1), separate, **EXACT)


def test_left_padding_changes_nothing(hybrid, tokens):
    lengths = [4, 11, 1]
    padded, mask = pad_left(tokens, lengths)
    output = hybrid(padded, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = hybrid(tokens[row : row + 1, -length:]).logits
        torch.testing.assert_close(output.logits[row : row + 1, -length:], alone, **EXACT)


def test_generation_equals_recomputing_and_beams_reorder(hybrid, tokens):
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    found = hybrid.generate(
        tokens, attention_mask=torch.ones_like(tokens), generation_config=settings
    )
    text = tokens
    for _ in range(6):
        text = torch.cat([text, hybrid(text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, text)
    cache = hybrid(tokens, use_cache=True).cache_params
    one = copy.copy(cache)
    one.reorder_cache(torch.tensor([2, 0, 0]))
    following = tokens[[2, 0, 0], :1]
    again = hybrid(following, cache_params=one).logits
    expected = hybrid(torch.cat([tokens[[2, 0, 0]], following], 1)).logits[:, -1:]
    torch.testing.assert_close(again, expected, **EXACT)


def test_saved_and_loaded(hybrid, tokens, tmp_path):
    with quiet_transformers():
        hybrid.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.mixers == MIXERS
    torch.testing.assert_close(loaded(tokens).logits, hybrid(tokens).logits)


def test_mistakes():
    with pytest.raises(
        ValueError, match="there is no mixer 'atention'; perhaps you meant 'attention'"
    ):
        tiny_config(mixers=["paragru", "atention"])
    with pytest.raises(ValueError, match="mixers names 1 block but num_hidden_layers is 2"):
        tiny_config(mixers=["paragru"])
    with pytest.raises(ValueError, match="cannot be split into 3 attention heads"):
        tiny_config(mixers=["paragru", "attention"], attention_heads=3)
    assert tiny_config(hidden_size=448, inner_size=8).mixers == ["paragru"] * 2  # 3 heads unused


def test_static_decoding_equals_transformers(hybrid, tokens, monkeypatch):
    """Also where the room for attention grows on the way."""
    settings = GenerationConfig(max_new_tokens=30, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(tokens)
    expected = hybrid.generate(tokens, attention_mask=mask, generation_config=settings)
    for room in (1024, 8):
        monkeypatch.setattr(decoder, "COSTS", replace(COSTS, attention_room=room))
        found = Decoder(hybrid, 3).generate(tokens.tolist(), max_new_tokens=30)
        assert found == expected[:, 11:].tolist()
    ragged = [row[-length:] for row, length in zip(tokens.tolist(), (4, 11, 1), strict=True)]
    alone = [Decoder(hybrid, 1).generate([row], max_new_tokens=9)[0] for row in ragged]
    assert Decoder(hybrid, 3).generate(ragged, max_new_tokens=9) == alone


def test_a_static_step_with_attention_can_be_compiled(hybrid, tokens, monkeypatch):
    """As one graph, again where the room grows."""
    compile_step = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(decoder.torch, "compile", compile_step)
    expected = Decoder(hybrid, 3).generate(tokens.tolist(), max_new_tokens=12)
    monkeypatch.setattr(decoder, "COSTS", replace(COSTS, attention_room=8))
    found = Decoder(hybrid, 3, compiled=True).generate(tokens.tolist(), max_new_tokens=12)
    assert found == expected


def test_attention_learns_next_to_recurrences():
    torch.manual_seed(0)
    config = tiny_config(mixers=["paragru", "attention"], attention_heads=2)
    model = ParaRNNForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(17, (4, 12))
    losses = []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


class LargestMask(TorchDispatchMode):
    """Entries of the largest tensor of booleans that is made inside."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype is torch.bool:
                self.entries = max(self.entries, tensor.numel())
        return made


@pytest.mark.parametrize("queries", [1, 2, 3, 4, 10])
def test_masks_of_some_queries_at_a_time(hybrid, tokens, queries, monkeypatch):
    """With documents and after a cache: values and gradients are the same, masks are small."""
    rows, count = tokens.shape
    resets = torch.rand(rows, count) < 0.2
    cotangent = torch.randn(rows, count, 17, dtype=torch.float64)

    def outcome():
        cache = ParaRNNCache()
        with LargestMask() as masks:
            first = hybrid(tokens[:, :4], cache_params=cache, use_cache=True, resets=resets[:, :4])
            rest = hybrid(tokens[:, 4:], cache_params=cache, use_cache=True, resets=resets[:, 4:])
            y = torch.cat([first.logits, rest.logits], 1)
            found = torch.autograd.grad((y * cotangent).sum(), list(hybrid.parameters()))
        return [y.detach(), *found], masks.entries

    expected, largest = outcome()
    assert largest == rows * (count - 4) * count
    limit = rows * count * queries
    monkeypatch.setattr(attention, "COSTS", replace(COSTS, mask_entries=limit))
    found, largest = outcome()
    assert largest <= max(limit, rows * count)
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(hybrid(tokens, resets=resets).logits, expected[0], **EXACT)
