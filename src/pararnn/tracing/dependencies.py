"""Proves which channels of a recurrent part reach which, by following marks through its operations.

Every value is followed as a boolean tensor of its shape: an entry is marked if it may depend on a
marked entry of the state. Row r of the state has the channels of group r marked; since rows do not
influence each other, a channel of the new state that has no mark in row r does not depend on group
r, whatever the values. That rows do not is seen likewise, with one row marked.

Pointwise operations unite marks, operations that only move entries move them, sums and products of
matrices unite them along the axes they contract, zeros in a weight or not. The result of any other
operation is marked all over.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from pararnn.tracing.capture import ROWS, count_of, shape_at
from pararnn.tracing.operations import (
    MOVES,
    creation_value,
    is_pointwise,
    named_arguments,
    operation_name,
)
from pararnn.tracing.partition import Partition
from pararnn.tracing.recorder import mapped

_MOST_MARKS = 2**31  # of the largest value, over all groups: finer groups are not looked for
_AT_ONCE = 2**24
_MOVED = (MOVES - {"index_select"}) | frozenset(
    "diagonal tril triu slice_backward select_backward".split()
)
_REDUCTIONS = frozenset(
    "sum mean prod amax amin var std logsumexp norm linalg_vector_norm any all argmax argmin max "
    "min median mode nansum count_nonzero var_mean std_mean aminmax".split()
)
_ALONG = frozenset(
    "_softmax _log_softmax _safe_softmax _softmax_backward_data _log_softmax_backward_data cumsum "
    "cumprod logcumsumexp cummax cummin sort".split()
)


def group_size(parts: Partition) -> int:
    """Channels of the smallest groups of neighbours that are proved not to reach each other."""
    hidden = parts.capture.hidden_size
    sizes = [size for size in range(hidden, 0, -1) if hidden % size == 0]
    proved = {hidden}
    for size in sizes[1:]:
        coarser = {s for s in sizes if s > size and s % size == 0}
        if coarser <= proved and _are_apart(parts, size):
            proved.add(size)
    return min(proved)


def _are_apart(parts: Partition, size: int) -> bool:
    """Whether groups of so many channels do not reach each other."""
    groups = parts.capture.hidden_size // size
    entries = max(shape.numel() for shape in map(_row_shape, [*parts.recurrent, *parts.states]))
    if entries * groups > _MOST_MARKS:
        return False
    device = torch.device("cpu")
    own = torch.eye(groups, dtype=torch.bool, device=device).repeat_interleave(size, 1)
    return not any(
        (new & ~some).any()
        for some in own.split(max(1, _AT_ONCE // entries))
        for new in _follow(parts.recurrent, _given(parts, some), parts.results, len(some))
    )


def _given(parts: Partition, state: Tensor) -> dict[fx.Node, Any]:
    """Marks of what the recurrent part takes: those of every component, (rows, hidden); no more."""
    marks = {edge: _everywhere(False, shape_at(edge, len(state))) for edge in parts.edges}
    return marks | dict.fromkeys(parts.states, state)


def _row_shape(node: fx.Node) -> torch.Size:
    return torch.Size(shape_at(node, 1) if "shape" in node.meta else ())


def rows_mix(parts: Partition, inputs: str) -> bool:
    """Whether a row of some inputs (`x_` or `state_`) reaches other rows of the new state.

    Operations without a rule count as working on every row by itself; that is to be tried.
    """
    marks: dict[fx.Node, Any] = {}
    nodes = [n for n in parts.capture.graph.nodes if not n.meta.get("is_count")]
    for node in nodes:
        if node.op in ("placeholder", "get_attr"):
            marks[node] = _everywhere(False, shape_at(node, ROWS[0]))
            if str(node.target).startswith(inputs):
                marks[node] = marks[node].clone()
                marks[node][0] = True
    operations = [n for n in nodes if n.op == "call_function"]
    found = _follow(operations, marks, parts.results, ROWS[0], by_rows=True)
    return any(bool(new[1:].any()) for new in found)


def _follow(
    operations: Sequence[fx.Node],
    marks: dict[fx.Node, Any],
    results: Sequence[fx.Node],
    rows: int,
    by_rows: bool = False,
) -> list[Tensor]:
    """Marks of the results of some operations, given those of all that they take."""
    last = {a: node for node in operations for a in node.all_input_nodes}
    for node in operations:
        marks[node] = _marks_after(node, marks, rows, by_rows)
        for argument in node.all_input_nodes:
            if last[argument] is node and argument not in results:
                marks.pop(argument, None)
    return [marks[result] for result in results]


def _marks_after(node: fx.Node, marks: dict[fx.Node, Any], rows: int, by_rows: bool) -> Any:
    """Marks of the result of one operation; a tuple, or those of its rows, if it has several."""

    def given(argument: fx.Node) -> Any:
        return marks[argument] if argument in marks else count_of(argument, rows)

    args, kwargs = mapped(node, given)
    func = node.target
    shape = shape_at(node, rows) if "shape" in node.meta else None
    if func is operator.getitem:
        of_rows = isinstance(args[0], Tensor)
        return _of_rows(args[0], node, rows) if of_rows else args[0][args[1]]
    name = operation_name(func)
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    if creation_value(func, args) is not None or not tensors:
        return _everywhere(False, shape)
    if name in _MOVED and not any(isinstance(a, torch.dtype) for a in args):
        is_view = name in ("view", "_unsafe_view")
        return torch.reshape(*args) if is_view else func(*args, **kwargs)  # type: ignore[operator]
    named = named_arguments(func, args, kwargs)
    if name in _RULES:
        found = _RULES[name](**named)
    elif is_pointwise(func):
        found = _united(tensors)
    elif name in _REDUCTIONS:
        found = _reduced(_united(tensors), named.get("dim"), named.get("keepdim", False))
    elif name in _ALONG:
        found = _spread(_united(tensors), named["dim"])
    else:
        taken = [a for a in node.all_input_nodes if a in marks]
        found = _rows_of([(marks[a], by_rows and a.meta["by_rows"]) for a in taken], rows)
        return found if shape is None else _of_rows(found, node, rows)
    if shape is None:
        return (found,) * len(func._schema.returns) if isinstance(found, Tensor) else found  # type: ignore[union-attr]
    return found.expand(shape)


def _rows_of(values: Sequence[tuple[Tensor, bool]], rows: int) -> Tensor:
    """Which rows of some values have a mark; all of them if one that is not by rows has any."""
    found = [
        m.reshape(rows, -1).any(1) if by_rows else m.any().expand(rows) for m, by_rows in values
    ]
    return _united(found)


def _of_rows(marked: Tensor, node: fx.Node, rows: int) -> Tensor:
    """Marks of a value whose rows are marked or not; all over if it is not by rows."""
    shape = shape_at(node, rows)
    if not node.meta["by_rows"]:
        return marked.any().expand(shape)
    return marked.view(rows, *[1] * (len(shape) - 1)).expand(shape)


def _everywhere(marked: bool, shape: Sequence[int] | None) -> Tensor:
    assert shape is not None
    return torch.full((), marked, dtype=torch.bool, device="cpu").expand(shape)


def _united(marks: Sequence[Tensor | None]) -> Tensor:
    return functools.reduce(torch.bitwise_or, [m for m in marks if m is not None])


def _reduced(marks: Tensor, dim: int | Sequence[int] | None, keepdim: bool) -> Tensor:
    axes = [dim] if isinstance(dim, int) else list(dim or range(marks.dim()))
    for axis in axes if marks.dim() else ():
        if marks.shape[axis] > 1 and marks.stride(axis) == 0:  # expanded: all entries are the first
            marks = marks.narrow(axis, 0, 1)
    return marks.any(axes, keepdim) if marks.dim() else marks


def _spread(marks: Tensor, dim: int | Sequence[int]) -> Tensor:
    """Every entry along some axes gets the marks of all of them."""
    return _reduced(marks, dim, True).expand_as(marks)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return _reduced(a, -1, True) | _reduced(b, -2, True)


def _layer_norm(
    input: Tensor, normalized_shape: list[int], weight: Any, bias: Any = None, eps: Any = None
) -> tuple[Tensor, ...]:
    axes = range(-len(normalized_shape), 0)
    over = _reduced(input, axes, True)
    return _united([_spread(input, axes), weight, bias]), over, over


def _group_norm(
    input: Tensor, weight: Any, bias: Any, N: int, C: int, HxW: int, group: int, eps: float
) -> tuple[Tensor, ...]:
    blocks = input.reshape(N, group, -1)
    scales = [m.reshape(C, *[1] * (input.dim() - 2)) for m in (weight, bias) if m is not None]
    over = blocks.any(-1)
    return _united([_spread(blocks, -1).reshape(input.shape), *scales]), over, over


_RULES: dict[str, Callable[..., Any]] = {
    "mm": lambda self, mat2: _product(self, mat2),
    "bmm": lambda self, mat2: _product(self, mat2),
    "addmm": lambda self, mat1, mat2, **_: self | _product(mat1, mat2),
    "baddbmm": lambda self, batch1, batch2, **_: self | _product(batch1, batch2),
    "constant_pad_nd": lambda self, pad, value: torch.constant_pad_nd(self, pad, False),
    "embedding": lambda weight, indices, **_: indices.unsqueeze(-1) | weight.any(0),
    "mv": lambda self, vec: self.any(-1) | vec.any(),
    "addmv": lambda self, mat, vec, **_: self | mat.any(-1) | vec.any(),
    "log_sigmoid_forward": lambda self: (self, self),
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "view_as_complex": lambda self: self.any(-1),
    "view_as_real": lambda self: self.unsqueeze(-1),
}
