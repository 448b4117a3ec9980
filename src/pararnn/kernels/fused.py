"""Run all steps of a cell whose channels mix in one kernel: `triton.mixing`, or `c.mixing`.

The one in Triton keeps the weights in registers.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from pararnn.kernels.c.mixing import CSweep, NotFused
from pararnn.kernels.lowering import NotLowered, lower
from pararnn.kernels.triton.build import missing, text_of
from pararnn.kernels.triton.device import on_device
from pararnn.kernels.triton.expressions import function
from pararnn.kernels.triton.tuples import OverTime
from pararnn.planning.kernel_plans import rows_obstacle, rows_warps
from pararnn.solvers.chunks import WHOLE, Chunks, Sweep, Swept
from pararnn.solvers.problem import with_rows
from pararnn.tracing.products import NotExpressed, Products, products
from pararnn.tracing.step import Input, Step

_TILE = 16  # see `triton.functions.dot`


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
        NotFused: The kernel does not support the step, or its weights are too large; the message
            says why.
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


@dataclass(frozen=True)
class _InTriton:
    """The kernel of a step in Triton.

    Attributes:
        products: The step, as expressions.
        drives: Indices of the inputs with drives.
        coefficients: Indices of the inputs with coefficients.
        run: The Triton kernel.
        constants: Its compile-time arguments.
    """

    products: Products
    drives: tuple[int, ...]
    coefficients: tuple[int, ...]
    run: Any
    constants: dict[str, Any]

    @property
    def source(self) -> str:
        """The module of the function that the kernel calls."""
        return text_of(self.constants["STEP"])

    def __call__(
        self,
        chunks: Chunks,
        state: Sequence[Tensor],
        sweep: Sweep,
        states: Sequence[Tensor],
        ends: Sequence[Tensor],
    ) -> None:
        """See `_Sweeps`."""
        cut, inputs, rows = chunks.cut, chunks.inputs, len(state[0])
        resets = [] if chunks.resets is None else [chunks.resets]
        over_time = functools.partial(_over_time, cut.backwards)
        with on_device(state[0]):
            try:
                self.run[rows, self.products.groups](
                    drives=over_time([inputs[i] for i in self.drives]),
                    coefficients=tuple(inputs[i] for i in self.coefficients),
                    weights=_blocks(self.products, inputs),
                    resets=over_time(resets),
                    reset_states=over_time([with_rows(s) for s in chunks.reset_states]),
                    initial=tuple(s.contiguous() for s in state),
                    states=over_time(states),
                    ends=tuple(ends),
                    settled=None if sweep.redo is None else sweep.redo.settled.view(torch.uint8),
                    rows=rows // sweep.copies,
                    batch=cut.batch,
                    time=cut.time,
                    chunk=cut.chunk,
                    first=sweep.first,
                    reverse=int(chunks.reverse),
                    **self.constants,
                )
            except _out_of_resources() as error:
                raise NotFused(f"its weights do not fit on the chip: {error}") from error


def _out_of_resources() -> type[Exception]:
    from triton.runtime.errors import OutOfResources  # only where there is a kernel

    return OutOfResources


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
        found = products(
            chunks.step.module, kinds, strides, len(state), like.shape[1], like.dtype, like.device
        )
        if backend == "c":
            lower(found.step)  # which raises if an operation has no rule
            return CSweep(found, like.dtype is torch.float64)
        obstacle = rows_obstacle(len(found.weights), _width(found), like.itemsize)
        return _compiled(found, like) if obstacle is None else obstacle
    except (NotExpressed, NotLowered) as error:
        return str(error)


def _compiled(products: Products, like: Tensor) -> _InTriton:
    from pararnn.kernels.triton import mixing  # needs Triton, which this module does not

    count, width, double = len(products.weights), _width(products), like.dtype is torch.float64
    drives, coefficients = products.drives, products.coefficients
    leaves = {"state": len(products.step), "drive": len(drives)}
    leaves |= {"coefficient": len(coefficients), "weight": count}
    used = [tuple(sorted({p.input for p in places})) for places in (drives, coefficients)]
    placed = [
        tuple((of.index(p.input), p.offset, p.group, p.channel) for p in places)
        for of, places in zip(used, (drives, coefficients), strict=True)
    ]
    constants = {
        "STEP": function("step", leaves, products.step, double),
        "DRIVES": placed[0],
        "COEFFICIENTS": placed[1],
        "WEIGHTS": count,
        "GROUPS": products.groups,
        "SIZE": products.size,
        "WIDTH": width,
        "TILE": _TILE,
        "num_warps": rows_warps(count, width, like.itemsize),
        "num_stages": 1,
    }
    return _InTriton(products, used[0], used[1], mixing.run, constants)


def _width(products: Products) -> int:
    """Channels of a program: those of a group, rounded up to a power of two."""
    return max(_TILE, 1 << (products.size - 1).bit_length())


def _over_time(backwards: bool, tensors: Sequence[Tensor]) -> tuple[OverTime, ...]:
    """Tensors (batch, time, ...) with their strides, from the first step of the run."""
    found = []
    for tensor in tensors:
        row, step, *_ = tensor.stride()
        tensor, step = (tensor[:, -1], -step) if backwards else (tensor, step)
        tensor = tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor
        found.append(OverTime(tensor, row, step))
    return tuple(found)


def _blocks(products: Products, inputs: Sequence[Tensor]) -> Tensor:
    """Copy the blocks of the weights into one tensor (blocks, groups, result, factor), padded."""
    size, padding = products.size, _width(products) - products.size
    found = torch.stack(
        [
            inputs[p.input].as_strided(
                (products.groups, size, size),
                (p.group, p.result, p.channel),
                inputs[p.input].storage_offset() + p.offset,
            )
            for p in products.weights
        ]
    )
    return nn.functional.pad(found, (0, padding, 0, padding)) if padding else found
