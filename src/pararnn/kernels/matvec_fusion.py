"""A pass of PyTorch's compiler that fuses matrix-vector products, for steps of generation.

Products of several matrices with one vector become one `pararnn::matvec`. It also computes the
vector itself, by pointwise operations and means. Intermediate results are not rounded, as in all
code that the compiler fuses.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort

from pararnn.kernels import matvec
from pararnn.kernels.matvec import Vector
from pararnn.kernels.triton.build import interpreted
from pararnn.kernels.triton.expressions import express_node, is_expressed
from pararnn.planning.costs import COSTS
from pararnn.tracing.expressions import Operand, leaf, make
from pararnn.tracing.operations import (
    named_arguments,
)

aten = torch.ops.aten
_MOVES = frozenset(
    (
        aten.reshape.default,
        aten.view.default,
        aten.permute.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
    )
)
_CONVERT = torch.ops.prims.convert_element_type.default
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class _Group:
    """Products with one vector, or with one vector per head.

    Attributes:
        nodes: The products.
        matrices: Their matrices.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    matrices: list[fx.Node] = field(default_factory=list)

    @property
    def vector(self) -> fx.Node:
        """The vector, before operations that only change its shape."""
        return _unshaped(self.nodes[0].args[0])

    @property
    def heads(self) -> int:
        """Number of vectors."""
        shape = _value(self.matrices[0]).shape
        return shape[0] if len(shape) == 3 else 1


