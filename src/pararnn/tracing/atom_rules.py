"""How operations that move, multiply and sum tensors are read as expressions over atoms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from pararnn.tracing.atoms import Item, Reader, Value, atoms_of, size_of
from pararnn.tracing.expressions import Operand, make
from pararnn.tracing.tiles import NotTiled


def _axes_of(given: Any, rank: int) -> list[int]:
    if given is None or given == []:
        return list(range(rank))
    return [given] if isinstance(given, int) else list(given)


def _view(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    return reader.regrouped(reader.of(given["self"]), node.meta["shape"])


def _unsqueeze(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    value = reader.of(given["self"])
    at = given["dim"] % (len(value.axes) + 1)
    return Value(value.expression, (*value.axes[:at], (), *value.axes[at:]), value.order)


def _permute(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    value = reader.of(given["self"])
    rank = len(value.axes)
    if "dims" in given:
        dims = [d % rank for d in given["dims"]]
    else:
        a, b = given.get("dim0", 0), given.get("dim1", 1)
        dims = list(range(rank))
        if rank > 1:
            dims[a % rank], dims[b % rank] = dims[b % rank], dims[a % rank]
    return Value(value.expression, tuple(value.axes[d] for d in dims), value.order)


def _expand(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    value, shape = reader.of(given["self"]), node.meta["shape"]
    axes = ((),) * (len(shape) - len(value.axes)) + value.axes
    pairs = zip(axes, shape, strict=True)
    found = tuple(items or (((None, s),) if s > 1 else ()) for items, s in pairs)
    return Value(value.expression, found, value.order)


def _select(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    value = reader.of(given["self"])
    at = given["dim"] % len(value.axes)
    if atoms_of([value.axes[at]]):
        raise NotTiled("it takes a part of an axis")
    return Value(value.expression, value.axes[:at] + value.axes[at + 1 :], value.order)


def _slice(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    value, shape = reader.of(given["self"]), node.meta["shape"]
    at = given["dim"] % len(value.axes)
    if size_of(value.axes[at]) == shape[at]:
        return value
    if atoms_of([value.axes[at]]):
        raise NotTiled("it takes a part of an axis")
    axis: tuple[Item, ...] = ((None, shape[at]),) if shape[at] > 1 else ()
    return Value(value.expression, (*value.axes[:at], axis, *value.axes[at + 1 :]), value.order)


def _product(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    left = reader.of(given["mat1"] if "mat1" in given else given.get("batch1", given.get("self")))
    right = reader.of(given.get("mat2", given.get("batch2", given.get("vec"))))
    found = reader.product(left, right)
    if "beta" not in given:
        return found
    alpha, beta = given["alpha"], given["beta"]
    both = lambda a, b: make("add", make("mul", beta, a), make("mul", alpha, b))  # noqa: E731
    return reader.both(both, reader.of(given["self"]), found)


def _sum(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    value = reader.of(given["self"])
    return reader.summed(
        value, _axes_of(given.get("dim"), len(value.axes)), bool(given.get("keepdim"))
    )


def _mean(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    value = reader.of(given["self"])
    axes = _axes_of(given.get("dim"), len(value.axes))
    count = math.prod(size_of(value.axes[a]) for a in axes)
    found = reader.summed(value, axes, bool(given.get("keepdim")))
    return Value(make("div", found.expression, float(count)), found.axes, found.order)


def _extreme(op: str) -> Callable[..., Value]:
    def rule(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
        value = reader.of(given["self"])
        axes = _axes_of(given.get("dim"), len(value.axes))
        return reader.summed(value, axes, bool(given.get("keepdim")), op)

    return rule


def _norm(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    value = reader.of(given["self"])
    axes = _axes_of(given.get("dim"), len(value.axes))
    if float(given["ord"]) != 2.0:
        raise NotTiled(f"a norm of order {given['ord']}")
    square = Value(make("mul", value.expression, value.expression), value.axes, value.order)
    found = reader.summed(square, axes, bool(given.get("keepdim")))
    return Value(make("sqrt", found.expression), found.axes, found.order)


def _softmax(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    value, axes = reader.of(given["self"]), [given["dim"]]
    top = reader.summed(value, axes, True, "max")
    powers = reader.both(lambda x, m: make("exp", make("sub", x, m)), value, top)
    total = reader.summed(powers, axes, True)
    return reader.both(lambda p, t: make("div", p, t), powers, total)


def _softmax_backward(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    grad, out = reader.of(given["grad_output"]), reader.of(given["output"])
    product = reader.both(lambda g, y: make("mul", g, y), grad, out)
    total = reader.summed(product, [given["dim"]], True)
    return reader.both(lambda p, y, t: make("sub", p, make("mul", y, t)), product, out, total)


def _centred(reader: Reader, value: Value, axes: Sequence[int]) -> tuple[Value, Value, float]:
    """The mean, the value without it, and how many entries it is over."""
    count = float(math.prod(size_of(value.axes[a]) for a in axes))
    total = reader.summed(value, axes, True)
    mean = Value(make("div", total.expression, count), total.axes, total.order)
    return mean, reader.both(lambda x, m: make("sub", x, m), value, mean), count


def _layer_norm(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Any:
    value = reader.of(given["input"])
    axes = list(range(len(value.axes) - len(given["normalized_shape"]), len(value.axes)))
    mean, centred, count = _centred(reader, value, axes)
    square = Value(make("mul", centred.expression, centred.expression), centred.axes, centred.order)
    total = reader.summed(square, axes, True)
    variance = make("add", make("div", total.expression, count), float(given["eps"]))
    scale = Value(make("div", 1.0, make("sqrt", variance)), total.axes, total.order)
    found = reader.both(lambda c, s: make("mul", c, s), centred, scale)
    for name, op in (("weight", "mul"), ("bias", "add")):
        if given[name] is not None:
            found = reader.both(lambda a, b: make(op, a, b), found, reader.of(given[name]))  # noqa: B023
    return found, mean, scale


def _layer_norm_backward(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Any:
    grad, value = reader.of(given["grad_out"]), reader.of(given["input"])
    mean, scale = reader.of(given["mean"]), reader.of(given["rstd"])
    first = len(value.axes) - len(given["normalized_shape"])
    axes, rows = list(range(first, len(value.axes))), list(range(first))
    count = float(math.prod(size_of(value.axes[a]) for a in axes))
    mul = lambda a, b: make("mul", a, b)  # noqa: E731
    normal = reader.both(lambda x, m, s: make("mul", make("sub", x, m), s), value, mean, scale)
    inner = grad if given["weight"] is None else reader.both(mul, grad, reader.of(given["weight"]))
    total = reader.summed(inner, axes, True)
    along = reader.summed(reader.both(mul, inner, normal), axes, True)

    def of_input(g: Operand, t: Operand, a: Operand, n: Operand, s: Operand) -> Operand:
        rest = make("add", make("div", t, count), make("mul", n, make("div", a, count)))
        return make("mul", s, make("sub", g, rest))

    found = reader.both(of_input, inner, total, along, normal, scale)
    of_weight = reader.summed(reader.both(mul, grad, normal), rows, False)
    return found, of_weight, reader.summed(grad, rows, False)


def _variance(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Any:
    value = reader.of(given["self"])
    axes = _axes_of(given.get("dim"), len(value.axes))
    _, centred, count = _centred(reader, value, axes)
    square = Value(make("mul", centred.expression, centred.expression), centred.axes, centred.order)
    found = reader.summed(square, axes, bool(given.get("keepdim")))
    correction = 1 if given.get("correction") is None else given["correction"]
    rest = max(count - correction, 0.0)
    return Value(make("div", found.expression, float(rest)), found.axes, found.order)


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze"), _view),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv"), _product),
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "select": _select,
    "slice": _slice,
    "sum": _sum,
    "mean": _mean,
    "amax": _extreme("max"),
    "amin": _extreme("min"),
    "linalg_vector_norm": _norm,
    "_softmax": _softmax,
    "_softmax_backward_data": _softmax_backward,
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "var": _variance,
}
