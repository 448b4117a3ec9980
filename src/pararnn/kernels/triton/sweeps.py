"""Launches the kernels of cells whose channels mix: `mixing`, `wide` and `spread`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pararnn.kernels.spread import REPEATED, SENT, Spread
from pararnn.kernels.stages import NotFused, Stages
from pararnn.kernels.triton.build import load, text_of
from pararnn.kernels.triton.device import on_device, processors, rounds_products, shared_memory
from pararnn.kernels.triton.expressions import function, spread_source, staged_source
from pararnn.kernels.triton.tuples import OverTime
from pararnn.kernels.turns import turn
from pararnn.planning.kernel_plans import (
    TILE,
    WideLaunch,
    computes_late,
    keeps_weights,
    kept_width,
    most_spread_rows,
    plan_spread,
    plan_wide,
    rows_warps,
    wide_precision,
)
from pararnn.solvers.chunks import Chunks, Sweep
from pararnn.solvers.problem import with_rows
from pararnn.tracing.expressions import Operand, leaf, topological
from pararnn.tracing.products import Place, Products


def in_triton(products: Products, like: Tensor) -> Kept | Streamed:
    """The kernel of a step, for states like a tensor.

    Raises:
        NotLowered: The step has an operation without a rule for kernels.
    """
    sizes = len(products.weights), kept_width(products.size), like.itemsize
    if products.is_plain and keeps_weights(*sizes):
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
        """What all kernels take, but for `constants`."""
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
            _launch(mixing.run, grid, {**arguments, **self.constants, "weights": weights})


@dataclass(frozen=True)
class Streamed(_Kernel):
    """Reads the weights at every step: `wide.run`. For few rows, `spread.run` instead.

    Attributes:
        most: The most products of a level, and blocks of vectors that it loads to multiply.
        spreads: The step for few rows: `spread.run`.
        stages: How many blocks fit on the chip at a time, of launches that asked for too many.
    """

    most: tuple[int, int]
    spreads: Spreads
    stages: dict[WideLaunch, int] = field(default_factory=dict, compare=False)
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
        like = state[0]
        arguments = self.arguments(chunks, state, sweep, states, ends)
        with on_device(like):
            if not self.spreads.run(chunks, like, arguments):
                self._run(chunks, like, arguments)

    def _run(self, chunks: Chunks, like: Tensor, arguments: dict[str, Any]) -> None:
        from pararnn.kernels.triton import wide  # needs Triton, which this module does not

        products = self.products
        sizes = products.size, products.groups, len(like), *self.most, like.itemsize
        plan = plan_wide(*sizes, processors(like.device), shared_memory(like.device))
        shared = -(-len(like) // plan.rows), products.groups
        count, totals = math.prod(shared), sum(map(len, self.constants["TOTALS"]))
        half = self.constants["SLOTS"] * plan.width + totals * plan.parts
        arguments |= {
            **self.constants,
            "weights": _blocks(products, chunks.inputs, plan.width).to(like.dtype),
            "scratch": like.new_empty(2 * half * count * plan.rows),
            "counters": like.new_zeros(count, dtype=torch.int32),
            "total": len(like),
            "WIDTH": plan.width,
            "PARTS": plan.parts,
            "SHARES": 1 << (plan.parts - 1).bit_length(),
            "ROWS": plan.rows,
            "BLOCK": plan.block,
            "INNER": plan.inner,
            "PRECISION": wide_precision(rounds_products(like.dtype), like.itemsize),
            "num_warps": plan.warps,
        }
        with _waiting(arguments, like.device) if plan.parts > 1 else nullcontext():
            self._launch(wide.run, (*shared, plan.parts), arguments, plan)

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], plan: WideLaunch
    ) -> None:
        """Launch a kernel with as many blocks on their way as fit on the chip."""
        while True:
            stages = self.stages.get(plan, plan.stages)
            try:
                return _launch(kernel, grid, {**arguments, "STAGES": stages})
            except NotFused:
                if stages == 1:
                    raise
                self.stages[plan] = stages - 1


class Spreads:
    """A step for few rows, whose programs share channels and keep weights: `spread.run`.

    Args:
        products: The step.
        double: Whether it computes in float64, else in float32.
    """

    def __init__(self, products: Products, double: bool) -> None:
        self.products, self.double = products, double
        self._known: dict[int, Spread] = {}
        self._constants: dict[int, dict[str, Any]] = {}

    def spread(self, block: int) -> Spread:
        """The step where a program has so many channels.

        Raises:
            NotFused: It has sums that such programs cannot compute.
        """
        if block not in self._known:
            p = self.products
            self._known[block] = Spread(p.step, p.weights, p.size, block, computes_late)
        return self._known[block]

    def sizes(self, block: int) -> tuple[int, int] | None:
        """How often such programs wait in a step, and how many numbers of weights each has."""
        try:
            spread = self.spread(block)
        except NotFused:
            return None
        return spread.waits, spread.elements

    def most_rows(self, like: Tensor) -> int:
        """Rows like those of a state up to which `run` runs them."""
        sizes = self.products.size, self.products.groups, like.itemsize
        return most_spread_rows(*sizes, processors(like.device), self.sizes)

    def run(self, chunks: Chunks, like: Tensor, arguments: Mapping[str, Any]) -> bool:
        """Run a sweep, if there are few enough rows; returns whether there were.

        Args:
            chunks: The steps.
            like: The states before them.
            arguments: What all kernels take.
        """
        from pararnn.kernels.triton import spread  # needs Triton, which this module does not

        sizes = self.products.size, self.products.groups, len(like), like.itemsize
        plan = plan_spread(*sizes, processors(like.device), self.sizes)
        if plan is None:
            return False
        width = -(-self.products.size // TILE) * TILE
        constants = self.constants(plan.block)
        grid = -(-len(like) // plan.rows), self.products.groups, plan.parts
        every = {
            **arguments,
            **constants,
            "weights": _blocks(self.products, chunks.inputs, width).to(like.dtype),
            "scratch": like.new_empty(2 * constants["SUMS"] * math.prod(grid) * plan.rows),
            "counters": like.new_zeros(math.prod(grid[:2]), dtype=torch.int32),
            "total": len(like),
            "WIDTH": width,
            "PARTS": plan.parts,
            "SHARES": 1 << (plan.parts - 1).bit_length(),
            "ROWS": plan.rows,
            "num_warps": plan.warps,
            "num_stages": 1,
        }
        with _waiting(every, like.device) if plan.parts > 1 else nullcontext():
            _launch(spread.run, grid, every)
        return True

    def source(self, block: int) -> str:
        """Source text of the step where a program has so many channels."""
        spread = self.spread(block)
        more = {"product": len(spread.products), "reduced": len(spread.totals)}
        return spread_source(spread, _leaves(self.products) | more, self.double)

    def constants(self, block: int) -> dict[str, Any]:
        """Compile-time arguments, see `spread.run`."""
        if block not in self._constants:
            self._constants[block] = self._made(self.spread(block))
        return self._constants[block]

    def _made(self, spread: Spread) -> dict[str, Any]:
        module = load(self.source(spread.block))
        stages = range(len(spread.moments))
        return {
            "VECTORS": tuple(getattr(module, f"vectors{n}") for n in stages),
            "REPEATED_VECTORS": tuple(getattr(module, f"repeated{n}") for n in stages),
            "NEW_STATE": module.new_state,
            **_sums(spread),
            **self._places("drive", self.products.drives, spread),
            **self._places("coefficient", self.products.coefficients, spread),
            "GROUPS": self.products.groups,
            "SIZE": self.products.size,
            "BLOCK": spread.block,
            "REPEATED_BLOCK": spread.repeated_block,
            "TILE": TILE,
        }

    def _places(self, kind: str, places: Sequence[Place], spread: Spread) -> dict[str, Any]:
        """Which inputs of a kind programs read in their own channels, and which as a whole."""
        found: dict[str, Any] = {}
        shown = _used(places, self.products.size)[1]
        for name, repeated in ((kind.upper(), False), (f"REPEATED_{kind.upper()}", True)):
            used = {e.args[0] for e in topological(spread.everything(repeated)) if e.op == kind}
            numbers = [n for n in range(len(places)) if n in used]
            found[f"{name}S"] = tuple(shown[n] for n in numbers)
            found[name] = tuple(numbers.index(n) if n in used else -1 for n in range(len(places)))
        return found


def _sums(spread: Spread) -> dict[str, Any]:
    """Which sums are computed when, and where they are sent, see `spread.run`."""
    place, products, totals = 0, [], []
    for n, p in enumerate(spread.products):
        weight, (results, lanes) = spread.weights[p.number], spread.shape(n)
        widths = weight.width, weight.results * weight.parts
        products.append((p.number, p.way, results, lanes, *widths, place))
        place += results * (p.way == SENT)
    for t in spread.totals:
        totals.append((_KINDS[t.op[:3]], t.way, t.number, place))
        place += t.way == SENT
    names = "WAITS ARRIVES SENT_PRODUCTS RECEIVED MULTIPLIED SENT_TOTALS COLLECTED SUMMED"
    tables: dict[str, list[Any]] = {name: [] for name in names.split()}
    sends = [s.begins for s in spread.all if s.way == SENT]
    for moment in spread.moments:
        vectors = [spread.vectors(moment, repeated) for repeated in (False, True)]
        tables["WAITS"].append(moment[0] > 0 and moment[1] == 0)
        of_round = [m for m in sends if m[0] == moment[0]]
        tables["ARRIVES"].append(bool(of_round) and moment == max(of_round))
        for kinds, sums in (
            (("SENT_PRODUCTS", "MULTIPLIED", "RECEIVED"), spread.products),
            (("SENT_TOTALS", "SUMMED", "COLLECTED"), spread.totals),
        ):
            for sent, name in zip((True, False), kinds, strict=False):
                pairs = [
                    (n, vectors[s.way == REPEATED].index(s.factor))
                    for n, s in enumerate(sums)
                    if s.begins == moment and (s.way == SENT) == sent
                ]
                tables[name].append(tuple(itertools.chain(*pairs)))
            arrived = [n for n, s in enumerate(sums) if s.way == SENT and s.known == moment]
            tables[kinds[2]].append(tuple(arrived))
    found = {name: tuple(t) for name, t in tables.items()}
    return {**found, "PRODUCTS": tuple(products), "TOTALS": tuple(totals), "SUMS": place}


def _waiting(arguments: dict[str, Any], device: torch.device) -> AbstractContextManager[None]:
    """Launch a kernel whose programs wait for each other; takes what the launch needs for it."""
    arguments["launch_cooperative_grid"] = True
    return turn(device)


def _launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> None:
    from triton.runtime.errors import OutOfResources  # only where there is a kernel

    try:
        kernel[grid](**arguments)
    except OutOfResources as error:
        raise NotFused(f"its weights do not fit on the chip: {error}") from error


def _used(
    places: Sequence[Place], size: int
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """The inputs that hold some slots, and where in these each is, as kernels take it."""
    used = tuple(sorted({p.input for p in places}))

    def shown(p: Place) -> tuple[int, ...]:
        plain = used.index(p.input), p.offset, p.group, p.channel
        is_plain = (p.parts, p.lanes) == (1, size)
        return plain if is_plain else (*plain, p.lanes, p.part, p.width)

    return used, tuple(map(shown, places))


def _leaves(products: Products) -> dict[str, int]:
    return {
        "state": len(products.step),
        "drive": len(products.drives),
        "coefficient": len(products.coefficients),
    }


def _common(products: Products) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """The inputs with drives and coefficients, and the constants of both kernels."""
    drives, coefficients = (
        _used(places, products.size) for places in (products.drives, products.coefficients)
    )
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


def _stages(products: Products) -> Stages:
    """The step, taken apart."""
    return Stages(products.step, lambda weight: computes_late(products.weights[weight].lanes))


def streamed_source(products: Products, double: bool) -> str:
    """The module of functions that `wide.run` calls."""
    stages = _stages(products)
    more = {"product": len(stages.products), "reduced": len(stages.totals)}
    return staged_source(stages, _leaves(products) | more, double)


def _streamed(products: Products, like: Tensor) -> Streamed:
    stages = _stages(products)
    module = load(streamed_source(products, like.dtype is torch.float64))
    drives, coefficients, constants = _common(products)
    tables, levels = _tables(stages, products), range(stages.levels)
    constants |= tables | {
        "COMPUTE": tuple(getattr(module, f"factors{n}") for n in levels),
        "LATE": tuple(getattr(module, f"late{n}") for n in levels),
        "NEW_STATE": module.new_state,
    }
    loaded = [len(tables["FACTORS"][n]) + stages.loaded_late(n) for n in levels]
    most = max(1, *map(len, tables["WEIGHTS"])), max(1, *loaded)
    spreads = Spreads(products, like.dtype is torch.float64)
    return Streamed(products, drives, coefficients, constants, most, spreads)


_KINDS = {"sum": 0, "max": 1, "min": 2}  # as in `wide`


def _tables(stages: Stages, products: Products) -> dict[str, Any]:
    """What is stored where, and what is multiplied with what, see `wide.run`."""
    names = "COMPUTED LANES FACTORS MULTIPLIED LATE_LANES WEIGHTS BLOCKED REDUCED RESULTS"
    tables: dict[str, list[Any]] = {name: [] for name in names.split()}
    components, last = len(products.step), stages.levels - 1
    numbers, slots = [0] * len(stages.products), components
    places: dict[Operand, int] = {leaf("state", n): n for n in range(components)}
    for level in range(stages.levels):
        mine = [n for n, p in enumerate(stages.products) if p.level == level]
        dots = [stages.products[n] for n in mine if stages.products[n].op == "dot"]
        reduced = [stages.products[n] for n in mine if stages.products[n].op != "dot"]
        blocks = [products.weights[p.weight] for p in dots]
        widths = [(p.factor, b.width) for p, b in zip(dots, blocks, strict=True)]
        widths += [(p.factor, p.more[0] * p.more[2]) for p in reduced]
        lanes = {f: max(w for g, w in widths if g is f) for f, _ in widths}
        tables["COMPUTED"].append(slots)
        tables["LANES"].append(tuple(lanes[f] for f in stages.computed(level)))
        for factor in stages.computed(level):
            places[factor], slots = slots, slots + 1
        early = list(dict.fromkeys(p.factor for p in dots if not p.late))
        factors = [*early, *stages.at(level, late=True)]
        tables["FACTORS"].append(tuple(places[f] for f in early))
        tables["LATE_LANES"].append(tuple(lanes[f] for f in factors[len(early) :]))
        tables["MULTIPLIED"].append(tuple(factors.index(p.factor) for p in dots))
        tables["WEIGHTS"].append(tuple(p.weight for p in dots))
        full = all(
            (b.parts, b.lanes, b.results) == (1, products.size, products.size) for b in blocks
        )
        sizes = [(b.results, b.lanes, b.parts) for b in blocks if not full]
        tables["BLOCKED"].append(tuple(itertools.chain(*sizes)))
        rows = [
            (places[p.factor], _KINDS[p.op[:3]], *p.more, 1 << (p.more[0] - 1).bit_length())
            for p in reduced
        ]
        tables["REDUCED"].append(tuple(itertools.chain(*rows)))
        tables["RESULTS"].append(slots)
        ordered = sorted(mine, key=lambda n: stages.products[n].op != "dot")
        for number, n in enumerate(ordered):
            numbers[n] = -1 - number if level == last else slots
            slots += level < last
    return {name: tuple(t) for name, t in tables.items()} | {
        "PRODUCTS": tuple(numbers),
        "SLOTS": slots,
        **_totals(stages),
    }


def _totals(stages: Stages) -> dict[str, Any]:
    """Which totals are taken on which level, see `wide.run`."""
    by_level = [[stages.totals[n] for n in stages.totals_at(i)] for i in range(stages.levels)]
    counts = [0, *itertools.accumulate(map(len, by_level))]
    return {
        "TOTALS": tuple(tuple(_KINDS[t.op[:3]] for t in own) for own in by_level),
        "TOTAL_LANES": tuple(tuple(t.more[0] for t in own) for own in by_level),
        "FIRST_TOTAL": tuple(counts[:-1]),
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
    count, size, groups = len(products.weights), products.size, products.groups
    blocks = [p.of(inputs[p.input], groups) for p in products.weights]
    if products.is_plain:
        found, padding = torch.stack(blocks).squeeze(2), width - size
        return nn.functional.pad(found, (0, padding, 0, padding)) if padding else found
    found = inputs[products.drives[0].input].new_zeros(count, groups, width, width)
    for p, block, padded in zip(products.weights, blocks, found, strict=True):
        strides = width * width, p.results * width + p.lanes, width, 1
        padded.as_strided(block.shape, strides).copy_(block)
    return found
