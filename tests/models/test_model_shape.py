"""Size, initialisation, configuration and loss of the language model."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pararnn.cells import ParaGRUCell
from pararnn.lm.models import CELLS, ParaRNNConfig, ParaRNNForCausalLM, register_cell
from pararnn.lm.models.block import ParaRNNBlock
from pararnn.lm.models.configuration import default_mlp_size
from pararnn.lm.models.loss import language_model_loss

from .conftest import tiny_config


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_has_the_size_of_the_papers_400m_model():
    with torch.device("meta"):
        model = ParaRNNForCausalLM(ParaRNNConfig())
    assert round(count(model) / 1e6) == 406
    d, heads = 1024, 4
    mixer = count(model.model.layers[0].mixer)
    matrices = 2 * d * d + 3 * d * d // heads + d * d
    assert matrices < mixer < matrices + 16 * d


def test_default_mlp_is_rounded_up():
    assert [default_mlp_size(d) for d in (96, 192, 256, 1024)] == [256, 512, 768, 2816]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "inner_size 8 cannot be split into 3 heads"),
        ({"cell": "gru2"}, "there is no mixer 'gru2'.*elman, .*register_cell"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; give a number from 1 up"),
    ],
)
def test_wrong_configuration_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("memory_option", "memory_options"), ("num_attention_heads", "attention_heads")],
)
def test_a_keyword_that_is_nearly_an_argument_is_refused(name, meant):
    """transformers keeps what it does not know, such as the name of a paper."""
    assert ParaRNNConfig(paper="2510.21450", sep_token_id=3).paper == "2510.21450"
    with pytest.raises(TypeError, match=f"no argument '{name}'; did you mean '{meant}'"):
        ParaRNNConfig(**{name: {}})


def test_cells_keep_their_own_initialisation(cell):
    model = ParaRNNForCausalLM(tiny_config(cell=cell, hidden_size=64, initializer_range=0.02))
    mixer = model.model.layers[0].mixer
    bound = (6.0 / 32) ** 0.5
    assert 0.9 * bound < mixer.rnn.cell.weight.abs().max() <= bound
    assert mixer.rnn.cell.bias.eq(0).all()
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.out_proj.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert mixer.conv.weight.abs().max() <= 0.5
    assert model.model.layers[0].residual_scale.eq(1).all()


class LinearCell(nn.Module):
    """A cell with a submodule that transformers would initialise, and an initialisation of it."""

    num_components = 1

    def __init__(self, input_size, hidden_size, num_heads):
        super().__init__()
        self.hidden_size = hidden_size
        self.inner = nn.Linear(input_size, hidden_size)
        self.decay = nn.Parameter(torch.full((hidden_size,), 0.5))
        nn.init.constant_(self.inner.weight, 0.25)

    def forward(self, x, state):
        return torch.tanh(self.decay * state + self.inner(x))


@pytest.fixture
def _linear_cell(monkeypatch):
    monkeypatch.setitem(CELLS, "linear", LinearCell)


@pytest.mark.usefixtures("_linear_cell")
def test_a_registered_cell_is_built_and_left_as_it_is(tokens):
    model = ParaRNNForCausalLM(tiny_config(cell="linear"))
    assert model.model.layers[1].mixer.rnn.cell.inner.weight.eq(0.25).all()
    assert model(tokens).logits.isfinite().all()


def test_cell_names_are_unique():
    register_cell("paragru", ParaGRUCell)
    with pytest.raises(ValueError, match="mixer name 'paragru' is taken"):
        register_cell("paragru", LinearCell)


def test_cell_options_reach_the_cell():
    options = {"max_recurrent_weight": 0.125, "bias": False}
    model = ParaRNNForCausalLM(tiny_config(cell_options=options))
    cell = model.model.layers[0].mixer.rnn.cell
    assert cell.max_recurrent_weight == 0.125
    assert cell.bias is None


def test_loss_is_cross_entropy_plus_weighted_z_loss(make_model, tokens):
    model = make_model(z_loss_weight=0.25)
    labels = tokens.clone()
    labels[0, 4:] = -100
    output = model(tokens, labels=labels)
    flat, targets = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    torch.testing.assert_close(output.cross_entropy, nn.functional.cross_entropy(flat, targets))
    z_loss = flat.logsumexp(-1)[targets != -100].square().mean()
    torch.testing.assert_close(output.z_loss, z_loss)
    torch.testing.assert_close(output.loss, output.cross_entropy + 0.25 * z_loss)
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert model(tokens, shift_labels=shifted).loss == output.loss
    assert model(tokens, labels=labels, return_dict=False)[0] == output.loss


def test_loss_without_targets_is_zero():
    losses = language_model_loss(torch.randn(2, 3, 5), torch.full((2, 3), -100))
    assert [loss.item() for loss in losses] == [0.0, 0.0]


def test_every_parameter_gets_a_gradient(make_model, tokens, cell):
    model = make_model(cell=cell).train()
    model(tokens, labels=tokens).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def _checkpoint(module):
    if isinstance(module, ParaRNNBlock):
        module.gradient_checkpointing = True
        module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)


def test_gradient_checkpointing_changes_nothing(make_model, tokens):
    model = make_model().train()
    model(tokens, labels=tokens).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.apply(_checkpoint)
    model(tokens, labels=tokens).loss.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-12)


def test_embeddings_and_hidden_states(make_model, tokens):
    model = make_model()
    embeddings = model.get_input_embeddings()(tokens)
    output = model(inputs_embeds=embeddings, output_hidden_states=True)
    expected = model(tokens)
    assert torch.equal(output.logits, expected.logits)
    assert [tuple(h.shape) for h in output.hidden_states] == [(3, 11, 8)] * 3
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(tokens, inputs_embeds=embeddings)
