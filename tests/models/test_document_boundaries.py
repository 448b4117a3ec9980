"""Padding and documents inside a batch: nothing crosses a boundary."""

import itertools

import pytest
import torch
from transformers import GenerationConfig

from pararnn.lm.models import ParaRNNCache

EXACT = {"rtol": 1e-9, "atol": 1e-11}


def pad_left(tokens, lengths, value=0):
    """Keep the last `lengths` tokens of every row; also the mask."""
    time = tokens.shape[1]
    mask = torch.arange(time) >= time - torch.tensor(lengths).unsqueeze(1)
    return tokens.where(mask, value), mask.long()


def test_left_padding_changes_nothing(make_model, tokens, cell):
    model, lengths = make_model(cell=cell), [4, 11, 1]
    for value in (0, 5):
        padded, mask = pad_left(tokens, lengths, value)
        output = model(padded, attention_mask=mask)
        for row, length in enumerate(lengths):
            alone = model(tokens[row : row + 1, -length:])
            torch.testing.assert_close(
                output.logits[row : row + 1, -length:], alone.logits, **EXACT
            )
            after = zip(output.cache_params.layers, alone.cache_params.layers, strict=True)
            for layer, expected in after:
                window = layer.window[row : row + 1]
                torch.testing.assert_close(window, expected.window, **EXACT)


def test_padding_gets_no_gradient(make_model, tokens):
    model = make_model()
    padded, mask = pad_left(tokens, [4, 11, 7])
    embeddings = model.get_input_embeddings()(padded).detach().requires_grad_()
    output = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
    (output.logits * mask.unsqueeze(-1)).square().sum().backward()
    assert embeddings.grad[mask == 0].eq(0).all()
    assert embeddings.grad[mask == 1].ne(0).all()


def test_padded_batch_in_pieces(make_model, tokens, cell):
    model = make_model(cell=cell)
    padded, mask = pad_left(tokens, [3, 11, 8])
    whole = model(padded, attention_mask=mask).logits
    cache, pieces = ParaRNNCache(), []
    for start, stop in ((0, 2), (2, 8), (8, 9), (9, 11)):
        part = model(padded[:, start:stop], attention_mask=mask[:, :stop], cache_params=cache)
        pieces.append(part.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, dim=1)[real], whole[real], **EXACT)


def test_generate_from_a_padded_batch(make_model, tokens, cell):
    model, lengths = make_model(cell=cell), [4, 11, 1]
    padded, mask = pad_left(tokens, lengths)
    settings = GenerationConfig(max_new_tokens=6, do_sample=False)
    batch = model.generate(padded, attention_mask=mask, generation_config=settings)
    for row, length in enumerate(lengths):
        prompt = tokens[row : row + 1, -length:]
        alone = model.generate(prompt, generation_config=settings)
        assert torch.equal(batch[row, -6:], alone[0, -6:])


def test_right_padding_needs_no_cache(make_model, tokens):
    model = make_model()
    mask = torch.ones_like(tokens)
    mask[0, 7:] = 0
    expected = model(tokens[:1, :7]).logits[0]
    for asked in (False, None):
        output = model(tokens, attention_mask=mask, use_cache=asked)
        torch.testing.assert_close(output.logits[0, :7], expected, **EXACT)
        assert output.cache_params is None
    for wish in ({"use_cache": True}, {"cache_params": ParaRNNCache()}):
        with pytest.raises(ValueError, match="pad on the left, or pass use_cache=False"):
            model(tokens, attention_mask=mask, **wish)


@pytest.mark.parametrize("starts", [(0, 3, 4, 9), (5,), (10,), (1, 2)])
def test_documents_are_independent(make_model, tokens, cell, starts):
    model = make_model(cell=cell)
    resets = torch.zeros_like(tokens, dtype=torch.bool)
    resets[:, list(starts)] = True
    packed = model(tokens, resets=resets).logits
    bounds = [0, *(s for s in starts if s), 11]
    alone = [model(tokens[:, a:b]).logits for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), **EXACT)


def test_documents_in_pieces(make_model, tokens, cell):
    model = make_model(cell=cell)
    resets = torch.rand(tokens.shape) < 0.3
    whole = model(tokens, resets=resets).logits
    for sizes in ([1] * 11, [4, 1, 6], [3, 8]):
        cache, pieces = ParaRNNCache(), []
        parts = zip(tokens.split(sizes, 1), resets.split(sizes, 1), strict=True)
        for piece, piece_resets in parts:
            output = model(piece, resets=piece_resets, cache_params=cache)
            pieces.append(output.logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)


def test_padding_and_documents_together(make_model, tokens):
    model = make_model()
    padded, mask = pad_left(tokens, [6, 11, 2])
    resets = torch.zeros_like(tokens, dtype=torch.bool)
    resets[:, 8] = True
    output = model(padded, attention_mask=mask, resets=resets).logits
    torch.testing.assert_close(output[:2, 8:], model(tokens[:2, 8:]).logits, **EXACT)
    torch.testing.assert_close(output[0, 5:8], model(tokens[:1, 5:8]).logits[0], **EXACT)


def test_wrong_shapes_are_refused(make_model, tokens):
    model = make_model()
    with pytest.raises(ValueError, match=r"resets has shape \(3, 5\) but the input has 11"):
        model(tokens, resets=torch.zeros(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 5\); pass \(3, 11\)"):
        model(tokens, attention_mask=torch.ones(3, 5))
    hole = torch.ones(3, 11)
    hole[1, 4] = 0
    with pytest.raises(ValueError, match="padding between two tokens"):
        model(tokens, attention_mask=hole)


def test_one_program_for_packed_rows_of_any_length(make_model):
    """A message with the number of tokens in it would tie the program to that number."""
    model, programs = make_model(), []

    def compiler(graph, _):
        programs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=compiler, fullgraph=True, dynamic=True)
    for length in (9, 12, 33):
        tokens, ends = torch.randint(1, 17, (1, length)), torch.tensor([0, 4, length])
        found = compiled(tokens, cu_seq_lens_q=ends).logits
        torch.testing.assert_close(found, model(tokens, cu_seq_lens_q=ends).logits, **EXACT)
    assert len(programs) == 1
