"""Run all steps of a cell whose channels mix in one kernel: see `triton.sweeps` and `c.mixing`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from pararnn.kernels.c.mixing import CSweep
from pararnn.kernels.lowering import NotLowered, lower
from pararnn.kernels.stages import NotFused
from pararnn.kernels.triton.build import missing
from pararnn.kernels.triton.sweeps import Streamed, in_triton
from pararnn.solvers.chunks import WHOLE, Chunks, Sweep, Swept
from pararnn.tracing.products import NotExpressed, products
from pararnn.tracing.step import Input, Step


class _Sweeps(Protocol):
    """Runs sweeps of a step."""

    @property
    def source(self) -> str:
        """What was generated for the step."""
        ...

    def __call__(
        self,
        chunks: Chunks,
        state: Sequence[Tensor],
        sweep: Sweep,
        states: Sequence[Tensor],
        ends: Sequence[Tensor],
    ) -> None:
        """Run one.

        Args:
            chunks: The steps.
            state: The states before the first step of rows, components (rows, hidden).
            sweep: Which steps.
            states: Where to write all states, (batch, time, hidden); empty for nowhere.
            ends: Where to write the states after the last step of rows, like `state`.

        Raises:
            NotFused: It cannot run here.
        """
        ...


_known: weakref.WeakKeyDictionary[fx.GraphModule, dict[tuple[Any, ...], _Sweeps | str]] = (
    weakref.WeakKeyDictionary()
)


def reason(chunks: Chunks, state: Sequence[Tensor], backend: str = "triton") -> str | None:
    """The reason why the steps cannot run in one kernel of "c" or "triton"; None if they can."""
    found = _found(chunks, state, backend)
    return found if isinstance(found, str) else None


def streams(chunks: Chunks, state: Sequence[Tensor], backend: str = "triton") -> bool:
    """Whether there is such a kernel, and one that reads the weights at every step."""
    return isinstance(_found(chunks, state, backend), Streamed)


def few_rows(chunks: Chunks, state: Sequence[Tensor], backend: str = "triton") -> int:
    """Rows up to which a kernel that `streams` keeps the weights; 0 if there is none."""
    found = _found(chunks, state, backend)
    return found.spreads.most_rows(state[0]) if isinstance(found, Streamed) else 0


def _found(chunks: Chunks, state: Sequence[Tensor], backend: str) -> _Sweeps | str:
    """The kernel for tensors of these shapes and types, or the reason why there is none; cached."""
    known = _known.setdefault(chunks.step.module, {})
    key = _key(chunks, state, backend)
    if key not in known:
        known[key] = _kernel(chunks, state, backend)
    return known[key]


def kernel_of(step: Step, backend: str) -> _Sweeps | None:
    """A kernel that was made for a step; None if there is none. Steps may share their modules."""
    alike = backend, step.num_components, step.hidden, step.dtype
    shapes = [i.shape for i in step.inputs]
    for key, kernel in _known.get(step.module, {}).items():
        if isinstance(kernel, str) or key[:4] != alike:
            continue
        if [tuple(shape) for shape, *_ in key[5:]] == shapes:
            return kernel
    return None


def run_steps(chunks: Chunks, state: Sequence[Tensor], sweep: Sweep = WHOLE) -> Swept:
    """Run a sweep in one kernel, on a GPU or in Triton's interpreter; see `chunks.Run`.

    Raises:
        NotFused: The kernel does not support the step; the message says why.
    """
    return _swept("triton", chunks, state, sweep)


def run_in_c(chunks: Chunks, state: Sequence[Tensor], sweep: Sweep = WHOLE) -> Swept:
    """Run a sweep in C, on a CPU; otherwise like `run_steps`."""
    return _swept("c", chunks, state, sweep)


def _swept(backend: str, chunks: Chunks, state: Sequence[Tensor], sweep: Sweep) -> Swept:
    kernel = _found(chunks, state, backend)
    if isinstance(kernel, str):
        raise NotFused(kernel)
    cut, (rows, hidden) = chunks.cut, state[0].shape
    states: Sequence[Tensor] = []
    if sweep.keep:
        states = [s.new_empty(cut.batch, cut.time, hidden) for s in state]
    if sweep.redo is not None:
        states = sweep.redo.states
    ends = [s.new_empty(rows, hidden) for s in state]
    try:
        kernel(chunks, state, sweep, states, ends)
    except NotFused as error:
        _known[chunks.step.module][_key(chunks, state, backend)] = str(error)
        raise
    return list(states), ends


def _key(chunks: Chunks, state: Sequence[Tensor], backend: str) -> tuple[Any, ...]:
    """The key of a kernel: shapes, strides and types of all tensors, without batch and time."""
    inputs = [
        (i.shape[2:], i.stride()[2:], i.dtype) if by_rows else (i.shape, i.stride(), i.dtype)
        for i, by_rows in zip(chunks.inputs, chunks.step.by_rows, strict=True)
    ]
    like = state[0]
    return backend, len(state), like.shape[1], like.dtype, like.device, *inputs


def _kernel(chunks: Chunks, state: Sequence[Tensor], backend: str = "triton") -> _Sweeps | str:
    """Generate the kernel, or say why it cannot be."""
    like, kinds, strides = state[0], [], []
    obstacle = missing(like.device.type) if backend == "triton" else None
    if obstacle is not None:
        return obstacle
    if like.dtype not in (torch.float32, torch.float64):
        return f"the state is of type {like.dtype}"
    for tensor, by_rows in zip(chunks.inputs, chunks.step.by_rows, strict=True):
        skipped = 2 if by_rows else 0
        kinds.append(Input(tuple(tensor.shape[skipped:]), tensor.dtype, by_rows))
        strides.append(tensor.stride()[skipped:])
    try:
        step = chunks.step
        sizes = len(state), step.hidden, step.group
        found = products(step.module, kinds, strides, *sizes, like.dtype, like.device)
        if backend == "c":
            lower(found.step)  # which raises if an operation has no rule
            return CSweep(found, like.dtype is torch.float64)
        return in_triton(found, like)
    except (NotExpressed, NotLowered) as error:
        return str(error)
