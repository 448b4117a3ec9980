"""Steps of recurrences whose channels mix in one generated kernel, the weights in registers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from pararnn.kernels.lowering import NotLowered
from pararnn.kernels.triton.backend import on_device
from pararnn.kernels.triton.build import load, missing
from pararnn.kernels.triton_steps import Form, source, width
from pararnn.solvers.chunks import WHOLE, Chunks, Sweep, Swept
from pararnn.tracing.mixing import Edge
from pararnn.tracing.products import NotExpressed, Products, products

_ON_CHIP = 200 * 2**10  # bytes for weights: most of the registers of a multiprocessor of an H100
_FACTORS = 48  # 32-bit registers of a thread for weights, beyond which a program gets more threads
_WARPS = 16  # of a program at most


class NotFused(Exception):
    """The steps cannot run in one kernel; the message says why."""


@dataclass(frozen=True)
class _Kernel:
    products: Products
    module: ModuleType
    warps: int


_known: weakref.WeakKeyDictionary[fx.GraphModule, dict[tuple[Any, ...], _Kernel | str]] = (
    weakref.WeakKeyDictionary()
)


def reasons(module: fx.GraphModule) -> list[str]:
    """Why a step was not fused, once for every form in which it was tried in vain."""
    return [k for k in _known.get(module, {}).values() if isinstance(k, str)]


def runs(module: fx.GraphModule, hidden: int, dtype: torch.dtype) -> bool:
    """Whether a step of so many channels is known to run in one kernel, whatever was tried."""
    kernels = [
        k for (_, h, t, *_), k in _known.get(module, {}).items() if (h, t) == (hidden, dtype)
    ]
    return bool(kernels) and not any(isinstance(k, str) for k in kernels)


def run_steps(chunks: Chunks, state: Sequence[Tensor], sweep: Sweep = WHOLE) -> Swept:
    """See `pararnn.solvers.chunks.Run`: in one kernel, on a GPU or in Triton's interpreter.

    Raises:
        NotFused: The step does something that the kernel has no means for, or its weights are too
            large; the message says what.
    """
    known = _known.setdefault(chunks.step.module, {})
    redo, begins = sweep.redo, chunks.begins is not None
    form = Form(state[0].dtype is torch.float64, begins, sweep.keep, redo is not None)
    key = _key(chunks, state, form)
    if key not in known:
        known[key] = _kernel(chunks, state, form)
    kernel = known[key]
    if isinstance(kernel, str):
        raise NotFused(kernel)
    cut, (rows, hidden) = chunks.cut, state[0].shape
    states: Sequence[Tensor] = []
    if sweep.keep:
        states = [s.new_empty(cut.batch, cut.time, hidden) for s in state]
    if redo is not None:
        states = redo.states
    ends = [s.new_empty(rows, hidden) for s in state]
    arguments = _arguments(kernel.products, chunks, state, states)
    arguments |= {f"ends{i}": e for i, e in enumerate(ends)}
    if redo is not None:
        arguments["settled"] = redo.settled.view(torch.uint8)
    arguments |= {"given": rows // sweep.copies, "batch": cut.batch, "time": cut.time}
    arguments |= {"chunk": cut.chunk, "first": sweep.first, "reverse": int(chunks.reverse)}
    grid = (rows, kernel.products.groups)
    with on_device(state[0]):
        try:
            kernel.module.run[grid](**arguments, num_warps=kernel.warps, num_stages=1)
        except _out_of_resources() as error:
            known[key] = f"its weights do not fit on the chip: {error}"
            raise NotFused(known[key]) from error
    return list(states), ends


def _out_of_resources() -> type[Exception]:
    from triton.runtime.errors import OutOfResources  # only where there is a kernel

    return OutOfResources


def _key(chunks: Chunks, state: Sequence[Tensor], form: Form) -> tuple[Any, ...]:
    """What a kernel is generated for."""
    edges = [
        (e.shape[2:], e.stride()[2:], e.dtype) if by_rows else (e.shape, e.stride(), e.dtype)
        for e, by_rows in zip(chunks.edges, chunks.step.by_rows, strict=True)
    ]
    like = state[0]
    return len(state), like.shape[1], like.dtype, like.device, form, *edges


def _kernel(chunks: Chunks, state: Sequence[Tensor], form: Form) -> _Kernel | str:
    """The kernel, or why there is none."""
    like, kinds, strides = state[0], [], []
    obstacle = missing(like.device.type)
    if obstacle is not None:
        return obstacle
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
        wanted = max(1, -(-size // (4 * 32 * _FACTORS)))
        most = min(_WARPS, width(found) * 4 // 32)  # four threads a sum, see `TILE`
        warps = min(most, 1 << (wanted - 1).bit_length())
        return _Kernel(found, load(source(found, form)), warps)
    except (NotExpressed, NotLowered) as error:
        return str(error)


def _arguments(
    products: Products, chunks: Chunks, state: Sequence[Tensor], states: Sequence[Tensor]
) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    moving = {f"edge{i}": chunks.edges[i] for i in {p.edge for p in products.drives}}
    if chunks.begins is not None:
        moving["begins"] = chunks.begins
        moving |= {f"fresh{i}": fresh for i, fresh in enumerate(chunks.fresh)}
        arguments |= {f"fresh{i}_channel": f.stride(2) for i, f in enumerate(chunks.fresh)}
    moving |= {f"states{i}": s for i, s in enumerate(states)}
    for name, tensor in moving.items():
        arguments |= _over_time(name, tensor, chunks.cut.backwards)
    arguments |= {f"edge{p.edge}": chunks.edges[p.edge] for p in products.coefficients}
    if products.weights:
        arguments["weights"] = _blocks(products, chunks.edges)
    return arguments | {f"initial{i}": s.contiguous() for i, s in enumerate(state)}


def _over_time(name: str, tensor: Tensor, backwards: bool) -> dict[str, Any]:
    """A tensor (batch, time, ...) from the time that comes first, with its strides."""
    step = tensor.stride(1)
    first = tensor[:, -1] if backwards else tensor
    if first.dtype is torch.bool:
        first = first.view(torch.uint8)
    return {
        name: first,
        f"{name}_step": -step if backwards else step,
        f"{name}_row": tensor.stride(0),
    }


def _blocks(products: Products, edges: Sequence[Tensor]) -> Tensor:
    """The blocks of the weights (blocks, groups, result, factor) in memory as `TILE` wants them."""
    size, padding = products.size, width(products) - products.size
    found = torch.stack(
        [
            edges[p.edge].as_strided(
                (products.groups, size, size),
                (p.group, p.result, p.channel),
                edges[p.edge].storage_offset() + p.offset,
            )
            for p in products.weights
        ]
    )
    return nn.functional.pad(found, (0, padding, 0, padding)) if padding else found