class FuseMatvecs(CustomGraphPass):
    """The pass; see the module."""

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite a graph in place."""
        _cut_before_joining(graph)
        for group in _groups(graph):
            _fuse(graph, group)
            stable_topological_sort(graph)

    def uuid(self) -> bytes:
        """A cache key that changes with this file and with that of the operator."""
        return get_hash_for_files((__file__, matvec.__file__))


def _cut_before_joining(graph: fx.Graph) -> None:
    """Replace a slice of a concatenation by a slice of the part that contains it."""
    for node in graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        joined, axis, first, last, step = _cut(node)
        while joined.target is aten.slice.Tensor and _cut(joined)[1] == axis and step == 1:
            joined, _, offset, _, step = _cut(joined)
            first, last = first + offset, last + offset
        if joined.target is not aten.cat.default or step != 1:
            continue
        concatenation = _arguments(joined)
        for part in concatenation["tensors"] if concatenation["dim"] == axis else ():
            size = _value(part).shape[axis]
            if first >= 0 and last <= size:
                with graph.inserting_before(node):
                    new = _call(graph, aten.slice.Tensor, part, axis, first, last)
                node.replace_all_uses_with(new)
                break
            first, last = first - size, last - size
    for node in reversed(graph.nodes):
        if node.target in (aten.slice.Tensor, aten.cat.default) and not node.users:
            graph.erase_node(node)


def _cut(node: fx.Node) -> tuple[fx.Node, int, int, int, int]:
    """The source of a slice, its axis, its bounds and its step."""
    given = _arguments(node)
    size = _value(given["self"]).shape[given["dim"]]
    first, last, _ = slice(given["start"], given["end"]).indices(size)
    return given["self"], given["dim"], first, last, given["step"]


def _groups(graph: fx.Graph) -> list[_Group]:
    found: dict[tuple[Any, ...], list[_Group]] = {}
    for node in graph.nodes:
        if node.target not in (aten.mm.default, aten.bmm.default):
            continue
        x: Any
        x, transposed = node.args
        matrix = _transposed(transposed)
        if matrix is None or not _serves(x, matrix):
            continue
        value = _value(matrix)
        key = (_unshaped(x), value.shape, value.dtype)
        groups = found.setdefault(key, [])
        if not groups or len(groups[-1].nodes) == COSTS.matvec_most_matrices:
            groups.append(_Group())
        groups[-1].nodes.append(node)
        groups[-1].matrices.append(matrix)
    return [group for groups in found.values() for group in groups]


def _serves(x: fx.Node, matrix: fx.Node) -> bool:
    """Whether the operator supports a product: one row times a contiguous weight."""
    value, (least, most) = _value(matrix), COSTS.matvec_inner
    return (
        _value(x).shape[-2] == 1
        and least <= value.shape[-1] <= most
        and value.is_contiguous()
        and value.dtype in _TYPES
        and (value.device.type == "cuda" or interpreted())
        and _unshaped(matrix).op == "placeholder"
    )


class _Region:
    """The operations that compute the vector of a group inside the fused operator.

    Attributes:
        inside: The operations, in order; empty if the vector itself is a leaf.
        leaves: The tensors that they read.
    """

    def __init__(self, graph: fx.Graph, group: _Group) -> None:
        self.group = group
        self.size = _value(group.vector).numel()
        before = _ancestors(group.vector)
        found: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            if node not in before:
                continue
            users = [user for user in node.users if user in before]
            wanted = node is group.vector or (users and all(user in found for user in users))
            if wanted and self._takes(node):
                found.add(node)
        self.inside = [node for node in graph.nodes if node in found]
        operands = [o for node in self.inside for o in node.all_input_nodes if o not in found]
        self.leaves = list(dict.fromkeys(operands or [group.vector]))

    def _takes(self, node: fx.Node) -> bool:
        """Whether the kernel can compute a node; its tensors are vectors or single numbers."""
        tensors = [node, *node.all_input_nodes]
        if node.op != "call_function" or len(tensors) == 1:
            return False
        values = [_value(n) for n in tensors]
        if not all(
            isinstance(v, Tensor) and v.dtype in _TYPES and v.numel() in (self.size, 1)
            for v in values
        ):
            return False
        if node.target in _MOVES:
            return _unshaped(node) is not node
        if node.target is aten.mean.dim:
            return self.group.heads == 1 and values[0].numel() == 1 < values[1].numel()
        if node.target is _CONVERT:
            return True
        leaves = {n: leaf("drive", i) for i, n in enumerate(node.all_input_nodes)}
        return is_expressed(node, leaves, torch.float32)

    def vector(self, stored: Sequence[fx.Node]) -> Vector:
        """Express the vector, and results that other operations need as well (`stored`)."""
        expressions: dict[fx.Node, Operand] = {
            n: leaf("drive", i) for i, n in enumerate(self.leaves)
        }
        for node in self.inside:
            if node.target in _MOVES or node.target is _CONVERT:
                expressions[node] = expressions[node.all_input_nodes[0]]
            elif node.target is aten.mean.dim:
                expressions[node] = make("mean", expressions[node.all_input_nodes[0]])
            else:
                expressions[node] = express_node(node, expressions, torch.float32)
        return Vector(
            tuple(_value(n).numel() > 1 for n in self.leaves),
            expressions[self.group.vector],
            tuple(expressions[n] for n in stored),
        )


def _fuse(graph: fx.Graph, group: _Group) -> None:
    """Replace a group by `pararnn::matvec`."""
    region = _Region(graph, group)
    inside = {*region.inside, *group.nodes}
    stored = [
        node
        for node in region.inside
        if _value(node).numel() == region.size and not all(_only_for(u, inside) for u in node.users)
    ]
    text = region.vector(stored).text()
    shape = [group.heads, *_value(group.matrices[0]).shape[-2:]]
    kinds = [str(_value(node).dtype).removeprefix("torch.") for node in stored]
    with graph.inserting_before(group.nodes[0]):
        flat = [_shaped(graph, n, [_value(n).numel()]) for n in region.leaves]
        matrices = [_shaped(graph, m, shape) for m in group.matrices]
        results = _call(graph, torch.ops.pararnn.matvec.default, flat, matrices, kinds, text)
        products, *kept = (
            _call(graph, operator.getitem, results, i) for i in range(1 + len(kinds))
        )
        chosen = [_call(graph, aten.select.int, products, 0, i) for i in range(len(matrices))]
        for old, new in zip([*group.nodes, *stored], [*chosen, *kept], strict=True):
            new = _shaped(graph, new, list(_value(old).shape))
            old.replace_all_uses_with(new, lambda user: user not in inside)
    for node in group.nodes:
        graph.erase_node(node)


def _shaped(graph: fx.Graph, node: fx.Node, shape: list[int]) -> fx.Node:
    return _call(graph, aten.reshape.default, node, shape)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A new node, with its value's metadata."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, _value))
    return node


def _only_for(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a node is inside, or a reshape that only nodes inside use."""
    if node in inside:
        return True
    return node.target in _MOVES and all(_only_for(user, inside) for user in node.users)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """A node and the nodes that it depends on."""
    found, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found


def _transposed(node: Any) -> fx.Node | None:
    """The matrix whose transpose a node is."""
    if node.target is not aten.permute.default:
        return None
    axes = list(range(_value(node).dim()))
    return node.args[0] if list(node.args[1]) == [*axes[:-2], axes[-1], axes[-2]] else None


def _unshaped(node: Any) -> fx.Node:
    """Undo reshapes: the earliest node with the same elements in the same order."""
    while node.target in _MOVES:
        (given,) = node.all_input_nodes
        if node.target is aten.permute.default:
            axes: Any = node.args[1]
            moved = [axis for axis in axes if _value(given).shape[axis] != 1]
            if moved != sorted(moved):
                break
        node = given
    return node


def _arguments(node: fx.Node) -> dict[str, Any]:
    target: Any = node.target
    return named_arguments(target, node.args, node.kwargs)


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")
