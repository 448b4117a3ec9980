"""A GPU that is not there: tensors on the CPU say that they are on one.

For what can be known without a device: what is chosen, which kernels are launched, how they compile
for an H100, and in Triton's interpreter what they compute.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._device import _device_constructors

from pararnn.kernels import turns
from pararnn.kernels.triton import device

GPU = torch.device("cuda", 0)
_CPU = torch.device("cpu")
_FACTORIES = "empty zeros ones full tensor arange eye rand randn empty_strided as_tensor".split()
_LIKE = "empty_like zeros_like ones_like full_like rand_like randn_like".split()
_NEW = "new_empty new_zeros new_ones new_full new_tensor new_empty_strided".split()


class Driver:
    """What Triton asks for: an H100 that loads and launches nothing."""

    class utils:
        @staticmethod
        def get_device_properties(_device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448}

        @staticmethod
        def load_binary(*_: Any) -> tuple[int, ...]:
            return 0, 0, 32, 0, 1024

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0

    def launcher_cls(self, _source: Any, _metadata: Any) -> Callable[..., None]:
        return lambda *_: None


@contextlib.contextmanager
def pretend_gpu(multiprocessors: int = 132, capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """Within this, all tensors are on a GPU, as far as Python can tell.

    Kernels run in Triton's interpreter, which knows no GPU newer than of capability (8, 0); or they
    are compiled and go to `Driver`, if Triton's has been set to it.
    """
    _device_constructors()  # PyTorch remembers the factories of its first call; not those of below
    properties = types.SimpleNamespace(multi_processor_count=multiprocessors)
    waits = {"wait_event": lambda *_: None, "wait_stream": lambda *_: None}
    stream = types.SimpleNamespace(cuda_stream=0, device=GPU, **waits)
    cuda = {
        "is_available": lambda: True,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: capability,
        "current_device": lambda: 0,
        "current_stream": lambda *_: stream,
        "stream": lambda *_: contextlib.nullcontext(),
        "Event": lambda: types.SimpleNamespace(record=lambda *_: None),
        "is_current_stream_capturing": lambda: False,
        "device": lambda *_: contextlib.nullcontext(),
        "device_of": lambda *_: np.errstate(all="ignore"),  # in the interpreter
        "synchronize": lambda *_: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
    }
    with contextlib.ExitStack() as stack:
        change = lambda owner, name, new: stack.enter_context(  # noqa: E731
            mock.patch.object(owner, name, new)
        )
        stack.enter_context(mock.patch.dict(turns._ends, clear=True))
        change(device, "_other_stream", lambda *_: stream)
        for name, new in cuda.items():
            change(torch.cuda, name, new)
        for name in (*_FACTORIES, *_LIKE):
            change(torch, name, _on_cpu(getattr(torch, name)))
        for name in (*_NEW, "to"):
            change(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
        empty = torch.ops.aten.empty.memory_format  # which recordings call
        change(empty, "_op", _on_cpu(empty._op))
        change(torch, "autocast", _autocast(torch.autocast))
        change(torch.Tensor, "device", property(_device))
        change(torch.Tensor, "is_cuda", property(lambda tensor: _device(tensor) == GPU))
        yield


def _device(tensor: torch.Tensor) -> torch.device:
    """The GPU, unless it is no real tensor at all (of device meta)."""
    real = torch._C.TensorBase.device.__get__(tensor)
    return GPU if real == _CPU else real


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple(_real(a) for a in args)
        return function(*args, **{n: _real(a) for n, a in kwargs.items()})

    return call


def _real(argument: Any) -> Any:
    is_device = isinstance(argument, (torch.device, str))
    return _CPU if is_device and str(argument).startswith("cuda") else argument


def _autocast(real: type) -> Callable[..., Any]:
    """Autocast where the tensors are."""
    return lambda device_type, *args, **kwargs: real("cpu", *args, **kwargs)
