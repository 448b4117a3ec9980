"""How operations that move and multiply tensors are read as expressions over atoms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from pararnn.tracing.atoms import Item, Reader, Value, atoms_of, size_of
from pararnn.tracing.expressions import make
from pararnn.tracing.reductions import REDUCTIONS
from pararnn.tracing.tiles import NotTiled


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


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze"), _view),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv"), _product),
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "select": _select,
    "slice": _slice,
    **REDUCTIONS,
}
