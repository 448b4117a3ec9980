"""Read a step whose channels mix only by products with weights, as expressions of slots.

Slots are those of `elementwise`. One operation is added to the pointwise ones: `dot(slot, weight)`
multiplies the channels of a group, in one slot, with a block of a weight. A product of values
(N, a * H) with a weight (a * H, b * H) gives b slots, each a sum of a dots. With one weight per
head, each head is a group. Offsets and strides of drives and blocks are read as well, so a
transposed weight only has other strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from pararnn.tracing.capture import Capture, record_rows
from pararnn.tracing.elementwise import (
    NotElementwise,
    Reader,
    Slot,
    Value,
    is_value,
    run_on,
)
from pararnn.tracing.expressions import Operand, is_boolean, leaf, make, topological
from pararnn.tracing.operations import MOVES, is_pointwise, named_arguments, operation_name
from pararnn.tracing.partition import Partition
from pararnn.tracing.recorder import TraceError, record
from pararnn.tracing.step import Input, recording

_SUBJECT = "the step"
_PRODUCTS = frozenset("mm bmm addmm".split())


class NotExpressed(Exception):
    """The step has an operation other than products with weights, pointwise ones and moves."""


@dataclass(frozen=True)
class Place:
    """The place of a slot in an input's memory, or of a block in a weight's. Units: elements.

    Attributes:
        input: Index of the input of the step.
        offset: From the start of the input, or of its row, to the first channel of the first group.
        group: Stride from group to group.
        channel: Stride from channel to channel; of a block, along the multiplied channels.
        result: Of a block, stride along the channels of the product.
    """

    input: int
    offset: int
    group: int
    channel: int
    result: int = 0


@dataclass(frozen=True)
class Products:
    """The step of one group of channels.

    Attributes:
        step: Expressions of the new components; the leaves are `state`, `drive`, `coefficient` and
            `weight`.
        drives: Place of each drive in a row.
        coefficients: Place of each coefficient.
        weights: Place of each block.
        size: Channels of a group.
        groups: Number of groups.
    """

    step: tuple[Operand, ...]
    drives: tuple[Place, ...]
    coefficients: tuple[Place, ...]
    weights: tuple[Place, ...]
    size: int
    groups: int


def products(
    module: fx.GraphModule,
    inputs: Sequence[Input],
    strides: Sequence[Sequence[int]],
    components: int,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Products:
    """Read a step.

    Args:
        module: The step, see `Step.module`.
        inputs: Its inputs besides the state.
        strides: Strides of each input, in elements, without that of the rows.
        components: Tensors in the state.
        hidden: Channels of each component.
        dtype: Type of the state.
        device: Device that the module runs on.

    Raises:
        NotExpressed: The step has another operation; the message names it.
    """
    kinds = {f"attribute_{i}": kind for i, kind in enumerate(inputs) if not kind.by_rows}
    moving = [i for i, kind in enumerate(inputs) if kind.by_rows]
    kinds |= {f"x_{n}": inputs[i] for n, i in enumerate(moving)}
    kinds |= {f"state_{n}": Input((hidden,), dtype, True) for n in range(components)}
    names = [
        f"x_{moving.index(i)}" if kind.by_rows else f"attribute_{i}"
        for i, kind in enumerate(inputs)
    ]
    if not moving:
        raise NotExpressed("no input besides the state has rows")

    plain = unfused(module)

    def run(*flat: Tensor) -> Sequence[Tensor]:
        given = dict(zip(kinds, flat, strict=True))
        return plain(*flat[len(inputs) :], *(given[name] for name in names))

    def at(rows: int) -> tuple[fx.Graph, list[Tensor]]:
        examples = {name: kind.example(rows, device) for name, kind in kinds.items()}
        return record(run, examples, _SUBJECT)

    try:
        with recording(device):
            graph, constants = record_rows(at, _SUBJECT)
        if constants:
            raise NotExpressed("it uses tensors that are not its inputs")
        placeholders = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
        calls = [n for n in graph.nodes if n.op == "call_function" and not n.meta.get("is_count")]
        (results,) = next(n for n in graph.nodes if n.op == "output").args
        parts = Partition(
            Capture(graph, [], {}, components, True, hidden, dtype, _SUBJECT),
            [placeholders[f"state_{n}"] for n in range(components)],
            calls,
            [placeholders[name] for name in names],
            list(results),
        )
        with torch.device("cpu"):  # where positions in memory are counted
            return _Reader(parts, strides).products()
    except (NotElementwise, TraceError) as error:
        raise NotExpressed(str(error)) from error


def _gates(
    count: int, x: Tensor, h: Tensor, x_bias: Tensor | None, h_bias: Tensor | None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    x = x if x_bias is None else x + x_bias
    return x.chunk(count, 1), (h if h_bias is None else h + h_bias).chunk(count, 1)


def _gru_cell(
    x: Tensor,
    h: Tensor,
    state: Tensor,
    x_bias: Tensor | None = None,
    h_bias: Tensor | None = None,
) -> tuple[Tensor, None]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = _gates(3, x, h, x_bias, h_bias)
    new = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return new + torch.sigmoid(x_z + h_z) * (state - new), None


def _lstm_cell(
    x: Tensor,
    h: Tensor,
    cell: Tensor,
    x_bias: Tensor | None = None,
    h_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    pairs = zip(*_gates(4, x, h, x_bias, h_bias), strict=True)
    i, f, g, o = (a + b for a, b in pairs)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell, None


_CELLS = {"_thnn_fused_gru_cell": _gru_cell, "_thnn_fused_lstm_cell": _lstm_cell}


def unfused(module: fx.GraphModule) -> fx.GraphModule:
    """Replace PyTorch's fused GRU and LSTM cells, which only GPUs have, by pointwise operations."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function":
            target: Any = node.target
            name = operation_name(target) if hasattr(target, "_schema") else target.__name__
            node.target = _CELLS.get(name, target)
    return fx.GraphModule(torch.nn.Module(), graph)


