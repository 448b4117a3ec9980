"""Prove that the channels of a recurrent part do not mix, by reading its operations.

Each value is a list of slots: a tensor (N, ...) with k * hidden_size entries per row has k slots.
A slot is one expression, the same for every channel. Operations that only move entries (views, cat,
chunk) run on a tensor of addresses instead, so one rule covers them all. Pointwise operations
combine slots channel by channel. Any other operation makes the recurrent part not elementwise.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from pararnn.tracing.capture import ROWS, count_of
from pararnn.tracing.expressions import Expression, Operand, leaf, make
from pararnn.tracing.operations import (
    IDENTITIES,
    MOVES,
    UnknownOperation,
    creation_value,
    express,
    is_pointwise,
    operation_name,
    round_to,
)
from pararnn.tracing.partition import Partition
from pararnn.tracing.recorder import aten, is_generated, mapped, show_place
from pararnn.tracing.step import Input


class NotElementwise(Exception):
    """The channels mix, or cannot be proved not to; the message says where."""


@dataclass(frozen=True)
class Source:
    """An edge that gives the step drives or coefficients; it consists of slots.

    Slices of one value (a projection cut into gates) share a source. So nothing is copied between
    the projection and the recurrence, forward or backward. For the same reason the heads need not
    be contiguous in memory: batched matrix products leave gaps between them.

    Attributes:
        edge: Node of the value in the captured graph.
        shape: The shape that it is broadcast to, without the rows.
        hidden_size: Channels of a slot.
        by_rows: Whether it has one row per sample (drives) or no rows (coefficients).
        dtype: The type that integers and booleans are converted to.
    """

    edge: fx.Node
    shape: tuple[int, ...]
    hidden_size: int
    by_rows: bool
    dtype: torch.dtype

    def emit(self, graph: fx.Graph, value: fx.Node, rows: fx.Node) -> fx.Node:
        """Reshape the edge to (rows, slots, heads, head_size), or (slots, hidden_size) if no rows.

        See `Output.emit`.
        """
        lead: list[Any] = [rows] if self.by_rows else []
        if not self.edge.meta["dtype"].is_floating_point:
            value = graph.call_function(torch.Tensor.to, (value, self.dtype))
        own = tuple(self.edge.meta["shape"])
        if not self.by_rows and len(own) > len(self.shape):
            value = graph.call_function(aten.reshape.default, (value, list(own[1:])))
            own = own[1:]
        target = (*own[:1], *self.shape) if self.by_rows else self.shape
        if own != target:
            value = graph.call_function(aten.expand.default, (value, [*lead, *self.shape]))
        slots = math.prod(self.shape) // self.hidden_size
        blocks = [slots, *self.channels] if self.by_rows else [slots, self.hidden_size]
        return graph.call_function(aten.reshape.default, (value, [*lead, *blocks]))

    def undo(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """See `Output.undo`."""
        meta = self.edge.meta
        own = list(meta["shape"])
        lead: list[Any] = [-1] if self.by_rows else []
        rest = own[1:] if self.by_rows or len(own) > len(self.shape) else own
        value = graph.call_function(aten.reshape.default, (value, [*lead, *self.shape]))
        fewer = len(self.shape) - len(rest)
        for _ in range(fewer):
            value = graph.call_function(aten.select.int, (value, 0, 0))
        for axis, (size, had) in enumerate(zip(self.shape[fewer:], rest, strict=True)):
            if size != had:  # `emit` expanded it
                value = graph.call_function(aten.slice.Tensor, (value, axis + len(lead), 0, had))
        if not self.by_rows and rest != own:
            value = graph.call_function(aten.reshape.default, (value, own))
        if not meta["dtype"].is_floating_point:
            kind = {"dtype": meta["dtype"]}
            value = graph.call_function(aten._to_copy.default, (value,), kind)
        return value

    @property
    def as_input(self) -> Input:
        """The result of `emit` as an input of the step."""
        floating = self.edge.meta["dtype"].is_floating_point
        dtype = self.edge.meta["dtype"] if floating else self.dtype
        slots = math.prod(self.shape) // self.hidden_size
        channels = self.channels if self.by_rows else (self.hidden_size,)
        return Input((slots, *channels), dtype, self.by_rows)

    @property
    def channels(self) -> tuple[int, int]:
        """Heads, and channels of a head."""
        in_heads = len(self.shape) > 1 and math.prod(self.shape[-2:]) == self.hidden_size
        return (self.shape[-2], self.shape[-1]) if in_heads else (1, self.hidden_size)


Slot = tuple[Source, int]
_WIDE = (torch.int32, torch.int64, torch.uint32, torch.uint64)


@dataclass(frozen=True)
class Elementwise:
    """The step of one channel.

    Attributes:
        step: Expressions of the new components; the leaves are `state`, `drive`, `coefficient`.
        drives: Source and slot of each drive.
        coefficients: Source and slot of each coefficient.
        names: Variable names in the user's source, by expression.
    """

    step: tuple[Operand, ...]
    drives: tuple[Slot, ...]
    coefficients: tuple[Slot, ...]
    names: dict[Expression, str]


@dataclass
class Value:
    """A tensor as slots.

    Attributes:
        shape: Without the rows.
        slots: One expression each.
        numbers: The address of each entry, as `Reader.addresses` numbers this value alone; None if
            the entries are in order: row by row, slot by slot, channel by channel.
    """

    shape: tuple[int, ...]
    slots: list[Operand]
    numbers: Tensor | None = None


def elementwise(parts: Partition) -> Elementwise:
    """Express the recurrent part channel by channel.

    Raises:
        NotElementwise: The message names the operation that mixes channels, and its line.
    """
    return Reader(parts).read()


def is_wide(node: fx.Node) -> bool:
    """Whether a value has integers that may need more than the 24 bits of float32."""
    if node.meta.get("dtype") not in _WIDE or not hasattr(node.target, "_schema"):
        return node.meta.get("dtype") in _WIDE
    moves = operation_name(node.target) in MOVES | IDENTITIES | {"_to_copy"}
    return not moves or any(map(is_wide, node.all_input_nodes))


class Reader:
    """Follows values as slots through the operations of a recurrent part."""

    def __init__(self, parts: Partition) -> None:
        self.parts = parts
        self.hidden_size = parts.capture.hidden_size
        self.dtype = torch.promote_types(parts.capture.dtype, torch.float32)
        self.drives: dict[Slot, int] = {}
        self.coefficients: dict[Slot, int] = {}
        self.values: dict[fx.Node, Any] = {}
        self.names: dict[Expression, str] = {}
        self.whole = {e for e in parts.edges if is_wide(e)}

    def read(self) -> Elementwise:
        """Express the recurrent part; see `elementwise`."""
        step = self.results()
        return Elementwise(step, tuple(self.drives), tuple(self.coefficients), self.names)

    def results(self) -> tuple[Operand, ...]:
        """Expressions of the new components."""
        for i, node in enumerate(self.parts.states):
            self.values[node] = Value((self.hidden_size,), [leaf("state", i)])
            if "name" in node.meta:
                self.names[leaf("state", i)] = node.meta["name"]
        for node in self.parts.recurrent:
            try:
                self.values[node] = self.evaluate(node)
            except (NotElementwise, UnknownOperation) as error:
                name = operation_name(node.target) if hasattr(node.target, "_schema") else "this"
                place = node.meta.get("place")
                at = "" if is_generated(place) else f" at {show_place(place)}"
                raise NotElementwise(f"{name}{at}: {error}") from None
            self.note_name(node)
        results = [self.broadcast(n, (self.hidden_size,)) for n in self.parts.results]
        return tuple(slots[0] for slots in results)

    def note_name(self, node: fx.Node) -> None:
        """Keep the user's variable name of a value of one slot."""
        value, name = self.values[node], node.meta.get("name")
        if name and isinstance(value, Value) and len(value.slots) == 1:
            (slot,) = value.slots
            if isinstance(slot, Expression) and slot.op != "state":
                taken = name in (
                    self.names.get(leaf("state", i)) for i in range(len(self.parts.states))
                )
                self.names.setdefault(slot, f"{name}'" if taken else name)

    def evaluate(self, node: fx.Node) -> Any:
        """The value of a node, or a list of values if it has several results."""
        func = node.target
        for value in (node, *node.all_input_nodes):
            if value.meta.get("dtype", torch.float32).is_complex:
                raise NotElementwise("complex numbers have two parts")
        if self.whole & set(node.all_input_nodes):
            self.follow_whole(node)
        if not hasattr(func, "_schema"):  # operator.getitem
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        fill = creation_value(func, node.args)
        shape = tuple(node.meta["shape"][1:]) if "shape" in node.meta else ()
        if fill is not None:
            self.require_rows(node)
            fill = fill if isinstance(fill, bool) else self.rounded(fill, node.meta.get("dtype"))
            return Value(shape, [fill] * self.count(shape))
        if operation_name(func) in MOVES:
            return self.move(node)
        if not is_pointwise(func):
            raise NotElementwise("it is not a pointwise operation")
        if operation_name(func) == "log_sigmoid_forward":
            shape = tuple(node.args[0].meta["shape"][1:])  # type: ignore[union-attr]
        else:
            self.require_rows(node)
        return self.pointwise(node, shape)

    def follow_whole(self, node: fx.Node) -> None:
        """Refuse integer arithmetic on integers of x: PyTorch's is exact, kernels round to 24 bits.

        Operations with a floating-point result pass; PyTorch itself rounds the integers there.
        """
        dtype = node.meta.get("dtype", torch.int64)
        if dtype.is_floating_point:
            return
        name = operation_name(node.target) if hasattr(node.target, "_schema") else "getitem"
        if name not in MOVES | IDENTITIES | {"where", "getitem"}:
            raise NotElementwise(
                "it computes with integers, of which kernels keep 24 bits; int16 or int8 would be "
                "exact"
            )
        self.whole.add(node)

    def require_rows(self, node: fx.Node) -> None:
        """Refuse a value whose rows are not one per sample along its first axis, and only there."""
        if not node.meta["by_rows"] or node.meta["row_axes"] != 1:
            raise NotElementwise("the result does not keep one row per sample")

    def count(self, shape: tuple[int, ...]) -> int:
        """The number of slots in a shape."""
        slots, rest = divmod(math.prod(shape), self.hidden_size)
        if rest:
            raise NotElementwise(f"shape (N, {shape}) is not made of whole components")
        return slots

    def pointwise(self, node: fx.Node, shape: tuple[int, ...]) -> Any:
        """Express a pointwise operation, slot by slot."""
        count = self.count(shape)
        tensors = [a for a in tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node)]
        if not all(map(is_value, tensors)):
            raise NotElementwise("it computes with the number of rows")
        slots = {a: self.broadcast(a, shape) for a in tensors}
        results = []
        for j in range(count):
            own: dict[fx.Node, Any] = {a: operands[j] for a, operands in slots.items()}
            args, kwargs = mapped(node, own.__getitem__)
            result = express(node.target, args, kwargs, self.parts.capture.dtype)
            results.append(self.rounded(result, node.meta.get("dtype")))
        if results and isinstance(results[0], tuple):
            return [Value(shape, [r[i] for r in results]) for i in range(len(results[0]))]
        return Value(shape, results)

    def rounded(self, result: Any, dtype: torch.dtype | None) -> Any:
        """Round a result to its own type, if that is narrower than the state's."""
        if isinstance(result, tuple) or dtype is None or not dtype.is_floating_point:
            return result
        return round_to(result, dtype, self.parts.capture.dtype)

    def broadcast(self, node: fx.Node, shape: tuple[int, ...]) -> list[Operand]:
        """The slots of a value, broadcast to (N, *shape)."""
        if node not in self.values:
            return self.edge_slots(node, shape)
        value = self.values[node]
        if len(value.shape) != len(shape):
            raise NotElementwise("rows and channels are broadcast against each other")
        if value.shape == shape:
            return value.slots
        addresses = self.addresses([value])[0].expand(ROWS[0], *shape)
        return self.decode(addresses, value.slots).slots

    def edge_slots(self, node: fx.Node, shape: tuple[int, ...]) -> list[Operand]:
        """The slots of an edge, broadcast to (N, *shape)."""
        terms = self.terms(node)
        if terms:  # added inside the step, a bias costs no pass over memory
            pairs = list(zip(*(self.edge_slots(term, shape) for term in terms), strict=True))
            if "name" in node.meta and len(pairs) == 1:
                name = node.meta["name"]
                self.names.update(zip(pairs[0], (name, f"{name}_bias"), strict=True))
            return [make("add", *pair) for pair in pairs]
        by_rows, own = node.meta["by_rows"], node.meta["shape"]
        if by_rows and len(own) != len(shape) + 1:
            raise NotElementwise("rows and channels are broadcast against each other")
        if not by_rows and len(own) == len(shape) + 1 and own[0] != 1:
            raise NotElementwise("a value without rows is used as if it had them")
        return [self.leaf(node, shape, j) for j in range(self.count(shape))]

    def terms(self, node: fx.Node) -> list[fx.Node]:
        """The terms of an edge that is a value with rows plus one without rows, such as a bias."""
        if not hasattr(node.target, "_schema") or operation_name(node.target) != "add":
            return []
        values: list[fx.Node] = [a for a in node.args if is_value(a)]  # type: ignore[misc]
        kinds = {v.meta["dtype"] for v in (*values, node)}
        rows = [v for v in values if v.meta["by_rows"] and v.meta["shape"] == node.meta["shape"]]
        plain = [v for v in values if not v.meta["row_axes"]]
        whole = len(rows) == len(plain) == 1 and not node.kwargs
        return [*rows, *plain] if whole and kinds == {self.parts.capture.dtype} else []

    def leaf(self, node: fx.Node, shape: tuple[int, ...], slot: int) -> Operand:
        """The drive or coefficient of one slot of an edge that is broadcast to `shape`."""
        by_rows = node.meta["by_rows"]
        known = self.drives if by_rows else self.coefficients
        source = Source(node, shape, self.hidden_size, by_rows, self.dtype)
        place = self.origin(node, shape, slot) if by_rows else None
        index = known.setdefault(place or (source, slot), len(known))
        made = leaf("drive" if by_rows else "coefficient", index)
        name = str(node.meta.get("name") or node.name)
        single = math.prod(shape) == self.hidden_size
        self.names.setdefault(made, name if single else f"{name}_{slot}")
        return make("ne", made, 0.0) if node.meta["dtype"] is torch.bool else made

    def origin(self, node: fx.Node, shape: tuple[int, ...], slot: int) -> Slot | None:
        """The slot of the value before all moves that this slot of an edge is a view of, if any."""
        base, addresses = self.trail(node)
        entries = math.prod(base.meta["shape"][1:])
        if base is node or entries % self.hidden_size:
            return None
        blocks = addresses.expand(ROWS[0], *shape).reshape(ROWS[0], -1, self.hidden_size)[:, slot]
        first = int(blocks[0, 0])
        rows = torch.arange(ROWS[0]).unsqueeze(1) * entries
        if first % self.hidden_size or not torch.equal(
            blocks, first + rows + torch.arange(self.hidden_size)
        ):
            return None
        own = tuple(base.meta["shape"][1:])
        return Source(base, own, self.hidden_size, True, self.dtype), first // self.hidden_size

    def trail(self, node: fx.Node) -> tuple[fx.Node, Tensor]:
        """Follow moves back to the value that they start from.

        Returns:
            That value's node, and for each entry of `node` the flat index of its entry there.
        """
        is_part = node.target is operator.getitem
        made_by: Any = node.args[0] if is_part else node
        if hasattr(made_by.target, "_schema") and operation_name(made_by.target) in MOVES:
            tensors = [a for a in tree_leaves((made_by.args, made_by.kwargs)) if is_value(a)]
            if len(tensors) == 1 and tensors[0].meta["by_rows"]:
                base, numbers = self.trail(tensors[0])
                moved = run_on(made_by, {tensors[0]: numbers})
                return base, moved[node.args[1]] if is_part else moved
        shape = tuple(node.meta["shape"])
        return node, torch.arange(math.prod(shape)).view(shape)

    def addresses(self, values: list[Value]) -> list[Tensor]:
        """Number all entries of some values: row by row, then slot by slot, channel by channel."""
        total = sum(len(v.slots) for v in values) * self.hidden_size
        offsets = torch.arange(ROWS[0]).unsqueeze(1) * total
        tensors, start = [], 0
        for value in values:
            entries = len(value.slots) * self.hidden_size
            if value.numbers is None:
                numbers = offsets + torch.arange(start, start + entries)
                tensors.append(numbers.view(ROWS[0], *value.shape))
            else:
                row = value.numbers // entries
                tensors.append(row * total + value.numbers % entries + start)
            start += entries
        return tensors

    def decode(self, addresses: Tensor, slots: list[Operand]) -> Value:
        """Turn moved addresses back into slots.

        Raises:
            NotElementwise: The channels of a slot would be out of order or of different rows.
        """
        shape, total = tuple(addresses.shape[1:]), len(slots) * self.hidden_size
        self.count(shape)
        if addresses.shape[0] != ROWS[0]:
            raise NotElementwise("the result does not keep one row per sample")
        flat = addresses.reshape(ROWS[0], -1)
        if not torch.equal(
            flat - flat[:1], (torch.arange(ROWS[0]) * total)[:, None].expand_as(flat)
        ):
            raise NotElementwise("rows are mixed")
        blocks = flat[0].view(-1, self.hidden_size)
        if not torch.equal(
            blocks % self.hidden_size, torch.arange(self.hidden_size).expand_as(blocks)
        ):
            raise NotElementwise("channels are mixed")
        return Value(shape, [slots[int(b[0]) // self.hidden_size] for b in blocks])

    def move(self, node: fx.Node) -> Any:
        """An operation that only moves entries."""
        tensors = [a for a in tree_leaves((node.args, node.kwargs)) if is_value(a)]
        operands = list(dict.fromkeys(tensors))
        values = [self.as_value(a) for a in operands]
        slots = [s for v in values for s in v.slots]
        result = run_on(node, dict(zip(operands, self.addresses(values), strict=True)))
        if isinstance(result, (tuple, list)):
            return [self.moved(r, slots) for r in result]
        return self.moved(result, slots)

    def moved(self, addresses: Tensor, slots: list[Operand]) -> Value:
        """The value at moved addresses."""
        return self.decode(addresses, slots)

    def as_value(self, node: fx.Node) -> Value:
        """A value of the recurrent part, or an edge, as slots."""
        if node in self.values:
            return self.values[node]
        if not node.meta["by_rows"]:
            raise NotElementwise("a value without rows is moved among values with rows")
        shape = tuple(node.meta["shape"][1:])
        return Value(shape, self.edge_slots(node, shape))


def is_value(argument: Any) -> bool:
    """Whether an argument of an operation is a tensor, not a number."""
    return isinstance(argument, fx.Node) and not argument.meta.get("is_count")


def run_on(node: fx.Node, numbers: dict[fx.Node, Tensor]) -> Any:
    """Run an operation that moves entries on tensors of addresses in place of its operands."""

    def replace(argument: fx.Node) -> Any:
        return numbers[argument] if argument in numbers else count_of(argument, ROWS[0])

    args, kwargs = mapped(node, replace)
    # Addresses may have other strides than the recorded values, so `view` could fail.
    views = (aten.view.default, aten._unsafe_view.default)
    function: Any = aten.reshape.default if node.target in views else node.target
    return function(*args, **kwargs)
