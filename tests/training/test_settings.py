"""Configurations: checks, storage, what a resumed run may change; the optimiser they describe."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from pararnn.lm.models import ParaRNNConfig, ParaRNNForCausalLM
from pararnn.lm.training import RunError
from pararnn.lm.training.config import (
    DEFAULT_STEPS,
    ArchitectureConfig,
    ExecutionConfig,
    OptimizerConfig,
    ScheduleConfig,
    TextConfig,
    TrainConfig,
    check_new,
    check_resumable,
    from_dict,
    identity,
    resolve,
    to_dict,
)
from pararnn.lm.training.optimizer import build_optimizer, is_matrix, learning_rate


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(steps=0), "steps is 0; it must be >= 1"),
        (lambda: TrainConfig(model="paragri"), "perhaps you meant 'paragru'"),
        (lambda: ArchitectureConfig(width=10), "architecture.num_heads is 4; .* a divisor of 10"),
        (lambda: TextConfig(held_out=1.0), "text.held_out is 1.0; it must be between 0 and 1"),
        (lambda: OptimizerConfig(beta2=1.0), "optimizer.beta2 is 1.0; .* from 0 to below 1"),
        (lambda: TextConfig(global_batch_size=0), "text.global_batch_size is 0; it must be >= 1"),
        (lambda: ExecutionConfig(profile_steps=-1), "execution.profile_steps is -1; .* >= 0"),
        (lambda: ArchitectureConfig(attention_every=-1), "attention_every is -1; it must be >= 0"),
        (
            lambda: TrainConfig(model="mamba2", architecture=ArchitectureConfig(attention_every=2)),
            "attention_every is 2; it must be 0 for mamba2",
        ),
        (lambda: ArchitectureConfig(max_timescale=1.5), "max_timescale is 1.5; it must be >= 2"),
        (lambda: TrainConfig(model="delta", memory_options=("a",)), "memory_options is a; it must"),
        (
            lambda: TrainConfig(model="m2rnn+delta:key_size=8,value_size=4"),
            "'delta:key_size=8,value_size=4' in 'm2rnn.delta:.*'; options stand apart from names, "
            "as in pararnn train --memory-options key_size=8 value_size=4. There are",
        ),
        (lambda: TrainConfig(model="m2rnn+"), "no architecture '' in 'm2rnn.'; a name is missing"),
        (lambda: TrainConfig(model="7xdelt"), "'delt' in '7xdelt'; perhaps you meant 'delta'"),
        (lambda: ScheduleConfig(length=0), "schedule.length is 0; it must be >= 1"),
    ],
)
def test_wrong_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


ATTENTION_ALONE = ArchitectureConfig(attention_every=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": "mamba2", "memory_options": ("key_size=8",)},
            "^memory_options is key_size=8, but no block of mamba2 has a memory; leave it out, or",
        ),
        (
            {"model": "paragru+attention", "memory_options": ("key_size=8", "value_size=8")},
            r"key_size=8 value_size=8, but no block of paragru\+attention has a memory",
        ),
        (
            {"model": "m2rnn+delta", "cell_options": ("damping=8",)},
            r"^cell_options is damping=8, but no block of m2rnn\+delta has a cell",
        ),
        ({"cell_options": ("a=1",), "architecture": ATTENTION_ALONE}, "of paragru has a cell"),
        ({"model": "transformer", "cell_options": ("a=1",)}, "no block of transformer has a cell"),
    ],
)
def test_options_that_no_block_takes(settings, message):
    """A new run is refused, a stored one is read."""
    config = TrainConfig(**settings)
    with pytest.raises(ValueError, match=message):
        check_new(config)
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_options_that_a_block_takes():
    cell = TrainConfig(model="cell.py:Mine@0123456789ab", cell_options=("a=1",))
    memory = TrainConfig(model="paragru+m2rnn", memory_options=("a=1",), cell_options=("a=1",))
    few = ArchitectureConfig(num_layers=1)  # another message says that they are too few
    for config in (TrainConfig(), cell, memory, dataclasses.replace(memory, architecture=few)):
        check_new(config)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(data=Path("a"), out=Path("b"), text=TextConfig(held_out=0.5), model="paralstm"),
        TrainConfig(model="2xdelta+attention", memory_options=("key_size=8", "nonlinearity=tanh")),
    ],
)
def test_settings_survive_json(config):
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("name", ["attention_every", "state_size"])
def test_settings_from_before_a_field(name):
    stored = to_dict(TrainConfig())
    del stored["architecture"][name]
    assert from_dict(TrainConfig, stored) == TrainConfig()


def test_identity_from_before_the_state_size():
    """The checkpoints of such a run still belong to it."""
    assert "architecture.state_size" not in identity(TrainConfig())
    other = TrainConfig(model="mamba2", architecture=ArchitectureConfig(state_size=16))
    assert identity(other)["architecture.state_size"] == 16


def test_identity_from_before_memories():
    assert not [name for name in identity(TrainConfig()) if "memory" in name]
    other = TrainConfig(model="delta", memory_options=("key_size=8",))
    assert identity(other)["memory_options"] == ["key_size=8"]


@pytest.mark.parametrize(
    "change",
    [{"steps": "many"}, {"text": {}}, {"surplus": 1}, {"steps": -1}, {"optimizer": None}],
)
def test_damaged_settings_are_refused(change):
    with pytest.raises(ValueError):  # noqa: PT011 # each has its own message
        from_dict(TrainConfig, {**to_dict(TrainConfig()), **change})


def test_schedule_does_not_follow_the_steps():
    assert resolve(TrainConfig(steps=20)).schedule.length == DEFAULT_STEPS
    assert resolve(TrainConfig(steps=5000)).schedule.length == 5000
    config = resolve(TrainConfig(steps=20, schedule=ScheduleConfig(length=7)))
    assert config.schedule.length == 7
    assert resolve(config) == config


def test_processes_share_the_sequences_of_a_step():
    assert resolve(TrainConfig(), 3).text.global_batch_size == 24
    stored = resolve(TrainConfig(text=TextConfig(batch_size=2, global_batch_size=12)), 3)
    assert resolve(stored, 2) == stored
    with pytest.raises(RunError, match=r"12 sequences per .* not a multiple of 2 .* x 4 \(proc"):
        resolve(stored, 4)


def test_resuming_may_change_steps_but_not_the_curve():
    stored = resolve(TrainConfig(steps=20))
    check_resumable(stored, dataclasses.replace(stored, steps=40, checkpoint_every=7, device="cpu"))
    other = dataclasses.replace(stored, optimizer=OptimizerConfig(learning_rate=1.0), seed=3)
    with pytest.raises(RunError, match=r"seed from 0 to 3, optimizer.learning_rate from .* to 1.0"):
        check_resumable(stored, other)
    assert identity(stored) == identity(dataclasses.replace(stored, steps=99, out=Path("x")))
    execution = ExecutionConfig(compile=True, activation_checkpointing="on", profile_steps=2)
    text = dataclasses.replace(stored.text, batch_size=2)
    cut = dataclasses.replace(stored, text=text, execution=execution)
    check_resumable(stored, resolve(cut, 4))
    assert identity(stored) == identity(cut)
    assert identity(stored) != identity(other)


def test_learning_rate_warms_up_and_ends_at_zero():
    schedule = ScheduleConfig(length=100, warmup=0.1)
    rates = [learning_rate(step, 2.0, schedule) for step in range(120)]
    assert rates[0] == 0.2
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(1 - math.cos(math.pi / 90), rel=1e-6)
    assert rates[100:] == [0.0] * 20
    assert all(b < a for a, b in itertools.pairwise(rates[10:100]))
    with pytest.raises(ValueError, match="pass a configuration through resolve"):
        learning_rate(0, 1.0, ScheduleConfig())


def test_only_matrices_decay():
    model = ParaRNNForCausalLM(
        ParaRNNConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_heads=2)
    )
    decayed = {name for name, p in model.named_parameters() if is_matrix(name, p)}
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in decayed} == {
        *("in_proj", "gate_proj", "out_proj", "up_proj", "down_proj"),
        *("cell", "conv", "embed_tokens", "lm_head"),
    }
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.5))
    with torch.no_grad():
        before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = parameter.abs().sum() < before[name].abs().sum()
        assert bool(shrunk) == (name in decayed), name
