"""A step whose channels mix by products, taken apart at these, for kernels that store them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
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


class NotFused(Exception):
    """The steps cannot run in one kernel; the message says why."""


@dataclass(frozen=True)
class _Product:
    """The product of a vector with a weight.

    Attributes:
        level: Products of lower levels have to be known before.
        factor: The vector, as an expression of leaves and results of other products.
        weight: Number of the weight.
    """

    level: int
    factor: Operand
    weight: int


class Stages:
    """A step, taken apart at its products.

    Attributes:
        products: All of them; leaf `product` n is the result of the n-th.
        roots: Expressions of the new components.

    Args:
        step: Expressions of the new components, with the operation `dot`.
    """

    def __init__(self, step: Sequence[Operand]) -> None:
        self.products: list[_Product] = []
        known: dict[tuple[Operand, ...], Operand] = {}

        def rule(op: str, args: tuple[Operand, ...]) -> Operand:
            if op != "dot":
                return make(op, *args)
            if args not in known:
                known[args] = leaf("product", len(self.products))
                factor, weight = args
                assert isinstance(weight, Expression)
                below = [e for e in topological([factor]) if e.op == "product"]
                level = max((1 + self.products[_number(e)].level for e in below), default=0)
                self.products.append(_Product(level, factor, _number(weight)))
            return known[args]

        self.roots = rewrite(step, rule)

    @functools.cached_property
    def factors(self) -> list[Operand]:
        """The distinct vectors that are multiplied."""
        return list(dict.fromkeys(p.factor for p in self.products))

    @property
    def levels(self) -> int:
        """Rounds of products, each of which needs those before."""
        return 1 + max(p.level for p in self.products)

    def computed(self, level: int) -> list[Operand]:
        """The vectors that products of a level multiply, without states: those are known."""
        mine = {p.factor for p in self.products if p.level == level}
        return [f for f in self.factors if f in mine and not _is_state(f)]

    def equations(self) -> list[str]:
        """The step as mathematics, a line for each product and each new component."""
        roots = [*(p.factor for p in self.products), *self.roots]
        names = {e: f"{e.op}{e.args[0]}" for e in topological(roots) if e.op in LEAVES}
        show = lambda e: names.get(e) or formula(e, names)  # noqa: E731
        products = enumerate(self.products)
        lines = [f"product{n} = weight{p.weight} times {show(p.factor)}" for n, p in products]
        return lines + [f"state{i}' = {show(root)}" for i, root in enumerate(self.roots)]


def _is_state(operand: Operand) -> bool:
    return isinstance(operand, Expression) and operand.op == "state"


def _number(leaf: Expression) -> int:
    return int(leaf.args[0])  # type: ignore[arg-type]
