"""A step whose channels mix, taken apart where they do, for kernels that share these out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pararnn.tracing.expressions import (
    LEAVES,
    Expression,
    Operand,
    formula,
    leaf,
    make,
    rewrite,
    topological,
)
from pararnn.tracing.products import PARTLY, WHOLE


class NotFused(Exception):
    """The steps cannot run in one kernel; the message says why."""


@dataclass(frozen=True)
class Mixed:
    """A product of a vector with a weight, or a reduction of a vector.

    Attributes:
        op: "dot", or the operation of a reduction, see `tracing.products`.
        level: Those of lower levels have to be known before.
        factor: The vector, as an expression of leaves and results of others.
        more: Number of the weight; or the numbers of lanes and parts of a reduction.
        late: Whether the vector needs a sum of the same level, so that those who multiply compute
            it.
    """

    op: str
    level: int
    factor: Operand
    more: tuple[int, ...]
    late: bool = False

    @property
    def weight(self) -> int:
        """Number of the weight of a product."""
        return self.more[0]


class Stages:
    """A step, taken apart at its products and reductions.

    Attributes:
        products: Products, and reductions of parts of a vector; leaf `product` n is the n-th.
        totals: Reductions of whole vectors; leaf `reduced` n is the n-th.
        roots: Expressions of the new components.

    Args:
        step: Expressions of the new components, with these operations.
        late: Whether those who multiply a vector with a weight may compute it, by the number of the
            weight.
    """

    def __init__(
        self, step: Sequence[Operand], late: Callable[[int], bool] = lambda weight: False
    ) -> None:
        self.products: list[Mixed] = []
        self.totals: list[Mixed] = []
        known: dict[tuple[object, ...], Operand] = {}

        def rule(op: str, args: tuple[Operand, ...]) -> Operand:
            if op not in ("dot", *WHOLE, *PARTLY):
                return make(op, *args)
            key = op, *args
            if key not in known:
                kind = "reduced" if op in WHOLE else "product"
                members = self.totals if op in WHOLE else self.products
                known[key] = leaf(kind, len(members))
                members.append(self._mixed(op, args, late))
            return known[key]

        self.roots = rewrite(step, rule)

    def _mixed(self, op: str, args: tuple[Operand, ...], late: Callable[[int], bool]) -> Mixed:
        factor, *rest = args
        more = tuple(_number(r) if isinstance(r, Expression) else int(r) for r in rest)  # type: ignore[arg-type]
        below = topological([factor])
        products = [self.products[_number(e)].level for e in below if e.op == "product"]
        totals = [self.totals[_number(e)].level for e in below if e.op == "reduced"]
        level = max([0, *(1 + p for p in products), *totals])
        if level not in totals:
            return Mixed(op, level, factor, more)
        if op == "dot" and late(more[0]):
            return Mixed(op, level, factor, more, late=True)
        return Mixed(op, level + 1, factor, more)

    @functools.cached_property
    def factors(self) -> list[Operand]:
        """The distinct vectors that are multiplied."""
        return list(dict.fromkeys(p.factor for p in self.products))

    @property
    def levels(self) -> int:
        """Rounds, each of which needs those before."""
        return 1 + max(m.level for m in (*self.products, *self.totals))

    def at(self, level: int, late: bool = False) -> list[Operand]:
        """The vectors that products of a level multiply, or reductions of parts go over."""
        mine = [p.factor for p in self.products if (p.level, p.late) == (level, late)]
        return list(dict.fromkeys(mine))

    def computed(self, level: int) -> list[Operand]:
        """Those that are stored before, that is, all but states: these are known."""
        return [f for f in self.at(level) if not _is_state(f)]

    def loaded_late(self, level: int) -> int:
        """How many vectors those who multiply load for the ones that they compute, and these."""
        late = self.at(level, late=True)
        leaves = {e for e in topological(late) if e.op in LEAVES and e.op != "reduced"}
        return len(late) + len(leaves)

    def totals_at(self, level: int) -> list[int]:
        """Numbers of the totals of a level."""
        return [n for n, t in enumerate(self.totals) if t.level == level]

    def equations(self) -> list[str]:
        """The step as mathematics, a line for each product, reduction and new component."""
        roots = [*(m.factor for m in (*self.products, *self.totals)), *self.roots]
        names = {e: f"{e.op}{e.args[0]}" for e in topological(roots) if e.op in LEAVES}
        show = lambda e: names.get(e) or formula(e, names)  # noqa: E731
        lines = []
        for kind, members in (("product", self.products), ("reduced", self.totals)):
            for n, m in enumerate(members):
                is_dot = m.op == "dot"
                what = f"weight{m.weight} times" if is_dot else f"{m.op}, {m.more} lanes, of"
                lines.append((m.level, f"{kind}{n} = {what} {show(m.factor)}"))
        ordered = [line for _, line in sorted(lines, key=lambda line: line[0])]
        return ordered + [f"state{i}' = {show(root)}" for i, root in enumerate(self.roots)]


def _is_state(operand: Operand) -> bool:
    return isinstance(operand, Expression) and operand.op == "state"


def _number(leaf: Expression) -> int:
    return int(leaf.args[0])  # type: ignore[arg-type]
