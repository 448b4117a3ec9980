"""What must be a whole number is refused in words wherever it is passed, and never rounded."""

import dataclasses
from typing import get_type_hints

import numpy as np
import pytest
import torch

import pararnn
from pararnn._whole import check_whole, check_whole_fields
from pararnn.lm.bench.models import ModelSize
from pararnn.lm.data import PrepareConfig, prepare
from pararnn.lm.decoding import Decoder, generate
from pararnn.lm.models import ParaRNNConfig, ParaRNNForCausalLM
from pararnn.lm.training import TrainConfig, evaluate
from pararnn.lm.training.config import (
    ArchitectureConfig,
    ExecutionConfig,
    ScheduleConfig,
    TextConfig,
)
from pararnn.reproduce.settings import ReproduceConfig
from pararnn.tasks import TASKS, draw
from pararnn.tasks.needle import Needle
from pararnn.tasks.settings import SuiteConfig, settings_for
from pararnn.testing import check_cell

CONFIGS = (
    *(ArchitectureConfig, TextConfig, ScheduleConfig, ExecutionConfig, TrainConfig),
    *(SuiteConfig, ReproduceConfig, ModelSize, Needle),
)


def fields_of_whole_numbers():
    kinds = (int, int | None, tuple[int, ...])
    configs = (*CONFIGS, PrepareConfig)
    hints = [(config, *hint) for config in configs for hint in get_type_hints(config).items()]
    return [(config, name) for config, name, hint in hints if hint in kinds]


@pytest.mark.parametrize(("config", "name"), fields_of_whole_numbers())
def test_settings(config, name):
    given = {"sources": "text"} if config is PrepareConfig else {}
    with pytest.raises(TypeError, match=rf"{name} must be a whole number, got 2\.5\.$"):
        config(**given, **{name: 2.5})


def test_there_are_such_fields():
    found = [name for _, name in fields_of_whole_numbers()]
    assert {"width", "steps", "seed", "length", "seeds", "needles", "units_per_shard"} <= {*found}
    assert len(found) > 30


@pytest.fixture(scope="module")
def model():
    config = ParaRNNConfig(vocab_size=7, hidden_size=8, num_hidden_layers=1)
    return ParaRNNForCausalLM(config)


def decoder_of_two(model):
    decoder = Decoder(model, 2)
    decoder.start([[1], [2, 3]])
    return decoder


TEXTS = [[1, 2], [3]]
CALLS = {
    "max_new_tokens": lambda m: generate(m, TEXTS, max_new_tokens=2.5),
    "max_new_tokens ": lambda m: Decoder(m, 2).generate(TEXTS, max_new_tokens=2.0),
    "max_new_tokens  ": lambda m: Decoder(m, 2).stream(TEXTS, max_new_tokens=True),
    "seed": lambda m: generate(m, TEXTS, max_new_tokens=2, temperature=1.0, seed=2.5),
    "seed ": lambda m: decoder_of_two(m).restore(decoder_of_two(m).snapshot(), seed=2.5),
    "end_of_text": lambda m: generate(m, TEXTS, max_new_tokens=2, end_of_text=2.5),
    "batch_size": lambda m: Decoder(m, 2.0),
    "texts[0]": lambda m: decoder_of_two(m).snapshot().select([0.0, 1.0]),
    "limit": lambda m: evaluate(m, None, None, limit=0.5),
    "chunk": lambda m: evaluate(m, None, None, chunk=0.5),
    "hidden_size": lambda _: ParaRNNConfig(hidden_size=64.0),
    "attention_heads": lambda _: ParaRNNConfig(attention_heads=2.0),
    "workers": lambda _: prepare(PrepareConfig(sources="text"), "folder", workers=1.5),
    "size": lambda _: draw(Needle(), 2.5, 64, split="test", seed=0, device="cpu"),
    "seed  ": lambda _: draw(Needle(), 2, 64, split="test", seed=0.5, device="cpu"),
    "batch_size ": lambda _: settings_for(next(iter(TASKS)), "smoke", {"batch_size": 32.5}),
    "max_iterations": lambda _: pararnn.Newton(max_iterations=2.5),
    "num_components": lambda _: pararnn.RNN(torch.nn.GRUCell(2, 3), num_components=1.5),
    "num_layers": lambda _: pararnn.ParaGRU(2, 3, num_layers=2.0),
    "batch": lambda _: check_cell(torch.nn.GRUCell(2, 3), batch=2.5),
    "features[0]": lambda _: check_cell(torch.nn.GRUCell(2, 3), features=2.5),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name, model):
    with pytest.raises(TypeError) as raised:
        CALLS[name](model)
    assert str(raised.value).startswith(f"{name.strip()} must be a whole number, got ")


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1, 2], [3.5]], "prompt 1 holds numbers of torch.float32; pass its tokens"),
        ([[1, 2], torch.tensor([0.0])], "prompt 1 holds numbers of torch.float32"),
        ([[True], [1]], "prompt 0 holds numbers of torch.bool"),
        (["text", [1]], "prompt 0 is a text, 'text'; pass its tokens"),
        ([[1], ["a"]], "prompt 1 holds what is no number"),
        ([[1], [None]], "prompt 1 holds what is no number"),
    ],
)
def test_tokens(prompts, message, model):
    with pytest.raises(TypeError, match=message):
        generate(model, prompts, max_new_tokens=2)


def test_whole_numbers_of_other_types_pass(model):
    check_whole(a=np.int64(3), b=-(2**70))
    check_whole_fields(SuiteConfig(seeds=np.int32(2)))
    expected = generate(model, TEXTS, max_new_tokens=3)
    arrays = [np.array(TEXTS[0]), torch.tensor(TEXTS[1])]
    assert generate(model, arrays, max_new_tokens=np.int64(3)) == expected
    assert decoder_of_two(model).snapshot().select(np.array([1])).batch_size == 1


def test_classes_of_users_may_name_what_only_type_checkers_have():
    @dataclasses.dataclass
    class Own:
        number: "int" = 2
        other: "Nowhere" = None  # noqa: F821

    check_whole_fields(Own())
