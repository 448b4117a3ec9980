"""Tracing where one of PyTorch's transforms or modes is on."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pararnn.tracing.ran import is_the_users

Result = TypeVar("Result")

_AS_IT_IS = contextlib.nullcontext()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

HOOKS_OF_ALL: dict[str, dict[int, Any]] = {
    name: value
    for name, value in vars(torch.nn.modules.module).items()
    if name.startswith(("_global_forward", "_global_backward")) and isinstance(value, dict)
}
"""PyTorch's hooks of all modules, by the name of their dictionary."""


def transformed() -> bool:
    """Whether tensors may belong to a transform of `torch.func`, or carry tangents."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device; meta has none."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, operations on this type of device have the types of what they are given."""
    if not autocasts(device):
        return _AS_IT_IS
    return torch.autocast(device, enabled=False)


def forward_of(module: torch.nn.Module) -> Callable[..., Any]:
    """What a call of a module comes to: its forward, if nothing is to happen around it."""
    own, plain = vars(module), type(module).__call__ is torch.nn.Module.__call__
    hooks = chain((own[name] for name in _HOOKS), HOOKS_OF_ALL.values())
    replaced = own.get("_compiled_call_impl") is not None or torch._C._get_tracing_state()
    if replaced or not plain or any(hooks):
        return module
    return module.forward


def untransformed(function: Callable[[], Result]) -> Result:
    """Call a function where no transform is on."""
    return apart(function) if transformed() else function()


def apart(function: Callable[[], Result]) -> Result:
    """Call a function in a new thread, where no transform, mode or operator is active."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def is_a_tools(hook: Any) -> bool:
    """Whether a hook of all modules is PyTorch's own: it counts or measures, no part of a step."""
    code = getattr(hook, "__code__", None)
    return code is not None and not is_the_users(code.co_filename)


@contextlib.contextmanager
def without_tools() -> Iterator[None]:
    """Inside, PyTorch's own hooks of all modules do not run, as those of FlopCounterMode."""
    before = [(hooks, dict(hooks)) for hooks in HOOKS_OF_ALL.values()]
    before = [(hooks, held) for hooks, held in before if any(map(is_a_tools, held.values()))]
    for hooks, held in before:
        for number in [n for n, hook in held.items() if is_a_tools(hook)]:
            del hooks[number]
    try:
        yield
    finally:
        for hooks, held in before:
            hooks.clear()
            hooks.update(held)


def outside_of_graphs(function: Callable[..., Result]) -> Callable[..., Result]:
    """The function as `torch.compile` is to call it: as it is, and all that it calls."""

    @functools.wraps(function)
    def run(*arguments: Any) -> Result:
        called = function
        if "torch._dynamo" in sys.modules:  # or it would be imported (2 s), as by the decorator
            called = torch.compiler.disable(function)
        return called(*arguments)

    vars(run)["_torchdynamo_disable"] = True
    return run


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, functions made by `torch.compile` run as they were written, so that all is seen."""
    if "torch._dynamo" not in sys.modules:  # there is none, and the import takes a second
        yield
        return
    with _EAGER.lock:
        _EAGER.users += 1
        if _EAGER.users == 1:
            _EAGER.stance.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _EAGER.lock:
            _EAGER.users -= 1
            if _EAGER.users == 0:
                _EAGER.stance.close()


class _Eager:
    """PyTorch's stance is one for all threads: the first sets it, the last one sets it back."""

    def __init__(self) -> None:
        self.lock, self.users, self.stance = threading.Lock(), 0, contextlib.ExitStack()


_EAGER = _Eager()


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
