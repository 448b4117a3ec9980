"""Outputs and gradients are those that were stored, on every backend; see `stored`."""

import pytest
import torch

from . import golden
from .stored import NAMES, numbers, outcome_of

RTOL = {"bfloat16": 16 * torch.finfo(torch.bfloat16).eps}
STORED = golden.read("contracts.json")
MIXING = ("mixing_", "m2rnn", "delta_memory")
EVERY = [
    (name, backend)
    for name in NAMES
    for backend in (("auto",) if name.startswith(MIXING) else ("torch", "c"))
]


def test_all_is_stored():
    assert list(STORED) == NAMES


@pytest.mark.parametrize(("name", "backend"), EVERY, ids=" ".join)
def test_as_stored(name, backend):
    found, stored = outcome_of(name, backend), STORED[name]
    assert found.keys() == stored.keys()
    rtol = RTOL.get(name.split()[1], 1e-8)
    for key, value in found.items():
        norm = stored[key][0]
        assert norm > 0
        for actual, expected in zip(numbers(key, value), stored[key], strict=True):
            assert abs(actual - expected) <= rtol * norm, f"{key}: {actual}, stored {expected}"
