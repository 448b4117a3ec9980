import random

import numpy as np
import pytest

from pararnn.lm.data import TokenSplit
from pararnn.lm.data.index import Shard
from pararnn.lm.training import report, train
from pararnn.lm.training.config import (
    ArchitectureConfig,
    OptimizerConfig,
    ScheduleConfig,
    TextConfig,
    TrainConfig,
)

WORDS = "the state before this step is the initial one and nothing else follows from it".split()


def sentences(seed, num_words=400):
    """Text that a small model learns something about in a few steps."""
    choose = random.Random(seed)
    words = (choose.choice(WORDS) for _ in range(num_words))
    return "".join(word + choose.choice(" \n") for word in words)


def byte_split(path):
    """A flat file of bytes as a split."""
    size = path.stat().st_size
    return TokenSplit(path.parent, [Shard(path.name, size, size, 0, "")], np.dtype(np.uint8))


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(sentences(number))
    return folder


@pytest.fixture
def make_config(tmp_path, text_folder):
    """Settings of a run that takes milliseconds per step."""

    def make(name="run", *, optimizer=None, **changes):
        settings = {
            "data": text_folder,
            "out": tmp_path / name,
            "steps": 8,
            "checkpoint_every": 3,
            "device": "cpu",
            "architecture": ArchitectureConfig(width=16, num_layers=1, num_heads=2),
            "text": TextConfig(sequence_length=24, batch_size=3, validation_tokens=500),
            "optimizer": OptimizerConfig(learning_rate=1e-2, **(optimizer or {})),
            "schedule": ScheduleConfig(length=40),
        }
        return TrainConfig(**{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a run of 6 steps, to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    text = folder / "text"
    text.mkdir()
    for number in range(4):
        (text / f"{number}.txt").write_text(sentences(number))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SAMPLE_TOKENS", 2)
        train(
            TrainConfig(
                data=text,
                out=folder / "run",
                steps=6,
                checkpoint_every=3,
                device="cpu",
                architecture=ArchitectureConfig(width=8, num_layers=1, num_heads=1),
                text=TextConfig(sequence_length=16, batch_size=2, validation_tokens=100),
            )
        )
    return folder / "run"
