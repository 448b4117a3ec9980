"""Runs whose processes share sequences: equal to one process, resumed by other numbers."""

import dataclasses

import pytest
from distributed.test_language_models import needs_context_parallel

from pararnn.lm.training import RunError, RunFolder, train
from pararnn.lm.training.config import ArchitectureConfig, ExecutionConfig, TextConfig, TrainConfig
from pararnn.lm.training.config import resolve as resolved

from .launch import SETTINGS, curve, needs_proc, trainings, with_text
from .test_many_processes import assert_close_curves

pytestmark = needs_proc

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_text(tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def launch(folder):
    with trainings(folder) as start:
        yield start


def shared(launch, name, count, split, *changes):
    arguments = ["--execution.sequence-parallel", split, "--steps", STEPS, "--out", name, *changes]
    return launch(count, *SETTINGS, *map(str, arguments)).wait()


def alone(folder, name, **changes):
    """A run of one process with the settings of another run."""
    config = RunFolder.open(folder / name).read_config()
    execution = dataclasses.replace(config.execution, sequence_parallel=1)
    out = folder / f"{name}-alone"
    train(dataclasses.replace(config, out=out, execution=execution, **changes))
    return out


def test_two_processes_share_each_sequence(folder, launch):
    """A cell; validation in between; one process goes on, and so do two with parts of their own."""
    changes = ("--text.batch-size", 2, "--validate-every", 3, "--checkpoint-every", 3)
    printed = shared(launch, "two", 2, 2, *changes)
    assert "in parts on 2 processes, 2 of which share each sequence" in printed
    assert len(curve(folder / "two")) == STEPS
    out = alone(folder, "two", steps=3)
    assert_close_curves(out, folder / "two", 3)
    arguments = ("--resume", "--out", out.name, "--steps", str(STEPS))
    launch(2, *arguments, "--execution.sequence-parallel", "2").wait()
    assert_close_curves(out, folder / "two", STEPS)


@needs_context_parallel
def test_four_processes_are_two_by_two(folder, launch):
    """A hybrid with attention and a memory, documents, and both ways of sharing a step."""
    changes = ("--model", "1xattention+1xparagru", "--text.batch-size", 1)
    changes += ("--execution.activation-checkpointing", "off")
    shared(launch, "four", 4, 2, *changes)
    config = RunFolder.open(folder / "four").read_config()
    assert config.text.global_batch_size == 2
    out = alone(folder, "four", text=dataclasses.replace(config.text, batch_size=2))
    assert_close_curves(out, folder / "four", STEPS)


def test_a_carried_state_goes_on(folder, launch):
    """From one process to two that share sequences, whose state is that after the last part."""
    shared(launch, "carried", 2, 2, "--text.batch-size", 2, "--text.carry-state")
    out = alone(folder, "carried", steps=3)
    assert_close_curves(out, folder / "carried", 3)
    arguments = ("--resume", "--out", out.name, "--steps", str(STEPS))
    launch(2, *arguments, "--execution.sequence-parallel", "2").wait()
    assert_close_curves(out, folder / "carried", STEPS)


def test_numbers_that_do_not_fit():
    def config(split, **changes):
        text = TextConfig(sequence_length=32)
        return TrainConfig(text=text, execution=ExecutionConfig(sequence_parallel=split), **changes)

    assert resolved(config(2), 4).text.global_batch_size == 2 * TextConfig().batch_size
    with pytest.raises(RunError, match=r"3 processes cannot share sequences by 2 each"):
        resolved(config(2), 3)
    for split in (0, 3, 64):
        with pytest.raises(ValueError, match=r"a divisor of text\.sequence_length, 32"):
            config(split)
    with pytest.raises(ValueError, match="it must be 1 for transformer"):
        config(2, model="transformer", architecture=ArchitectureConfig())
