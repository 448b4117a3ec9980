"""A step whose channels are spread over programs: which sums these have to exchange, and when.

A sum here is a product with a weight, or a sum or an extreme over channels. `triton.spread` runs
such steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pararnn.kernels.stages import NotFused
from pararnn.tracing.expressions import Expression, Operand, leaf, make, rewrite, topological
from pararnn.tracing.products import PARTLY, WHOLE, Place

OWN, REPEATED, SENT = 0, 1, 2
"""Who computes a sum.

- `OWN`: each program for its own channels, from its own channels.
- `REPEATED`: every program all of it, from values that all of them know.
- `SENT`: all together. Each computes the part that comes from its own channels and sends it to the
  others, and they add up the parts of all.
"""

Moment = tuple[int, int]
"""A place in a step: how often programs have waited for each other, and how many sums that depend
on each other were computed since."""


@dataclass(frozen=True)
class Sum:
    """A product of a vector with a weight, or a total: a sum or an extreme of a vector.

    Attributes:
        op: "dot", or the operation of a total, see `tracing.products`.
        factor: The vector, as an expression of leaves and results of others.
        number: Of a product, the number of its weight; of a total, how many lanes it sums.
        way: `OWN`, `REPEATED` or `SENT`.
        begins: When the vector is known, and so the sum can be computed.
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
    """A step, taken apart at its sums, for programs that share its channels.

    Attributes:
        products: In the expressions, leaf `product` n stands for the n-th of these.
        totals: Likewise leaf `reduced` n.
        roots: Expressions of the new components.

    Args:
        step: Expressions of the new components, with sums inside, see `tracing.products`.
        weights: Places of the weights.
        size: Channels.
        block: Channels of a program.
        repeats: Whether every program computes a vector with so many channels as a whole, where it
            can, so that it need not be sent.

    Raises:
        NotFused: The step has sums of parts of the channels.
    """

    def __init__(
        self,
        step: Sequence[Operand],
        weights: Sequence[Place],
        size: int,
        block: int,
        repeats: Callable[[int], bool],
    ) -> None:
        self.weights, self.size, self.block = weights, size, block
        self._repeats = repeats
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
        way = REPEATED if self._repeats(lanes) and self._all_know(below) else SENT
        return Sum(op, factor, number, way, begins)

    def _is_local(self, op: str, number: int) -> bool:
        """Whether no program needs the channels of another."""
        if op != "dot":
            return self.size <= self.block
        weight = self.weights[number]
        if max(weight.lanes, weight.results) * weight.parts <= self.block:
            return True  # all are channels of the first program
        return weight.lanes == weight.results and self.block % weight.lanes == 0

    def _all_know(self, below: Sequence[Expression]) -> bool:
        """Whether all programs know a vector with these expressions: products in it were sent."""
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
        """The moments at which sums are computed or arrive, in order: the stages of a step."""
        return sorted({s.begins for s in self.all} | {s.known for s in self.all if s.way == SENT})

    def vectors(self, moment: Moment, repeated: bool) -> list[Operand]:
        """The distinct vectors that are multiplied or summed at a moment.

        Args:
            moment: The moment.
            repeated: Those that every program computes as a whole; else those of which each
                computes its channels.
        """
        mine = [s for s in self.all if s.begins == moment and (s.way == REPEATED) == repeated]
        return list(dict.fromkeys(s.factor for s in mine))

    def everything(self, repeated: bool) -> list[Operand]:
        """All repeated vectors; or all that a program computes in its own channels."""
        found = [v for m in self.moments for v in self.vectors(m, repeated)]
        return found if repeated else [*found, *self.roots]

    def shape(self, number: int) -> tuple[int, int]:
        """Results and multiplied channels of the part of a weight that a program keeps."""
        product = self.products[number]
        if product.way == SENT:
            weight = self.weights[product.number]
            return _padded(weight.results * weight.parts), self.block
        return self.block, self.repeated_block if product.way == REPEATED else self.block

    @property
    def repeated_block(self) -> int:
        """Channels of the longest repeated vector, a power of two."""
        lanes = [self.weights[p.number].width for p in self.products if p.way == REPEATED]
        lanes += [t.number for t in self.totals if t.way == REPEATED]
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
