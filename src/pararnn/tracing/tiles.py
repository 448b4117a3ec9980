"""Read a step, its readout and their adjoint as operations on tiles.

A value of one row is a tensor of any shape. Its axes are made of atoms: an axis of an input is one
atom, or several where a view takes it apart. Atoms that meet in an operation on each element are
the same axis of the cell, and so are the factors that a product sums over. From these follows how a
kernel lays the state out:

- axes along which nothing mixes, neither in the step nor in the readout, become programs;
- at most two others become the rows and columns of a tile, which a program holds.

A value has rows, columns, both or neither, and enters operations by broadcasting: a key has rows, a
value columns, a gate neither. A weight that is multiplied along columns is a matrix, columns x
columns. Gradients that lack an axis of the programs are sums over programs: partial sums here,
which are added up outside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from pararnn.tracing.expressions import LEAVES, Expression, Operand, leaf, make, topological
from pararnn.tracing.operations import (
    IDENTITIES,
    UnknownOperation,
    creation_value,
    express,
    is_pointwise,
    named_arguments,
    operation_name,
)
from pararnn.tracing.partition import operation
from pararnn.tracing.products import unfused
from pararnn.tracing.recorder import TraceError, is_differentiable, record, show_place
from pararnn.tracing.step import Input, Step, recording, vjp
from pararnn.tracing.traced import Readout

_SUBJECT = "the step"
_MOST_ENTRIES = 1 << 14  # of a tile


class NotTiled(Exception):
    """The step cannot be laid out as tiles; the message says why."""


class _Split(Exception):
    """An atom has to be taken apart."""

    def __init__(self, atom: int, sizes: tuple[int, ...]) -> None:
        super().__init__(atom, sizes)
        self.atom, self.sizes = atom, sizes


Item = tuple[int | None, int]
"""Part of an axis: its atom and its size; no atom where values are the same all along it."""


@dataclass(frozen=True)
class Axis:
    """Rows or columns of a tile.

    Attributes:
        stride: In the memory of the tensor, in elements.
        size: Entries; 1 if there is no such axis.
    """

    stride: int = 0
    size: int = 1


@dataclass(frozen=True)
class Place:
    """Where the entries of a value lie in a tensor, or in one row of it at one step.

    Attributes:
        programs: Stride along every axis of the programs; 0 where it has none.
        rows: Its rows.
        columns: Its columns.
        is_matrix: Whether its rows and columns are both those of a weight.
        lacks: Axes of the programs that it does not have.
    """

    programs: tuple[int, ...]
    rows: Axis
    columns: Axis
    is_matrix: bool
    lacks: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """A value that a kernel writes.

    Attributes:
        expression: The value.
        place: Where it goes.
        summed: Axes of the programs over which programs have partial sums.
        split: Whether it is a partial sum where programs have a part of the split axis.
    """

    expression: Operand
    place: Place
    summed: tuple[int, ...]
    split: bool


@dataclass(frozen=True)
class Tiles:
    """A step, its readout and their adjoint, laid out.

    Leaves of expressions are `state`, `drive` (inputs with rows), `coefficient` (those without) and
    `adjoint`: of the state after the step, and after those of the result that is handed out.

    Attributes:
        programs: Sizes of the axes of the programs.
        rows: Rows of a tile.
        columns: Columns.
        split: The axis of a tile that may be cut into parts which have programs of their own: 0, 1
            or None.
        multiplied: Whether rows and whether columns take part in products of matrices.
        drives: Numbers of the inputs that are drives.
        coefficients: Numbers of the others.
        state: Where components lie.
        drive_places: Where drives do.
        coefficient_places: Where coefficients do.
        step: New components.
        readout: What is handed out.
        adjoints: Adjoints of the components before the step.
        gradients: Gradient of every differentiable input.
        differentiable: Numbers of these.
    """

    programs: tuple[int, ...]
    rows: int
    columns: int
    split: int | None
    multiplied: tuple[bool, bool]
    drives: tuple[int, ...]
    coefficients: tuple[int, ...]
    state: tuple[Place, ...]
    drive_places: tuple[Place, ...]
    coefficient_places: tuple[Place, ...]
    step: tuple[Operand, ...]
    readout: Result
    adjoints: tuple[Operand, ...]
    gradients: tuple[Result, ...]
    differentiable: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Entries of a tile."""
        return self.rows * self.columns


def tiles(step: Step, readout: Readout | None) -> Tiles:
    """Read a step.

    Args:
        step: The step.
        readout: What is handed out; the first component when None.

    Raises:
        NotTiled: It has an operation that is not known here, or its axes do not fit a tile.
    """
    try:
        graph, inputs = _recorded(step, readout)
        factors: dict[tuple[str, int], tuple[int, ...]] = {}
        while True:
            reader = _Reader(graph, inputs, step.num_components, factors)
            try:
                reader.read()
                break
            except _Split as split:
                reader.refine(split)
        return _laid_out(reader)
    except (TraceError, UnknownOperation) as error:
        raise NotTiled(str(error)) from error


def all_inputs(step: Step, readout: Readout | None) -> list[tuple[int, Input]]:
    """The inputs of step and readout without repetitions, with their numbers among all."""
    count = len(step.inputs)
    found = list(enumerate(step.inputs))
    for n, given in enumerate(readout.inputs if readout else ()):
        if readout is not None and readout.shared[n] is None:
            found.append((count + n, given))
    return found


