"""Read the recording of a step on one row as expressions over atoms.

A tensor of any shape has axes that are made of atoms. An axis of an input is one atom, or several
where a view takes it apart: then the recording is read again with the parts. Atoms that meet in an
operation on each element are the same axis of the cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from pararnn.tracing.expressions import LEAVES, Expression, Operand, leaf, make, topological
from pararnn.tracing.operations import (
    IDENTITIES,
    creation_value,
    express,
    is_pointwise,
    named_arguments,
    operation_name,
)
from pararnn.tracing.partition import operation
from pararnn.tracing.recorder import is_differentiable, show_place
from pararnn.tracing.step import Input
from pararnn.tracing.tiles import NotTiled


class Split(Exception):
    """An atom has to be taken apart."""

    def __init__(self, atom: int, sizes: tuple[int, ...]) -> None:
        super().__init__(atom, sizes)
        self.atom, self.sizes = atom, sizes


class Slice(Exception):
    """An atom is taken in parts."""

    def __init__(self, atom: int, sizes: tuple[int, ...]) -> None:
        super().__init__(atom, sizes)
        self.atom, self.sizes = atom, sizes


Item = tuple[int | None, int]
"""Part of an axis: its atom and its size; no atom where values are the same all along it."""


@dataclass(frozen=True)
class Value:
    """A tensor.

    Attributes:
        expression: Of an entry.
        axes: The items of each axis; items of size 1 are left out.
        order: The atoms in the order in which the expression has them.
    """

    expression: Operand
    axes: tuple[tuple[Item, ...], ...]
    order: tuple[int, ...]

    def is_like(self, other: Value) -> bool:
        """Whether two values have the same shape."""
        return list(map(size_of, self.axes)) == list(map(size_of, other.axes))


def size_of(items: Iterable[Item]) -> int:
    """Entries of an axis."""
    return math.prod(size for _, size in items)


def atoms_of(axes: Iterable[Iterable[Item]]) -> tuple[int, ...]:
    """The atoms of some axes, in order."""
    return tuple(atom for items in axes for atom, _ in items if atom is not None)


@dataclass
class Reader:
    """Reads a recording.

    Args:
        graph: The recording.
        inputs: Inputs of the step and the readout, with their numbers.
        components: Tensors in the state.
        factors: For an axis of an input, the sizes of its atoms; one atom for others.
        rules: How operations are read that are not on each element.

    Attributes:
        values: What nodes compute.
        same: For every atom another one of the same axis, or itself.
        sizes: Of atoms.
        origins: Input, axis and place there of each atom; None for one that stands for another.
        meetings: Atoms of values that meet in operations on each element.
        leaves: The inputs.
        new: The new components.
        y: What is handed out.
        grads: Gradients of the components, and of the differentiable inputs.
    """

    graph: fx.Graph
    inputs: list[tuple[int, Input]]
    components: int
    factors: dict[tuple[str, int], tuple[int, ...]]
    rules: Mapping[str, Callable[..., Any]]
    values: dict[fx.Node, Any] = field(default_factory=dict)
    same: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    origins: list[tuple[str, int, int] | None] = field(default_factory=list)
    meetings: set[tuple[tuple[int, ...], ...]] = field(default_factory=set)
    leaves: dict[str, Value] = field(default_factory=dict)
    new: list[Operand] = field(default_factory=list)
    y: Value = field(init=False)
    grads: list[Operand] = field(default_factory=list)

    # Atoms

    def find(self, atom: int) -> int:
        """The axis of the cell that an atom belongs to."""
        while self.same[atom] != atom:
            atom = self.same[atom]
        return atom

    def unify(self, a: int, b: int) -> None:
        """Take two atoms for the same axis."""
        a, b = self.find(a), self.find(b)
        if self.sizes[a] != self.sizes[b]:
            raise NotTiled("axes of different sizes meet")
        self.same[max(a, b)] = min(a, b)

    def another(self, atom: int) -> int:
        """An atom for a second axis of a value, along which it has the entries of the first."""
        self.same.append(self.find(atom))
        self.sizes.append(self.sizes[atom])
        self.origins.append(None)
        return len(self.same) - 1

    def refine(self, split: Split) -> None:
        """Take an atom apart, and all that belong to the same axis, for the next reading."""
        of = self.find(split.atom)
        for atom, origin in reversed(list(enumerate(self.origins))):
            if origin is not None and self.find(atom) == of:
                name, axis, place = origin
                old = self.factors.get((name, axis), (self.sizes[atom],))
                # places count in the factors of this reading, so the last place comes first
                new = (*old[:place], *split.sizes, *old[place + 1 :])
                self.factors[name, axis] = new

    def origins_of(self, atom: int) -> list[tuple[str, int, int]]:
        """Where an axis of the cell is in inputs."""
        of = self.find(atom)
        return [o for a, o in enumerate(self.origins) if o is not None and self.find(a) == of]

    def placeholder(self, name: str, shape: Sequence[int], expression: Operand) -> Value:
        """An input, with atoms of its own."""
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
        self.leaves[name] = value = Value(expression, tuple(axes), tuple(order))
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
                sort, _, number = name.partition("_")
                expression = numbers[name] if sort == "input" else leaf(sort, int(number))
                shape = node.meta["shape"]
                self.values[node] = self.placeholder(name, shape, expression)
            elif node.op == "output":
                self.compare(list(node.args[0]))
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
            if self.leaves[f"state_{i}"].is_like(self.leaves["state_0"]):
                self.aligned([self.leaves["state_0"], self.leaves[f"state_{i}"]])
        self.aligned([y, self.leaves[f"adjoint_{count}"]])
        wanted = [f"input_{n}" for n, kind in self.inputs if is_differentiable(kind.dtype)]
        of = [self.leaves[name] for name in (*(f"state_{i}" for i in range(count)), *wanted)]
        self.new, self.y, self.grads = [n.expression for n in new], y, []
        for leaf_, grad in zip(of, grads, strict=True):
            (_, expression), _, _ = self.aligned([leaf_, grad])
            self.grads.append(expression)

    def of(self, given: Any) -> Value:
        """A node or a number as a value."""
        if isinstance(given, fx.Node):
            value = self.values[given]
            if not isinstance(value, Value):
                raise NotTiled("a value is no tensor")
            return value
        return Value(given, (), ())

    def shape(self, value: Value) -> list[int]:
        """Sizes of its axes."""
        return list(map(size_of, value.axes))

    def evaluate(self, node: fx.Node) -> Any:
        """What a node computes."""
        func: Any = operation(node)
        if not hasattr(func, "_schema"):
            if getattr(func, "__name__", "") == "getitem":
                return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
            raise NotTiled(f"{func} is not known")
        name = operation_name(func)
        filled = creation_value(func, tuple(node.args))
        if filled is not None:
            shape = node.meta["shape"]
            return Value(filled, tuple(((None, s),) if s > 1 else () for s in shape), ())
        rule = self.rules.get(name)
        if rule is not None:
            return rule(self, node, named_arguments(func, tuple(node.args), dict(node.kwargs)))
        if name in IDENTITIES:
            return self.values[node.args[0]]  # type: ignore[index]
        if is_pointwise(func):
            return self.pointwise(node, func)
        raise NotTiled(f"{name} is not known to kernels of tiles")

    # Operations on each element

    def pointwise(self, node: fx.Node, func: Any) -> Any:
        """An operation on each element."""
        tensors = [a for a in tree_leaves((node.args, node.kwargs)) if isinstance(a, fx.Node)]
        distinct = list(dict.fromkeys(tensors))
        expressions, axes, order = self.aligned([self.of(t) for t in distinct])
        given = dict(zip(distinct, expressions, strict=True))
        pick = lambda a: given[a] if isinstance(a, fx.Node) else a  # noqa: E731
        args, kwargs = tree_map(pick, tuple(node.args)), tree_map(pick, dict(node.kwargs))
        found = express(func, args, kwargs, torch.float64)
        if isinstance(found, tuple):
            return tuple(Value(f, axes, order) for f in found)
        return Value(found, axes, order)

    def aligned(
        self, values: Sequence[Value]
    ) -> tuple[list[Operand], tuple[tuple[Item, ...], ...], tuple[int, ...]]:
        """The expressions of values that are broadcast, and the axes and order of the result."""
        rank = max(len(v.axes) for v in values)
        padded = [((),) * (rank - len(v.axes)) + v.axes for v in values]
        names: list[dict[int, int]] = [{} for _ in values]
        axes = tuple(self.merged([list(p[axis]) for p in padded], names) for axis in range(rank))
        if len(set(atoms := atoms_of(axes))) < len(atoms):
            raise NotTiled("an axis meets itself")
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
                        raise Split(atom, (least, size // least))
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
        self, values: Sequence[Value], names: Sequence[dict[int, int]]
    ) -> tuple[list[Operand], tuple[int, ...]]:
        """The expressions with their atoms in one order, and that order."""
        orders = [tuple(n.get(a, a) for a in v.order) for v, n in zip(values, names, strict=True)]
        order = max(orders, key=len)
        order = (*order, *(a for o in orders for a in o if a not in order))
        order = tuple(dict.fromkeys(order))
        if any(len(set(o)) < len(o) for o in orders):
            raise NotTiled("an axis meets itself")
        self.meetings.add(tuple(orders))
        found = []
        for value, own in zip(values, orders, strict=True):
            wanted = tuple(a for a in order if a in own)
            expression = value.expression
            if wanted != own and isinstance(expression, Expression):
                expression = make("turn", expression, written(own), written(wanted))
            found.append(expression)
        return found, order

    # Moves

    def regrouped(self, value: Value, shape: Sequence[int]) -> Value:
        """A view of a value."""
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
                        raise Split(atom, (part, has // part))
                    items.insert(0, (None, has // part))
                axis.append((atom, part))
                size //= part
            axes.append(tuple(axis))
        if any(size > 1 for _, size in items):
            raise NotTiled("a view does not fit")
        return Value(value.expression, tuple(axes), value.order)

    # Products and sums

    def product(self, left: Value, right: Value) -> Value:
        """Left (*batch, m, k) times right (*batch, k, n), or (k,) without batch."""
        batch = len(left.axes) - 2 if len(right.axes) > 1 else 0
        names: tuple[dict[int, int], ...] = ({}, {})
        axes = [self.merged([list(left.axes[i]), list(right.axes[i])], names) for i in range(batch)]
        own: tuple[dict[int, int], ...] = ({}, {})
        along = self.merged([list(left.axes[-1]), list(right.axes[batch])], own)
        x, y = left.expression, right.expression
        result = right.axes[batch + 1 :]
        weighted = _is_weight(x, left.axes[batch:]) or _is_weight(y, right.axes[batch:])
        if not weighted and not (atoms_of([left.axes[batch]]) and atoms_of(result)):
            # a vector is one factor: a sum of products of entries
            every = [{**n, **o} for n, o in zip(names, own, strict=True)]
            axes += [left.axes[batch], *result]
            expressions, order = self.in_order((left, right), every)
            found = make("mul", *expressions)
            for atom, size in along:
                found = make("mul", found, float(size)) if atom is None else sum_of(found, atom)
            lost = atoms_of([along])
            return Value(found, tuple(axes), tuple(a for a in order if a not in lost))
        has = atoms_of((*axes, left.axes[batch]))
        twice = {a: self.another(a) for a in atoms_of(result) if a in has}
        names[1].update(twice)
        axes += [left.axes[batch]]
        axes += [
            tuple((twice.get(a, a), n) if a is not None else (a, n) for a, n in r) for r in result
        ]
        orders = [
            tuple(n.get(a, a) for a in v.order if a not in o)
            for v, n, o in zip((left, right), names, own, strict=True)
        ]
        order = tuple(dict.fromkeys((*orders[0], *orders[1])))
        back = [{name: atom for atom, name in o.items()} for o in own]
        sums: tuple[list[int], list[int]] = [], []
        for atom, size in along:
            if atom is None:
                x = make("mul", x, float(size))
            elif atom in back[0] and atom in back[1]:
                sums[0].append(back[0][atom])
                sums[1].append(back[1][atom])
            elif atom in back[0]:
                x = sum_of(x, back[0][atom])
            else:
                y = sum_of(y, back[1][atom])
        if not isinstance(x, Expression) or not isinstance(y, Expression):
            raise NotTiled("a factor of a product of matrices is a number")
        kept = [
            [a for a in v.order if a not in o or a in s]
            for v, o, s in zip((left, right), own, sums, strict=True)
        ]
        shared = set(atoms_of(axes[:batch]))
        both = [a for a in left.order if names[0].get(a, a) in shared & {*orders[1]}]
        found = make("dot", x, y, *map(written, (*sums, *kept, both)))
        return Value(found, tuple(axes), order)

    def summed(self, value: Value, axes: Sequence[int], keep: bool, op: str = "sum") -> Value:
        """The sum along axes, or another operation of `sum`, `max` and `min`."""
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
        lost = set(atoms_of(value.axes[a] for a in gone))
        return Value(expression, tuple(left), tuple(a for a in value.order if a not in lost))

    def both(self, func: Callable[..., Operand], *values: Value) -> Value:
        """An operation on each element of values that are broadcast."""
        expressions, axes, order = self.aligned(values)
        return Value(func(*expressions), axes, order)


def _is_weight(expression: Operand, axes: Sequence[tuple[Item, ...]]) -> bool:
    """Whether a factor with these axes is a matrix that is the same at all times."""
    if not isinstance(expression, Expression) or any(not atoms_of([a]) for a in axes):
        return False
    if len(axes) != 2:
        return False
    leaves = [n for n in topological([expression]) if n.op in LEAVES]
    return all(n.op == "coefficient" for n in leaves)


def sum_of(value: Operand, atom: int) -> Operand:
    """The sum along an atom."""
    return make("sum", value, str(atom))


def written(atoms: Iterable[int]) -> str:
    """Atoms as an operand of an expression."""
    return ",".join(map(str, atoms))


def read_atoms(text: Operand) -> list[int]:
    """What `written` wrote."""
    assert isinstance(text, str)
    return [int(a) for a in text.split(",") if a]
