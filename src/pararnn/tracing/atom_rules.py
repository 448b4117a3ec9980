"""How operations that move and multiply tensors are read as expressions over atoms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from pararnn.tracing.atoms import Item, Reader, Slice, Value, atoms_of, size_of
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


def _cut(value: Value, at: int, ends: Sequence[int]) -> None:
    """Have an axis cut into pieces, if it has different entries."""
    items = value.axes[at]
    if not atoms_of([items]):
        return
    atom, size = items[0]
    inner = size_of(items[1:])
    if atom is None or any(end % inner for end in ends):
        raise NotTiled("it takes a part of an axis that is made of several")
    marks = sorted({0, *(end // inner for end in ends), size})
    raise Slice(atom, tuple(b - a for a, b in itertools.pairwise(marks)))


def _select(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    value = reader.of(given["self"])
    at = given["dim"] % len(value.axes)
    if value.axes[at]:
        index = given["index"] % size_of(value.axes[at])
        _cut(value, at, (index, index + 1))
    return Value(value.expression, value.axes[:at] + value.axes[at + 1 :], value.order)


def _slice(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    value, shape = reader.of(given["self"]), node.meta["shape"]
    at = given["dim"] % len(value.axes)
    if size_of(value.axes[at]) == shape[at]:
        return value
    if given.get("step", 1) != 1 and atoms_of([value.axes[at]]):
        raise NotTiled("it takes every second entry of an axis or fewer")
    first, last, _ = slice(given["start"], given["end"]).indices(size_of(value.axes[at]))
    _cut(value, at, (first, last))
    axis: tuple[Item, ...] = ((None, shape[at]),) if shape[at] > 1 else ()
    return Value(value.expression, (*value.axes[:at], axis, *value.axes[at + 1 :]), value.order)


def _split(reader: Reader, node: fx.Node, given: dict[str, Any]) -> list[Value]:
    value = reader.of(given["self"])
    at = given["dim"] % len(value.axes)
    size: Any = given.get("split_sizes", given.get("split_size"))
    total = size_of(value.axes[at])
    starts = range(0, total, size) if isinstance(size, int) else itertools.accumulate(size)
    ends = [*starts, total]
    if {*ends} <= {0, total}:
        return [value]
    _cut(value, at, ends)
    raise NotTiled("it takes parts of an axis along which all is the same")


def _unbind(reader: Reader, node: fx.Node, given: dict[str, Any]) -> list[Value]:
    value = reader.of(given["self"])
    at = given["dim"] % len(value.axes)
    count = size_of(value.axes[at])
    _cut(value, at, range(count))
    left = Value(value.expression, value.axes[:at] + value.axes[at + 1 :], value.order)
    return [left] * count


def _product(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Value:
    left = reader.of(given["mat1"] if "mat1" in given else given.get("batch1", given.get("self")))
    right = reader.of(given.get("mat2", given.get("batch2", given.get("vec"))))
    found = reader.product(left, right)
    if "beta" not in given:
        return found
    alpha, beta = given["alpha"], given["beta"]
    both = lambda a, b: make("add", make("mul", beta, a), make("mul", alpha, b))  # noqa: E731
    return reader.both(both, reader.of(given["self"]), found)


def _place_of_extreme(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Any:
    raise NotTiled("it looks for the place of an extreme; amax and amin do not")


def _joined(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Any:
    raise NotTiled("it needs parts of an axis as one value")


def _part_backward(reader: Reader, node: fx.Node, given: dict[str, Any]) -> Any:
    """The gradient of all of an axis from that of a part, which is all of it or its one entry."""
    sizes, value = list(given["input_sizes"]), reader.of(given["grad_output"])
    at = given["dim"] % len(sizes)
    if sizes[at] == 1 and len(value.axes) < len(sizes):
        return Value(value.expression, (*value.axes[:at], (), *value.axes[at:]), value.order)
    if len(value.axes) == len(sizes) and size_of(value.axes[at]) == sizes[at]:
        return value
    return _joined(reader, node, given)


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze"), _view),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv"), _product),
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "select": _select,
    "slice": _slice,
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "unbind": _unbind,
    **dict.fromkeys(("cat", "stack"), _joined),
    **dict.fromkeys(("slice_backward", "select_backward"), _part_backward),
    **dict.fromkeys(("max", "min", "argmax", "argmin", "sort", "topk"), _place_of_extreme),
    **REDUCTIONS,
}
