"""Read a step entry by entry: what every entry of every value is computed from.

A value is a tensor of addresses, with rows as it has them in the recording. An address says which
row an entry belongs to, and which number it has among all entries of a row; coefficients and
weights belong to no row. Operations that only move entries run on addresses. All others make new
entries, the same ones in every row (`Made`). How entries lie side by side in vectors is decided
afterwards, by those who ask for them: see `products`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from pararnn.tracing.capture import ROWS
from pararnn.tracing.elementwise import NotElementwise, is_value, is_wide, run_on
from pararnn.tracing.expressions import Operand, make
from pararnn.tracing.operations import (
    IDENTITIES,
    MOVES,
    UnknownOperation,
    creation_value,
    express,
    is_pointwise,
    named_arguments,
    operation_name,
    round_to,
)
from pararnn.tracing.recorder import is_generated, mapped, show_place
from pararnn.tracing.reductions import REDUCTIONS

_ROW = 1 << 40  # entries of a row, at most
_PRODUCTS = frozenset("mm bmm addmm baddbmm mv".split())


@dataclass
class Made:
    """Entries of a row that one operation makes.

    Attributes:
        first: Number of the first among all entries.
        size: How many there are.
    """

    first: int
    size: int


@dataclass
class State(Made):
    """A component of the state."""

    component: int


@dataclass
class Given(Made):
    """An input.

    Attributes:
        input: Its number.
        positions: Of the entries, in its memory or that of a row (in elements).
        by_rows: Whether it has rows.
        is_bool: Whether it holds truth values.
    """

    input: int
    positions: Tensor
    by_rows: bool
    is_bool: bool


@dataclass
class Number(Made):
    """A number."""

    value: float


@dataclass
class Elementwise(Made):
    """An operation on each element.

    Attributes:
        function: Of operands.
        operands: The entries that are its operands, each (size,).
    """

    function: Callable[..., Operand]
    operands: list[Tensor]


@dataclass
class Product(Made):
    """Products of vectors with matrices that are weights; results one vector after another.

    Attributes:
        input: Number of the weight.
        factors: The multiplied entries of each vector, each (factors,).
        positions: Of each matrix, in the memory of the weight, each (factors, results).
    """

    input: int
    factors: list[Tensor]
    positions: list[Tensor]


@dataclass
class Reduced(Made):
    """Sums or extremes.

    Attributes:
        op: "sum", "max" or "min".
        operands: The entries that it goes over, (size, entries).
    """

    op: str
    operands: Tensor


class Unavailable:
    """A value that no row has by itself, such as the gradient of a weight."""


@dataclass
class Entries:
    """Reads a recording.

    Args:
        nodes: Its operations.
        hidden: Channels of a component.
        dtype: The type of the arithmetic.

    Attributes:
        made: All entries, in order.
        kinds: For every entry, a number that is the same for entries that are computed alike.
        homes: For every entry the channel of the state that it belongs to; -1 if it belongs to
            none.
        values: Addresses of nodes.
    """

    nodes: Sequence[fx.Node]
    hidden: int
    dtype: torch.dtype
    made: list[Any] = field(default_factory=list)
    kinds: list[Tensor] = field(default_factory=list)
    homes: list[Tensor] = field(default_factory=list)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    _count: int = 0
    _kinds: int = 0
    _whole: set[fx.Node] = field(default_factory=set)

    # Entries

    def add(self, kind: type[Made], size: int, *more: Any) -> Made:
        """Make entries."""
        made = kind(self._count, size, *more)
        self._count += size
        self.made.append(made)
        if isinstance(made, Elementwise):
            found = torch.stack([self.kind_of(o) for o in made.operands])
            kinds, which = found.unique(dim=1, return_inverse=True)
            self.kinds.append(self._kinds + which)
            self._kinds += kinds.shape[1]
            self.homes.append(torch.stack([self.home_of(o) for o in made.operands]).amax(0))
        else:
            self.kinds.append(torch.full((size,), self._kinds))
            self._kinds += 1
            is_state = isinstance(made, State)
            self.homes.append(torch.arange(size) if is_state else torch.full((size,), -1))
        self._joined = None
        return made

    _joined: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def _all(self) -> tuple[Tensor, Tensor]:
        if self._joined is None:
            self.kinds, self.homes = [torch.cat(self.kinds)], [torch.cat(self.homes)]
            self._joined = self.kinds[0], self.homes[0]
        return self._joined

    def kind_of(self, entries: Tensor) -> Tensor:
        """See `kinds`."""
        return self._all()[0][entries]

    def home_of(self, entries: Tensor) -> Tensor:
        """See `homes`."""
        return self._all()[1][entries]

    def state(self, node: fx.Node, component: int) -> None:
        """Take a node for a component of the state."""
        made = self.add(State, self.hidden, component)
        self.values[node] = self.in_rows(made.first + torch.arange(self.hidden), (ROWS[0], 1))

    def given(self, node: fx.Node, number: int, strides: Sequence[int]) -> None:
        """Take a node for an input, whose memory has these strides, without that of the rows."""
        by_rows = bool(node.meta["by_rows"])
        shape = node.meta["shape"][1:] if by_rows else node.meta["shape"]
        positions = torch.zeros(shape, dtype=torch.int64)
        for axis, stride in enumerate(strides):
            along = [1] * len(shape)
            along[axis] = shape[axis]
            positions += (torch.arange(shape[axis]) * stride).view(along)
        is_bool = node.meta["dtype"] is torch.bool
        if is_wide(node):
            self._whole.add(node)
        made = self.add(Given, positions.numel(), number, positions.flatten(), by_rows, is_bool)
        entries = made.first + torch.arange(made.size).view(shape)
        lead = (ROWS[0], *[1] * len(shape)) if by_rows else ()
        self.values[node] = self.in_rows(entries, lead)

    @staticmethod
    def in_rows(entries: Tensor, lead: Sequence[int] = ()) -> Tensor:
        """The addresses of entries in every row, along a first axis; in none without `lead`."""
        if not lead:
            return entries
        return entries + (_ROW * torch.arange(1, ROWS[0] + 1)).view(lead)

    # Values, as `reductions` takes them

    def of(self, given: Any) -> Any:
        """A node as addresses, or a number as itself."""
        if not isinstance(given, fx.Node):
            return given
        value = self.values[given]
        if isinstance(value, Unavailable):
            raise NotElementwise("it needs a value that is not computed row by row")
        return value

    def shape(self, value: Tensor) -> list[int]:
        """Sizes of its axes."""
        return list(value.shape)

    def both(self, function: Callable[..., Operand], *values: Any) -> Any:
        """An operation on each element of values that are broadcast; numbers stay as they are."""
        if any(isinstance(v, Unavailable) for v in values):
            return Unavailable()
        tensors = [v for v in values if isinstance(v, Tensor)]

        def on_tensors(*operands: Operand) -> Operand:
            left = iter(operands)
            return function(*(next(left) if isinstance(v, Tensor) else v for v in values))

        return self.elementwise(on_tensors, tensors)

    def elementwise(self, function: Callable[..., Operand], values: Sequence[Tensor]) -> Tensor:
        """An operation on each element of values that are broadcast."""
        broadcast = torch.broadcast_tensors(*values)
        addresses = torch.stack([b.flatten() for b in broadcast])
        entries, rows = addresses % _ROW, addresses // _ROW
        row = rows.amax(0)
        if not bool(((rows == row) | (rows == 0)).all()):
            raise NotElementwise("it combines entries of different rows")
        shape = broadcast[0].shape
        if not row.any():
            distinct, which = entries.unique(dim=1, return_inverse=True)
            made = self.add(Elementwise, distinct.shape[1], function, list(distinct))
            return (made.first + which).view(shape)
        lists = [entries[:, row == r] for r in range(1, ROWS[0] + 1)]
        if not row.all() or any(not torch.equal(e, lists[0]) for e in lists):
            raise NotElementwise("it treats rows differently")
        made = self.add(Elementwise, lists[0].shape[1], function, list(lists[0]))
        found = torch.empty_like(row)
        for r in range(1, ROWS[0] + 1):
            found[row == r] = r * _ROW + made.first + torch.arange(made.size)
        return found.view(shape)

    def summed(self, value: Any, axes: Sequence[int], keep: bool, op: str = "sum") -> Any:
        """The sum along axes, or another operation of `sum`, `max` and `min`."""
        if isinstance(value, Unavailable):
            return value
        along = sorted({a % value.dim() for a in axes}) if value.dim() else []
        kept = [a for a in range(value.dim()) if a not in along]
        flat = value.permute(*kept, *along).reshape(*(value.shape[a] for a in kept), -1)
        rows = flat // _ROW
        if not bool((rows == rows[..., :1]).all()):
            return Unavailable()  # it sums over rows
        shape = [1 if a in along else n for a, n in enumerate(value.shape)]
        shape = shape if keep else [n for a, n in enumerate(value.shape) if a in kept]
        row, entries = rows[..., 0].flatten(), (flat % _ROW).flatten(0, -2)
        if not row.all():
            raise NotElementwise("it sums a value without rows")
        lists = [entries[row == r] for r in range(1, ROWS[0] + 1)]
        if any(not torch.equal(e, lists[0]) for e in lists):
            raise NotElementwise("it treats rows differently")
        made = self.add(Reduced, len(lists[0]), op, lists[0])
        found = torch.empty_like(row)
        for r in range(1, ROWS[0] + 1):
            found[row == r] = r * _ROW + made.first + torch.arange(made.size)
        return found.view(shape)

    # Operations

    def read(self) -> None:
        """Read all operations.

        Raises:
            NotElementwise: One is not known here; the message names it.
        """
        for node in self.nodes:
            try:
                self.values[node] = self.evaluate(node)
            except (NotElementwise, UnknownOperation) as error:
                name = operation_name(node.target) if hasattr(node.target, "_schema") else "this"
                place = node.meta.get("place")
                at = "" if is_generated(place) else f" at {show_place(place)}"
                raise NotElementwise(f"{name}{at}: {error}") from None

    def evaluate(self, node: fx.Node) -> Any:
        """The addresses of a node, or a list of them if it has several results."""
        func: Any = node.target
        for value in (node, *node.all_input_nodes):
            if value.meta.get("dtype", torch.float32).is_complex:
                raise NotElementwise("complex numbers have two parts")
        if self._whole & set(node.all_input_nodes):
            self.follow_whole(node)
        if not hasattr(func, "_schema"):  # operator.getitem
            if func is not operator.getitem:
                raise NotElementwise("it computes with the number of rows")
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        name = operation_name(func)
        filled = creation_value(func, node.args)
        if filled is not None:
            return self.filled(node, filled)
        if name == "index_select":
            raise NotElementwise("it takes entries by their numbers in a tensor")
        if name in MOVES:
            tensors = [a for a in tree_leaves((node.args, node.kwargs)) if is_value(a)]
            return run_on(node, {a: self.of(a) for a in tensors})
        if name in _PRODUCTS:
            return self.product(named_arguments(func, tuple(node.args), dict(node.kwargs)))
        if name in REDUCTIONS:
            given = named_arguments(func, tuple(node.args), dict(node.kwargs))
            return REDUCTIONS[name](self, node, given)
        if not is_pointwise(func):
            raise NotElementwise("it is not a pointwise operation")
        return self.pointwise(node)

    def filled(self, node: fx.Node, value: float) -> Tensor:
        """A new tensor with a number everywhere."""
        shape = list(node.meta["shape"])
        if not isinstance(value, bool):
            value = self.rounded(value, node.meta.get("dtype"))
        made = self.add(Number, 1, value)
        if not node.meta["row_axes"]:
            return torch.full(shape, made.first)
        if not node.meta["by_rows"]:
            raise NotElementwise("the result does not keep one row per sample")
        lead = (ROWS[0], *[1] * (len(shape) - 1))
        return self.in_rows(torch.full(shape, made.first), lead)

    def pointwise(self, node: fx.Node) -> Any:
        """An operation on each element."""
        func: Any = node.target
        tensors = [a for a in tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node)]
        if not all(map(is_value, tensors)):
            raise NotElementwise("it computes with the number of rows")
        distinct = [a for a in dict.fromkeys(tensors) if 0 not in a.meta["shape"]]
        if not distinct:
            raise NotElementwise("it computes with numbers alone")
        dtype = node.meta.get("dtype")

        def of_operands(number: int | None) -> Callable[..., Operand]:
            def function(*operands: Operand) -> Operand:
                own = dict(zip(distinct, operands, strict=True))
                args, kwargs = mapped(node, lambda a: own.get(a, 0.0))  # of an empty buffer, 0
                found = express(func, args, kwargs, self.dtype)
                if number is not None:
                    return found[number]  # type: ignore[index]
                return self.rounded(found, dtype)

            return function

        values = [self.of(a) for a in distinct]
        if any(isinstance(v, Unavailable) for v in values):
            return Unavailable()
        several = len(func._schema.returns)
        if several == 1:
            return self.elementwise(of_operands(None), values)
        return [self.elementwise(of_operands(n), values) for n in range(several)]

    def rounded(self, result: Any, dtype: torch.dtype | None) -> Any:
        """Round a result to its own type, if that is narrower than that of the arithmetic."""
        if dtype is None or not dtype.is_floating_point:
            return result
        return round_to(result, dtype, self.dtype)

    def follow_whole(self, node: fx.Node) -> None:
        """Refuse integer arithmetic on integers of x, which kernels round to 24 bits."""
        if node.meta.get("dtype", torch.int64).is_floating_point:
            return
        name = operation_name(node.target) if hasattr(node.target, "_schema") else "getitem"
        if name not in MOVES | IDENTITIES | {"where", "getitem"}:
            raise NotElementwise("it computes with integers, of which kernels keep 24 bits")
        self._whole.add(node)

    # Products

    def product(self, given: dict[str, Any]) -> Any:
        """A product of matrices, with what is added to it."""
        left = given.get("mat1", given.get("batch1", given["self"]))
        right = given.get("mat2", given.get("batch2", given.get("vec")))
        x, y = self.of(left), self.of(right)
        found = self.times(x, y.unsqueeze(1)).squeeze(1) if y.dim() == 1 else self.times(x, y)
        if "beta" not in given:
            return found
        alpha, beta = given["alpha"], given["beta"]
        both = lambda a, b: make("add", make("mul", beta, a), make("mul", alpha, b))  # noqa: E731
        return self.both(both, self.of(given["self"]), found)

    def times(self, left: Tensor, right: Tensor) -> Tensor:
        """The product of two matrices, or two batches of them; one factor must be a weight."""
        if self.is_weight(right):
            return self.multiplied(left, right)
        if self.is_weight(left):
            return self.multiplied(right.mT, left.mT).mT
        raise NotElementwise("neither factor is a weight")

    def is_weight(self, value: Tensor) -> bool:
        """Whether all entries are those of an input without rows."""
        return bool((value < _ROW).all()) and isinstance(self.maker(value), Given)

    def maker(self, entries: Tensor) -> Any:
        """What made all of these entries; None if several did."""
        low, high = int(entries.min()), int(entries.max())
        made = next(m for m in reversed(self.made) if m.first <= low)
        return made if high < made.first + made.size else None

    def multiplied(self, value: Tensor, weight: Tensor) -> Tensor:
        """Value (*batch, m, k) times weight (*batch, k, n)."""
        source: Given = self.maker(weight)
        positions = source.positions[weight - source.first]
        if value.dim() == 2:
            value, positions = value.unsqueeze(0), positions.unsqueeze(0)
        count, rows, entries = positions.shape[2], value // _ROW, value % _ROW
        if not bool((rows == rows[:, :, :1]).all()) or not bool(rows.all()):
            raise NotElementwise("the multiplied value does not consist of rows")
        row = rows[:, :, 0]
        places = [(row == r).nonzero().tolist() for r in range(1, ROWS[0] + 1)]
        first = [(entries[b, m], positions[b]) for b, m in places[0]]
        for other in places[1:]:
            alike = len(other) == len(first) and all(
                torch.equal(e, entries[b, m]) and torch.equal(p, positions[b])
                for (e, p), (b, m) in zip(first, other, strict=True)
            )
            if not alike:
                raise NotElementwise("rows are multiplied with different weights")
        factors, matrices = map(list, zip(*first, strict=True))
        made = self.add(Product, len(first) * count, source.input, factors, matrices)
        found = torch.empty(*row.shape, count, dtype=torch.int64)
        for r, own in enumerate(places, 1):
            for n, (b, m) in enumerate(own):
                found[b, m] = r * _ROW + made.first + n * count + torch.arange(count)
        return found.squeeze(0) if weight.dim() == 2 else found


def entries_of(addresses: Tensor) -> Tensor:
    """The entries of the first row of a value (rows, ...), without rows."""
    return addresses[0] % _ROW