@dataclass
class _Weight:
    """Entries of an input without rows, by their positions in its memory (in elements)."""

    input: int
    positions: Tensor


class _Reader(Reader):
    def __init__(self, parts: Partition, strides: Sequence[Sequence[int]]) -> None:
        super().__init__(parts)
        self.inputs = {node: i for i, node in enumerate(parts.edges)}
        self.strides = strides
        self.weights: dict[Place, int] = {}
        self.sizes: set[int] = set()

    def products(self) -> Products:
        step = self.results()
        if len(self.sizes) != 1:
            raise NotElementwise(
                "its products have groups of different sizes"
                if self.sizes
                else "it has no product with a weight"
            )
        (size,) = self.sizes
        drives, coefficients = (
            tuple(self.place(source, size) for source in found)
            for found in (self.drives, self.coefficients)
        )
        groups = self.hidden_size // size
        return Products(step, drives, coefficients, tuple(self.weights), size, groups)

    def place(self, source: Slot, size: int) -> Place:
        of, slot = source
        positions = self.positions(of.edge)
        own = positions.shape[1:] if len(positions.shape) > len(of.shape) else positions.shape
        channels = positions.reshape(own).expand(of.shape).reshape(-1, self.hidden_size)[slot]
        return _fitted(self.inputs[of.edge], channels.view(-1, size, 1))

    def positions(self, node: fx.Node) -> Tensor:
        """Memory positions of the entries of an input, or of one row of it (in elements)."""
        shape = node.meta["shape"][1:] if node.meta["by_rows"] else node.meta["shape"]
        found = torch.zeros(shape, dtype=torch.int64)
        for axis, stride in enumerate(self.strides[self.inputs[node]]):
            along = [1] * len(shape)
            along[axis] = shape[axis]
            found += (torch.arange(shape[axis]) * stride).view(along)
        return found

    def evaluate(self, node: fx.Node) -> Any:
        if not hasattr(node.target, "_schema"):
            return super().evaluate(node)
        name = operation_name(node.target)
        operands = [a for a in tree_leaves((node.args, node.kwargs)) if is_value(a)]
        if name in _PRODUCTS:
            return self.product(node)
        if name in MOVES and len(operands) == 1 and (weight := self.weight(operands[0])):
            result = run_on(node, {operands[0]: weight.positions})
            if isinstance(result, (tuple, list)):
                return [_Weight(weight.input, r) for r in result]
            return _Weight(weight.input, result)
        if is_pointwise(node.target) and self.any_scattered(operands):
            return self.pointwise_scattered(node, operands)
        return super().evaluate(node)

    def any_scattered(self, operands: Sequence[fx.Node]) -> bool:
        """Whether one of these values is scattered: its entries are not in order (`Value`)."""
        values = [self.values.get(o) for o in operands]
        return any(isinstance(v, Value) and v.numbers is not None for v in values)

    def pointwise_scattered(self, node: fx.Node, operands: Sequence[fx.Node]) -> Value:
        """A pointwise operation on scattered values; the result is scattered alike."""
        distinct = list(dict.fromkeys(operands))
        values = [self.as_value(o) for o in distinct]
        numbers = [self.addresses([v])[0] for v in values]
        rows = [
            n // (len(v.slots) * self.hidden_size) for n, v in zip(numbers, values, strict=True)
        ]
        channels = [n % self.hidden_size for n in numbers]
        if not all(torch.equal(r, rows[0]) for r in rows) or not all(
            torch.equal(c, channels[0]) for c in channels
        ):
            raise NotElementwise("it combines entries of different rows or channels")
        slots = torch.stack(
            [
                (n // self.hidden_size % len(v.slots)).flatten()
                for n, v in zip(numbers, values, strict=True)
            ]
        )
        pairs, which = slots.unique(dim=1, return_inverse=True)
        shape = (pairs.shape[1] * self.hidden_size,)
        kept = dict(self.values)
        for operand, value, picked in zip(distinct, values, pairs, strict=True):
            self.values[operand] = Value(shape, [value.slots[int(i)] for i in picked])
        result = self.pointwise(node, shape)
        self.values = kept
        if not isinstance(result, Value):
            raise NotElementwise("it has several results")
        found = (rows[0] * pairs.shape[1] + which.view(rows[0].shape)) * self.hidden_size
        return Value((), result.slots, found + channels[0])

    def moved(self, addresses: Tensor, slots: list[Operand]) -> Value:
        try:
            return super().moved(addresses, slots)
        except NotElementwise:  # entries may be out of order until a later move
            return Value((), slots, addresses)

    def broadcast(self, node: fx.Node, shape: tuple[int, ...]) -> list[Operand]:
        value = self.values.get(node)
        if isinstance(value, _Weight):
            raise NotElementwise("a weight is used outside a product")
        if isinstance(value, Value) and value.numbers is not None:
            self.decode(value.numbers, value.slots)
        return super().broadcast(node, shape)

    def as_value(self, node: fx.Node) -> Value:
        if isinstance(self.values.get(node), _Weight):
            raise NotElementwise("a weight is used outside a product")
        return super().as_value(node)

    def edge_slots(self, node: fx.Node, shape: tuple[int, ...]) -> list[Operand]:
        if 0 in node.meta["shape"]:  # an empty buffer, such as log_sigmoid has on a GPU
            return [0.0] * self.count(shape)
        return super().edge_slots(node, shape)

    def weight(self, node: fx.Node) -> _Weight | None:
        if node in self.inputs and not node.meta["row_axes"]:
            return _Weight(self.inputs[node], self.positions(node))
        value = self.values.get(node)
        return value if isinstance(value, _Weight) else None

    def product(self, node: fx.Node) -> Value:
        func: Any = node.target
        given = named_arguments(func, tuple(node.args), dict(node.kwargs))
        added = given["self"] if "mat1" in given else None
        left, right = (given["mat1"] if "mat1" in given else given["self"]), given["mat2"]
        found = self.times(left, right)
        if added is None:
            return found
        shape = tuple(node.meta["shape"][1:])
        if found.numbers is not None:
            self.decode(found.numbers, found.slots)
        sums: list[Operand] = [
            make("add", make("mul", given["beta"], a), make("mul", given["alpha"], b))
            for a, b in zip(self.broadcast(added, shape), found.slots, strict=True)
        ]
        return Value(shape, sums)

    def times(self, left: fx.Node, right: fx.Node) -> Value:
        """The product of two matrices, or two batches of them; one factor must be a weight."""
        weight = self.weight(right)
        if weight is not None:
            return self.moved(*self.blocks(self.as_value(left), weight, turned=False))
        weight = self.weight(left)
        if weight is None:
            raise NotElementwise("neither factor is a weight")
        return self.moved(*self.blocks(self.as_value(right), weight, turned=True))

    def blocks(self, value: Value, weight: _Weight, turned: bool) -> tuple[Tensor, list[Operand]]:
        """Addresses and slots of value @ weight, or of weight @ value if `turned`."""
        numbers, positions = self.addresses([value])[0], weight.positions
        if turned:
            numbers, positions = numbers.mT, positions.mT
        if numbers.dim() == 2:
            numbers, positions = numbers.unsqueeze(0), positions.unsqueeze(0)
        families: list[_Family] = []
        seen: dict[tuple[int, int], int] = {}
        places = []
        total = len(value.slots) * self.hidden_size
        for matrix, of in zip(numbers, positions, strict=True):
            for entries in matrix:
                row, factors, group, block = self.block(entries, total, of)
                n = seen[row, group] = seen.get((row, group), -1) + 1
                if n == len(families):
                    families.append(_Family(factors, {}))
                families[n].add(factors, group, block)
                places.append((row, n, group))
        size, count = block.shape[1], block.shape[2]
        self.sizes.add(size)
        slots = [s for family in families for s in self.dots(family, value.slots, weight.input)]
        column = torch.arange(count)[:, None] * self.hidden_size + torch.arange(size)
        found = [
            (row * len(slots) + n * count) * self.hidden_size + group * size + column.flatten()
            for row, n, group in places
        ]
        result = torch.stack(found).view(*numbers.shape[:2], -1)
        result = result.mT if turned else result
        return result.squeeze(0) if weight.positions.dim() == 2 else result, slots

    def block(
        self, entries: Tensor, total: int, positions: Tensor
    ) -> tuple[int, tuple[int, ...], int, Tensor]:
        """One vector times a matrix.

        Args:
            entries: Addresses of the vector.
            total: Entries of a row.
            positions: Memory positions of the matrix.

        Returns:
            The row of the vector, its slots, its group, and the memory positions of the matrix,
            shape (slots, size, slots of the result, size).
        """
        row, (inner, order) = int(entries[0]) // total, (entries % total).sort()
        slots = (inner // self.hidden_size).unique()
        size = len(inner) // len(slots)
        first = int(inner[0]) % self.hidden_size
        expected = slots[:, None] * self.hidden_size + first + torch.arange(size)
        if (entries // total != row).any() or not torch.equal(inner, expected.flatten()):
            raise NotElementwise("the multiplied value does not consist of groups of channels")
        if positions.shape[1] % size or first % size or self.hidden_size % size:
            raise NotElementwise("the result does not consist of groups of channels")
        found = positions[order].view(len(slots), size, -1, size)
        return row, tuple(map(int, slots)), first // size, found

    def dots(self, family: _Family, slots: list[Operand], number: int) -> list[Operand]:
        """The slots of a product, each a sum of dots."""
        groups = sorted(family.blocks)
        size = family.blocks[groups[0]].shape[1]
        if groups != list(range(self.hidden_size // size)):
            raise NotElementwise("a product leaves channels out")
        blocks = torch.stack([family.blocks[g] for g in groups])
        results = []
        for o in range(blocks.shape[3]):
            total: Operand = 0.0
            for i, factor in enumerate(family.factors):
                place = _fitted(number, blocks[:, i, :, o])
                weight = leaf("weight", self.weights.setdefault(place, len(self.weights)))
                total = make("add", total, make("dot", _with_rows(slots[factor]), weight))
            results.append(total)
        return results


@dataclass
class _Family:
    """One product for each group, of the same slots.

    Attributes:
        factors: The multiplied slots.
        blocks: Memory positions of the weight of each group.
    """

    factors: tuple[int, ...]
    blocks: dict[int, Tensor]

    def add(self, factors: tuple[int, ...], group: int, block: Tensor) -> None:
        known = self.blocks.setdefault(group, block)
        if factors != self.factors or not torch.equal(known, block):
            raise NotElementwise("rows are multiplied with different weights")


def _with_rows(slot: Operand) -> Operand:
    slot = make("to_float", slot) if is_boolean(slot) else slot
    if not any(e.op in ("state", "drive") for e in topological([slot])):
        raise NotElementwise("the multiplied value does not depend on the row")
    return slot


def _fitted(number: int, positions: Tensor) -> Place:
    """Express memory positions (groups, size, size or 1) as an offset and strides.

    Raises:
        NotElementwise: No strides give these positions.
    """
    offset = int(positions[0, 0, 0])
    strides = [
        int(positions.select(axis, 1)[0, 0]) - offset if positions.shape[axis] > 1 else 0
        for axis in range(3)
    ]
    expected = torch.tensor(offset)
    for axis, stride in enumerate(strides):
        along = [1, 1, 1]
        along[axis] = positions.shape[axis]
        expected = expected + (torch.arange(positions.shape[axis]) * stride).view(along)
    if not torch.equal(expected.expand_as(positions), positions):
        raise NotElementwise("its channels have no constant stride in memory")
    return Place(number, offset, *strides)
