"""Language models of registered cells whose states are matrices, and which have a readout."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from pararnn.lm.decoding import generate
from pararnn.lm.models import CELLS, ParaRNNCache
from pararnn.lm.training.checkpoints import quiet_transformers
from pararnn.lm.training.comparison import step_by_step
from pararnn.testing import assert_close

from .test_document_boundaries import pad_left

KEYS = 3


class Memory(nn.Module):
    """Heads of keys and values, each with a product in its step; hands out all heads."""

    def __init__(self, input_size, hidden_size, num_heads):
        super().__init__()
        values = hidden_size // num_heads
        self.input_size = input_size
        self.shape = self.state_shape = (num_heads, KEYS, values)
        self.gates = nn.Linear(input_size, 2 * num_heads * KEYS + hidden_size + num_heads)
        self.weight = nn.Parameter(torch.eye(values) + 0.1 * torch.randn(num_heads, 1, values))

    def split(self, x):
        heads, keys, values = self.shape
        parts = self.gates(x).view(len(x), heads, -1).split([keys, keys, values, 1], -1)
        return [p.unsqueeze(-1) for p in parts]

    def forward(self, x, state):
        k, _, v, f = self.split(x)
        new = torch.tanh(state @ self.weight + k * v.mT)
        return torch.lerp(new, state, torch.sigmoid(f))

    def readout(self, x, state):
        return (self.split(x)[1] * state).sum(-2)


class WithCount(Memory):
    """The same with a second tensor, one number per head."""

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.state_shape = (self.shape, self.shape[:1])

    def forward(self, x, state):
        memory, count = state
        new = super().forward(x, memory * torch.cos(count)[..., None, None])
        return new, 0.9 * count + new.mean((-1, -2))

    def readout(self, x, state):
        return super().readout(x, state[0]) + state[1].unsqueeze(-1)


@pytest.fixture(params=[Memory, WithCount], ids=["matrix", "pair"])
def model(request, monkeypatch, make_model):
    monkeypatch.setitem(CELLS, "memory", request.param)
    return make_model(cell="memory")


def test_trains_as_a_loop_does(model, tokens):
    """Documents that begin inside a row, and all gradients."""
    resets = torch.rand(tokens.shape) < 0.2
    found, expected = (
        m(tokens, labels=tokens, resets=resets) for m in (model, step_by_step(model))
    )
    assert_close("logits", found.logits, expected.logits, rtol=1e-9)
    model.train()(tokens, labels=tokens, resets=resets).loss.backward()
    other = step_by_step(model)
    other.zero_grad()
    other(tokens, labels=tokens, resets=resets).loss.backward()
    pairs = zip(model.named_parameters(), other.parameters(), strict=True)
    for (name, parameter), reference in pairs:
        assert_close(name, parameter.grad, reference.grad, rtol=1e-8)


def test_pieces_padding_and_choices_of_the_cache(model, tokens):
    whole, cache = model(tokens), ParaRNNCache()
    pieces = [
        model(t, cache_params=cache, use_cache=True).logits for t in tokens.split([1, 4, 6], 1)
    ]
    assert_close("pieces", torch.cat(pieces, 1), whole.logits, rtol=1e-9)
    padded, mask = pad_left(tokens, [4, 11, 1])
    alone = model(tokens[:1, -4:]).logits
    assert_close("padded", model(padded, attention_mask=mask).logits[:1, -4:], alone, rtol=1e-9)
    chosen, new = copy.copy(cache), torch.tensor([[3], [5]])
    chosen.batch_select_indices(torch.tensor([2, 0]))
    expected = model(torch.cat([tokens[[2, 0]], new], 1)).logits[:, -1:]
    assert_close("chosen", model(new, cache_params=chosen).logits, expected, rtol=1e-9)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(model, tokens, beams):
    results = []
    for use_cache in (True, False):
        settings = GenerationConfig(
            max_new_tokens=8, do_sample=False, num_beams=beams, use_cache=use_cache
        )
        results.append(model.generate(tokens, generation_config=settings))
    assert torch.equal(*results)
    if beams == 1:
        new = results[0][:, tokens.shape[1] :].tolist()
        assert generate(model, tokens.tolist(), max_new_tokens=8) == new
        assert generate(model, [tokens[0].tolist(), [5]], max_new_tokens=8)[0] == new[0]


def test_round_trip(model, tokens, tmp_path):
    with quiet_transformers():
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close("logits", again(tokens).logits, model(tokens).logits, rtol=1e-9)


def test_compiled(model, tokens):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close("logits", compiled(tokens).logits, model(tokens).logits, rtol=1e-9)


def test_outputs_that_do_not_fill_the_branch(monkeypatch, make_model):
    monkeypatch.setitem(CELLS, "narrow", lambda size, _, **options: Memory(size, 6, **options))
    with pytest.raises(ValueError, match=r"'narrow' hands out \(2, 3\) for every token, 6 numbers"):
        make_model(cell="narrow")
