"""Weights of one byte: how far they are, what is shared, and what a model loses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pararnn.lm.decoding import Decoder, int8_weights
from pararnn.lm.decoding import decoder as generation
from pararnn.lm.decoding.int8 import Int8Linear
from pararnn.lm.models import CausalLoss, ParaRNNForCausalLM
from pararnn.lm.models.architectures import Shape, make_config, make_model
from pararnn.testing import assert_close

from .conftest import tiny_config
from .test_generation import Counted, error
from .test_mixers import tiny


def test_weights_are_the_nearest_of_255_steps():
    linear = nn.Linear(40, 7, bias=False).double()
    with torch.no_grad():
        linear.weight[3] *= 1000  # a channel does not disturb the others
        linear.weight[5] = 0
    rounded = Int8Linear(linear)
    assert rounded.codes.dtype is torch.int8
    again = rounded.weight
    assert again.dtype is torch.float64
    assert torch.equal(again, rounded.codes.double() * rounded.scale[:, None])
    assert ((again - linear.weight).abs() <= 0.5001 * rounded.scale[:, None]).all()
    x = torch.randn(2, 3, 40, dtype=torch.float64)
    assert_close("product", rounded(x), x @ again.T, rtol=1e-12)
    assert rounded(x.float()).dtype is torch.float32


def test_all_but_projections_is_shared():
    model = tiny(
        num_hidden_layers=3,
        mixers=["paragru", "m2rnn", "attention"],
        attention_heads=2,
        memory_options={"key_size": 3, "value_size": 4},
    )
    before = copy.deepcopy(model.state_dict())
    small = int8_weights(model)
    of_model = {id(p) for p in model.parameters()}
    assert all(id(p) in of_model for p in small.parameters())
    left = [n for n, m in small.named_modules() if isinstance(m, nn.Linear)]
    assert left == []
    names = [n for n, m in small.named_modules() if isinstance(m, Int8Linear)]
    assert {"lm_head", "model.layers.0.mixer.in_proj", "model.layers.2.mixer.out_proj"} < set(names)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    tokens = torch.randint(17, (2, 9))
    exact, near = model(tokens).logits, small(tokens).logits
    assert 0 < (near - exact).square().mean() < 1e-3 * exact.square().mean()
    found = Decoder(small, 2).generate(tokens.tolist(), max_new_tokens=5)
    text = tokens
    for _ in range(5):
        text = torch.cat([text, small(text).logits[:, -1:].argmax(-1)], 1)
    assert found == text[:, 9:].tolist()


def test_a_tied_head_gets_weights_of_its_own():
    model = ParaRNNForCausalLM(tiny_config(tie_word_embeddings=True)).eval()
    small = int8_weights(model)
    assert small.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert isinstance(small.lm_head, Int8Linear)


def test_a_trained_model_loses_little():
    """On text that it has learned."""
    torch.manual_seed(0)
    model = ParaRNNForCausalLM(tiny_config(hidden_size=32, intermediate_size=48))
    text = torch.randint(17, (1, 6)).repeat(4, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(text, labels=text).loss.backward()
        optimizer.step()
    model.eval()
    small = int8_weights(model)
    with torch.no_grad():
        exact, near = (m(text, labels=text).loss.item() for m in (model, small))
        expected = small(text, labels=text).cross_entropy.item()
        loss, *_ = CausalLoss(small)(text, F.pad(text[:, 1:], (0, 1), value=-100))
    assert exact < 0.7
    assert abs(near - exact) < 0.01 * exact
    assert loss.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("default")  # the compiler's own are errors to it
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("texts", [1, 2])
def test_kernels_read_bytes(texts, device, monkeypatch):
    """No weight is converted before a product, and scales are part of what follows."""
    fusion = Counted()
    options = {"post_grad_custom_post_pass": fusion}
    monkeypatch.setattr(generation, "compile_options", lambda: options)
    torch.manual_seed(2)
    config = tiny_config(hidden_size=32, intermediate_size=48)
    model = int8_weights(ParaRNNForCausalLM(config).half().to(device))
    exact = copy.deepcopy(model).double()
    decoders = Decoder(exact, texts), Decoder(model, texts), Decoder(model, texts, compiled=True)
    for decoder in decoders:
        decoder.start([[3, 1, 4]] * texts)
        decoder.step()
    plain, compiled = (error(decoder, decoders[0]) for decoder in decoders[1:])
    assert 0 < compiled < 1.2 * plain < 0.1
    assert fusion.products == 5 * 2 + 1
    assert fusion.others == {"pararnn.matvec.default"}
    assert fusion.weights == {torch.int8, torch.float16}  # the latter of the cells


def test_other_models_are_refused():
    shape = Shape(vocab_size=17, width=8, num_layers=1, num_heads=2, max_length=8)
    model = make_model(make_config("transformer", shape))
    with pytest.raises(TypeError, match="int8 weights are for ParaRNNForCausalLM, not for"):
        int8_weights(model)
