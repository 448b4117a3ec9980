"""Rewrite batched products with a weight that all rows share as products with the weight itself.

`bmm` multiplies two batches of matrices. `matmul` expands a shared weight to such a batch, so the
weight is read, or even copied, once for every row. The rewritten product has the weight once; the
rows of the batch become rows of the other factor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from pararnn.tracing.capture import ROWS, count_of, mark_rows, shape_at
from pararnn.tracing.operations import MOVES, is_pointwise, named_arguments, operation_name
from pararnn.tracing.partition import is_random
from pararnn.tracing.recorder import aten, is_differentiable

_COPIES = frozenset("_to_copy clone contiguous".split())


def share_weights(graph: fx.Graph) -> None:
    """Rewrite, in place, the products of a captured step whose weight all rows share."""
    for node in [n for n in graph.nodes if n.target is aten.baddbmm.default]:
        _taken_apart(graph, node)
    for node in [n for n in graph.nodes if n.target is aten.bmm.default]:
        left, right = node.args
        if _is_repeated(right):
            _Product(graph, node).replace(left, right)
        elif _is_repeated(left):
            _Product(graph, node, turned=True).replace(right, left)


def _taken_apart(graph: fx.Graph, node: fx.Node) -> None:
    """Split `baddbmm` into `bmm` and an addition if all rows share its weight."""
    given = named_arguments(node.target, tuple(node.args), dict(node.kwargs))
    if not (_is_repeated(given["batch1"]) or _is_repeated(given["batch2"])):
        return
    new = _Product(graph, node)
    product = new.call(aten.bmm.default, given["batch1"], given["batch2"])
    if given["alpha"] != 1:
        product = new.call(aten.mul.Tensor, product, given["alpha"])
    added = given["self"]
    if given["beta"] != 1:
        added = new.call(aten.mul.Tensor, added, given["beta"])
    node.replace_all_uses_with(new.call(aten.add.Tensor, added, product))
    graph.erase_node(node)


def _is_repeated(node: fx.Node) -> bool:
    """Whether a batch of matrices repeats the same matrices for every row."""
    first, *others = node.meta["slopes"]
    return bool(first and not any(others) and _path(node)) and _repetition(node) is not None


def _path(node: fx.Node) -> list[fx.Node] | None:
    """Operations, in order, that compute a value from values without rows.

    None if one of them is neither a move, a copy nor pointwise, or is random.
    """
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        at = stack.pop()
        if at.meta.get("is_count") or at in found:
            continue
        if "slopes" not in at.meta or not hasattr(at.target, "_schema"):
            return None
        known = operation_name(at.target) in MOVES | _COPIES or is_pointwise(at.target)
        if not known or is_random(at):
            return None
        found[at] = None
        stack.extend(a for a in at.all_input_nodes if any(a.meta.get("slopes", (1,))))
    return [n for n in node.graph.nodes if n in found]


def _repetition(node: fx.Node) -> str | None:
    """How a batch repeats the matrices of one row.

    "outside" as `Tensor.repeat` does, "inside" as `repeat_interleave` does, None if it does not.
    """
    one, some = _computed(node, 1), _computed(node, ROWS[0])
    if torch.equal(some, one.repeat(ROWS[0], 1, 1)):
        return "outside"
    return "inside" if torch.equal(some, one.repeat_interleave(ROWS[0], 0)) else None


def _computed(node: fx.Node, rows: int) -> Tensor:
    """A value at a number of rows, from random numbers that are the same in every call."""
    values: dict[fx.Node, Any] = {}

    def given(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        if argument.meta.get("is_count"):
            return count_of(argument, rows)
        if argument not in values:
            values[argument] = _numbers(argument, len(values))
        return values[argument]

    for at in _path(node) or ():
        args, kwargs = tree_map(given, tuple(at.args)), tree_map(given, dict(at.kwargs))
        kwargs.pop("device", None)
        values[at] = at.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


def _numbers(like: fx.Node, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    shape, dtype = like.meta["shape"], like.meta["dtype"]
    if is_differentiable(dtype):
        return torch.rand(shape, generator=draw, dtype=dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=draw).to(dtype)


def _on_meta(node: fx.Node, rows: int) -> Tensor:
    """The result of an operation at a number of rows, on the meta device."""

    def given(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        if argument.meta.get("is_count"):
            return count_of(argument, rows)
        shape = shape_at(argument, rows)
        return torch.empty(shape, dtype=argument.meta["dtype"], device="meta")

    args, kwargs = tree_map(given, tuple(node.args)), tree_map(given, dict(node.kwargs))
    kwargs.pop("device", None)
    return node.target(*args, **kwargs)  # type: ignore[operator]


class _Product:
    """Replaces one product.

    Args:
        graph: The graph of the product.
        node: The product.
        turned: Whether the weight is on the left; the transposes are multiplied then.
    """

    def __init__(self, graph: fx.Graph, node: fx.Node, turned: bool = False) -> None:
        self.graph, self.node, self.turned = graph, node, turned

    def call(self, func: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert an operation before the product, with its metadata."""
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(func, args, kwargs)
        new.meta.update(place=self.node.meta.get("place"), line=self.node.meta.get("line", 0))
        results = [_on_meta(new, rows) for rows in ROWS]
        new.meta.update(shape=tuple(results[0].shape), dtype=results[0].dtype)
        mark_rows(new, tuple(results[1].shape))
        return new

    def transposed(self, value: fx.Node, first: int = -2, second: int = -1) -> fx.Node:
        return self.call(aten.transpose.int, value, first, second)

    def reshaped(self, value: fx.Node, *shape: int) -> fx.Node:
        return self.call(aten.reshape.default, value, list(shape))

    def replace(self, value: fx.Node, repeated: fx.Node) -> None:
        """Replace the product by one of `value` and the weight of one row."""
        order, weight = _repetition(repeated), self.of_one_row(repeated)
        if self.turned:
            value, weight = self.transposed(value), self.transposed(weight)
        count, inner, outer = weight.meta["shape"]
        size = value.meta["shape"][1]
        if count == 1:
            rows, one = self.reshaped(value, -1, inner), self.reshaped(weight, inner, outer)
            result = self.reshaped(self.call(aten.mm.default, rows, one), -1, size, outer)
        elif order == "inside":
            rows = self.reshaped(value, count, -1, inner)
            result = self.reshaped(self.call(aten.bmm.default, rows, weight), -1, size, outer)
        else:
            apart = self.transposed(self.reshaped(value, -1, count, size, inner), 0, 1)
            rows = self.reshaped(apart, count, -1, inner)
            product = self.call(aten.bmm.default, rows, weight)
            product = self.reshaped(product, count, -1, size, outer)
            result = self.reshaped(self.transposed(product, 0, 1), -1, size, outer)
        if self.turned:
            result = self.transposed(result)
        self.node.replace_all_uses_with(result)
        self.graph.erase_node(self.node)

    def of_one_row(self, repeated: fx.Node) -> fx.Node:
        """The weight at one row; a single matrix if its matrices are all equal."""
        new: dict[fx.Node, fx.Node] = {}

        def given(argument: Any) -> Any:
            if not isinstance(argument, fx.Node):
                return argument
            is_count = argument.meta.get("is_count")
            return count_of(argument, 1) if is_count else new.get(argument, argument)

        for at in _path(repeated) or ():
            args, kwargs = tree_map(given, tuple(at.args)), tree_map(given, dict(at.kwargs))
            new[at] = self.call(at.target, *args, **kwargs)
        values = _computed(repeated, 1)
        if len(values) > 1 and torch.equal(values, values[:1].expand_as(values)):
            return self.call(aten.slice.Tensor, new[repeated], 0, 0, 1)
        return new[repeated]
