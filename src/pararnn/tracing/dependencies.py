"""Prove which channels of a recurrent part reach which, by following marks through its operations.

Each value has a boolean tensor of its shape, its marks: an entry is marked if it may depend on a
marked entry of the state. In row r of the state, the channels of group r are marked. Rows do not
influence each other, so a channel of the new state without a mark in row r cannot depend on group
r. `rows_mix` checks that about the rows in the same way, with one row marked.

Pointwise operations combine marks with "or". Operations that move entries move marks. Sums and
matrix products combine marks along the axes that they contract, even where a weight is zero. Any
other operation marks its whole result.
"""

from __future__ import annotations

import functools
import itertools
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
from pararnn.tracing.packed import Packing
from pararnn.tracing.partition import Partition
from pararnn.tracing.recorder import mapped

_MOST_MARKS = 2**31  # marks of the largest value, over all groups; finer groups are not tried
_MOST_AXES = 64  # combinations of axes that are tried
_AT_ONCE = 2**24  # marks of the largest value that are followed together
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


def group_size(parts: Partition, blocks: int = 1) -> int:
    """Channels of the smallest groups of neighbours proved independent of each other.

    Args:
        parts: The split step.
        blocks: Blocks of channels that are known not to reach each other.
    """
    block = parts.capture.hidden_size // blocks
    sizes = [size for size in range(block, 0, -1) if block % size == 0]
    proved = {block}
    for size in sizes[1:]:
        coarser = {s for s in sizes if s > size and s % size == 0}
        if coarser <= proved:
            groups = torch.eye(block // size, dtype=torch.bool, device="cpu")
            marks = groups.repeat_interleave(size, 1).repeat(1, blocks)  # of all blocks at once
            if _are_apart(parts, [marks] * len(parts.states)):
                proved.add(size)
    return min(proved)


def axes_apart(parts: Partition, packing: Packing) -> tuple[tuple[int, ...], ...]:
    """For each tensor of the state, the axes along which no entry is proved to reach another.

    The first one of each tensor has the same size as that of the others, and belongs to it: an
    entry may reach entries of the same index there in all tensors. So have the second ones, and so
    on.

    Args:
        parts: The split step.
        packing: Where the entries lie.
    """
    found: list[tuple[int, ...]] = []
    for axes in _axes_together(packing.shapes):
        taken = any(a in used for a, used in zip(axes, zip(*found, strict=True), strict=False))
        if not taken and _are_apart(parts, _marks_along(packing, axes)):
            found.append(axes)
    return tuple(zip(*found, strict=True)) or ((),) * len(packing.shapes)


def _axes_together(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Axes that may belong to each other, one of each tensor; axes of one entry are left out."""
    if sum(map(len, shapes)) == len(shapes) and len(set(shapes)) < 2:
        return []  # plain vectors: their groups tell all
    if len(set(shapes)) == 1:
        return [(a,) * len(shapes) for a, size in enumerate(shapes[0]) if size > 1]
    choices = itertools.product(*(range(len(shape)) for shape in shapes))
    sizes = ((c, {shape[a] for a, shape in zip(c, shapes, strict=True)}) for c in choices)
    return [c for c, s in sizes if len(s) == 1 and s != {1}][:_MOST_AXES]


def _marks_along(packing: Packing, axes: tuple[int, ...]) -> list[Tensor]:
    """Marks of components: in row i, the entries with index i along one axis of each tensor."""
    parts = []
    for shape, axis in zip(packing.shapes, axes, strict=True):
        size = shape[axis]
        marks = torch.eye(size, dtype=torch.bool, device="cpu")
        marks = marks.view(size, *(size if a == axis else 1 for a in range(len(shape))))
        parts.append(marks.expand(size, *shape))
    return list(packing.join(parts).unbind(1))


def _are_apart(parts: Partition, groups: Sequence[Tensor]) -> bool:
    """Whether groups of entries are proved independent of each other.

    Args:
        parts: The split step.
        groups: Of each component, (groups, hidden): the entries of each group.
    """
    entries = max(shape.numel() for shape in map(_row_shape, [*parts.recurrent, *parts.states]))
    if entries * len(groups[0]) > _MOST_MARKS:
        return False
    size = max(1, _AT_ONCE // entries)
    for some in zip(*(marks.split(size) for marks in groups), strict=True):
        found = _follow(parts.recurrent, _given(parts, some), parts.results, len(some[0]))
        if any((new & ~own).any() for new, own in zip(found, some, strict=True)):
            return False
    return True


def _given(parts: Partition, state: Sequence[Tensor]) -> dict[fx.Node, Any]:
    """Marks of the arguments: of the components, each (rows, hidden); none on the edges."""
    marks = {edge: _everywhere(False, shape_at(edge, len(state[0]))) for edge in parts.edges}
    return marks | dict(zip(parts.states, state, strict=True))


def _row_shape(node: fx.Node) -> torch.Size:
    return torch.Size(shape_at(node, 1) if "shape" in node.meta else ())


def rows_mix(parts: Partition, inputs: str) -> bool:
    """Whether a row of some inputs (`x_` or `state_`) may reach other rows of the new state.

    An operation without a rule counts as keeping rows apart if its values have rows; the caller
    has to test that.
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
    results = [*parts.results, *([parts.readout.result] if parts.readout else [])]
    found = _follow(operations, marks, results, ROWS[0], by_rows=True)
    return any(bool(new[1:].any()) for new in found)


def _follow(
    operations: Sequence[fx.Node],
    marks: dict[fx.Node, Any],
    results: Sequence[fx.Node],
    rows: int,
    by_rows: bool = False,
) -> list[Tensor]:
    """Marks of `results`, given the marks of all that the operations take; frees others early."""
    last = {a: node for node in operations for a in node.all_input_nodes}
    for node in operations:
        marks[node] = _marks_after(node, marks, rows, by_rows)
        for argument in node.all_input_nodes:
            if last[argument] is node and argument not in results:
                marks.pop(argument, None)
    return [marks[result] for result in results]


def _marks_after(node: fx.Node, marks: dict[fx.Node, Any], rows: int, by_rows: bool) -> Any:
    """Marks of the result of one operation.

    An operation with several results gives a tuple of marks, or one mark for each row.
    """

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
    """Which rows of some values have a mark; all rows if a value without rows has one."""
    found = [
        m.reshape(rows, -1).any(1) if by_rows else m.any().expand(rows) for m, by_rows in values
    ]
    return _united(found)


def _of_rows(marked: Tensor, node: fx.Node, rows: int) -> Tensor:
    """Expand marks of rows to the shape of a value; a value without rows takes any of them."""
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
        if marks.shape[axis] > 1 and marks.stride(axis) == 0:  # broadcast: one entry tells all
            marks = marks.narrow(axis, 0, 1)
    return marks.any(axes, keepdim) if marks.dim() else marks


def _spread(marks: Tensor, dim: int | Sequence[int]) -> Tensor:
    """Mark all entries along some axes where one of them is marked."""
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
