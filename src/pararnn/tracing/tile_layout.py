"""Lay a step, its readout and their adjoint out in tiles, see `tiles`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pararnn.tracing.atom_rules import RULES
from pararnn.tracing.atoms import Reader, Split, Value, read_atoms
from pararnn.tracing.expressions import LEAVES, Expression, Operand, make, topological
from pararnn.tracing.operations import UnknownOperation
from pararnn.tracing.products import unfused
from pararnn.tracing.recorder import TraceError, is_differentiable, record
from pararnn.tracing.step import Input, Step, arithmetic, recording, vjp
from pararnn.tracing.tiles import Axis, NotTiled, Place, Result, Tiles
from pararnn.tracing.traced import Readout

_SUBJECT = "the step"
_MOST_ENTRIES = 1 << 14  # of a tile


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
            reader = Reader(graph, inputs, step.num_components, factors, RULES)
            try:
                reader.read()
                break
            except Split as split:
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
    inputs, count = all_inputs(step, readout), step.num_components
    floats = [kind.dtype for _, kind in inputs if kind.dtype.is_floating_point]
    dtype = arithmetic([step.dtype, *floats])
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
        self, reader: Reader, programs: Sequence[int], places: dict[int, int], split: int | None
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
                self.known[node] = found = self.laid(node)
                self.check(found)
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

    def check(self, found: _Laid) -> None:
        """Refuse what no program has: a part of a sum at entries of other parts."""
        if found.summed & {*found.order} or (found.cut and self.split in found.order):
            raise _NotLinear("a partial sum meets the entries that it sums")
        pair = self.matrix(found.order)
        if pair and self.split in found.order:  # noqa: SIM102
            if self.places[found.order[pair[0]]] == self.places[self.split]:
                raise _NotLinear("a matrix whose axes are cut")
        inside = [a for a in found.order if a not in self.places]
        if len(set(inside)) < len(inside):
            raise NotTiled("a value has an axis of the programs twice")

    def laid(self, node: Expression) -> _Laid:
        if node.op in LEAVES or node in self.orders:  # a truth value is more than its leaf
            order = self.orders.get(node, ())
            self.matrix(order)
            return _Laid(node, order, frozenset(), False)
        args = [self(a) for a in node.args if not isinstance(a, str)]
        texts = [read_atoms(a) for a in node.args if isinstance(a, str)]
        if node.op == "turn":
            return self.turned(args[0], *texts)
        if node.op in _SUMS and node.op != "dot":
            return self.reduced(node.op, args[0], self.reader.find(texts[0][0]))
        if node.op == "dot":
            return self.dot(args[0], args[1], *texts)
        return self.element(node.op, args)

    def turned(self, x: _Laid, own: list[int], wanted: list[int]) -> _Laid:
        find, places = self.reader.find, self.places
        order = tuple(axis for a in wanted if (axis := find(a)) in x.order)
        pair = self.matrix(x.order)
        if pair is None:
            return _Laid(x.expression, order, x.summed, x.cut)
        at = places[x.order[pair[0]]]
        before, after = ([a for a in o if places.get(find(a)) == at] for o in (own, wanted))
        turned = make("turned", x.expression) if before != after else x.expression
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

    def position(self, order: Sequence[int], atoms: list[int], atom: int) -> int:
        """Where an atom is in the order of a value; `atoms` are those that were read."""
        axis = self.reader.find(atom)
        number = [a for a in atoms if self.reader.find(a) == axis].index(atom)
        found = [i for i, a in enumerate(order) if a == axis]
        if number >= len(found):
            raise NotTiled("a product of matrices with one that is the same all along an axis")
        return found[number]

    def dot(
        self,
        x: _Laid,
        y: _Laid,
        of_x: list[int],
        of_y: list[int],
        x_order: list[int],
        y_order: list[int],
        both: list[int],
    ) -> _Laid:
        sums = [
            [self.position(v.order, atoms, a) for a in of]
            for v, atoms, of in ((x, x_order, of_x), (y, y_order, of_y))
        ]
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
        shared = set(map(self.reader.find, both))
        if shared & {*self.places}:
            raise NotTiled("a product of matrices for every entry of an axis of a tile")
        order = (*own[0], *(a for a in own[1] if a not in shared))
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
        for factor, summed_at in ((x, sums[0]), (y, sums[1])):
            pair = self.matrix(factor.order)
            at = next(i for i in summed_at if factor.order[i] == axis)
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
        for a in args:
            order = (*order, *(Counter(a.order) - Counter(order)).elements())
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


def _laid_out(reader: Reader) -> Tiles:
    find = reader.find
    for orders in reader.meetings:
        _check_meeting(reader, orders)
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


def _check_meeting(reader: Reader, orders: tuple[tuple[int, ...], ...]) -> None:
    """Refuse values that have one axis of the cell in different places.

    As do a vector and its transpose: which of the two a value has does not show in expressions.
    """
    axes: dict[int, set[int]] = {}
    for atom in {a for order in orders for a in order}:
        axes.setdefault(reader.find(atom), set()).add(atom)
    for atoms in axes.values():
        if any(len(atoms & {*order}) not in (0, len(atoms)) for order in orders):
            raise NotTiled("two axes of a value are one")


_SUMS = {"sum": 1, "max": 1, "min": 1, "dot": 2}
"""Operations that sum, with the operand that says along which atoms."""


def _sums(
    reader: Reader, roots: Iterable[Operand], operations: Sequence[str] = tuple(_SUMS)
) -> set[int]:
    """The axes along which expressions sum."""
    found: set[int] = set()
    for node in topological(roots):
        if node.op in operations:
            found.update(read_atoms(node.args[_SUMS[node.op]]))
    return {reader.find(a) for a in found}


def _place_others(reader: Reader, places: dict[int, int], programs: Sequence[int]) -> None:
    """Give the results of products the place of the axis that the product sums over."""
    roots = [*reader.new, reader.y.expression]
    dots = [n for n in topological(roots) if n.op == "dot"]
    find = reader.find
    while True:
        before = len(places)
        for node in dots:
            sums, x, y = (
                read_atoms(node.args[2]),
                read_atoms(node.args[4]),
                read_atoms(node.args[5]),
            )
            along = [find(a) for a in sums if find(a) in places]
            others = {find(a) for a in (*x, *y)} - set(places) - set(programs)
            if len(along) == 1 and len(others) == 1:
                places[others.pop()] = places[along[0]]
        if len(places) == before:
            return


def _arranged(
    reader: Reader, programs: tuple[int, ...], places: dict[int, int], split: int | None
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
    is_one = any(a in layout.places for a in found.order) and layout.matrix(found.order) is None
    if place.is_matrix and is_one:
        raise NotTiled("a matrix is the same all along an axis")
    if layout.split is not None and not cut and not has and not _along_split(layout, place):
        value, cut = (make("once", value), True) if isinstance(value, Expression) else (value, cut)
    return Result(value, place, tuple(layout.programs.index(a) for a in sorted(found.summed)), cut)


def _along_split(layout: _Layout, place: Place) -> bool:
    """Whether a tensor has entries along the axis that is cut."""
    assert layout.split is not None
    axis = (place.rows, place.columns)[layout.places[layout.split]]
    return axis.size > 1 and not place.is_matrix


def _place(layout: _Layout, value: Value) -> Place:
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
    if len(inside) == 2 and inside[0][0] == inside[1][0]:
        return Place(tuple(programs), inside[0][1], inside[1][1], True)
    found = dict(inside)
    if len(found) != len(inside):
        raise NotTiled("an input has more axes than a tile")
    return Place(tuple(programs), found.get(0, Axis()), found.get(1, Axis()), False)
