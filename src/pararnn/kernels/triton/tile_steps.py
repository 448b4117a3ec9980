"""Generates the functions that the kernels of tiles call, from a step in tiles.

Sums along an axis and products of matrices are calls of functions in `functions`; everything else
is written as for channels that do not mix, and values are broadcast.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pararnn.kernels.lowering import OF_TILES
from pararnn.kernels.triton.expressions import equations
from pararnn.kernels.triton.steps import Module, Precision
from pararnn.tracing.expressions import (
    LEAVES,
    Expression,
    Operand,
    make,
    operands,
    rewrite,
    topological,
)
from pararnn.tracing.tiles import Place, Tiles

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
        module.function(name, leaves, _turned_inside(results), flags=flags, shaped=like)

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
    places = {
        "state": tiles.state,
        "drive": tiles.drive_places,
        "coefficient": tiles.coefficient_places,
        "adjoint": (*tiles.state, tiles.readout.place),
    }
    axes: dict[Expression, set[int]] = {}  # 0 for rows, 1 for columns
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
                for own, turned in zip(given, node.args[3:], strict=True)
            )
            axes[node] = (x & {0}) | (y & {1})
        elif node.op == "total":
            axes[node] = set()
        elif node.op[:-1] in _ALONG:
            axes[node] -= {int(node.op[-1])}
    first, *others = results
    likes: list[str | None] = []
    for n, root in enumerate(first):
        has = axes[root] if isinstance(root, Expression) else set()
        likes.append(
            None if isinstance(root, Expression) and _axes(tiles.state[n]) <= has else f"state[{n}]"
        )
    return likes + [None for o in others for _ in o]


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
