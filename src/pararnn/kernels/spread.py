"""A step whose channels are spread over programs, which hand nothing but sums to each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pararnn.kernels.stages import NotFused
from pararnn.tracing.expressions import Expression, Operand, leaf, make, rewrite, topological
from pararnn.tracing.products import PARTLY, WHOLE, Place

OWN, BRIEF, SENT = 0, 1, 2
"""Who computes a sum: each program from channels of its own; each program, all of it, from values
that all know; or all together, each the part over its own channels, which they then add up."""

Moment = tuple[int, int]
"""How often programs have waited for each other in a step, and how many sums since then came first.
"""


@dataclass(frozen=True)
class Sum:
    """A product of a vector with a weight, or a total of a vector.

    Attributes:
        op: "dot", or the operation of a total, see `tracing.products`.
        factor: The vector, as an expression of leaves and results of others.
        number: Of the weight; or the lanes of a total.
        way: `OWN`, `BRIEF` or `SENT`.
        begins: When the vector is known.
    """

    op: str
    factor: Operand
    number: int
    way: int
    begins: Moment

    @property
    def known(self) -> Moment:
        """When the sum is known."""
        waits, after = self.begins
        return (waits + 1, 0) if self.way == SENT else (waits, after + 1)


class Spread:
    """A step, taken apart at its sums.

    Attributes:
        products: Leaf `product` n is the n-th.
        totals: Leaf `reduced` n is the n-th.
        roots: Expressions of the new components.

    Args:
        step: Expressions of the new components, with sums.
        weights: Places of the weights.
        size: Channels.
        block: Channels of a program.
        brief: The most channels of a vector that all programs compute, each for itself.

    Raises:
        NotFused: The step has sums of parts of the channels.
    """

    def __init__(
        self, step: Sequence[Operand], weights: Sequence[Place], size: int, block: int, brief: int
    ) -> None:
        self.weights, self.size, self.block, self.brief = weights, size, block, brief
        self.products: list[Sum] = []
        self.totals: list[Sum] = []
        known: dict[tuple[object, ...], Operand] = {}

        def rule(op: str, args: tuple[Operand, ...]) -> Operand:
            if op in PARTLY:
                raise NotFused("it has sums of parts of the channels")
            if op != "dot" and op not in WHOLE:
                return make(op, *args)
            key = op, *args
            if key not in known:
                kind, members = ("reduced", self.totals) if op in WHOLE else self._dots
                known[key] = leaf(kind, len(members))
                members.append(self._sum(op, *args))
            return known[key]

        self._dots = "product", self.products
        self.roots = rewrite(step, rule)

    def _sum(self, op: str, factor: Operand, more: Operand) -> Sum:
        number = int(more.args[0] if isinstance(more, Expression) else more)  # type: ignore[arg-type]
        below = topological([factor])
        sums = [self.products[_number(e)] for e in below if e.op == "product"]
        sums += [self.totals[_number(e)] for e in below if e.op == "reduced"]
        begins = max([(0, 0), *(s.known for s in sums)])
        lanes = self.weights[number].width if op == "dot" else number
        if self._is_local(op, number):
            return Sum(op, factor, number, OWN, begins)
        way = BRIEF if lanes <= self.brief and self._all_know(below) else SENT
        return Sum(op, factor, number, way, begins)

    def _is_local(self, op: str, number: int) -> bool:
        """Whether no program needs the channels of another."""
        if op != "dot":
            return self.size <= self.block
        weight = self.weights[number]
        if max(weight.lanes, weight.results) * weight.parts <= self.block:
            return True  # all channels are those of the first
        return weight.lanes == weight.results and self.block % weight.lanes == 0

    def _all_know(self, below: Sequence[Expression]) -> bool:
        """Whether all programs know a vector with these expressions: it is made of sent sums."""
        products = [self.products[_number(e)].way for e in below if e.op == "product"]
        return set(products) == {SENT} and all(e.op != "state" for e in below)

    @property
    def all(self) -> list[Sum]:
        """All sums."""
        return [*self.products, *self.totals]

    @property
    def waits(self) -> int:
        """How often programs wait for each other."""
        return max(s.known[0] for s in self.all)

    @property
    def moments(self) -> list[Moment]:
        """The moments at which sums are computed or arrive, in their order."""
        return sorted({s.begins for s in self.all} | {s.known for s in self.all if s.way == SENT})

    def vectors(self, moment: Moment, brief: bool) -> list[Operand]:
        """The distinct vectors that are multiplied or summed at a moment.

        Args:
            moment: The moment.
            brief: Those that all programs compute; else those of which each has its channels.
        """
        mine = [s for s in self.all if s.begins == moment and (s.way == BRIEF) == brief]
        return list(dict.fromkeys(s.factor for s in mine))

    def everything(self, brief: bool) -> list[Operand]:
        """All that is computed of brief vectors, or of the channels that a program has."""
        found = [v for m in self.moments for v in self.vectors(m, brief)]
        return found if brief else [*found, *self.roots]

    def shape(self, number: int) -> tuple[int, int]:
        """Results and multiplied channels of the part of a weight that a product reads."""
        product = self.products[number]
        if product.way == SENT:
            weight = self.weights[product.number]
            return _padded(weight.results * weight.parts), self.block
        return self.block, self.brief_block if product.way == BRIEF else self.block

    @property
    def brief_block(self) -> int:
        """Channels of brief vectors."""
        lanes = [self.weights[p.number].width for p in self.products if p.way == BRIEF]
        lanes += [t.number for t in self.totals if t.way == BRIEF]
        return _padded(max(lanes, default=1))

    @property
    def elements(self) -> int:
        """Numbers of the weights that a program keeps."""
        shapes = [self.shape(n) for n in range(len(self.products))]
        return sum(results * lanes for results, lanes in shapes)


def _number(leaf: Expression) -> int:
    return int(leaf.args[0])  # type: ignore[arg-type]


def _padded(lanes: int) -> int:
    return max(16, 1 << (lanes - 1).bit_length())
