"""Launches the kernels that run many steps of a cell whose channels mix: `mixing` and `wide`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pararnn.kernels.stages import NotFused, Stages
from pararnn.kernels.triton.build import load, text_of
from pararnn.kernels.triton.device import on_device, processors, rounds_products, shared_memory
from pararnn.kernels.triton.expressions import function, staged_source
from pararnn.kernels.triton.tuples import OverTime
from pararnn.planning.kernel_plans import (
    TILE,
    keeps_weights,
    kept_width,
    plan_wide,
    rows_warps,
    wide_precision,
)
from pararnn.solvers.chunks import Chunks, Sweep
from pararnn.solvers.problem import with_rows
from pararnn.tracing.expressions import Operand, leaf
from pararnn.tracing.products import Place, Products


def in_triton(products: Products, like: Tensor) -> Kept | Streamed:
    """The kernel of a step, for states like a tensor.

    Raises:
        NotLowered: The step has an operation without a rule for kernels.
    """
    if keeps_weights(len(products.weights), kept_width(products.size), like.itemsize):
        return _kept(products, like)
    return _streamed(products, like)


@dataclass(frozen=True)
class _Kernel:
    """A kernel that runs sweeps of a step.

    Attributes:
        products: The step, as expressions.
        drives: Indices of the inputs with drives.
        coefficients: Indices of the inputs with coefficients.
        constants: Compile-time arguments.
        calls: The name of one that is a generated function.
    """

    products: Products
    drives: tuple[int, ...]
    coefficients: tuple[int, ...]
    constants: Mapping[str, Any]
    calls: ClassVar[str]

    @property
    def source(self) -> str:
        """The module of the functions that the kernel calls."""
        return text_of(self.constants[self.calls])

    def arguments(
        self,
        chunks: Chunks,
        state: Sequence[Tensor],
        sweep: Sweep,
        states: Sequence[Tensor],
        ends: Sequence[Tensor],
    ) -> dict[str, Any]:
        """What both kernels take."""
        cut, inputs = chunks.cut, chunks.inputs
        resets = [] if chunks.resets is None else [chunks.resets]
        over_time = functools.partial(_over_time, cut.backwards)
        return {
            "drives": over_time([inputs[i] for i in self.drives]),
            "coefficients": tuple(inputs[i] for i in self.coefficients),
            "resets": over_time(resets),
            "reset_states": over_time([with_rows(s) for s in chunks.reset_states]),
            "initial": tuple(s.contiguous() for s in state),
            "states": over_time(states),
            "ends": tuple(ends),
            "settled": None if sweep.redo is None else sweep.redo.settled.view(torch.uint8),
            "rows": len(state[0]) // sweep.copies,
            "batch": cut.batch,
            "time": cut.time,
            "chunk": cut.chunk,
            "first": sweep.first,
            "reverse": int(chunks.reverse),
            **self.constants,
        }


@dataclass(frozen=True)
class Kept(_Kernel):
    """Keeps the weights in registers: `mixing.run`."""

    calls = "STEP"

    def __call__(
        self,
        chunks: Chunks,
        state: Sequence[Tensor],
        sweep: Sweep,
        states: Sequence[Tensor],
        ends: Sequence[Tensor],
    ) -> None:
        """Run a sweep; see `fused._Sweeps`."""
        from pararnn.kernels.triton import mixing  # needs Triton, which this module does not

        with on_device(state[0]):
            arguments = self.arguments(chunks, state, sweep, states, ends)
            grid = len(state[0]), self.products.groups
            weights = _blocks(self.products, chunks.inputs, kept_width(self.products.size))
            _launch(mixing.run, grid, arguments | {"weights": weights})


@dataclass(frozen=True)
class Streamed(_Kernel):
    """Reads the weights at every step: `wide.run`.

    Attributes:
        most: The most products of a level, and vectors that it multiplies.
    """

    most: tuple[int, int]
    calls = "NEW_STATE"

    def __call__(
        self,
        chunks: Chunks,
        state: Sequence[Tensor],
        sweep: Sweep,
        states: Sequence[Tensor],
        ends: Sequence[Tensor],
    ) -> None:
        """Run a sweep; see `fused._Sweeps`."""
        from pararnn.kernels.triton import wide  # needs Triton, which this module does not

        products, like = self.products, state[0]
        sizes = products.size, products.groups, len(like), *self.most, like.itemsize
        plan = plan_wide(*sizes, processors(like.device), shared_memory(like.device))
        with on_device(like):
            arguments = self.arguments(chunks, state, sweep, states, ends)
            shared = -(-len(like) // plan.rows), products.groups
            count, slots = math.prod(shared), self.constants["SLOTS"]
            arguments |= {
                "weights": _blocks(products, chunks.inputs, plan.width).to(like.dtype),
                "scratch": like.new_empty(2 * slots * count * plan.rows * plan.width),
                "counters": like.new_zeros(count, dtype=torch.int32),
                "total": len(like),
                "WIDTH": plan.width,
                "PARTS": plan.parts,
                "ROWS": plan.rows,
                "BLOCK": plan.block,
                "INNER": plan.inner,
                "STAGES": plan.stages,
                "PRECISION": wide_precision(rounds_products(like.dtype), like.itemsize),
                "num_warps": plan.warps,
            }
            if plan.parts > 1:  # which wait for each other
                arguments["launch_cooperative_grid"] = True
            _launch(wide.run, (*shared, plan.parts), arguments)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    from triton.runtime.errors import OutOfResources  # only where there is a kernel

    try:
        kernel[grid](**arguments)
    except OutOfResources as error:
        raise NotFused(f"its weights do not fit on the chip: {error}") from error


def _used(places: Sequence[Place]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The inputs that hold some slots, and where in these each is, as kernels take it."""
    used = tuple(sorted({p.input for p in places}))
    return used, tuple((used.index(p.input), p.offset, p.group, p.channel) for p in places)


