"""Scalar functions that generated Triton calls, on a GPU and in Triton's interpreter.

On a GPU they are libdevice's, which are accurate to a few units in the last place; the interpreter
has no libdevice and takes PyTorch's. The `fast_` ones use the hardware's tanh, with errors of about
5e-4: for results in half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from pararnn.kernels.primitives import PRIMITIVES, called
from pararnn.kernels.triton.build import interpreted
from pararnn.tracing.derivatives import torch_callable


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def maximum(a, b):  # type: ignore[no-untyped-def]
    """The larger; NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):  # type: ignore[no-untyped-def]
    """The smaller; NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bounded(x):  # type: ignore[no-untyped-def]
    """The number, or 0 where a product with it might not be finite."""
    return tl.where(tl.abs(x) < 1e18, x, 0.0)


@triton.jit
def magnitude(x):  # type: ignore[no-untyped-def]
    """The absolute value, infinite for NaN, so that a maximum sees it."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def only(mask, flag):  # type: ignore[no-untyped-def]
    """The mask where a flag, a scalar or one with fewer axes, holds; nothing where not.

    As numbers, since the interpreter makes other types of scalar truth values in a mask.
    """
    return mask & (tl.zeros_like(mask.to(tl.int32)) + tl.cast(flag, tl.int32) > 0)