def _recorded(step: Step, readout: Readout | None) -> tuple[fx.Graph, list[tuple[int, Input]]]:
    """Record both directions on one row, so that sums over the rows are sums over one."""
    inputs, count, dtype = all_inputs(step, readout), step.num_components, step.dtype
    if not any(kind.by_rows for _, kind in inputs):
        raise NotTiled("nothing differs over time")
    for _, kind in inputs:
        if not (kind.dtype.is_floating_point or kind.dtype is torch.bool):
            raise NotTiled(f"an input is of type {kind.dtype}")
    if readout is not None and readout.is_random:
        raise NotTiled("its readout draws random numbers")
    vector = Input((step.hidden,), dtype, True)
    kinds = {f"state_{i}": vector for i in range(count)}
    kinds |= {f"input_{n}": kind for n, kind in inputs}
    shape = readout.shape if readout else vector.shape
    kinds |= {f"adjoint_{i}": vector for i in range(count)}
    kinds[f"adjoint_{count}"] = Input(tuple(shape), dtype, True)
    module = unfused(step.module)
    reads = unfused(readout.module) if readout else None

    def run(*flat: Tensor) -> Sequence[Tensor]:
        given = dict(zip(kinds, flat, strict=True))
        state = [given[f"state_{i}"] for i in range(count)]
        new = list(module(*state, *(given[f"input_{n}"] for n in range(len(step.inputs)))))
        y = new[0]
        if readout is not None and reads is not None:
            numbers = [
                len(step.inputs) + n if same is None else same
                for n, same in enumerate(readout.shared)
            ]
            after = [new[i] for i in readout.components]
            (y,) = reads(*after, *(given[f"input_{n}"] for n in numbers))
        wanted = [given[f"input_{n}"] for n, kind in inputs if is_differentiable(kind.dtype)]
        adjoints = [given[f"adjoint_{i}"] for i in range(count + 1)]
        return [*new, y, *vjp([*new, y], adjoints, [*state, *wanted])]

    with recording(step.device):
        examples = {}
        for name, kind in kinds.items():
            if kind.dtype.is_floating_point:
                kind = Input(kind.shape, dtype, kind.by_rows)
            examples[name] = kind.example(1, step.device)
            wanted = is_differentiable(kind.dtype) and not name.startswith("adjoint")
            examples[name].requires_grad_(wanted)
        graph, constants = record(run, examples, _SUBJECT)
    if constants:
        raise NotTiled("it uses tensors that are not its inputs")
    return graph, inputs


@dataclass(frozen=True)
class _Value:
    """A tensor.

    Attributes:
        expression: Of an entry.
        axes: The items of each axis; items of size 1 are left out.
        order: The atoms in the order in which the expression has them.
    """

    expression: Operand
    axes: tuple[tuple[Item, ...], ...]
    order: tuple[int, ...]


def _size(items: Iterable[Item]) -> int:
    return math.prod(size for _, size in items)


def _atoms(axes: Iterable[Iterable[Item]]) -> tuple[int, ...]:
    return tuple(atom for items in axes for atom, _ in items if atom is not None)


