"""Tensors that move on by one entry, in PyTorch and in Triton's interpreter."""

import pytest
import torch

from pararnn.kernels import moving

from .conftest import needs_triton

SHAPES = [(2, 3, 700), (2, 1, 5, 7), (1, 3, 8), (1, 1), (3, 2, 1), (2, 7, 600)]


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_triton)])
def test_tensors_move_on(kernel, monkeypatch):
    """Of several types, and a new entry of another type than the others."""
    types = torch.float32, torch.bfloat16, torch.int64, torch.float64
    monkeypatch.setattr(moving, "_has_kernel", lambda _: kernel)
    held = [(100 * torch.randn(shape)).to(t) for t in types for shape in SHAPES]
    newest = [torch.randn(t.shape[0], 1, *t.shape[2:]).to(t.dtype) for t in held]
    newest[0] = newest[0].double()
    pairs = zip(held, newest, strict=True)
    expected = [torch.cat([t[:, 1:], new.to(t.dtype)], 1) for t, new in pairs]
    moving.move_on(held, newest)
    for tensor, wanted in zip(held, expected, strict=True):
        assert torch.equal(tensor, wanted)


def test_nothing_moves():
    moving.move_on([], [])
