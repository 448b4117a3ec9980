"""Tracing where one of PyTorch's transforms or modes is on."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

Result = TypeVar("Result")


def transformed() -> bool:
    """Whether tensors may belong to a transform of `torch.func`, or carry tangents."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def untransformed(function: Callable[[], Result]) -> Result:
    """Call a function where no transform is on."""
    return apart(function) if transformed() else function()


def apart(function: Callable[[], Result]) -> Result:
    """Call a function where no transform, mode or operator is on: in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def stand_in(tensor: Tensor) -> Tensor:
    """A tensor like one that only its transform can compute with; of others the tensor itself."""
    if not (torch._C._functorch.is_functorch_wrapped_tensor(tensor) or _is_dual(tensor)):
        return tensor
    return apart(lambda: _like(tensor))


def _like(tensor: Tensor) -> Tensor:
    made = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return made.uniform_().requires_grad_() if made.is_floating_point() else made


def _is_dual(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor, level=0).tangent is not None
