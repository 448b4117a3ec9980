"""Lay a step, its readout and their adjoint out in tiles, see `tiles`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from pararnn.tracing.atom_rules import RULES
from pararnn.tracing.atoms import Reader, Slice, Split, Value, read_atoms
from pararnn.tracing.expressions import LEAVES, Expression, Operand, make, topological
from pararnn.tracing.operations import UnknownOperation
from pararnn.tracing.pieces import Cut, Pieces, evaluate, in_pieces, whole
from pararnn.tracing.products import unfused
from pararnn.tracing.recorder import TraceError, is_differentiable, record
from pararnn.tracing.step import Input, Step, arithmetic, recording, vjp
from pararnn.tracing.tangents import tangents
from pararnn.tracing.tiles import Axis, NotTiled, Piece, Place, Result, Tiles
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
        cuts: dict[str, Cut] = {}
        while True:
            recorded = _recorded(step, readout, cuts)
            reader = _read(recorded)
            if isinstance(reader, Reader):
                return _laid_out(reader, recorded)
            cuts = reader
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


@dataclass(frozen=True)
class _Leaf:
    """A placeholder of a recording: a tensor, or a piece of one.

    Attributes:
        of: What it is a piece of, by the name that this has where nothing is cut.
        kind: Of the piece.
        cut: Where the tensor is cut; None where it is whole.
        number: Of the piece.
    """

    of: str
    kind: Input
    cut: Cut | None
    number: int

    @property
    def start(self) -> int:
        """Where the piece begins in what is cut."""
        return sum(self.cut.sizes[: self.number]) if self.cut else 0

    @property
    def width(self) -> int:
        """Entries of the piece that lie side by side along the axis that is cut."""
        return self.cut.sizes[self.number] * self.cut.after if self.cut else 0


@dataclass(frozen=True)
class _Recorded:
    """Both directions of a step, recorded.

    Attributes:
        graph: The recording.
        leaves: Its placeholders.
        inputs: Those of inputs, with their numbers.
        components: Tensors in the state.
        hidden: Entries of a component.
        cuts: What was cut.
    """

    graph: fx.Graph
    leaves: dict[str, _Leaf]
    inputs: list[tuple[int, Input]]
    components: int
    hidden: int
    cuts: dict[str, Cut]


def _read(recorded: _Recorded) -> Reader | dict[str, Cut]:
    """The reading, or what has to be cut for it."""
    factors: dict[tuple[str, int], tuple[int, ...]] = {}
    for name, leaf in recorded.leaves.items():
        if leaf.cut is not None:
            factors[name, leaf.cut.axis] = (leaf.cut.before, leaf.width)
    while True:
        reader = Reader(recorded.graph, recorded.inputs, recorded.components, factors, RULES)
        try:
            reader.read()
        except Split as split:
            reader.refine(split)
        except Slice as found:
            return _with_cuts(recorded, reader, found)
        else:
            return reader


def _with_cuts(recorded: _Recorded, reader: Reader, found: Slice) -> dict[str, Cut]:
    """What is cut if an axis is too, in all tensors that have it."""
    cuts = dict(recorded.cuts)
    pieces: dict[str, dict[int, tuple[int, ...]]] = {}
    for name, axis, place in reader.origins_of(found.atom):
        leaf = recorded.leaves[name]
        if not leaf.of:
            raise NotTiled("what it hands out is taken in parts")
        own = reader.factors.get((name, axis), (1,))
        before, after = math.prod(own[:place]), math.prod(own[place + 1 :])
        new = Cut(axis, before, found.sizes, after)
        if leaf.cut is None:
            if cuts.setdefault(leaf.of, new) != new:
                raise NotTiled("it takes parts of a tensor along two axes")
            continue
        old = leaf.cut
        whole = (old.axis, old.before, old.after) == (axis, before, after)
        if not whole or sum(found.sizes) != old.sizes[leaf.number]:
            raise NotTiled("it takes parts of a tensor along two axes")
        pieces.setdefault(leaf.of, {})[leaf.number] = found.sizes
    for name, parts in pieces.items():
        old = recorded.cuts[name]
        every = [parts.get(n, (size,)) for n, size in enumerate(old.sizes)]
        cuts[name] = replace(old, sizes=tuple(size for part in every for size in part))
    if cuts == recorded.cuts:
        raise NotTiled("it takes parts of an axis")
    return cuts


def _recorded(step: Step, readout: Readout | None, cuts: dict[str, Cut]) -> _Recorded:
    """Record both directions on one row, so that sums over the rows are sums over one.

    Args:
        step: The step.
        readout: See `tiles`.
        cuts: States and inputs that come in pieces.
    """
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
    states = {f"state_{i}": vector for i in range(count)}
    leaves = _leaves("state", states, cuts)
    given_pieces = _leaves("input", {f"input_{n}": kind for n, kind in inputs}, cuts)
    adjoints = {n.replace("state", "adjoint"): leaf for n, leaf in leaves.items()}
    shape = readout.shape if readout else vector.shape
    adjoints[f"adjoint_{len(leaves)}"] = _Leaf("", Input(tuple(shape), dtype, True), None, 0)
    every = {**leaves, **given_pieces, **adjoints}
    module = unfused(step.module)
    reads = unfused(readout.module) if readout else None

    def run(*flat: Tensor) -> Sequence[Tensor]:
        given = dict(zip(every, flat, strict=True))
        parts: dict[str, list[Tensor]] = {}
        for name, leaf in {**leaves, **given_pieces}.items():
            parts.setdefault(leaf.of, []).append(given[name])
        values = {
            name: Pieces(tuple(own), cuts[name]) if name in cuts else own[0]
            for name, own in parts.items()
        }
        state = [values[name] for name in states]
        found = evaluate(module, *state, *(values[f"input_{n}"] for n in range(len(step.inputs))))
        y = found[0]
        if readout is not None and reads is not None:
            numbers = [
                len(step.inputs) + n if same is None else same
                for n, same in enumerate(readout.shared)
            ]
            after = [found[i] for i in readout.components]
            (y,) = evaluate(reads, *after, *(values[f"input_{n}"] for n in numbers))
        new = [
            piece
            for name, value in zip(states, found, strict=True)
            for piece in in_pieces(value, cuts.get(name))
        ]
        results = [*new, whole(y)]
        wanted = [
            given[n] for n, leaf in given_pieces.items() if is_differentiable(leaf.kind.dtype)
        ]
        of = [given[name] for name in leaves]
        return [*results, *vjp(results, [given[name] for name in adjoints], [*of, *wanted])]

    with recording(step.device):
        examples = {}
        for name, leaf in every.items():
            kind = leaf.kind
            if kind.dtype.is_floating_point:
                kind = Input(kind.shape, dtype, kind.by_rows)
            examples[name] = kind.example(1, step.device)
            may = is_differentiable(kind.dtype) and not name.startswith("adjoint")
            examples[name].requires_grad_(may)
        graph, constants = record(run, examples, _SUBJECT)
    if constants:
        raise NotTiled("it uses tensors that are not its inputs")
    numbered = [(n, leaf.kind) for n, leaf in enumerate(given_pieces.values())]
    return _Recorded(graph, every, numbered, len(leaves), step.hidden, cuts)


def _leaves(sort: str, kinds: dict[str, Input], cuts: dict[str, Cut]) -> dict[str, _Leaf]:
    """The pieces of tensors, numbered anew."""
    found = []
    for name, kind in kinds.items():
        cut = cuts.get(name)
        for number, size in enumerate(cut.sizes if cut else (0,)):
            own = kind
            if cut is not None:
                shape = list(kind.shape)
                shape[cut.axis - kind.by_rows] = cut.before * size * cut.after
                own = Input(tuple(shape), kind.dtype, kind.by_rows)
            found.append(_Leaf(name, own, cut, number))
    return {f"{sort}_{n}": leaf for n, leaf in enumerate(found)}


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

    @property
    def is_matrix_state(self) -> bool:
        """Whether a tensor of the state has rows and columns."""
        states = [self.reader.leaves[f"state_{i}"] for i in range(self.reader.components)]
        return any(len({self.reader.find(a) for a in s.order} & {*self.places}) > 1 for s in states)

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
        axis = inside[0]
        place = self.places[axis]
        if not all(free):
            if all(self.matrix(v.order) is None for v in (x, y)):
                product = self.element("mul", [x, y])
                for gone in dict.fromkeys(along):
                    product = self.reduced("sum", product, gone)
                return product
            return self.of_vector((x, y), sums, axis, _Laid(0.0, order, summed, cut))
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

    def of_vector(
        self, factors: tuple[_Laid, _Laid], sums: list[list[int]], axis: int, like: _Laid
    ) -> _Laid:
        """A vector times a matrix whose axes have one place: a sum over one of them.

        Args:
            factors: Both, in any order.
            sums: Where each is summed.
            axis: The axis of the tile that is summed.
            like: The result but for its expression.
        """
        if not self.is_matrix_state:
            raise NotTiled("channels of a vector mix by weights, which other kernels do")
        pairs = list(zip(factors, sums, strict=True))
        pairs.sort(key=lambda p: self.matrix(p[0].order) is not None)
        (vector, _), (weight, summed_at) = pairs
        pair = self.matrix(weight.order)
        if pair is None or self.matrix(vector.order) is not None:
            raise NotTiled("a product with a value without axes")
        place = self.places[axis]
        at = next(i for i in summed_at if weight.order[i] == axis)
        self.multiplied |= {*self.places}  # blocks of the same size as rows and as columns
        # rows are summed where the result has columns
        along = 1 - place
        matrix: Operand = weight.expression
        if pair.index(at) != along:
            matrix = make("turned", matrix)
        found = make("mul", make("turned", vector.expression), matrix)
        size = float(self.reader.sizes[axis])
        return replace(like, expression=make(f"total{along}", found, size))

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


def _laid_out(reader: Reader, recorded: _Recorded) -> Tiles:
    find = reader.find
    for orders in reader.meetings:
        _check_meeting(reader, orders)
    states = [tuple(map(find, reader.leaves[f"state_{i}"].order)) for i in range(reader.components)]
    state = max(states, key=len)
    if any(len(set(s)) != len(s) for s in states):
        raise NotTiled("two axes of its state are one")
    if any(not {*s} <= {*state} for s in states):
        raise NotTiled("a tensor of its state has an axis that the largest does not have")
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
    common = set(state).intersection(*states)
    if not {*programs} <= common:
        raise NotTiled("a tensor of its state lacks an axis along which nothing mixes")
    places = {axis: n + 2 - len(tile) for n, axis in enumerate(tile)}
    _place_others(reader, places, programs)
    free = sorted((a for a in tile if a not in mixing and a in common), key=lambda a: a in read)
    for split in (*free, None):
        try:
            return _arranged(reader, recorded, programs, places, split)
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
    reader: Reader,
    recorded: _Recorded,
    programs: tuple[int, ...],
    places: dict[int, int],
    split: int | None,
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
    place = lambda name: _place(layout, reader.leaves[name], recorded.leaves[name])  # noqa: E731
    alone = lambda n: _place(layout, reader.leaves[f"input_{n}"])  # noqa: E731
    gradients = [
        _result(layout, expression, alone(n))
        for n, expression in zip(wanted, reader.grads[count:], strict=True)
    ]
    readout = _result(layout, reader.y.expression, _place(layout, reader.y))
    if readout.summed:
        raise NotTiled("its readout sums over axes of the programs")
    sizes = [1, 1]
    for axis, at in places.items():
        sizes[at] = max(sizes[at], reader.sizes[axis])
    products = {places[a] for a in layout.multiplied}
    before = tuple(p.expression for p in adjoints)
    state = tuple(_state_places(layout, recorded))
    return Tiles(
        programs=tuple(reader.sizes[a] for a in programs),
        rows=sizes[0],
        columns=sizes[1],
        split=None if split is None else places[split],
        multiplied=(0 in products, 1 in products),
        drives=tuple(drives),
        coefficients=tuple(coefficients),
        pieces=tuple(_pieces(recorded)),
        state=state,
        drive_places=tuple(place(f"input_{n}") for n in drives),
        coefficient_places=tuple(place(f"input_{n}") for n in coefficients),
        step=tuple(p.expression for p in step),
        readout=readout,
        adjoints=before,
        gradients=tuple(gradients),
        wanted=tuple(wanted),
        tangents=tangents(before, state),
    )


def _pieces(recorded: _Recorded) -> Iterable[Piece]:
    for n, kind in recorded.inputs:
        leaf = recorded.leaves[f"input_{n}"]
        cut = leaf.cut and replace(leaf.cut, axis=leaf.cut.axis - kind.by_rows)
        yield Piece(int(leaf.of.removeprefix("input_")), kind.shape, cut)


def _state_places(layout: _Layout, recorded: _Recorded) -> Iterable[Place]:
    """Where the tensors of the state lie in a row of components."""
    for i in range(recorded.components):
        leaf = recorded.leaves[f"state_{i}"]
        place = _place(layout, layout.reader.leaves[f"state_{i}"], leaf)
        first = int(leaf.of.removeprefix("state_")) * recorded.hidden
        yield replace(place, offset=place.offset + first)


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


def _place(layout: _Layout, value: Value, leaf: _Leaf | None = None) -> Place:
    """Where a value lies, in a tensor of its own or in the one that a leaf is a piece of."""
    reader, stride, offset = layout.reader, 1, 0
    strides: dict[int, int] = {}
    for axis, items in reversed(list(enumerate(value.axes))):
        cut = leaf.cut if leaf and leaf.cut and leaf.cut.axis == axis else None
        inner = 1
        for atom, size in reversed(items):
            if atom is None:
                raise NotTiled("what it hands out is the same all along an axis")
            strides[atom] = stride * inner
            if leaf and cut and inner >= leaf.width:  # other pieces lie between
                strides[atom] = stride * (inner // leaf.width) * sum(cut.sizes) * cut.after
            inner *= size
        if leaf and cut:
            offset = leaf.start * cut.after * stride
        stride *= cut.length if cut else inner
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
        return Place(tuple(programs), inside[0][1], inside[1][1], True, offset)
    found = dict(inside)
    if len(found) != len(inside):
        raise NotTiled("an input has more axes than a tile")
    return Place(tuple(programs), found.get(0, Axis()), found.get(1, Axis()), False, offset)
