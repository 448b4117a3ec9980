"""Run by `test_many_processes` in two processes: models in parts against whole ones."""

import math

import pytest
import torch

from pararnn.data.errors import OtherProcessError, RunError
from pararnn.models.causal_loss import CausalLoss
from pararnn.models.presets import ARCHITECTURES
from pararnn.training.config import (
    ArchitectureConfig,
    ExecutionConfig,
    OptimizerConfig,
    TrainConfig,
)
from pararnn.training.language_model import build_model
from pararnn.training.optimizer import build_optimizer
from pararnn.training.parallel import Processes, join_processes
from pararnn.training.sharding import gather_on_first, lay_out
from pararnn.training.step import train_step
from pararnn.training.text import Codec

ALONE = Processes(0, 1, torch.device("cpu"))
BATCH = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(0))


def take_steps(architecture, batches, processes, execution, precision="float32"):
    """Two optimiser steps; the results and the model."""
    config = TrainConfig(
        model=architecture,
        architecture=ArchitectureConfig(width=16, num_layers=2, num_heads=2),
        optimizer=OptimizerConfig(precision=precision),
    )
    model = CausalLoss(build_model(config, Codec()), 1e-4)
    lay_out(model, execution, processes)
    optimizer = build_optimizer(model.model, config.optimizer)
    results = [train_step(model, optimizer, batches, config.optimizer, processes) for _ in range(2)]
    return results, model, optimizer, config


def compare(processes, architecture, execution, precision="float32"):
    mine = BATCH[2 * processes.rank : 2 * processes.rank + 2]
    plain = ExecutionConfig()
    expected, whole, *_ = take_steps(architecture, [BATCH], ALONE, plain, precision)
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
                error = (value - whole.state_dict()[name]).abs().max()
                assert error < 2e-4, (architecture, name, error)


def check_not_finite(processes):
    """A gradient that is not finite in one process stops the update in all."""
    plain = ExecutionConfig()
    _, model, optimizer, config = take_steps("paragru", [BATCH], processes, plain)
    before = gather_on_first(model.state_dict(), processes)
    if processes.rank == 1:
        model.model.model.norm.register_full_backward_hook(
            lambda module, grads_in, grads_out: tuple(grad * math.nan for grad in grads_in)
        )
    result = train_step(model, optimizer, [BATCH], config.optimizer, processes)
    assert not result.is_finite
    assert result.culprit == "model.embed_tokens.weight", result
    for name, value in gather_on_first(model.state_dict(), processes).items():
        assert torch.equal(value, before[name]), name


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


with join_processes("cpu") as processes:
    for architecture in ARCHITECTURES:
        compare(processes, architecture, ExecutionConfig())
    checkpointed = ExecutionConfig(activation_checkpointing=True)
    for architecture in ARCHITECTURES:
        compare(processes, architecture, checkpointed)
    compare(processes, "paragru", checkpointed, "bfloat16")
    check_not_finite(processes)
    check_failure(processes)
    processes.print("all equal")
