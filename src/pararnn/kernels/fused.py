"""Steps of recurrences whose channels mix in one generated kernel, the weights kept on the chip."""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

from pararnn.kernels.lowering import NotLowered
from pararnn.kernels.triton_backend import on_device
from pararnn.kernels.triton_build import load
from pararnn.kernels.triton_steps import ROWS, Form, source, width
from pararnn.solvers.chunks import Chunks
from pararnn.tracing.mixing import Edge
from pararnn.tracing.products import NotExpressed, Products, products

_ON_CHIP = 200 * 2**10  # bytes for weights: nearly all that a multiprocessor of an H100 has
_FACTORS = 96  # 32-bit registers of a thread for weights, beyond which it has to put some away
_WARPS = (4, 8)  # of a program, least and most


class NotFused(Exception):
    """The steps cannot run in one kernel; the message says why."""


@dataclass(frozen=True)
class _Kernel:
    products: Products
    module: ModuleType
    warps: int


_known: weakref.WeakKeyDictionary[fx.GraphModule, dict[Hashable, _Kernel | str]] = (
    weakref.WeakKeyDictionary()
)


def reasons(module: fx.GraphModule) -> list[str]:
    """Why a step was not fused, once for every form in which it was tried in vain."""
    return [k for k in _known.get(module, {}).values() if isinstance(k, str)]


def run_steps(
    chunks: Chunks, state: Sequence[Tensor], first: int = 0, copies: int = 1
) -> list[Tensor]:
    """See `pararnn.solvers.chunks.Run`: in one kernel, on a GPU or in Triton's interpreter.

    Raises:
        NotFused: The step does something that the kernel has no means for, or its weights are too
            large; the message says what.
    """
    known = _known.setdefault(chunks.step.module, {})
    key = _key(chunks, state)
    if key not in known:
        known[key] = _kernel(chunks, state)
    kernel = known[key]
    if isinstance(kernel, str):
        raise NotFused(kernel)
    piece = chunks.piece(first, chunks.steps) if first else chunks
    rows, hidden = state[0].shape
    # Row by row, as `Cut.join` wants it.
    states = [s.new_empty(rows, piece.steps, hidden).transpose(0, 1) for s in state]
    arguments = _arguments(kernel.products, piece, state, states)
    arguments |= {"rows": rows, "given": rows // copies, "steps": piece.steps}
    grid = (-(-rows // ROWS), kernel.products.groups)
    with on_device(state[0]):
        try:
            kernel.module.run[grid](**arguments, num_warps=kernel.warps, num_stages=1)
        except _out_of_resources() as error:
            known[key] = f"its weights do not fit on the chip: {error}"
            raise NotFused(known[key]) from error
    return states


def _out_of_resources() -> type[Exception]:
    from triton.runtime.errors import OutOfResources  # only where there is a kernel

    return OutOfResources


def _key(chunks: Chunks, state: Sequence[Tensor]) -> Hashable:
    """What a kernel is generated for."""
    edges = [
        (e.shape[2:], e.stride()[2:], e.dtype) if by_rows else (e.shape, e.stride(), e.dtype)
        for e, by_rows in zip(chunks.edges, chunks.step.by_rows, strict=True)
    ]
    like = state[0]
    return len(state), like.shape[1], like.dtype, like.device, chunks.begins is None, *edges


def _kernel(chunks: Chunks, state: Sequence[Tensor]) -> _Kernel | str:
    """The kernel, or why there is none."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton was not found (it comes with PyTorch for GPUs)"
    like, kinds, strides = state[0], [], []
    if like.dtype not in (torch.float32, torch.float64):
        return f"the state is of type {like.dtype}"
    for edge, by_rows in zip(chunks.edges, chunks.step.by_rows, strict=True):
        skipped = 2 if by_rows else 0
        kinds.append(Edge(tuple(edge.shape[skipped:]), edge.dtype, by_rows))
        strides.append(edge.stride()[skipped:])
    try:
        found = products(
            chunks.step.module, kinds, strides, len(state), like.shape[1], like.dtype, like.device
        )
        size = len(found.weights) * width(found) ** 2 * like.itemsize
        if size > _ON_CHIP:
            return f"its weights take {size >> 10} KB on the chip, which has {_ON_CHIP >> 10} KB"
        # Tensor cores want float32 weights in two parts.
        double = like.dtype is torch.float64
        in_parts = not double and 2 * size <= _ON_CHIP
        form = Form(double, "tf32x3" if in_parts else "ieee", chunks.begins is not None)
        wanted = size * (2 if in_parts else 1) // (4 * 32 * _FACTORS)
        warps = _WARPS[0] if wanted <= _WARPS[0] else _WARPS[1]
        return _Kernel(found, load(source(found, form)), warps)
    except (NotExpressed, NotLowered) as error:
        return str(error)


def _arguments(
    products: Products, chunks: Chunks, state: Sequence[Tensor], states: Sequence[Tensor]
) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for i in {p.edge for p in products.drives}:
        arguments |= _over_time(f"edge{i}", chunks.edges[i], chunks.reverse)
    for i in {p.edge for p in (*products.coefficients, *products.weights)}:
        arguments[f"edge{i}"] = chunks.edges[i]
    if chunks.begins is not None:
        arguments |= _over_time("begins", chunks.begins, chunks.reverse)
        for i, fresh in enumerate(chunks.fresh):
            arguments |= _over_time(f"fresh{i}", fresh, chunks.reverse)
            arguments[f"fresh{i}_channel"] = fresh.stride(2)
    arguments |= {f"initial{i}": s.contiguous() for i, s in enumerate(state)}
    return arguments | {f"states{i}": s for i, s in enumerate(states)}


def _over_time(name: str, tensor: Tensor, reverse: bool) -> dict[str, Any]:
    """A tensor (steps, rows, ...) from the step that comes first, with its strides."""
    step = tensor.stride(0)
    first = tensor[-1] if reverse else tensor
    if first.dtype is torch.bool:
        first = first.view(torch.uint8)
    return {
        name: first,
        f"{name}_step": -step if reverse else step,
        f"{name}_row": tensor.stride(1),
    }
