"""Generates the functions that the kernels of tiles call, from a step in tiles.

Sums along an axis and products of matrices are calls of functions in `functions`; everything else
is written as for channels that do not mix, and values are broadcast.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

from pararnn.kernels.lowering import OF_TILES, lower
from pararnn.kernels.triton.expressions import equations
from pararnn.kernels.triton.steps import Module, Precision
from pararnn.tracing.expressions import (
    LEAVES,
    Expression,
    Operand,
    is_boolean,
    make,
    operands,
    rewrite,
    topological,
)
from pararnn.tracing.tiles import Place, Tiles

_TOTALS = ("total", "total0", "total1")
_ALONG = {"total": "total_along", "max": "largest_along", "min": "smallest_along"}


def tiled_source(tiles: Tiles, precision: Precision) -> str:
    """A module with the functions that the kernels of tiles call: `step`, `again` and `adjoint`.

    And two that go on through chunks, where `Tiles.tangents` are known: `tangent` returns new
    tensors of the state and the Jacobian by columns; `gather` the adjoints before the step too, and
    the Jacobian by rows.

    Args:
        tiles: The step.
        precision: See `Module`.
    """
    module = Module(precision)
    plain = module.language

    def term(op: str, args: Sequence[str]) -> str:
        if op not in OF_TILES:
            return plain.term(op, args)
        if op == "turned":
            return f"tl.trans({args[0]})"
        if op == "once":
            return f"(({args[0]}) * once)"
        if op == "matmul":
            module.used.add(op)
            turned = ", ".join(str(bool(_whole(a))) for a in args[3:])
            return f"matmul({args[0]}, {args[1]}, {_whole(args[2])}, FACTORS, {turned})"
        if op == "total":
            module.used.add("total_of")
            return f"total_of({args[0]}, {_whole(args[1])}, {_whole(args[2])})"
        name = _ALONG[op[:-1]]
        module.used.add(name)
        return f"{name}({args[0]}, {op[-1]}, {_whole(args[1])})"

    number = lambda value: _Number(value, plain.number(value))  # noqa: E731
    module.language = dataclasses.replace(plain, term=term, number=number)
    leaves = {
        "state": len(tiles.step),
        "drive": len(tiles.drives),
        "coefficient": len(tiles.coefficients),
    }
    flags = ["FACTORS: tl.constexpr", "once"]
    handed = [tiles.readout.expression]
    like = lambda roots: _like_state(tiles, roots)  # noqa: E731

    def function(name: str, results: Sequence[Sequence[Operand]]) -> None:
        new = lower(root for members in results for root in members)
        new = [_one_total(tiles, root) for root in new]
        left = iter(_small_first(tiles, new) if precision == "half" else new)
        one = [[next(left) for _ in members] for members in results]
        own = _turned_inside(one)
        first = _in_order(tiles, own)
        module.function(name, leaves, own, flags=flags, first=first, shaped=like)

    function("step", [tiles.step, handed])
    function("again", [tiles.step])
    found = dict(zip(tiles.wanted, tiles.gradients, strict=True))
    grads = [
        [found[n].expression for n in numbers if n in found]
        for numbers in (tiles.drives, tiles.coefficients)
    ]
    columns = [entry for column in tiles.tangents for entry in column]
    rows = [entry for row in zip(*tiles.tangents, strict=True) for entry in row]
    if len(tiles.tangents) == 1:
        rows = columns
    if columns:
        function("tangent", [tiles.step, columns])
    leaves = {**leaves, "adjoint": len(tiles.step) + 1}
    function("adjoint", [tiles.adjoints, *grads])
    if columns:
        function("gather", [tiles.step, tiles.adjoints, rows])
    return module.text("a cell's step, for the kernels of tiles", equations(tiles.step))


def _small_first(tiles: Tiles, roots: Sequence[Operand]) -> list[Operand]:
    """Products in an order in which what has fewer axes is multiplied first, and out of totals.

    A quotient by such a value is a product with its reciprocal: one division for a row, where each
    entry had one of eight instructions or more. The results are off by some units in the last place
    of float32, which results in half precision do not show.
    """
    new: dict[Expression, Operand] = {}
    factors: dict[Expression, _Factors] = {}
    axes, uses = _axes_of(tiles, [roots]), _uses(roots)
    for node in topological(roots):
        args = tuple(new[a] if isinstance(a, Expression) else a for a in node.args)
        own = _factors_of(node, args, axes, factors)
        if own is not None and own.small and own.large:
            new[node] = own.product()
            if uses[node] == 1 or any(has for has, _ in own.small):
                factors[node] = own
        elif node.op in _TOTALS and (inside := factors.get(node.args[0])):  # type: ignore[arg-type]
            new[node] = inside.total(node.op, args[1:])
        else:
            new[node] = node if node.op in LEAVES else make(node.op, *args)
    return [new[r] if isinstance(r, Expression) else r for r in roots]


@dataclasses.dataclass(frozen=True)
class _Factors:
    """A product.

    Attributes:
        large: Factors with all of its axes.
        small: The others, with their axes.
        negative: Whether it is the negative of that.
    """

    large: tuple[Operand, ...]
    small: tuple[tuple[frozenset[int], Operand], ...]
    negative: bool = False

    def product(self) -> Operand:
        """The product: what has the same axes first."""
        found: dict[frozenset[int], Operand] = {}
        for axes, factor in sorted(self.small, key=lambda own: -len(own[0])):
            # a number joins a row or a column, if there is one
            at = axes if axes or not found else next(iter(found))
            found[at] = make("mul", found[at], factor) if at in found else factor
        result = functools.reduce(functools.partial(make, "mul"), [*self.large, *found.values()])
        return make("neg", result) if self.negative else result

    def total(self, op: str, sizes: Sequence[Operand]) -> Operand:
        """Its total, of what is not the same for all that is added up."""
        along = {0, 1} if op == "total" else {int(op[-1])}
        outside = tuple(own for own in self.small if own[0] and not own[0] & along)
        inside = tuple(own for own in self.small if own not in outside)
        total = make(op, _Factors(self.large, inside).product(), *sizes)
        return _Factors((total,), outside, self.negative).product()


def _factors_of(
    node: Expression,
    args: Sequence[Operand],
    axes: Mapping[Expression, set[int]],
    known: Mapping[Expression, _Factors],
) -> _Factors | None:
    """The factors of a value: those of its operands `args`, as they are now."""
    if node.op not in ("mul", "div", "neg") or any(map(is_boolean, args)):
        return None
    large: list[Operand] = []
    small: list[tuple[frozenset[int], Operand]] = []
    negative = node.op == "neg"
    for n, (old, now) in enumerate(zip(node.args, args, strict=True)):
        has = frozenset(axes[old]) if isinstance(old, Expression) else frozenset()
        if node.op == "div" and n == 1:
            if len(has) == len(axes[node]):
                return None
            small.append(
                (has, 1.0 / now if now and isinstance(now, float) else make("div", 1.0, now))
            )
        elif len(has) < len(axes[node]):
            small.append((has, now))
        elif isinstance(old, Expression) and old in known:
            large += known[old].large
            small += known[old].small
            negative ^= known[old].negative
        else:
            large.append(now)
    return _Factors(tuple(large), tuple(small), negative)


def _one_total(tiles: Tiles, root: Operand) -> Operand:
    """A sum or difference of totals as one total, so that threads exchange one number."""
    if not isinstance(root, Expression) or root.op not in ("add", "sub", "neg"):
        return root
    args = [_one_total(tiles, a) for a in root.args]
    given = [a for a in args if isinstance(a, Expression) and a.op in _TOTALS]
    if len(given) < len(args) or len({(a.op, *a.args[1:]) for a in given}) > 1:
        return make(root.op, *args)
    inner = [a.args[0] for a in given]
    axes = _axes_of(tiles, [inner])
    if any(axes.get(a) != axes.get(inner[0]) for a in inner):  # type: ignore[arg-type]
        return make(root.op, *args)
    return make(given[0].op, _one_product(root.op, inner), *given[0].args[1:])


def _one_product(op: str, args: Sequence[Operand]) -> Operand:
    """A sum or difference of tiles; that of two products with a factor in common as one product."""
    if op == "neg":
        return make(op, *args)
    terms = [(True, args[0]), (op == "add", args[1])]
    for n, (plus, a) in enumerate(terms):
        if isinstance(a, Expression) and a.op == "neg":
            terms[n] = not plus, a.args[0]
    (plus, a), (also, b) = sorted(terms, key=lambda term: not term[0])
    if isinstance(a, Expression) and isinstance(b, Expression) and a.op == b.op == "mul":
        for n, m in itertools.product(range(2), range(2)):
            if a.args[n] is b.args[m]:
                rest = make("add" if plus == also else "sub", a.args[1 - n], b.args[1 - m])
                found = make("mul", a.args[n], rest)
                return found if plus else make("neg", found)
    return make(op, *args)


def _uses(roots: Sequence[Operand]) -> Counter[Expression]:
    """How often values are used."""
    uses = Counter(a for node in topological(roots) for a in operands(node))
    uses.update(root for root in roots if isinstance(root, Expression))
    return uses


def _in_order(tiles: Tiles, results: Sequence[Sequence[Operand]]) -> list[Expression]:
    """Results and values that are used several times, in an order that keeps few tiles at a time.

    The compiler keeps this order, by and large. In that of the results a step back begins with the
    adjoint before it, and keeps all that the gradients are made of: too many registers. Here next
    comes what leaves the fewest tiles, and of those what makes none.
    """
    roots = [root for members in results for root in members if isinstance(root, Expression)]
    order, axes, uses = topological(roots), _axes_of(tiles, results), _uses(roots)
    kept, ends = {e for e in order if e.op in LEAVES or uses[e] > 1} | {*roots}, {*roots}
    needs: dict[Expression, set[Expression]] = {}
    for node in order:  # of those that are kept
        below = [{a} if a in kept else needs[a] for a in operands(node)]
        needs[node] = set().union(*below)
    left = {node: None for node in order if node in kept and node.op not in LEAVES}
    users = Counter(a for node in left for a in needs[node])

    def tiles_more(node: Expression) -> tuple[int, int]:
        made = int(len(axes[node]) == 2)
        freed = (a for a in needs[node] if users[a] == 1 and a not in ends)
        return made - sum(len(axes[a]) == 2 for a in freed), made

    found: list[Expression] = []
    while left:
        node = min((n for n in left if not needs[n] & left.keys()), key=tiles_more)
        del left[node]
        users.subtract(needs[node])
        found.append(node)
    return found


def _turned_inside(results: Sequence[Sequence[Operand]]) -> list[list[Operand]]:
    """The same, where factors of products are turned by these, after they are rounded.

    Half as much then goes through shared memory, in the way that is made for it.
    """

    def rule(op: str, args: tuple[Operand, ...]) -> Operand:
        if op != "matmul":
            return make(op, *args)
        turned = [isinstance(a, Expression) and a.op == "turned" for a in args[:2]]
        factors = [a.args[0] if t else a for a, t in zip(args[:2], turned, strict=True)]  # type: ignore[union-attr]
        return make(op, *factors, args[2], *map(float, turned))

    new = iter(rewrite([root for members in results for root in members], rule))
    return [[next(new) for _ in members] for members in results]


def _like_state(tiles: Tiles, results: Sequence[Sequence[Operand]]) -> list[str | None]:
    """What results have to be given the shape of: a tensor of the state whose shape they lack."""
    axes = _axes_of(tiles, results)
    first, *others = results
    likes: list[str | None] = []
    for n, root in enumerate(first):
        has = axes[root] if isinstance(root, Expression) else set()
        likes.append(
            None if isinstance(root, Expression) and _axes(tiles.state[n]) <= has else f"state[{n}]"
        )
    return likes + [None for o in others for _ in o]


def _axes_of(tiles: Tiles, results: Sequence[Sequence[Operand]]) -> dict[Expression, set[int]]:
    """The axes that values have: 0 for rows, 1 for columns."""
    places = {
        "state": tiles.state,
        "drive": tiles.drive_places,
        "coefficient": tiles.coefficient_places,
        "adjoint": (*tiles.state, tiles.readout.place),
    }
    axes: dict[Expression, set[int]] = {}
    for node in topological([root for members in results for root in members]):
        if node.op in LEAVES:
            axes[node] = _axes(places[node.op][int(float(node.args[0]))])  # type: ignore[arg-type]
            continue
        given = [axes[a] for a in operands(node)]
        axes[node] = set().union(*given)
        if node.op == "turned":
            axes[node] = {1 - a for a in axes[node]}
        elif node.op == "matmul":
            x, y = (
                {1 - a for a in own} if turned else own
                for own, turned in zip(given, node.args[3:] or (0, 0), strict=True)
            )
            axes[node] = (x & {0}) | (y & {1})
        elif node.op == "total":
            axes[node] = set()
        elif node.op[:-1] in _ALONG:
            axes[node] -= {int(node.op[-1])}
    return axes


def _axes(place: Place) -> set[int]:
    return {n for n, axis in enumerate((place.rows, place.columns)) if axis.size > 1}


class _Number(str):
    """The text of a number that remembers it."""

    value: float

    def __new__(cls, value: float, text: str) -> _Number:
        made = super().__new__(cls, text)
        made.value = value
        return made


def _whole(number: str) -> int:
    assert isinstance(number, _Number)
    return int(number.value)