@triton.jit
def dot(x, weight, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The product of a vector, whose entries beyond `SIZE` may be anything, with a weight.

    The weight has the shape (result, factor // TILE, factor % TILE), with neighbours in memory
    along the last axis: with a TILE of 16 a thread has 4 of them in every tile, and all sums but
    the last, over 4 threads, stay within a thread.
    """
    if x.shape[0] > SIZE:
        x = tl.where(tl.arange(0, x.shape[0]) < SIZE, x, 0.0)
    # Reshaped to three axes at once, Triton would lay products out like the state.
    terms = tl.reshape(x, (weight.shape[1], weight.shape[2]))[None, :, :] * weight
    return tl.sum(tl.sum(terms, axis=1), axis=1)


@triton.jit
def mean(x, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The mean of a vector (1, entries), whose entries beyond `SIZE` may be anything."""
    inside = tl.arange(0, x.shape[1])[None, :] < SIZE
    return tl.sum(tl.where(inside, x, 0.0), 1)[:, None] / SIZE


@triton.jit
def matmul(  # type: ignore[no-untyped-def]
    x,
    y,
    SIZE: tl.constexpr,
    FACTORS: tl.constexpr,
    X_TURNED: tl.constexpr,
    Y_TURNED: tl.constexpr,
):
    """The product of two matrices, whose entries beyond `SIZE` along the sum may be anything.

    Args:
        x: (m, k).
        y: (k, n).
        SIZE: Entries that the sum goes over.
        FACTORS: The type of the factors.
        X_TURNED: Whether the first is given as (k, m).
        Y_TURNED: Whether the second is given as (n, k).
    """
    x, y = as_factor(x, FACTORS), as_factor(y, FACTORS)
    if X_TURNED:
        x = tl.trans(x)
    if Y_TURNED:
        y = tl.trans(y)
    if x.shape[1] > SIZE:
        k = tl.arange(0, x.shape[1])
        x = tl.where(k[None, :] < SIZE, x, 0.0)
        y = tl.where(k[:, None] < SIZE, y, 0.0)
    return tl.dot(x, through_memory(y, FACTORS), input_precision="ieee")


@triton.jit
def filled(x, AXIS: tl.constexpr, SIZE: tl.constexpr, NUMBER: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tile with a number in place of what lies beyond `SIZE` along an axis."""
    if x.shape[AXIS] > SIZE:
        i = tl.arange(0, x.shape[AXIS])
        inside = (i[None, :] if AXIS == 1 else i[:, None]) < SIZE
        x = tl.where(inside, x, NUMBER)
    return x


@triton.jit
def total_along(x, AXIS: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum along an axis, which stays."""
    found = tl.sum(filled(x, AXIS, SIZE, 0.0), AXIS)
    return found[None, :] if AXIS == 0 else found[:, None]


@triton.jit
def total_of(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of all entries, as a tile of one."""
    x = filled(filled(x, 0, ROWS, 0.0), 1, COLUMNS, 0.0)
    return tl.full([1, 1], tl.sum(x), x.dtype)


@triton.jit
def largest_along(x, AXIS: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest entry along an axis, which stays; NaN if one is."""
    found = tl.reduce(filled(x, AXIS, SIZE, float("-inf")), AXIS, maximum)
    return found[None, :] if AXIS == 0 else found[:, None]


@triton.jit
def smallest_along(x, AXIS: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The smallest entry along an axis, which stays; NaN if one is."""
    found = tl.reduce(filled(x, AXIS, SIZE, float("inf")), AXIS, minimum)
    return found[None, :] if AXIS == 0 else found[:, None]


@triton.jit
def total(  # type: ignore[no-untyped-def]
    sums,
    result,
    rows,
    width,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The sum over the rows of a matrix, in order: a kernel, one program for some columns."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    if PDL:
        tl.extra.cuda.gdc_wait()
    found = tl.zeros([ROWS, BLOCK], tl.float64)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        at = sums + tl.cast(row, tl.int64) * width + columns
        found += tl.load(at, mask=(row < rows) & (columns < width), other=0.0)
    inside = columns < width
    tl.store(result + columns, tl.sum(found, 0)[None, :].to(result.dtype.element_ty), mask=inside)


if interpreted():
    from triton.runtime.interpreter import TensorHandle

    def _of_library(operation: str, name: str) -> Callable[..., Any]:
        reference = torch_callable(operation)

        def call(*args: Any) -> Any:
            like = next(a for a in args if isinstance(a, tl.tensor))
            values = [
                torch.tensor(a.handle.data, device="cpu") if isinstance(a, tl.tensor) else a
                for a in args
            ]
            result = reference(*values).numpy().astype(like.handle.data.dtype)
            shape = list(result.shape)
            kind = tl.block_type(like.dtype, shape) if shape else like.dtype
            return tl.tensor(TensorHandle(result, like.dtype), kind)

        return call

    @triton.jit
    def prefetch(base, stride, step, low, high, channels, STEPS, BLOCK):  # type: ignore[no-untyped-def]
        """Nothing: there is no cache."""

    @triton.jit
    def anew(number):  # type: ignore[no-untyped-def]
        """The number."""
        return number

    @triton.jit
    def uniform(number):  # type: ignore[no-untyped-def]
        """The number."""
        return number

    @triton.jit
    def through_memory(y, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
        """The tile."""
        return y

    @triton.jit
    def times(number, stride):  # type: ignore[no-untyped-def]
        """The product in 64 bits."""
        return tl.cast(number, tl.int64) * stride

    @triton.jit
    def read(at, inside, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
        """The entries at addresses, 0 where there is none."""
        return tl.load(at, mask=inside, other=0)

    @triton.jit
    def write(at, values, inside, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
        """Write entries."""
        tl.store(at, values, mask=inside)

    @triton.jit
    def as_factor(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
        """The tile, rounded to a type; the interpreter cannot multiply in half precision."""
        return x.to(KIND).to(x.dtype)
else:
    from triton.language.extra import libdevice

    def _of_library(operation: str, name: str) -> Callable[..., Any]:
        return getattr(libdevice, name)

    @triton.jit
    def through_memory(y, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
        """The second factor of a product: where it is computed, it goes through shared memory.

        Tensor cores take it turned. Turned twice, with something between that the compiler does not
        look into, it is written and read in 8 instructions; else Triton shuffles it in 56.
        """
        if KIND.primitive_bitwidth == 16:
            turned = tl.inline_asm_elementwise(
                "mov.b32 $0, $1;",
                "=r,r",
                [tl.trans(y)],
                dtype=y.dtype,
                is_pure=True,
                pack=2,
            )
            return tl.trans(turned)
        else:
            return y

    @triton.jit
    def times(number, stride):  # type: ignore[no-untyped-def]
        """The product in 64 bits, of numbers of 32 bits in one instruction.

        In a loop the compiler does not see that a stride has 32 bits, and takes three or four.
        """
        stride += number * 0  # one that is 1 is compiled in
        if stride.dtype == tl.int32:
            return tl.inline_asm_elementwise(
                "mul.wide.s32 $0, $1, $2;",
                "=l,r,r",
                [number, stride],
                dtype=tl.int64,
                is_pure=True,
                pack=1,
            )
        else:
            return tl.cast(number, tl.int64) * stride

    @triton.jit
    def read(at, inside, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
        """The entries at addresses, 0 where there is none.

        In half precision, where all are there, every thread reads those that it needs. Nobody may
        write them. `tl.load` would have each read by one thread, in the order of memory, and hand
        it to the others through shared memory, with barriers.
        """
        if WHOLE and at.dtype.element_ty.primitive_bitwidth == 16:
            return tl.inline_asm_elementwise(
                "ld.global.nc.b16 $0, [$1];",
                "=h,l",
                [at.to(tl.int64)],
                dtype=at.dtype.element_ty,
                is_pure=True,
                pack=1,
            )
        else:
            return tl.load(at, mask=inside, other=0)

    @triton.jit
    def write(at, values, inside, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
        """Write entries; in half precision by all threads that have them, see `read`."""
        if WHOLE and at.dtype.element_ty.primitive_bitwidth == 16:
            tl.inline_asm_elementwise(
                "st.global.b16 [$1], $2; mov.b32 $0, 0;",
                "=r,l,h",
                [at.to(tl.int64), values.to(at.dtype.element_ty)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        else:
            tl.store(at, values, mask=inside)

    @triton.jit
    def as_factor(x, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
        """The tile in a type."""
        return x.to(KIND)

    @triton.jit
    def fmax(a, b):  # type: ignore[no-untyped-def]
        """The larger, or the one that is a number."""
        return tl.maximum(a, b)

    @triton.jit
    def fmin(a, b):  # type: ignore[no-untyped-def]
        """The smaller, or the one that is a number."""
        return tl.minimum(a, b)

    @triton.jit
    def fast_tanh(x):  # type: ignore[no-untyped-def]
        """The hardware's."""
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )

    @triton.jit
    def fast_sigmoid(x):  # type: ignore[no-untyped-def]
        """By the hardware's tanh."""
        return 0.5 * fast_tanh(0.5 * x) + 0.5

    @triton.jit
    def fast_exp(x):  # type: ignore[no-untyped-def]
        """By the hardware's power of two."""
        return tl.exp(x)

    @triton.jit
    def anew(number):  # type: ignore[no-untyped-def]
        """The number, as if it were another every time: nothing is computed from it ahead."""
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [number], dtype=tl.int32, is_pure=False, pack=1
        )

    @triton.jit
    def uniform(number):  # type: ignore[no-untyped-def]
        """The number, known to be the same in all threads of a warp.

        So branches and loops that depend on it leave addresses in the registers that threads share.
        """
        return tl.inline_asm_elementwise(
            "redux.sync.max.s32 $0, $1, 0xffffffff;",
            "=r,r",
            [number],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def prefetch(  # type: ignore[no-untyped-def]
        base,
        stride,
        step,
        low,
        high,
        channels,
        STEPS: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """Bring some steps of a block of channels into the L2 cache, lines of 128 bytes."""
        line: tl.constexpr = min(BLOCK, 1024 // base.dtype.element_ty.primitive_bitwidth)
        rows = step + tl.arange(0, STEPS)
        rows = tl.cast(tl.minimum(tl.maximum(rows, low), high), tl.int64)
        columns = tl.minimum(tl.arange(0, BLOCK // line) * line, channels - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [(base + rows[:, None] * stride + columns[None, :]).to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


for _operation, _row in PRIMITIVES.items():
    for _name in map(called, (_row.triton, _row.half)):
        if _name and _name not in globals():
            globals()[_name] = _of_library(_operation, _name)
