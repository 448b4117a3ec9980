"""A pass of PyTorch's compiler that fuses matrix-vector products, for steps of generation.

Products of several matrices with one vector, or with one of each of a few texts, become one
`pararnn::matvec`. It also computes the vectors themselves, by pointwise operations and means.
Intermediate results are not rounded, as in all code that the compiler fuses. What only moves
numbers is not computed at all: where they are is part of the kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import stable_topological_sort

from pararnn.kernels import matvec
from pararnn.kernels.matvec import Leaf, Vector
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
_PARTS = frozenset((aten.slice.Tensor, aten.select.int, aten.unbind.int))
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass
class _Group:
    """Products with one vector of every text, or with one per head and text.

    Attributes:
        nodes: The products.
        matrices: Their matrices.
    """

    nodes: list[fx.Node] = field(default_factory=list)
    matrices: list[fx.Node] = field(default_factory=list)

    @property
    def x(self) -> fx.Node:
        """The vectors, (texts, inner) or (heads, texts, inner)."""
        x = self.nodes[0].args[0]
        assert isinstance(x, fx.Node)
        return x

    @property
    def heads(self) -> int:
        """Number of vectors of a text."""
        shape = _value(self.matrices[0]).shape
        return shape[0] if len(shape) == 3 else 1

    @property
    def texts(self) -> int:
        """Number of texts."""
        return _value(self.nodes[0]).shape[-2]


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
        key = (_unshaped(x), value.shape, value.dtype, _value(node).shape)
        groups = found.setdefault(key, [])
        if not groups or len(groups[-1].nodes) == COSTS.matvec_most_matrices:
            groups.append(_Group())
        groups[-1].nodes.append(node)
        groups[-1].matrices.append(matrix)
    return [group for groups in found.values() for group in groups]


def _serves(x: fx.Node, matrix: fx.Node) -> bool:
    """Whether the operator supports a product: a row for every text times a contiguous weight."""
    value, texts, (least, most) = _value(matrix), _value(x).shape[-2], COSTS.matvec_inner
    return (
        texts <= COSTS.matvec_most_texts
        and least <= value.shape[-1] <= most
        and value.is_contiguous()
        and value.dtype in (*_TYPES, torch.int8)
        and _value(x).dtype in _TYPES
        and (value.device.type == "cuda" or interpreted())
        and _unshaped(matrix).op == "placeholder"
    )


class _Region:
    """The operations that compute the vectors of a group inside the fused operator.

    Attributes:
        inside: The operations, in order; empty if the vector itself is a leaf.
        leaves: What they read: by the node, the tensor that has its entries, and where.
        indices: The numbers of rows, where leaves are rows of a table.
    """

    def __init__(self, graph: fx.Graph, group: _Group) -> None:
        self.heads, self.texts, x = group.heads, group.texts, group.x
        self.size = _value(x).numel() // self.texts
        self.root, entries = _source(x, _is_move)
        if not torch.equal(self._by_text(entries), self._all()):
            self.root = x
        before = _ancestors(self.root)
        found: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            if node not in before:
                continue
            users = [user for user in node.users if user in before]
            wanted = node is self.root or (users and all(user in found for user in users))
            if wanted and self._takes(node):
                found.add(node)
        for node in graph.nodes:  # what only moves entries of a leaf is read where they are
            if node in found and _only_moves(node) and found.isdisjoint(node.all_input_nodes):
                found.remove(node)
        self.inside = [node for node in graph.nodes if node in found]
        self.leaves: dict[fx.Node, tuple[fx.Node, Leaf]] = {}
        self.indices: list[fx.Node] = []
        if not self.inside:
            self.root = x
            self.leaves[x] = self._leaf(x, self._by_text)
        for node in self.inside:
            for operand in node.all_input_nodes:
                if operand not in found and operand not in self.leaves:
                    self.leaves[operand] = self._leaf(operand, self._broadcast)

    def _all(self) -> Tensor:
        """Numbers of all entries, (texts, entries)."""
        return _numbers(self.texts * self.size).view(self.texts, self.size)

    def _by_text(self, entries: Tensor) -> Tensor:
        """Entries in the order of x, (heads, texts, inner), as (texts, entries)."""
        return entries.view(self.heads, self.texts, -1).transpose(0, 1).reshape(self.texts, -1)

    def _broadcast(self, entries: Tensor) -> Tensor:
        """A vector or a number, of each text or of all, as (texts, entries)."""
        if len(entries) == self.size:
            return entries.expand(self.texts, -1)
        if len(entries) == 1:
            return entries.expand(self.texts, 1)
        return entries.view(self.texts, -1)

    def _leaf(self, node: fx.Node, lay: Callable[[Tensor], Tensor]) -> tuple[fx.Node, Leaf]:
        """The tensor that has the entries of a node, and where; the node itself if need be."""
        source, entries = _source(node, _only_moves)
        value = _value(source)
        readable = value.dtype in _TYPES and value.is_contiguous()
        found = _regular(lay(entries)) if readable else None
        if found is None:
            source, found = node, _regular(lay(_numbers(_value(node).numel())))
        assert found is not None
        return self._row(source, found) or (source, found)

    def _row(self, source: fx.Node, place: Leaf) -> tuple[fx.Node, Leaf] | None:
        """The table that the rows of all texts are from, and where; None if they are not."""
        if source.target is not aten.embedding.default:
            return None
        table, index = source.all_input_nodes
        size = _value(table).shape[1]
        of_texts = _value(index).numel() == self.texts and place.text == (self.texts > 1) * size
        if not of_texts or not place.run or not _value(table).is_contiguous():
            return None
        if index not in self.indices:
            self.indices.append(index)
        return table, place._replace(text=size, row=self.indices.index(index))

    def _takes(self, node: fx.Node) -> bool:
        """Whether the kernel can compute a node; its tensors are vectors or single numbers."""
        operands = node.all_input_nodes
        if node.op != "call_function" or not operands:
            return False
        result, *given = (_value(n) for n in (node, *operands))
        if not all(isinstance(v, Tensor) and v.dtype in _TYPES for v in (result, *given)):
            return False
        of_all = self.texts * self.size
        if not all(v.numel() in (of_all, self.size, self.texts, 1) for v in (result, *given)):
            return False
        if _is_move(node):
            _, entries = _source(node, lambda n: n is node)
            return torch.equal(entries, _numbers(given[0].numel()))
        if node.target is aten.mean.dim:
            of_text = self.heads == 1 and given[0].shape[-1] == self.size
            return of_text and given[0].numel() == of_all and result.numel() == self.texts
        if node.target is _CONVERT:
            return True
        leaves = {n: leaf("drive", i) for i, n in enumerate(operands)}
        if not is_expressed(node, leaves, torch.float32):
            return False
        return all(self._agrees(value, result) for value in given)

    def _agrees(self, value: Tensor, result: Tensor) -> bool:
        """Whether an operation takes, for an entry of a text, that entry of that text."""
        places = _numbers(value.numel()).view(value.shape).expand(result.shape).reshape(-1)
        if value.numel() in (1, result.numel()):
            return value.numel() == 1 or torch.equal(places, _numbers(len(places)))
        if result.numel() != self.texts * self.size:
            return False
        expected = self._broadcast(_numbers(value.numel()))
        return torch.equal(places.view(self.texts, -1), expected.expand(self.texts, self.size))

    def vector(self, stored: Sequence[fx.Node]) -> Vector:
        """Express the vector, and results that other operations need as well (`stored`)."""
        expressions: dict[fx.Node, Operand] = {
            n: leaf("drive", i) for i, n in enumerate(self.leaves)
        }
        for node in self.inside:
            if _is_move(node) or node.target is _CONVERT:
                expressions[node] = expressions[node.all_input_nodes[0]]
            elif node.target is aten.mean.dim:
                expressions[node] = make("mean", expressions[node.all_input_nodes[0]])
            else:
                expressions[node] = express_node(node, expressions, torch.float32)
        return Vector(
            tuple(place for _, place in self.leaves.values()),
            expressions[self.root],
            tuple(expressions[n] for n in stored),
        )


def _fuse(graph: fx.Graph, group: _Group) -> None:
    """Replace a group by `pararnn::matvec`."""
    region = _Region(graph, group)
    inside, texts = {*region.inside, *group.nodes}, group.texts
    wanted = [
        node
        for node in region.inside
        if _value(node).numel() == texts * region.size
        and not all(_only_for(u, inside) for u in node.users)
    ]
    stored = [_converted(node, inside) for node in wanted]
    text = region.vector(wanted).text()
    shape = [group.heads, *_value(group.matrices[0]).shape[-2:]]
    kinds = [str(_value(node).dtype).removeprefix("torch.") for node in (group.nodes[0], *stored)]
    with graph.inserting_before(group.nodes[0]):
        read = [*(tensor for tensor, _ in region.leaves.values()), *region.indices]
        flat = [_shaped(graph, tensor, [_value(tensor).numel()]) for tensor in read]
        matrices = [_shaped(graph, m, shape) for m in group.matrices]
        target = torch.ops.pararnn.matvec.default
        results = _call(graph, target, flat, matrices, kinds, texts, text)
        products, *kept = (_call(graph, operator.getitem, results, i) for i in range(len(kinds)))
        chosen = [_call(graph, aten.select.int, products, 0, i) for i in range(len(matrices))]
        for old, new in zip([*group.nodes, *stored], [*chosen, *kept], strict=True):
            new = _shaped(graph, new, list(_value(old).shape))
            old.replace_all_uses_with(new, lambda user: user not in inside)
    for node in group.nodes:
        graph.erase_node(node)


def _source(node: fx.Node, passes: Callable[[fx.Node], bool]) -> tuple[fx.Node, Tensor]:
    """The earliest tensor that a node has its entries from, and where they are in it.

    Args:
        node: Any.
        passes: Whether to look behind a node.
    """
    if node.target is aten.cat.default or not passes(node):
        return node, _numbers(_value(node).numel())
    moves: list[fx.Node] = []
    while passes(node) and node.target is not aten.cat.default:
        moves.append(node)
        (node,) = node.all_input_nodes
    entries: Any = _numbers(_value(node).numel()).view(_value(node).shape)
    for move in reversed(moves):
        if move.target is not _CONVERT:
            target: Any = move.target
            before = entries
            args, kwargs = fx.map_arg((move.args, move.kwargs), lambda _: before)  # noqa: B023
            entries = target(*args, **kwargs)
    entries = entries.reshape(-1)
    return _part_of(node, entries, passes) if passes(node) else (node, entries)


def _part_of(
    joined: fx.Node, entries: Tensor, passes: Callable[[fx.Node], bool]
) -> tuple[fx.Node, Tensor]:
    """The same for entries of a concatenation, if all are in one of its parts."""
    parts = _arguments(joined)["tensors"]
    numbers = [_numbers(_value(part).numel()).view(_value(part).shape) for part in parts]
    owners = [torch.full_like(n, i) for i, n in enumerate(numbers)]
    axis = _arguments(joined)["dim"]
    owner, number = (torch.cat(each, axis).reshape(-1)[entries] for each in (owners, numbers))
    if not (owner == owner[0]).all():
        return joined, entries
    source, places = _source(parts[int(owner[0])], passes)
    return source, places[number]


def _numbers(count: int) -> Tensor:
    return torch.arange(count, device="cpu")  # whatever the default


def _is_move(node: fx.Node) -> bool:
    """Whether a node has all entries of another, maybe in another order."""
    if node.target in (aten.slice.Tensor, aten.select.int):
        return bool(_value(node).numel() == _value(node.all_input_nodes[0]).numel())
    return node.target in _MOVES or node.target is aten.clone.default


def _only_moves(node: fx.Node) -> bool:
    """Whether a node has entries of another, unchanged but for their type."""
    if node.target is operator.getitem:
        return node.args[0].target is aten.unbind.int  # type: ignore[union-attr]
    return _is_move(node) or node.target in _PARTS or node.target in (_CONVERT, aten.cat.default)


def _regular(places: Tensor) -> Leaf | None:
    """The places of a vector's entries, (texts, entries), or of one number, (texts, 1)."""
    first, count = int(places[0, 0]), places.shape[1]
    text = int(places[1, 0]) - first if len(places) > 1 else 0
    own = places[0] - first
    if not torch.equal(places, first + own + text * _numbers(len(places))[:, None]):
        return None
    if count == 1:
        return Leaf(first, text, 0, 0)
    ends = (own.diff() != 1).nonzero()
    run = int(ends[0]) + 1 if len(ends) else count
    stride = int(own[run]) if run < count else run
    number = _numbers(count)
    if not torch.equal(own, number // run * stride + number % run):
        return None
    return Leaf(first, text, run, stride)


def _converted(node: fx.Node, inside: set[fx.Node]) -> fx.Node:
    """The form in which alone a value is needed outside: behind a conversion; else as it is."""
    moves = [node]
    while True:
        users = [user for user in moves[-1].users if user not in inside]
        if len(users) != 1 or not (_is_move(users[0]) or users[0].target is _CONVERT):
            return node
        moves.append(users[0])
        if users[0].target is _CONVERT:
            _, entries = _source(users[0], lambda n: n in moves[1:])
            return users[0] if torch.equal(entries, _numbers(len(entries))) else node


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
    """The matrix whose transpose a node is; as it is stored, if it is bytes."""
    if node.target is not aten.permute.default:
        return None
    axes = list(range(_value(node).dim()))
    if list(node.args[1]) != [*axes[:-2], axes[-1], axes[-2]]:
        return None
    matrix = node.args[0]
    converted = matrix.target is _CONVERT and _value(matrix.args[0]).dtype is torch.int8
    return matrix.args[0] if converted else matrix


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
