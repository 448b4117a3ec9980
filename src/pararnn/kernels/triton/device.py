"""The device that kernels are launched on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from pararnn.kernels.triton.build import interpreted


@functools.cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start before the one that it depends on has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """The device of a tensor as the current one; Triton launches there."""
    if tensor.is_cuda:
        return torch.cuda.device_of(tensor)
    import numpy as np  # the interpreter's: floating point is to behave as on a GPU

    return np.errstate(all="ignore")


def side_by_side(tensor: Tensor, first: Callable[[], None], second: Callable[[], None]) -> None:
    """Launch kernels by two functions, which may run at the same time on the device of a tensor.

    What is launched later waits for both. Neither may allocate memory.
    """
    if not tensor.is_cuda:
        first()
        second()
        return
    current = torch.cuda.current_stream(tensor.device)
    other = _other_stream(tensor.device, current.cuda_stream)
    other.wait_stream(current)
    first()
    with torch.cuda.stream(other):
        second()
    current.wait_stream(other)


@functools.cache
def _other_stream(device: torch.device, current: int) -> torch.cuda.Stream:
    """One for each: a capture of a stream takes in all that is launched on its other one."""
    return torch.cuda.Stream(device)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have in shared memory; the interpreter has no bound."""
    if interpreted() or device.type != "cuda":
        return 2**31
    from triton.runtime import driver  # which a machine without a GPU need not have

    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def rounds_products(dtype: torch.dtype) -> bool:
    """Whether a GPU's products of matrices round (TF32), for states that are kept in a type."""
    return dtype is not torch.float64 and torch.get_float32_matmul_precision() != "highest"