@dataclass
class _Reader:
    """Reads a recording."""

    graph: fx.Graph
    inputs: list[tuple[int, Input]]
    components: int
    factors: dict[tuple[str, int], tuple[int, ...]]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    same: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    origins: list[tuple[str, int, int]] = field(default_factory=list)
    leaves: dict[str, _Value] = field(default_factory=dict)
    new: list[Operand] = field(default_factory=list)
    y: _Value = field(init=False)
    grads: list[Operand] = field(default_factory=list)

    # Atoms

    def find(self, atom: int) -> int:
        """The axis of the cell that an atom belongs to."""
        while self.same[atom] != atom:
            atom = self.same[atom]
        return atom

    def unify(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if self.sizes[a] != self.sizes[b]:
            raise NotTiled("axes of different sizes meet")
        self.same[max(a, b)] = min(a, b)

    def refine(self, split: _Split) -> None:
        """Take an atom apart, and all that belong to the same axis, for the next reading."""
        of = self.find(split.atom)
        for atom, (name, axis, place) in enumerate(self.origins):
            if self.find(atom) == of:
                old = self.factors.get((name, axis), (self.sizes[atom],))
                # places count in the factors of this reading; several splits of one axis at a
                # time come from the last place to the first
                new = (*old[:place], *split.sizes, *old[place + 1 :])
                self.factors[name, axis] = new

    def placeholder(self, name: str, shape: Sequence[int], expression: Operand) -> _Value:
        axes, order = [], []
        for axis, size in enumerate(shape):
            items: list[Item] = []
            for place, part in enumerate(self.factors.get((name, axis), (size,))):
                if part > 1:
                    atom = len(self.same)
                    self.same.append(atom)
                    self.sizes.append(part)
                    self.origins.append((name, axis, place))
                    items.append((atom, part))
                    order.append(atom)
            axes.append(tuple(items))
        self.leaves[name] = value = _Value(expression, tuple(axes), tuple(order))
        return value

    # Reading

    def read(self) -> None:
        """Read all nodes."""
        numbers: dict[str, Operand] = {}
        counts = {True: 0, False: 0}
        for n, kind in self.inputs:
            made: Operand = leaf("drive" if kind.by_rows else "coefficient", counts[kind.by_rows])
            counts[kind.by_rows] += 1
            numbers[f"input_{n}"] = make("ne", made, 0.0) if kind.dtype is torch.bool else made
        for node in self.graph.nodes:
            if node.op == "placeholder":
                name = str(node.target)
                kind, _, number = name.partition("_")
                expression = numbers[name] if kind == "input" else leaf(kind, int(number))
                shape = node.meta["shape"]
                self.values[node] = self.placeholder(name, shape, expression)
            elif node.op == "output":
                self.compare(list(node.args[0]))  # type: ignore[arg-type]
            elif node.op == "call_function":
                try:
                    self.values[node] = self.evaluate(node)
                except NotTiled as error:
                    place = node.meta.get("place")
                    where = f" at {show_place(place)}" if place else ""
                    raise NotTiled(f"{error}{where}") from None

    def compare(self, results: Sequence[Any]) -> None:
        """Give results the axes of what they belong to: new states those of states, and so on."""
        values, count = [self.of(r) for r in results], self.components
        new, (y, *grads) = values[:count], values[count:]
        for i in range(count):
            self.aligned([self.leaves[f"state_{i}"], new[i], self.leaves[f"adjoint_{i}"]])
            self.aligned([self.leaves["state_0"], self.leaves[f"state_{i}"]])
        self.aligned([y, self.leaves[f"adjoint_{count}"]])
        wanted = [f"input_{n}" for n, kind in self.inputs if is_differentiable(kind.dtype)]
        of = [self.leaves[name] for name in (*(f"state_{i}" for i in range(count)), *wanted)]
        self.new, self.y, self.grads = [n.expression for n in new], y, []
        for leaf_, grad in zip(of, grads, strict=True):
            (_, expression), _, _ = self.aligned([leaf_, grad])
            self.grads.append(expression)

    def of(self, given: Any) -> _Value:
        if isinstance(given, fx.Node):
            value = self.values[given]
            if not isinstance(value, _Value):
                raise NotTiled("a value is no tensor")
            return value
        return _Value(given, (), ())

    def evaluate(self, node: fx.Node) -> Any:
        func: Any = operation(node)
        if not hasattr(func, "_schema"):
            if getattr(func, "__name__", "") == "getitem":
                return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
            raise NotTiled(f"{func} is not known")
        name = operation_name(func)
        filled = creation_value(func, tuple(node.args))
        if filled is not None:
            shape = node.meta["shape"]
            return _Value(filled, tuple(((None, s),) if s > 1 else () for s in shape), ())
        rule = _RULES.get(name)
        if rule is not None:
            return rule(self, node, named_arguments(func, tuple(node.args), dict(node.kwargs)))
        if name in IDENTITIES:
            return self.values[node.args[0]]  # type: ignore[index]
        if is_pointwise(func):
            return self.pointwise(node, func)
        raise NotTiled(f"{name} is not known to kernels of tiles")

    # Operations on each element

    def pointwise(self, node: fx.Node, func: Any) -> Any:
        tensors = [a for a in tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node)]
        distinct = list(dict.fromkeys(tensors))
        expressions, axes, order = self.aligned([self.of(t) for t in distinct])
        given = dict(zip(distinct, expressions, strict=True))
        pick = lambda a: given[a] if isinstance(a, fx.Node) else a  # noqa: E731
        args, kwargs = tree_map(pick, tuple(node.args)), tree_map(pick, dict(node.kwargs))
        found = express(func, args, kwargs, torch.float64)
        if isinstance(found, tuple):
            return tuple(_Value(f, axes, order) for f in found)
        return _Value(found, axes, order)

    def aligned(
        self, values: Sequence[_Value]
    ) -> tuple[list[Operand], tuple[tuple[Item, ...], ...], tuple[int, ...]]:
        """The expressions of values that are broadcast, and the axes and order of the result."""
        rank = max(len(v.axes) for v in values)
        padded = [((),) * (rank - len(v.axes)) + v.axes for v in values]
        names: list[dict[int, int]] = [{} for _ in values]
        axes = tuple(self.merged([list(p[axis]) for p in padded], names) for axis in range(rank))
        expressions, order = self.in_order(values, names)
        return expressions, axes, order

    def merged(
        self, lists: Sequence[list[Item]], names: Sequence[dict[int, int]]
    ) -> tuple[Item, ...]:
        """One axis of several values, item by item; `names` learns what atoms are called."""
        present = [i for i, items in enumerate(lists) if items]
        result: list[Item] = []
        while any(lists[i] for i in present):
            least = min(lists[i][0][1] for i in present)
            for i in present:
                atom, size = lists[i][0]
                if size > least:
                    if size % least:
                        raise NotTiled("axes of different sizes meet")
                    if atom is not None:
                        raise _Split(atom, (least, size // least))
                    lists[i][:1] = [(None, least), (None, size // least)]
            atoms = [a for i in present if (a := lists[i][0][0]) is not None]
            for other in atoms[1:]:
                self.unify(atoms[0], other)
            for i in present:
                atom, _ = lists[i].pop(0)
                if atom is not None:
                    names[i][atom] = atoms[0]
            result.append((atoms[0] if atoms else None, least))
        return tuple(result)

    def in_order(
        self, values: Sequence[_Value], names: Sequence[dict[int, int]]
    ) -> tuple[list[Operand], tuple[int, ...]]:
        """The expressions with their atoms in one order, and that order."""
        orders = [tuple(n.get(a, a) for a in v.order) for v, n in zip(values, names, strict=True)]
        order = max(orders, key=len)
        order = (*order, *(a for o in orders for a in o if a not in order))
        order = tuple(dict.fromkeys(order))
        found = []
        for value, own in zip(values, orders, strict=True):
            wanted = tuple(a for a in order if a in own)
            expression = value.expression
            if wanted != own and isinstance(expression, Expression):
                expression = make("turn", expression, _written(own), _written(wanted))
            found.append(expression)
        return found, order

    # Moves

    def regrouped(self, value: _Value, shape: Sequence[int]) -> _Value:
        items = [item for axis in value.axes for item in axis]
        axes = []
        for size in shape:
            axis: list[Item] = []
            while size > 1:
                if not items:
                    raise NotTiled("a view does not fit")
                atom, has = items.pop(0)
                part = math.gcd(has, size) if has != size else has
                if has != part:
                    if size % part or has % part or part == 1:
                        raise NotTiled("a view cuts an axis in two ways")
                    if atom is not None:
                        raise _Split(atom, (part, has // part))
                    items.insert(0, (None, has // part))
                axis.append((atom, part))
                size //= part
            axes.append(tuple(axis))
        return _Value(value.expression, tuple(axes), value.order)

    # Products and sums

    def product(self, left: _Value, right: _Value) -> _Value:
        """Left (*batch, m, k) times right (*batch, k, n), or (k,) without batch."""
        batch = len(left.axes) - 2 if len(right.axes) > 1 else 0
        names: tuple[dict[int, int], ...] = ({}, {})
        axes = [self.merged([list(left.axes[i]), list(right.axes[i])], names) for i in range(batch)]
        axes += [left.axes[batch], *right.axes[batch + 1 :]]
        own: tuple[dict[int, int], ...] = ({}, {})
        along = self.merged([list(left.axes[-1]), list(right.axes[batch])], own)
        orders = [
            tuple(n.get(a, a) for a in v.order if a not in o)
            for v, n, o in zip((left, right), names, own, strict=True)
        ]
        order = tuple(dict.fromkeys((*orders[0], *orders[1])))
        x, y = left.expression, right.expression
        if not (left.axes[batch] and _atoms(right.axes[batch + 1 :])):
            # a vector is one factor: a sum of products of entries
            every = [{**n, **o} for n, o in zip(names, own, strict=True)]
            expressions, _ = self.in_order((left, right), every)
            found = make("mul", *expressions)
            for atom, size in along:
                found = make("mul", found, float(size)) if atom is None else _sum_of(found, atom)
            return _Value(found, tuple(axes), order)
        back = [{name: atom for atom, name in o.items()} for o in own]
        sums: tuple[list[int], list[int]] = [], []
        for atom, size in along:
            if atom is None:
                x = make("mul", x, float(size))
            elif atom in back[0] and atom in back[1]:
                sums[0].append(back[0][atom])
                sums[1].append(back[1][atom])
            elif atom in back[0]:
                x = _sum_of(x, back[0][atom])
            else:
                y = _sum_of(y, back[1][atom])
        if not isinstance(x, Expression) or not isinstance(y, Expression):
            return _Value(make("mul", x, y), tuple(axes), order)
        kept = [
            [a for a in v.order if a not in o or a in s]
            for v, o, s in zip((left, right), own, sums, strict=True)
        ]
        found = make("dot", x, y, *map(_written, (*sums, *kept)))
        return _Value(found, tuple(axes), order)

    def summed(self, value: _Value, axes: Sequence[int], keep: bool, op: str = "sum") -> _Value:
        expression = value.expression
        gone = {a % len(value.axes) for a in axes}
        for axis in gone:
            for atom, size in value.axes[axis]:
                if atom is None:
                    if op == "sum":
                        expression = make("mul", expression, float(size))
                else:
                    expression = make(op, expression, str(atom))
        left = [
            () if i in gone else items
            for i, items in enumerate(value.axes)
            if keep or i not in gone
        ]
        lost = set(_atoms(value.axes[a] for a in gone))
        return _Value(expression, tuple(left), tuple(a for a in value.order if a not in lost))

    def both(self, func: Callable[..., Operand], *values: _Value) -> _Value:
        """An operation on each element of values that are broadcast."""
        expressions, axes, order = self.aligned(values)
        return _Value(func(*expressions), axes, order)


def _sum_of(value: Operand, atom: int) -> Operand:
    return make("sum", value, str(atom))


def _written(atoms: Iterable[int]) -> str:
    return ",".join(map(str, atoms))


def _read(text: Operand) -> list[int]:
    assert isinstance(text, str)
    return [int(a) for a in text.split(",") if a]


def _axes_of(given: Any, rank: int) -> list[int]:
    if given is None or given == []:
        return list(range(rank))
    return [given] if isinstance(given, int) else list(given)


def _view(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
    return reader.regrouped(reader.of(given["self"]), node.meta["shape"])


def _unsqueeze(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
    value = reader.of(given["self"])
    at = given["dim"] % (len(value.axes) + 1)
    return _Value(value.expression, (*value.axes[:at], (), *value.axes[at:]), value.order)


def _permute(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
    value = reader.of(given["self"])
    rank = len(value.axes)
    if "dims" in given:
        dims = [d % rank for d in given["dims"]]
    else:
        a, b = given.get("dim0", 0), given.get("dim1", 1)
        dims = list(range(rank))
        if rank > 1:
            dims[a % rank], dims[b % rank] = dims[b % rank], dims[a % rank]
    return _Value(value.expression, tuple(value.axes[d] for d in dims), value.order)


def _expand(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
    value, shape = reader.of(given["self"]), node.meta["shape"]
    axes = ((),) * (len(shape) - len(value.axes)) + value.axes
    pairs = zip(axes, shape, strict=True)
    found = tuple(items or (((None, s),) if s > 1 else ()) for items, s in pairs)
    return _Value(value.expression, found, value.order)


def _select(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
    value = reader.of(given["self"])
    at = given["dim"] % len(value.axes)
    if _atoms([value.axes[at]]):
        raise NotTiled("it takes a part of an axis")
    return _Value(value.expression, value.axes[:at] + value.axes[at + 1 :], value.order)


def _slice(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
    value, shape = reader.of(given["self"]), node.meta["shape"]
    at = given["dim"] % len(value.axes)
    if _size(value.axes[at]) == shape[at]:
        return value
    if _atoms([value.axes[at]]):
        raise NotTiled("it takes a part of an axis")
    axis: tuple[Item, ...] = ((None, shape[at]),) if shape[at] > 1 else ()
    return _Value(value.expression, (*value.axes[:at], axis, *value.axes[at + 1 :]), value.order)


def _product(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
    left = reader.of(given["mat1"] if "mat1" in given else given.get("batch1", given.get("self")))
    right = reader.of(given.get("mat2", given.get("batch2", given.get("vec"))))
    found = reader.product(left, right)
    if "beta" not in given:
        return found
    alpha, beta = given["alpha"], given["beta"]
    both = lambda a, b: make("add", make("mul", beta, a), make("mul", alpha, b))  # noqa: E731
    return reader.both(both, reader.of(given["self"]), found)


def _sum(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
    value = reader.of(given["self"])
    return reader.summed(
        value, _axes_of(given.get("dim"), len(value.axes)), bool(given.get("keepdim"))
    )


def _mean(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
    value = reader.of(given["self"])
    axes = _axes_of(given.get("dim"), len(value.axes))
    count = math.prod(_size(value.axes[a]) for a in axes)
    found = reader.summed(value, axes, bool(given.get("keepdim")))
    return _Value(make("div", found.expression, float(count)), found.axes, found.order)


def _extreme(op: str) -> Callable[..., _Value]:
    def rule(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
        value = reader.of(given["self"])
        axes = _axes_of(given.get("dim"), len(value.axes))
        return reader.summed(value, axes, bool(given.get("keepdim")), op)

    return rule


def _norm(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
    value = reader.of(given["self"])
    axes = _axes_of(given.get("dim"), len(value.axes))
    if float(given["ord"]) != 2.0:
        raise NotTiled(f"a norm of order {given['ord']}")
    square = _Value(make("mul", value.expression, value.expression), value.axes, value.order)
    found = reader.summed(square, axes, bool(given.get("keepdim")))
    return _Value(make("sqrt", found.expression), found.axes, found.order)


def _softmax(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
    value, axes = reader.of(given["self"]), [given["dim"]]
    top = reader.summed(value, axes, True, "max")
    powers = reader.both(lambda x, m: make("exp", make("sub", x, m)), value, top)
    total = reader.summed(powers, axes, True)
    return reader.both(lambda p, t: make("div", p, t), powers, total)


def _softmax_backward(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> _Value:
    grad, out = reader.of(given["grad_output"]), reader.of(given["output"])
    product = reader.both(lambda g, y: make("mul", g, y), grad, out)
    total = reader.summed(product, [given["dim"]], True)
    return reader.both(lambda p, y, t: make("sub", p, make("mul", y, t)), product, out, total)


def _centred(reader: _Reader, value: _Value, axes: Sequence[int]) -> tuple[_Value, _Value, float]:
    """The mean, the value without it, and how many entries it is over."""
    count = float(math.prod(_size(value.axes[a]) for a in axes))
    total = reader.summed(value, axes, True)
    mean = _Value(make("div", total.expression, count), total.axes, total.order)
    return mean, reader.both(lambda x, m: make("sub", x, m), value, mean), count


def _layer_norm(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> Any:
    value = reader.of(given["input"])
    axes = list(range(len(value.axes) - len(given["normalized_shape"]), len(value.axes)))
    mean, centred, count = _centred(reader, value, axes)
    square = _Value(
        make("mul", centred.expression, centred.expression), centred.axes, centred.order
    )
    total = reader.summed(square, axes, True)
    variance = make("add", make("div", total.expression, count), float(given["eps"]))
    scale = _Value(make("div", 1.0, make("sqrt", variance)), total.axes, total.order)
    found = reader.both(lambda c, s: make("mul", c, s), centred, scale)
    for name, op in (("weight", "mul"), ("bias", "add")):
        if given[name] is not None:
            found = reader.both(lambda a, b: make(op, a, b), found, reader.of(given[name]))  # noqa: B023
    return found, mean, scale


def _layer_norm_backward(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> Any:
    grad, value = reader.of(given["grad_out"]), reader.of(given["input"])
    mean, scale = reader.of(given["mean"]), reader.of(given["rstd"])
    first = len(value.axes) - len(given["normalized_shape"])
    axes, rows = list(range(first, len(value.axes))), list(range(first))
    count = float(math.prod(_size(value.axes[a]) for a in axes))
    mul = lambda a, b: make("mul", a, b)  # noqa: E731
    normal = reader.both(lambda x, m, s: make("mul", make("sub", x, m), s), value, mean, scale)
    inner = grad if given["weight"] is None else reader.both(mul, grad, reader.of(given["weight"]))
    total = reader.summed(inner, axes, True)
    along = reader.summed(reader.both(mul, inner, normal), axes, True)

    def of_input(g: Operand, t: Operand, a: Operand, n: Operand, s: Operand) -> Operand:
        rest = make("add", make("div", t, count), make("mul", n, make("div", a, count)))
        return make("mul", s, make("sub", g, rest))

    found = reader.both(of_input, inner, total, along, normal, scale)
    of_weight = reader.summed(reader.both(mul, grad, normal), rows, False)
    return found, of_weight, reader.summed(grad, rows, False)


def _variance(reader: _Reader, node: fx.Node, given: dict[str, Any]) -> Any:
    value = reader.of(given["self"])
    axes = _axes_of(given.get("dim"), len(value.axes))
    _, centred, count = _centred(reader, value, axes)
    square = _Value(
        make("mul", centred.expression, centred.expression), centred.axes, centred.order
    )
    found = reader.summed(square, axes, bool(given.get("keepdim")))
    correction = 1 if given.get("correction") is None else given["correction"]
    rest = max(count - correction, 0.0)
    return _Value(make("div", found.expression, float(rest)), found.axes, found.order)


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze"), _view),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv"), _product),
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "select": _select,
    "slice": _slice,
    "sum": _sum,
    "mean": _mean,
    "amax": _extreme("max"),
    "amin": _extreme("min"),
    "linalg_vector_norm": _norm,
    "_softmax": _softmax,
    "_softmax_backward_data": _softmax_backward,
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "var": _variance,
}


# Layout


class _NotLinear(NotTiled):
    """A partial sum enters an operation that needs the whole sum."""


@dataclass(frozen=True)
class _Laid:
    """A value as a kernel computes it.

    Attributes:
        expression: In operations on tiles.
        order: The axes of the cell that it has, in order; a matrix has two in one place.
        summed: Axes of the programs over which it is a partial sum.
        cut: Whether it is one over the parts of a tile.
    """

    expression: Operand
    order: tuple[int, ...]
    summed: frozenset[int]
    cut: bool


_LINEAR = frozenset("neg to_float".split())


class _Layout:
    """Turns expressions over atoms into operations on tiles.

    Args:
        reader: What was read.
        programs: Axes of the cell that become programs.
        places: For every other axis 0 for rows, 1 for columns.
        split: The axis that may be cut.
    """

    def __init__(
        self, reader: _Reader, programs: Sequence[int], places: dict[int, int], split: int | None
    ) -> None:
        self.reader, self.programs, self.places, self.split = reader, programs, places, split
        self.known: dict[Expression, _Laid] = {}
        self.multiplied: set[int] = set()
        self.orders = {
            value.expression: tuple(map(reader.find, value.order))
            for value in reader.leaves.values()
        }

    def __call__(self, root: Operand) -> _Laid:
        if not isinstance(root, Expression):
            return _Laid(root, (), frozenset(), False)
        for node in topological([root]):
            if node not in self.known:
                self.known[node] = self.laid(node)
        return self.known[root]

    def matrix(self, order: Sequence[int]) -> tuple[int, int] | None:
        """Where in an order the two axes are that have the same place; None if there are none."""
        inside = [(i, self.places[c]) for i, c in enumerate(order) if c in self.places]
        for n, (i, place) in enumerate(inside):
            for j, other in inside[n + 1 :]:
                if place == other:
                    if len(inside) > 2:
                        raise NotTiled("a value has more axes than a tile")
                    return i, j
        return None

    def laid(self, node: Expression) -> _Laid:
        if node.op in LEAVES:
            order = self.orders.get(node, ())
            self.matrix(order)
            return _Laid(node, order, frozenset(), False)
        args = [self(a) for a in node.args if not isinstance(a, str)]
        texts = [_read(a) for a in node.args if isinstance(a, str)]
        if node.op == "turn":
            return self.turned(args[0], *texts)
        if node.op in _SUMS and node.op != "dot":
            return self.reduced(node.op, args[0], self.reader.find(texts[0][0]))
        if node.op == "dot":
            return self.dot(args[0], args[1], *texts)
        return self.element(node.op, args)

    def turned(self, x: _Laid, own: list[int], wanted: list[int]) -> _Laid:
        order = tuple(x.order[own.index(a)] for a in wanted)
        pair, now = self.matrix(x.order), self.matrix(order)
        if pair is None or now is None:
            return _Laid(x.expression, order, x.summed, x.cut)
        first = own.index(wanted[now[0]])
        turned = make("turned", x.expression) if first != pair[0] else x.expression
        return _Laid(turned, order, x.summed, x.cut)

    def reduced(self, op: str, x: _Laid, axis: int) -> _Laid:
        size = self.reader.sizes[axis]
        if x.order.count(axis) > 1:
            raise NotTiled("it sums a matrix along one of two equal axes")
        order = tuple(a for a in x.order if a != axis)
        if axis not in x.order:
            if op != "sum":
                return x
            return _Laid(make("mul", x.expression, float(size)), order, x.summed, x.cut)
        if axis in self.programs:
            if op != "sum":
                raise _NotLinear("an extreme over axes that do not mix")
            return _Laid(x.expression, order, x.summed | {axis}, x.cut)
        if axis not in self.places:
            raise NotTiled("it sums along an axis that the state does not have")
        if self.matrix(x.order) is not None:
            raise NotTiled("it sums a matrix")
        if op != "sum" and (x.summed or x.cut or axis == self.split):
            raise _NotLinear("an extreme over parts")
        place, inner = self.places[axis], x.expression
        found = make(f"{'total' if op == 'sum' else op}{place}", inner, float(size))
        if op == "sum" and isinstance(inner, Expression) and inner.op == f"total{1 - place}":
            sizes = (size, inner.args[1]) if place == 0 else (inner.args[1], size)
            found = make("total", inner.args[0], *map(float, sizes))  # type: ignore[arg-type]
        return _Laid(found, order, x.summed, x.cut or axis == self.split)

    def dot(
        self,
        x: _Laid,
        y: _Laid,
        of_x: list[int],
        of_y: list[int],
        x_order: list[int],
        y_order: list[int],
    ) -> _Laid:
        sums = [x_order.index(a) for a in of_x], [y_order.index(a) for a in of_y]
        along = [x.order[i] for i in sums[0]]
        over = {a for a in along if a in self.programs}
        inside = [a for a in along if a in self.places]
        if len(over) + len(inside) != len(along):
            raise NotTiled("a product sums along an axis that the state does not have")
        if (x.summed or x.cut) and (y.summed or y.cut):
            raise _NotLinear("a product of partial sums")
        summed = x.summed | y.summed | over
        cut = x.cut or y.cut or self.split in inside
        own = [
            [a for i, a in enumerate(v.order) if i not in s]
            for v, s in zip((x, y), sums, strict=True)
        ]
        order = (*own[0], *(a for a in own[1] if a in self.places or a not in own[0]))
        free = [[a for a in o if a in self.places] for o in own]
        if any(len(f) > 1 for f in free) or len(inside) > 1:
            raise NotTiled("a product of values with more axes than a tile")
        first, second = x.expression, y.expression
        if not inside:
            if all(free) and self.places[free[0][0]] == self.places[free[1][0]]:
                first, second = self.upright(first, x.order), self.lying(second, y.order)
            return _Laid(make("mul", first, second), order, summed, cut)
        if not all(free):
            raise NotTiled("a product with a value without axes")
        axis = inside[0]
        place = self.places[axis]
        self.multiplied |= {axis, free[0][0], free[1][0]}
        size = float(self.reader.sizes[axis])
        flags = []
        for value, summed_at in ((x, sums[0]), (y, sums[1])):
            pair = self.matrix(value.order)
            at = next(i for i in summed_at if value.order[i] == axis)
            flags.append(None if pair is None else pair.index(at))
        # as a product of two-dimensional arrays: x (m, k) times y (k, n)
        if flags[0] is None and flags[1] is None:
            if place == 0:
                found = make("matmul", make("turned", first), second, size)
            else:
                found = make("matmul", first, make("turned", second), size)
            if self.places[free[0][0]] != self.places[free[1][0]]:
                raise NotTiled("a product of values with different axes")
            return _Laid(found, order, summed, cut)
        if flags[0] is not None and flags[1] is not None:
            first = first if flags[0] == 1 else make("turned", first)
            second = second if flags[1] == 0 else make("turned", second)
            return _Laid(make("matmul", first, second, size), order, summed, cut)
        value, weight, flag = first, second, flags[1]
        if flags[0] is not None:
            value, weight, flag = second, first, flags[0]
        if place == 1:
            weight = weight if flag == 0 else make("turned", weight)
            return _Laid(make("matmul", value, weight, size), order, summed, cut)
        weight = weight if flag == 1 else make("turned", weight)
        return _Laid(make("matmul", weight, value, size), order, summed, cut)

    def upright(self, x: Operand, order: Sequence[int]) -> Operand:
        """A vector as a column."""
        return x if self.vector(order) == 0 else make("turned", x)

    def lying(self, x: Operand, order: Sequence[int]) -> Operand:
        """A vector as a row."""
        return x if self.vector(order) == 1 else make("turned", x)

    def vector(self, order: Sequence[int]) -> int:
        return next(self.places[a] for a in order if a in self.places)

    def element(self, op: str, args: list[_Laid]) -> _Laid:
        summed = frozenset().union(*(a.summed for a in args))
        cut = any(a.cut for a in args)
        order = max((a.order for a in args), key=len, default=())
        order = (*order, *dict.fromkeys(c for a in args for c in a.order if c not in order))
        if self.matrix(order) is not None:
            for a in args:
                inside = [c for c in a.order if c in self.places]
                if len(inside) == 1:
                    raise NotTiled("it combines a matrix with a vector")
        expressions = [a.expression for a in args]
        if summed or cut:
            expressions = self.linear(op, args, summed, cut)
        return _Laid(make(op, *expressions), order, summed, cut)

    def linear(
        self, op: str, args: list[_Laid], summed: frozenset[int], cut: bool
    ) -> list[Operand]:
        """The operands of an operation that has partial sums among them."""
        partial = [bool(a.summed or a.cut) for a in args]
        expressions = [a.expression for a in args]
        if op in _LINEAR or (op in ("div",) and not partial[1]):
            return expressions
        alone = sum(partial) == 1
        if alone and (op == "mul" or (op.endswith("_backward") and partial[0])):
            return expressions
        terms = {"add": (0, 1), "sub": (0, 1), "where": (1, 2)}.get(op)
        if terms is None or any(p for i, p in enumerate(partial) if i not in terms):
            raise _NotLinear(f"{op} of a sum over axes that do not mix")
        for i in terms:
            if args[i].expression == 0.0:
                continue
            if args[i].summed != summed:
                raise _NotLinear(f"{op} of sums over different axes")
            if cut and not args[i].cut:
                expressions[i] = make("once", expressions[i])
        return expressions


def _laid_out(reader: _Reader) -> Tiles:
    find = reader.find
    state = tuple(map(find, reader.leaves["state_0"].order))
    if len(set(state)) != len(state):
        raise NotTiled("two axes of its state are one")
    mixing, read = _sums(reader, reader.new), _sums(reader, [reader.y.expression])
    tile = [a for a in state if a in mixing or a in read]
    if len(tile) > 2:
        raise NotTiled("entries mix along more than two axes")
    for axis in reversed(state):
        entries = math.prod(reader.sizes[a] for a in (*tile, axis))
        if len(tile) < 2 and axis not in tile and entries <= _MOST_ENTRIES:
            tile.append(axis)
    dotted = _sums(reader, reader.new, ("dot",))
    # sums within a row stay within few threads; products with weights need their factors there
    tile.sort(key=lambda a: (a in dotted, a in mixing, a in read, state.index(a)))
    programs = tuple(a for a in state if a not in tile)
    places = {axis: n + 2 - len(tile) for n, axis in enumerate(tile)}
    _place_others(reader, places, programs)
    free = sorted((a for a in tile if a not in mixing), key=lambda a: a in read)
    for split in (*free, None):
        try:
            return _arranged(reader, programs, places, split)
        except _NotLinear:
            if split is None:
                raise
    raise AssertionError


_SUMS = {"sum": 1, "max": 1, "min": 1, "dot": 2}
"""Operations that sum, with the operand that says along which atoms."""


def _sums(
    reader: _Reader, roots: Iterable[Operand], operations: Sequence[str] = tuple(_SUMS)
) -> set[int]:
    """The axes along which expressions sum."""
    found: set[int] = set()
    for node in topological(roots):
        if node.op in operations:
            found.update(_read(node.args[_SUMS[node.op]]))
    return {reader.find(a) for a in found}


def _place_others(reader: _Reader, places: dict[int, int], programs: Sequence[int]) -> None:
    """Give the results of products the place of the axis that the product sums over."""
    roots = [*reader.new, reader.y.expression]
    dots = [n for n in topological(roots) if n.op == "dot"]
    find = reader.find
    while True:
        before = len(places)
        for node in dots:
            sums, x, y = _read(node.args[2]), _read(node.args[4]), _read(node.args[5])
            along = [find(a) for a in sums if find(a) in places]
            others = {find(a) for a in (*x, *y)} - set(places) - set(programs)
            if len(along) == 1 and len(others) == 1:
                places[others.pop()] = places[along[0]]
        if len(places) == before:
            return


def _arranged(
    reader: _Reader, programs: tuple[int, ...], places: dict[int, int], split: int | None
) -> Tiles:
    layout, count = _Layout(reader, programs, places, split), reader.components
    step = [layout(e) for e in reader.new]
    for part in step:
        if part.cut or part.summed:
            raise _NotLinear("a state that is a sum over axes that do not mix")
    adjoints = [layout(e) for e in reader.grads[:count]]
    for part in adjoints:
        if part.cut or part.summed:
            raise _NotLinear("an adjoint that is a sum over axes that do not mix")
    drives = [n for n, kind in reader.inputs if kind.by_rows]
    coefficients = [n for n, kind in reader.inputs if not kind.by_rows]
    wanted = [n for n, kind in reader.inputs if is_differentiable(kind.dtype)]
    place = lambda name: _place(layout, reader.leaves[name])  # noqa: E731
    gradients = [
        _result(layout, expression, place(f"input_{n}"))
        for n, expression in zip(wanted, reader.grads[count:], strict=True)
    ]
    readout = _result(layout, reader.y.expression, _place(layout, reader.y))
    if readout.summed:
        raise NotTiled("its readout sums over axes of the programs")
    sizes = [1, 1]
    for axis, at in places.items():
        sizes[at] = max(sizes[at], reader.sizes[axis])
    products = {places[a] for a in layout.multiplied}
    return Tiles(
        programs=tuple(reader.sizes[a] for a in programs),
        rows=sizes[0],
        columns=sizes[1],
        split=None if split is None else places[split],
        multiplied=(0 in products, 1 in products),
        drives=tuple(drives),
        coefficients=tuple(coefficients),
        state=tuple(place(f"state_{i}") for i in range(count)),
        drive_places=tuple(place(f"input_{n}") for n in drives),
        coefficient_places=tuple(place(f"input_{n}") for n in coefficients),
        step=tuple(p.expression for p in step),
        readout=readout,
        adjoints=tuple(p.expression for p in adjoints),
        gradients=tuple(gradients),
        differentiable=tuple(wanted),
    )


def _result(layout: _Layout, expression: Operand, place: Place) -> Result:
    found = layout(expression)
    value, cut = found.expression, found.cut
    has = layout.split in found.order
    if layout.split is not None and not cut and not has and not _along_split(layout, place):
        value, cut = make("once", value) if isinstance(value, Expression) else value, True
    return Result(value, place, tuple(layout.programs.index(a) for a in sorted(found.summed)), cut)


def _along_split(layout: _Layout, place: Place) -> bool:
    """Whether a tensor has entries along the axis that is cut."""
    assert layout.split is not None
    axis = (place.rows, place.columns)[layout.places[layout.split]]
    return axis.size > 1 and not place.is_matrix


def _place(layout: _Layout, value: _Value) -> Place:
    reader, stride = layout.reader, 1
    strides: dict[int, int] = {}
    for items in reversed(value.axes):
        for atom, size in reversed(items):
            if atom is None:
                raise NotTiled("what it hands out is the same all along an axis")
            strides[atom] = stride
            stride *= size
    inside: list[tuple[int, Axis]] = []
    programs = [0] * len(layout.programs)
    for atom in value.order:
        axis = reader.find(atom)
        if axis in layout.programs:
            programs[layout.programs.index(axis)] = strides[atom]
        elif axis in layout.places:
            inside.append((layout.places[axis], Axis(strides[atom], reader.sizes[axis])))
        else:
            raise NotTiled("an input has an axis that the state does not have")
    has = {reader.find(a) for a in value.order}
    lacks = tuple(n for n, a in enumerate(layout.programs) if a not in has)
    if len(inside) == 2 and inside[0][0] == inside[1][0]:
        return Place(tuple(programs), inside[0][1], inside[1][1], True, lacks)
    found = dict(inside)
    if len(found) != len(inside):
        raise NotTiled("an input has more axes than a tile")
    return Place(tuple(programs), found.get(0, Axis()), found.get(1, Axis()), False, lacks)
