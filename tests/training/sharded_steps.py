"""Run by `test_many_processes` in two processes: models in parts against whole ones.

The device is the argument: cpu, or cuda with a GPU for each process.
"""

import dataclasses
import math
import sys

import pytest
import torch
from torch.distributed.tensor import DTensor

from pararnn.lm.data.errors import OtherProcessError, RunError
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.models.presets import ARCHITECTURES
from pararnn.lm.training import sharding
from pararnn.lm.training.config import (
    ArchitectureConfig,
    ExecutionConfig,
    OptimizerConfig,
    TrainConfig,
)
from pararnn.lm.training.initial import blocks, is_empty, start_block
from pararnn.lm.training.language_model import build_model, outline_model
from pararnn.lm.training.optimizer import build_optimizer
from pararnn.lm.training.parallel import Processes, join_processes
from pararnn.lm.training.sharding import gather_on_first, lay_out
from pararnn.lm.training.step import train_step
from pararnn.lm.training.text import Codec

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
BATCH = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(0))
FAR = {"cpu": 0.0, "cuda": 1e-3}
"""Share of the entries that may be further off: AdamW's first steps take the sign of a gradient,
and a GPU sums tiny ones in another order."""


def settings(architecture, precision="float32"):
    return TrainConfig(
        model=architecture,
        architecture=ArchitectureConfig(width=16, num_layers=2, num_heads=2),
        optimizer=OptimizerConfig(precision=precision),
    )


def take_steps(architecture, batches, processes, execution, precision="float32"):
    """Two optimiser steps; the results and the model."""
    config = settings(architecture, precision)
    make = build_model if processes.count == 1 else outline_model
    model = CausalLoss(make(config, Codec()), 1e-4)
    lay_out(model, execution, processes, config.seed)
    optimizer = build_optimizer(model.model, config.optimizer)
    steps = [train_step(model, optimizer, batches, config.optimizer, processes) for _ in range(2)]
    results = [step.read() for step in steps]
    return results, model, optimizer, config


def compare(processes, architecture, execution, precision="float32"):
    mine = BATCH[2 * processes.rank : 2 * processes.rank + 2]
    plain, alone = (
        ExecutionConfig(activation_checkpointing="off"),
        Processes(0, 1, processes.device),
    )
    expected, whole, *_ = take_steps(architecture, [BATCH], alone, plain, precision)
    # in parts: two processes with one pass each, or with two passes of one sequence
    for batches in ([mine], list(mine.split(1))):
        found, parts, *_ = take_steps(architecture, batches, processes, execution, precision)
        rtol = 1e-5 if precision == "float32" else 1e-2
        for a, b in zip(found, expected, strict=True):
            assert math.isclose(a.loss, b.loss, rel_tol=rtol), (architecture, a, b)
            assert math.isclose(a.grad_norm, b.grad_norm, rel_tol=10 * rtol), (architecture, a, b)
        gathered = gather_on_first(parts.state_dict(), processes)
        for name, value in gathered.items():
            assert value.dtype == torch.float32
            if precision == "float32":
                error = (value - whole.state_dict()[name].cpu()).abs()
                far = (error > 2e-4).float().mean().item()
                assert far <= FAR[DEVICE], (architecture, name, far, error.max())


def check_start(processes, architecture, monkeypatch):
    """Parts begin with the values of a whole model, and only one block exists whole at a time."""
    config = settings(architecture)
    config = dataclasses.replace(config, seed=3)
    expected = build_model(config, Codec())
    loss = CausalLoss(outline_model(config, Codec()), 1e-4)
    assert all(p.is_meta for p in loss.parameters())

    def start(model, index, seed):
        for number, block in enumerate(blocks(model)):
            if number >= index:
                assert is_empty(block)
        for p in model.parameters():
            assert p.is_meta or isinstance(p, DTensor)
        return start_block(model, index, seed)

    monkeypatch.setattr(sharding, "start_block", start)
    lay_out(loss, ExecutionConfig(), processes, config.seed)
    assert all(isinstance(p, DTensor) for p in loss.parameters())
    assert not any(buffer.is_meta for buffer in loss.buffers())
    found = gather_on_first(loss.model.state_dict(), processes)
    if processes.is_first:
        assert found.keys() == expected.state_dict().keys()
    for name, value in found.items():
        assert torch.equal(value, expected.state_dict()[name]), (architecture, name)
    for a, b in zip(loss.model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(a.cpu(), b), architecture


def check_not_finite(processes):
    """A gradient that is not finite in one process is told by all."""
    plain = ExecutionConfig()
    _, model, optimizer, config = take_steps("paragru", [BATCH], processes, plain)
    if processes.rank == 1:
        model.model.model.norm.register_full_backward_hook(
            lambda module, grads_in, grads_out: tuple(grad * math.nan for grad in grads_in)
        )
    result = train_step(model, optimizer, [BATCH], config.optimizer, processes).read()
    assert not result.is_finite
    assert result.culprit == "model.embed_tokens.weight", result


def check_failure(processes):
    """What fails in the first process fails in all, and only there with a message."""

    def fail():
        raise RunError("no text")

    expected = (RunError, "no text") if processes.is_first else (OtherProcessError, "says why")
    with pytest.raises(expected[0], match=expected[1]):
        processes.on_first(fail)
    assert processes.on_first(lambda: processes.rank) == 0
    assert processes.largest(processes.rank) == 1
    assert processes.mean([float(processes.rank)]) == [0.5]


with join_processes(DEVICE) as processes:
    for architecture in ARCHITECTURES:
        with pytest.MonkeyPatch.context() as monkeypatch:
            check_start(processes, architecture, monkeypatch)
    for architecture in ARCHITECTURES:
        compare(processes, architecture, ExecutionConfig(activation_checkpointing="off"))
    checkpointed = ExecutionConfig(activation_checkpointing="on")
    for architecture in ARCHITECTURES:
        compare(processes, architecture, checkpointed)
    compare(processes, "paragru", checkpointed, "bfloat16")
    if DEVICE == "cuda":  # takes minutes on a CPU
        compiled = ExecutionConfig(activation_checkpointing="on", compile=True)
        compare(processes, "paragru", compiled, "bfloat16")
        compare(processes, "transformer", compiled, "bfloat16")
    check_not_finite(processes)
    check_failure(processes)
    processes.print("all equal")
