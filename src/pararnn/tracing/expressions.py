"""Scalar expressions: what the recurrent part of a cell computes for one channel.

An expression is a small immutable graph of aten operations over a few kinds of leaves: a component
of the state, a drive, a coefficient, the incoming adjoint of a component, and an entry of the
tangent before a step. Equal expressions are one object, so shared subexpressions are found by
identity.

Where channels mix (`products`), the operation `dot` multiplies the channels of a group with one
more kind of leaf, a block of a weight, and others are sums or extremes over the channels. Where
these are computed before the rest, their results are leaves themselves: `product`, and `reduced`
for one that is the same in all channels.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Iterable, Iterator

LEAVES = tuple("state drive coefficient adjoint tangent weight product reduced".split())


class Expression:
    """An operation and its operands; build it with `make`, never directly."""

    __slots__ = ("__weakref__", "args", "is_bool", "op")

    def __init__(self, op: str, args: tuple[Operand, ...], is_bool: bool) -> None:
        self.op, self.args, self.is_bool = op, args, is_bool

    def __add__(self, other: Operand) -> Operand:
        return make("add", self, other)

    def __radd__(self, other: Operand) -> Operand:
        return make("add", other, self)

    def __sub__(self, other: Operand) -> Operand:
        return make("sub", self, other)

    def __rsub__(self, other: Operand) -> Operand:
        return make("sub", other, self)

    def __mul__(self, other: Operand) -> Operand:
        return make("mul", self, other)

    def __rmul__(self, other: Operand) -> Operand:
        return make("mul", other, self)

    def __truediv__(self, other: Operand) -> Operand:
        return make("div", self, other)

    def __rtruediv__(self, other: Operand) -> Operand:
        return make("div", other, self)

    def __neg__(self) -> Operand:
        return make("neg", self)

    def __lt__(self, other: Operand) -> Operand:
        return make("lt", self, other)

    def __le__(self, other: Operand) -> Operand:
        return make("le", self, other)

    def __gt__(self, other: Operand) -> Operand:
        return make("gt", self, other)

    def __ge__(self, other: Operand) -> Operand:
        return make("ge", self, other)

    def __and__(self, other: Operand) -> Operand:
        return make("logical_and", self, other)

    def __rand__(self, other: Operand) -> Operand:
        return make("logical_and", other, self)

    def __or__(self, other: Operand) -> Operand:
        return make("logical_or", self, other)

    def __ror__(self, other: Operand) -> Operand:
        return make("logical_or", other, self)

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(map(repr, self.args))})"


Operand = Expression | float | int | bool | str | None

BOOLEAN = frozenset(
    "lt le gt ge eq ne logical_and logical_or logical_xor logical_not isnan isinf isfinite "
    "isposinf isneginf signbit to_bool".split()
)
_FOLD: dict[str, Callable[..., float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "neg": operator.neg,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "eq": operator.eq,
    "ne": operator.ne,
    "to_float": float,
}
_interned: weakref.WeakValueDictionary[tuple[object, ...], Expression] = (
    weakref.WeakValueDictionary()
)  # as long as somebody has them


def _identity_key(arg: Operand) -> object:
    if isinstance(arg, Expression):
        return id(arg)
    return (type(arg).__name__, repr(arg))


def make(op: str, *args: Operand) -> Operand:
    """Return the one expression `op(*args)`, simplified where no NaN or infinity could tell."""
    args = tuple(float(a) if type(a) is int else a for a in args)
    if op == "logical_not" and isinstance(args[0], bool):
        return not args[0]
    if op in _FOLD and all(isinstance(a, (int, float)) for a in args):
        return _FOLD[op](*args)
    if op == "mul":
        if _is_number(args[0], 1):
            return _as_float(args[1])
        if _is_number(args[1], 1):
            return _as_float(args[0])
    if op == "add" and _is_number(args[0], 0):
        return _as_float(args[1])
    if op in ("add", "sub") and _is_number(args[1], 0):
        return _as_float(args[0])
    if op == "div" and _is_number(args[1], 1):
        return _as_float(args[0])
    if op == "neg" and isinstance(args[0], Expression) and args[0].op == "neg":
        return args[0].args[0]
    if op == "where" and isinstance(args[0], bool):
        return args[1] if args[0] else args[2]
    if op in _LOGIC and any(isinstance(a, bool) for a in args):
        a, known = args if isinstance(args[1], bool) else args[::-1]
        assert isinstance(known, bool)
        return _LOGIC[op](a, known)
    return intern(op, args)


_LOGIC: dict[str, Callable[[Operand, bool], Operand]] = {
    "logical_and": lambda a, known: a if known else False,
    "logical_or": lambda a, known: True if known else a,
    "logical_xor": lambda a, known: make("logical_not", a) if known else a,
}


def intern(op: str, args: tuple[Operand, ...]) -> Expression:
    """Return the one expression `op(*args)` as it stands."""
    key = (op, *map(_identity_key, args))
    known = _interned.get(key)
    if known is None:
        is_bool = op in BOOLEAN or (op == "where" and is_boolean(args[1]) and is_boolean(args[2]))
        known = _interned[key] = Expression(op, args, is_bool)
    return known


def leaf(kind: str, index: int) -> Expression:
    """Return leaf `index` of a kind named in `LEAVES`."""
    return intern(kind, (index,))


def is_boolean(operand: Operand) -> bool:
    """Whether the operand is a truth value."""
    return operand.is_bool if isinstance(operand, Expression) else isinstance(operand, bool)


def _is_number(operand: Operand, value: float) -> bool:
    return isinstance(operand, (int, float)) and operand == value


def _as_float(operand: Operand) -> Operand:
    return make("to_float", operand) if is_boolean(operand) else operand


def operands(expression: Expression) -> Iterator[Expression]:
    """Yield the operands that are expressions."""
    return (a for a in expression.args if isinstance(a, Expression))


def topological(roots: Iterable[Operand]) -> list[Expression]:
    """Every expression below `roots`, operands first, each once."""
    order: list[Expression] = []
    seen: set[Expression] = set()
    stack = [(root, False) for root in reversed(list(roots)) if isinstance(root, Expression)]
    while stack:
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((a, False) for a in reversed(list(operands(node))))
    return order


def rewrite(
    roots: Iterable[Operand], rule: Callable[[str, tuple[Operand, ...]], Operand]
) -> list[Operand]:
    """Rebuild the graphs below `roots` bottom-up, each node by `rule(op, new_args)`."""
    roots = list(roots)
    new: dict[Expression, Operand] = {}
    for node in topological(roots):
        args = tuple(new[a] if isinstance(a, Expression) else a for a in node.args)
        new[node] = node if node.op in LEAVES else rule(node.op, args)
    return [new[r] if isinstance(r, Expression) else r for r in roots]


def serialize(roots: Iterable[Operand]) -> str:
    """A deterministic text of the graphs below `roots`: equal texts, equal functions."""
    roots = list(roots)
    order = topological(roots)
    names = {node: f"%{i}" for i, node in enumerate(order)}

    def show(operand: Operand) -> str:
        return names[operand] if isinstance(operand, Expression) else repr(operand)

    lines = [f"{names[n]}={n.op}({','.join(map(show, n.args))})" for n in order]
    return "\n".join([*lines, "->" + ",".join(map(show, roots))])


_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">"}
_INFIX |= {"ge": ">=", "eq": "==", "ne": "!="}
PRECEDENCE = {"add": 2, "sub": 2, "mul": 3, "div": 3, "neg": 3} | dict.fromkeys(
    ("lt", "le", "gt", "ge", "eq", "ne"), 1
)


def formula(root: Operand, names: dict[Expression, str]) -> str:
    """Print an expression as mathematics; a node in `names` below the root prints as its name."""

    def show(operand: Operand, outer: int, right: bool = False) -> str:
        if not isinstance(operand, Expression):
            return f"{operand:g}" if isinstance(operand, float) else str(operand)
        if operand in names and operand is not root:
            return names[operand]
        level = PRECEDENCE.get(operand.op)
        if operand.op in _INFIX and level is not None:
            left, other = operand.args
            text = f"{show(left, level)} {_INFIX[operand.op]} {show(other, level, True)}"
        elif operand.op == "neg":
            text = f"-{show(operand.args[0], 3, True)}"
        else:
            arguments = [a for a in operand.args if a is not None]
            return f"{operand.op}({', '.join(show(a, 0) for a in arguments)})"
        assert level is not None
        return f"({text})" if level < outer or (right and level == outer) else text

    return show(root, 0)


def literal(value: float) -> str:
    """A Python number as text that every target reads; infinities and NaN by name."""
    if math.isnan(value):
        return "NAN"
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    return repr(float(value))