def _leaves(products: Products) -> dict[str, int]:
    return {
        "state": len(products.step),
        "drive": len(products.drives),
        "coefficient": len(products.coefficients),
    }


def _common(products: Products) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """The inputs with drives and coefficients, and the constants of both kernels."""
    drives, coefficients = _used(products.drives), _used(products.coefficients)
    constants = {
        "DRIVES": drives[1],
        "COEFFICIENTS": coefficients[1],
        "GROUPS": products.groups,
        "SIZE": products.size,
    }
    return drives[0], coefficients[0], constants


def _kept(products: Products, like: Tensor) -> Kept:
    count, width = len(products.weights), kept_width(products.size)
    drives, coefficients, constants = _common(products)
    leaves = _leaves(products) | {"weight": count}
    constants |= {
        "STEP": function("step", leaves, products.step, like.dtype is torch.float64),
        "WEIGHTS": count,
        "WIDTH": width,
        "TILE": TILE,
        "num_warps": rows_warps(count, width, like.itemsize),
        "num_stages": 1,
    }
    return Kept(products, drives, coefficients, constants)


def streamed_source(products: Products, double: bool) -> str:
    """The module of functions that `wide.run` calls."""
    stages = Stages(products.step)
    return staged_source(stages, _leaves(products) | {"product": len(stages.products)}, double)


def _streamed(products: Products, like: Tensor) -> Streamed:
    stages = Stages(products.step)
    module = load(streamed_source(products, like.dtype is torch.float64))
    drives, coefficients, constants = _common(products)
    tables = _tables(stages, len(products.step))
    constants |= tables | {
        "COMPUTE": tuple(getattr(module, f"factors{n}") for n in range(stages.levels)),
        "NEW_STATE": module.new_state,
    }
    most = max(map(len, tables["WEIGHTS"])), max(map(len, tables["FACTORS"]))
    return Streamed(products, drives, coefficients, constants, most)


def _tables(stages: Stages, components: int) -> dict[str, Any]:
    """What is stored where, and what is multiplied with what, see `wide.run`."""
    names = "COMPUTED", "FACTORS", "MULTIPLIED", "WEIGHTS", "RESULTS"
    tables: dict[str, list[Any]] = {name: [] for name in names}
    numbers, slots, last = [0] * len(stages.products), components, stages.levels - 1
    places: dict[Operand, int] = {leaf("state", n): n for n in range(components)}
    for level in range(stages.levels):
        mine = [n for n, p in enumerate(stages.products) if p.level == level]
        factors = list(dict.fromkeys(stages.products[n].factor for n in mine))
        tables["COMPUTED"].append(slots)
        for factor in stages.computed(level):
            places[factor], slots = slots, slots + 1
        tables["FACTORS"].append(tuple(places[f] for f in factors))
        tables["MULTIPLIED"].append(tuple(factors.index(stages.products[n].factor) for n in mine))
        tables["WEIGHTS"].append(tuple(stages.products[n].weight for n in mine))
        tables["RESULTS"].append(slots)
        for number, n in enumerate(mine):
            numbers[n] = -1 - number if level == last else slots
            slots += level < last
    return {name: tuple(t) for name, t in tables.items()} | {
        "PRODUCTS": tuple(numbers),
        "SLOTS": slots,
    }


def _over_time(backwards: bool, tensors: Sequence[Tensor]) -> tuple[OverTime, ...]:
    """Tensors (batch, time, ...) with their strides, from the first step of the run."""
    found = []
    for tensor in tensors:
        row, step, *_ = tensor.stride()
        tensor, step = (tensor[:, -1], -step) if backwards else (tensor, step)
        tensor = tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor
        found.append(OverTime(tensor, row, step))
    return tuple(found)


def _blocks(products: Products, inputs: Sequence[Tensor], width: int) -> Tensor:
    """Copy the blocks of the weights into one tensor (blocks, groups, result, factor), padded."""
    size, padding = products.size, width - products.size
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
