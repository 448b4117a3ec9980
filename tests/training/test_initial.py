"""Initial weights, part after part."""

import pytest
import torch
from torch import nn

from pararnn.lm.models import CELLS, ParaRNNConfig
from pararnn.lm.models.architectures import BASELINES, Shape, make_config
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training.config import ArchitectureConfig, ExecutionConfig
from pararnn.lm.training.initial import blocks, is_empty, outline, start
from pararnn.lm.training.language_model import build_model, outline_model
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.presets import preset_config
from pararnn.lm.training.sharding import lay_out
from pararnn.lm.training.text import Codec

HERE = Processes(0, 1, torch.device("cpu"))


def configuration(architecture, num_layers=3):
    shape = Shape(vocab_size=64, width=32, num_layers=num_layers, num_heads=2)
    return make_config(architecture, shape)


def hybrid():
    return ParaRNNConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=3,
        num_heads=2,
        mixers=["paragru", "attention", "paralstm"],
    )


@pytest.mark.parametrize("architecture", [*CELLS, *BASELINES, "hybrid"])
def test_all_parts_get_values_which_the_seed_decides(architecture):
    config = hybrid() if architecture == "hybrid" else configuration(architecture)
    model = outline(config)
    assert all(is_empty(block) for block in blocks(model))
    start(model, 1)
    assert not is_empty(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), name
        assert tensor.device.type == "cpu"
    loss = CausalLoss(outline(config))
    torch.manual_seed(77)  # has no part in it
    lay_out(loss, ExecutionConfig(), HERE, 1)
    again, other = loss.model.state_dict(), start(outline(config), 2).state_dict()
    random = 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, again[name]), name
        random += not torch.equal(value, other[name])
    assert random > len(blocks(model))
    tokens = torch.randint(64, (2, 9))
    assert loss.train()(tokens, tokens)[0].isfinite()


@pytest.mark.parametrize("cell", ["paragru", "slstm", "elman"])
def test_gates_begin_with_the_timescales_of_the_settings(cell, make_config):
    config = make_config(
        model=cell, architecture=ArchitectureConfig(width=16, num_layers=2, num_heads=2)
    )
    assert config.architecture.max_timescale == 1024
    options = {"max_timescale": 1024.0} if CELLS[cell].keeps else {}
    expected = CELLS[cell](16, 16, num_heads=2, **options).bias
    model = build_model(config, Codec())
    for block in model.model.layers:
        assert torch.equal(block.mixer.rnn.cell.bias, expected)
    assert bool(expected.any()) == bool(options)


def test_presets_begin_as_in_the_paper():
    config = preset_config("paragru", "400m")
    model = outline_model(config, Codec())
    cell = model.model.layers[0].mixer.rnn.cell
    assert cell.max_timescale is None
    assert config.architecture.max_timescale is None


def test_blocks_differ_and_are_initialised_as_transformers_does():
    made = start(outline(configuration("paragru")), 0)
    first, second, _ = made.model.layers
    assert not torch.equal(first.mlp.up_proj.weight, second.mlp.up_proj.weight)
    for module, std in (
        (made.model.embed_tokens, 0.02),
        (made.lm_head, 0.02),
        (first.mlp.up_proj, 0.02),
        (second.mlp.down_proj, 0.02 / 6**0.5),
    ):
        assert module.weight.std().item() == pytest.approx(std, rel=0.1)
    assert made.model.norm.weight.eq(1).all()
    assert first.residual_scale.eq(1).all()


def test_the_rotation_of_the_transformer_is_what_it_would_be():
    """A buffer, computed and not drawn."""
    config = configuration("transformer")
    from pararnn.lm.models.architectures import make_model

    expected = dict(make_model(config).named_buffers())
    found = dict(start(outline(config), 0).named_buffers())
    assert found.keys() == expected.keys()
    assert found
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class OwnCell(nn.Module):
    """Has values of its own and no way to make them again."""

    num_components = 1

    def __init__(self, input_size, hidden_size, num_heads):
        super().__init__()
        self.hidden_size = hidden_size
        self.inner = nn.Linear(input_size, hidden_size)
        nn.init.constant_(self.inner.weight, 0.25)
        self.register_buffer("decay", torch.full((hidden_size,), 0.5))

    def forward(self, x, state):
        return torch.tanh(self.decay * state + self.inner(x))


def test_a_cell_keeps_what_its_constructor_made(monkeypatch):
    monkeypatch.setitem(CELLS, "own", OwnCell)
    made = start(outline(configuration("own")), 0)
    for layer in made.model.layers:
        cell = layer.mixer.rnn.cell
        assert cell.inner.weight.eq(0.25).all()
        assert cell.decay.eq(0.5).all()
    assert made(torch.randint(64, (2, 5))).logits.isfinite().all()
