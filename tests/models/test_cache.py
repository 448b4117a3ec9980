"""Going on from a state: step by step, in pieces, in `generate`, on disk."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig

from pararnn.lm.models import ParaRNNCache, ParaRNNForCausalLM, ParaRNNModel
from pararnn.lm.training.checkpoints import quiet_transformers

EXACT = {"rtol": 1e-9, "atol": 1e-11}


@pytest.mark.parametrize("kernel", [1, 4])
def test_steps_and_pieces_equal_the_whole(make_model, tokens, cell, kernel):
    model = make_model(cell=cell, conv_kernel=kernel)
    whole = model(tokens).logits
    for sizes in ([1] * 11, [2, 1, 8], [5, 6]):
        cache, pieces = ParaRNNCache(), []
        for piece in tokens.split(sizes, dim=1):
            pieces.append(model(piece, cache_params=cache, use_cache=True).logits)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)
        assert cache.num_tokens == 11


def test_gradients_flow_through_the_cache(make_model, tokens, cell):
    model = make_model(cell=cell)
    whole = torch.autograd.grad(model(tokens).logits[:, -1].sum(), list(model.parameters()))
    cache = ParaRNNCache()
    model(tokens[:, :7], cache_params=cache, use_cache=True)
    last = model(tokens[:, 7:], cache_params=cache, use_cache=True).logits[:, -1]
    pieces = torch.autograd.grad(last.sum(), list(model.parameters()))
    for name, (part, expected) in zip(
        dict(model.named_parameters()), zip(pieces, whole, strict=True), strict=True
    ):
        torch.testing.assert_close(part, expected, **EXACT, msg=lambda m, n=name: f"{n}: {m}")
    model.zero_grad()
    model(tokens[:, 7:], cache_params=cache.detach()).logits.sum().backward()
    assert all(layer.window.grad_fn is None for layer in cache.detach().layers)


def test_training_makes_no_cache(make_model, tokens):
    model = make_model()
    assert model(tokens).cache_params.num_tokens == 11
    assert model(tokens, use_cache=False).cache_params is None
    assert model.train()(tokens).cache_params is None


SAMPLING = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
    "sequences": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
}


@pytest.mark.parametrize("kind", SAMPLING)
def test_generate_with_cache_equals_without(make_model, tokens, cell, kind):
    model = make_model(cell=cell)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        settings = GenerationConfig(max_new_tokens=9, use_cache=use_cache, **SAMPLING[kind])
        results.append(model.generate(tokens, generation_config=settings))
    assert torch.equal(*results)
    assert results[0].shape[1] == 20


def test_generate_runs_one_token_per_step(make_model, tokens, monkeypatch):
    model, lengths = make_model(), []
    forward = ParaRNNModel.forward

    def spy(self, input_ids=None, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(ParaRNNModel, "forward", spy)
    model.generate(tokens, generation_config=GenerationConfig(max_new_tokens=4, do_sample=False))
    assert lengths == [11, 1, 1, 1]


def test_generate_goes_on_from_a_given_cache(make_model, tokens):
    model = make_model()
    settings = GenerationConfig(max_new_tokens=5, do_sample=False)
    expected = model.generate(tokens, generation_config=settings)
    cache = model(tokens[:, :6], use_cache=True).cache_params
    snapshot = copy.copy(cache)
    result = model.generate(tokens, generation_config=settings, cache_params=cache)
    assert torch.equal(result, expected)
    assert snapshot.num_tokens == 6
    with pytest.raises(ValueError, match="the cache has seen 6 tokens but input_ids has only 6"):
        model.generate(tokens[:, :6], generation_config=settings, cache_params=snapshot)


def test_cache_selects_sequences(make_model, tokens):
    model = make_model(cell="paralstm")
    cache = model(tokens, use_cache=True).cache_params
    next_tokens = torch.tensor([[3], [5]])
    expected = model(torch.cat([tokens[[2, 0]], next_tokens], dim=1)).logits[:, -1:]
    chosen = copy.copy(cache)
    chosen.batch_select_indices(torch.tensor([2, 0]))
    torch.testing.assert_close(model(next_tokens, cache_params=chosen).logits, expected, **EXACT)
    repeated = copy.copy(cache)
    repeated.batch_repeat_interleave(2)
    assert repeated.layers[0].window.shape[0] == 6
    repeated.reset()
    assert repeated.num_tokens == repeated.get_seq_length() == 0
    assert cache.num_tokens == 11


def test_round_trip_through_auto_classes(make_model, tokens, cell, tmp_path):
    model = make_model(cell=cell, cell_options={"max_recurrent_weight": 0.25})
    with quiet_transformers():
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        base = AutoModel.from_pretrained(tmp_path)
    assert type(again) is ParaRNNForCausalLM
    assert type(base) is ParaRNNModel
    assert AutoConfig.from_pretrained(tmp_path).cell_options == {"max_recurrent_weight": 0.25}
    assert again.model.layers[0].mixer.rnn.cell.max_recurrent_weight == 0.25
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, **EXACT)
    expected = model.model(tokens).last_hidden_state
    torch.testing.assert_close(base(tokens).last_hidden_state, expected, **EXACT)


def test_tied_embeddings_survive_a_round_trip(make_model, tokens, tmp_path):
    model = make_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with quiet_transformers():
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits, **EXACT)


def test_weights_missing_on_disk_are_initialised(make_model, tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    model = make_model()
    with quiet_transformers():
        model.save_pretrained(tmp_path)
        path = tmp_path / "model.safetensors"
        weights = load_file(path)
        kept = {name: w for name, w in weights.items() if "layers.1.mixer" not in name}
        save_file(kept, path, metadata={"format": "pt"})
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    mixer = again.model.layers[1].mixer
    assert mixer.rnn.cell.bias.eq(0).all()
    assert 0 < mixer.rnn.cell.diagonal.abs().max() <= 0.5
    assert 0 < mixer.conv.weight.abs().max() <= 0.5
    assert torch.equal(
        again.model.layers[0].mixer.rnn.cell.weight, weights["model.layers.0.mixer.rnn.cell.weight"]
    )
