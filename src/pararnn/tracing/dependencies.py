"""Proves which channels of a recurrent part reach which, by following marks through its operations.

Every value is followed as a boolean tensor of its shape: an entry is marked if it may depend on a
marked entry of the state. Row r of the state has the channels of group r marked; since rows do not
influence each other, a channel of the new state that has no mark in row r does not depend on group
r, whatever the values. Pointwise operations unite marks, operations that only move entries move
them, sums and products of matrices unite them along the axes they contract, zeros in a weight or
not. The result of any other operation is marked all over.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map

from pararnn.tracing.capture import count_of, shape_at
from pararnn.tracing.operations import (
    MOVES,
    creation_value,
    is_pointwise,
    named_arguments,
    operation_name,
)
from pararnn.tracing.partition import Partition

_MOST_MARKS = 2**31  # of the largest value, over all groups: finer groups are not looked for
_AT_ONCE = 2**24
_MOVED = (MOVES - {"index_select"}) | frozenset(
    "diagonal tril triu constant_pad_nd slice_backward select_backward".split()
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
        for new in _follow(parts, some)
    )


def _row_shape(node: fx.Node) -> torch.Size:
    return torch.Size(shape_at(node, 1) if "shape" in node.meta else ())


def _follow(parts: Partition, state: Tensor) -> list[Tensor]:
    """Marks of the new components, given those of every component, (rows, hidden)."""
    rows = len(state)
    marks: dict[fx.Node, Any] = dict.fromkeys(parts.states, state)
    for edge in parts.edges:
        marks[edge] = state.new_zeros(()).expand(shape_at(edge, rows))
    last = {a: node for node in parts.recurrent for a in node.all_input_nodes}
    for node in parts.recurrent:
        marks[node] = _marks_after(node, marks, rows)
        for argument in node.all_input_nodes:
            if last[argument] is node and argument not in parts.results:
                marks.pop(argument, None)
    return [marks[result] for result in parts.results]


def _marks_after(node: fx.Node, marks: dict[fx.Node, Any], rows: int) -> Any:
    """Marks of the result of one operation; a tuple, or one for all, when it has several."""

    def given(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        return marks[argument] if argument in marks else count_of(argument, rows)

    args, kwargs = tree_map(given, tuple(node.args)), tree_map(given, dict(node.kwargs))
    func = node.target
    shape = shape_at(node, rows) if "shape" in node.meta else None
    if func is operator.getitem:
        of_all = isinstance(args[0], bool)
        return _everywhere(args[0], shape) if of_all else args[0][args[1]]
    name = operation_name(func)
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    if creation_value(func, args) is not None:
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
    else:  # a truth value for all entries
        found = any(bool(t.any()) for t in tensors)
    if shape is None:  # several results
        return (found,) * len(func._schema.returns) if isinstance(found, Tensor) else found  # type: ignore[union-attr]
    return _everywhere(found, shape) if isinstance(found, bool) else found.expand(shape)


def _everywhere(marked: bool, shape: Sequence[int] | None) -> Tensor:
    assert shape is not None
    return torch.full((), marked, dtype=torch.bool, device="cpu").expand(shape)


def _united(marks: Sequence[Tensor | None]) -> Tensor:
    return functools.reduce(torch.bitwise_or, [m for m in marks if m is not None])


def _reduced(marks: Tensor, dim: int | Sequence[int] | None, keepdim: bool) -> Tensor:
    axes = [dim] if isinstance(dim, int) else list(dim or range(marks.dim()))
    return marks.any(axes, keepdim) if marks.dim() else marks


def _spread(marks: Tensor, dim: int | Sequence[int]) -> Tensor:
    """Every entry along some axes gets the marks of all of them."""
    return _reduced(marks, dim, True).expand_as(marks)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a.any(-1, keepdim=True) | b.any(-2, keepdim=True)


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
    "mv": lambda self, vec: self.any(-1) | vec.any(),
    "addmv": lambda self, mat, vec, **_: self | mat.any(-1) | vec.any(),
    "log_sigmoid_forward": lambda self: (self, self),
    "native_layer_norm": _layer_norm,
    "_fused_rms_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "view_as_complex": lambda self: self.any(-1),
    "view_as_real": lambda self: self.unsqueeze(-1),
}
