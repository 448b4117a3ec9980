"""Means, norms and softmax in sums, maxima and operations on each element, for any reader.

A reader has values of its own kind and four functions: `of` (a node or a number as a value),
`shape` (sizes of the axes of a value), `both` (an operation on each element of values that are
broadcast), and `summed` (the sum along axes, or another operation of `sum`, `max` and `min`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from pararnn.tracing.expressions import Operand, make
from pararnn.tracing.operations import UnknownOperation

Rule = Callable[[Any, fx.Node, dict[str, Any]], Any]
"""Of a reader, a node and its arguments by name: what it computes."""


def _axes_of(given: Any, rank: int) -> list[int]:
    if given is None or given == []:
        return list(range(rank))
    return [given] if isinstance(given, int) else list(given)


def _taken(reader: Any, given: dict[str, Any]) -> tuple[Any, list[int], bool, float]:
    """The value, the axes, whether they stay, and how many entries there are along them."""
    value = reader.of(given["self"])
    sizes = reader.shape(value)
    axes = _axes_of(given.get("dim"), len(sizes))
    return value, axes, bool(given.get("keepdim")), float(math.prod(sizes[a] for a in axes))


def _of_each(name: str) -> Callable[..., Operand]:
    return lambda *args: make(name, *args)


_add, _sub, _mul, _div, _exp, _log, _sqrt = map(_of_each, "add sub mul div exp log sqrt".split())


def _reduced(op: str) -> Rule:
    def rule(reader: Any, node: fx.Node, given: dict[str, Any]) -> Any:
        value, axes, keep, _ = _taken(reader, given)
        return reader.summed(value, axes, keep, op)

    return rule


def _mean(reader: Any, node: fx.Node, given: dict[str, Any]) -> Any:
    value, axes, keep, count = _taken(reader, given)
    return reader.both(lambda t: _div(t, count), reader.summed(value, axes, keep))


def _norm(reader: Any, node: fx.Node, given: dict[str, Any]) -> Any:
    value, axes, keep, _ = _taken(reader, given)
    if float(given["ord"]) != 2.0:
        raise UnknownOperation(f"a norm of order {given['ord']}")
    square = reader.both(lambda x: _mul(x, x), value)
    return reader.both(_sqrt, reader.summed(square, axes, keep))


def _powers(reader: Any, value: Any, axes: Sequence[int]) -> tuple[Any, Any, Any]:
    """The maximum, the powers of e without it, and their sum."""
    top = reader.summed(value, axes, True, "max")
    powers = reader.both(lambda x, m: _exp(_sub(x, m)), value, top)
    return top, powers, reader.summed(powers, axes, True)


def _softmax(reader: Any, node: fx.Node, given: dict[str, Any]) -> Any:
    _, powers, total = _powers(reader, reader.of(given["self"]), [given["dim"]])
    return reader.both(_div, powers, total)


def _softmax_backward(reader: Any, node: fx.Node, given: dict[str, Any]) -> Any:
    grad, out = reader.of(given["grad_output"]), reader.of(given["output"])
    product = reader.both(_mul, grad, out)
    total = reader.summed(product, [given["dim"]], True)
    return reader.both(lambda p, y, t: _sub(p, _mul(y, t)), product, out, total)


def _logsumexp(reader: Any, node: fx.Node, given: dict[str, Any]) -> Any:
    value, axes, keep, _ = _taken(reader, given)
    _, powers, _ = _powers(reader, value, axes)
    sums = reader.summed(powers, axes, keep), reader.summed(value, axes, keep, "max")
    return reader.both(lambda t, m: _add(_log(t), m), *sums)


def _log_softmax(reader: Any, node: fx.Node, given: dict[str, Any]) -> Any:
    value = reader.of(given["self"])
    top, _, total = _powers(reader, value, [given["dim"]])
    return reader.both(lambda x, m, t: _sub(_sub(x, m), _log(t)), value, top, total)


def _log_softmax_backward(reader: Any, node: fx.Node, given: dict[str, Any]) -> Any:
    grad, out = reader.of(given["grad_output"]), reader.of(given["output"])
    total = reader.summed(grad, [given["dim"]], True)
    return reader.both(lambda g, y, t: _sub(g, _mul(_exp(y), t)), grad, out, total)


def _squares(reader: Any, value: Any, axes: Sequence[int]) -> tuple[Any, Any, Any, float]:
    """The mean, the value without it, the sum of squares of that, and how many entries."""
    sizes = reader.shape(value)
    count = float(math.prod(sizes[a] for a in axes))
    mean = reader.both(lambda t: _div(t, count), reader.summed(value, axes, True))
    centred = reader.both(_sub, value, mean)
    square = reader.both(lambda c: _mul(c, c), centred)
    return mean, centred, square, count


def _layer_norm(reader: Any, node: fx.Node, given: dict[str, Any]) -> Any:
    value = reader.of(given["input"])
    rank = len(reader.shape(value))
    axes = list(range(rank - len(given["normalized_shape"]), rank))
    mean, centred, square, count = _squares(reader, value, axes)
    eps = float(given["eps"])
    inverse = lambda t: _div(1.0, _sqrt(_add(_div(t, count), eps)))  # noqa: E731
    scale = reader.both(inverse, reader.summed(square, axes, True))
    found = reader.both(_mul, centred, scale)
    for name, op in (("weight", _mul), ("bias", _add)):
        if given[name] is not None:
            found = reader.both(op, found, reader.of(given[name]))
    return found, mean, scale


def _layer_norm_backward(reader: Any, node: fx.Node, given: dict[str, Any]) -> Any:
    grad, value = reader.of(given["grad_out"]), reader.of(given["input"])
    mean, scale = reader.of(given["mean"]), reader.of(given["rstd"])
    sizes = reader.shape(value)
    first = len(sizes) - len(given["normalized_shape"])
    axes, rows = list(range(first, len(sizes))), list(range(first))
    count = float(math.prod(sizes[a] for a in axes))
    normal = reader.both(lambda x, m, s: _mul(_sub(x, m), s), value, mean, scale)
    inner = grad if given["weight"] is None else reader.both(_mul, grad, reader.of(given["weight"]))
    total = reader.summed(inner, axes, True)
    along = reader.summed(reader.both(_mul, inner, normal), axes, True)

    def of_input(g: Operand, t: Operand, a: Operand, n: Operand, s: Operand) -> Operand:
        return _mul(s, _sub(g, _add(_div(t, count), _mul(n, _div(a, count)))))

    found = reader.both(of_input, inner, total, along, normal, scale)
    of_weight = reader.summed(reader.both(_mul, grad, normal), rows, False)
    return found, of_weight, reader.summed(grad, rows, False)


def _variance(root: bool) -> Rule:
    def rule(reader: Any, node: fx.Node, given: dict[str, Any]) -> Any:
        value, axes, keep, _ = _taken(reader, given)
        _, _, square, count = _squares(reader, value, axes)
        correction = 1 if given.get("correction") is None else given["correction"]
        rest = float(max(count - correction, 0.0))
        total = reader.summed(square, axes, keep)
        return reader.both(lambda t: _sqrt(_div(t, rest)) if root else _div(t, rest), total)

    return rule


REDUCTIONS: dict[str, Rule] = {
    "sum": _reduced("sum"),
    "amax": _reduced("max"),
    "amin": _reduced("min"),
    "mean": _mean,
    "linalg_vector_norm": _norm,
    "logsumexp": _logsumexp,
    "_softmax": _softmax,
    "_softmax_backward_data": _softmax_backward,
    "_log_softmax": _log_softmax,
    "_log_softmax_backward_data": _log_softmax_backward,
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "var": _variance(root=False),
    "std": _variance(root=True),
}
