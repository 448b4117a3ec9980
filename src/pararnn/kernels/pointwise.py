"""Fuse pointwise operations into as few generated Triton kernels as possible.

Before and after an adjoint, its inputs and the gradients are computed for all times at once: by a
few matrix products and a dozen pointwise operations between them. Unfused, these operations would
read and write memory a dozen times; in one kernel they do so once.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pararnn.kernels.triton.build import missing
from pararnn.kernels.triton.device import on_device
from pararnn.kernels.triton.expressions import express_node, function, is_expressed
from pararnn.planning.costs import COSTS
from pararnn.planning.kernel_plans import pointwise_block
from pararnn.tracing.expressions import Operand, leaf, make
from pararnn.tracing.operations import operation_name
from pararnn.tracing.partition import operation

_FORMS = 64  # functions kept for each module

Function = Callable[..., Sequence[Tensor]]


def run(module: fx.GraphModule, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Run a module of operations; see `pararnn.solvers.systems.RunModule`."""
    kind = tensors[0].device.type
    if kind != "cuda" or missing(kind):
        return module(*(t.contiguous() for t in tensors))
    rows = max(t.shape[:1] for t in tensors)  # not part of the key: a function takes any number
    form = tuple((t.shape[:1] == rows or t.shape[:1], t.shape[1:], t.dtype) for t in tensors)
    known = _known.setdefault(module, OrderedDict())
    if form not in known:
        known[form] = fused(module, tensors)
        if len(known) > _FORMS:
            known.popitem(last=False)
    return known[form](*tensors)


_known: weakref.WeakKeyDictionary[fx.GraphModule, OrderedDict[Hashable, Function]] = (
    weakref.WeakKeyDictionary()
)


def fused(module: fx.GraphModule, tensors: Sequence[Tensor]) -> Function:
    """Fuse the operations of a module, for these shapes and any number of rows.

    The function takes tensors of any strides. Operations that are not fused get them contiguous.
    """
    try:
        values = _Shapes(module).of(tensors)
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return _as_it_is(weakref.ref(module))
    return _Fusion(module.graph, values).module()


def _as_it_is(module: weakref.ref[fx.GraphModule]) -> Function:
    """The module unfused, by a weak reference, so that the cache does not keep it alive."""

    def run(*given: Tensor) -> Sequence[Tensor]:
        found = module()
        assert found is not None
        return found(*(t.contiguous() for t in given))

    return run


class _Shapes(fx.Interpreter):
    """Finds shapes and types of a graph's nodes on the meta device, without computing values."""

    def of(self, tensors: Sequence[Tensor]) -> dict[fx.Node, Any]:
        self.found: dict[fx.Node, Any] = {}
        self.run(*(torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors))
        return self.found

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Tensors that an operation makes on a device of its own are on the meta device as well."""
        named = {"device": torch.device("meta")} if "device" in kwargs else {}
        return super().call_function(target, args, {**kwargs, **named})


@dataclass
class _Cluster:
    """Pointwise operations that become one kernel.

    Attributes:
        shape: Shape of all their results.
        nodes: The operations, in order.
    """

    shape: torch.Size
    nodes: list[fx.Node] = field(default_factory=list)


class _Fusion:
    """Orders the operations of a graph in stages, so that each cluster can run at once.

    A stage has first the operations that are not fused, then the clusters. An operation that takes
    the result of a cluster other than its own is in a later stage, so clusters of one stage are
    independent.
    """

    def __init__(self, graph: fx.Graph, values: dict[fx.Node, Any]) -> None:
        self.old, self.values = graph, values
        floating = [v.dtype for v in values.values() if _is_tensor(v) and v.is_floating_point()]
        self.dtype = torch.float64 if torch.float64 in floating else torch.float32
        self.stages: dict[fx.Node, int] = {}
        self.clusters: dict[tuple[int, torch.Size], _Cluster] = {}
        self.of: dict[fx.Node, _Cluster] = {}
        self.operations = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        self.stages.update({n: 0 for n in graph.nodes if n.op == "placeholder"})
        for node in self.operations:
            self.place(node)
        for cluster in self.clusters.values():
            if len(cluster.nodes) == 1:
                del self.of[cluster.nodes[0]]
        self.new = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.contiguous: dict[fx.Node, fx.Node] = {}

    def place(self, node: fx.Node) -> None:
        """Find the stage of an operation, and its cluster if it can be fused."""
        shape = self.values[node].shape if self.fits(node) else None
        stage = 0
        for operand in node.all_input_nodes:
            cluster = self.of.get(operand)
            later = cluster is not None and cluster.shape != shape
            stage = max(stage, self.stages[operand] + later)
        self.stages[node] = stage
        if shape is not None:
            cluster = self.clusters.setdefault((stage, shape), _Cluster(shape))
            cluster.nodes.append(node)
            self.of[node] = cluster

    def fits(self, node: fx.Node) -> bool:
        """Whether a kernel can compute an operation."""
        value = self.values[node]
        operands = [self.values[n] for n in node.all_input_nodes]
        if (
            not _is_tensor(value)
            or value.dim() < 2
            or not all(_is_tensor(v) and v.dtype in (self.dtype, torch.bool) for v in operands)
            or value.dtype not in (self.dtype, torch.bool)
            or all(v.shape != value.shape for v in operands)
        ):
            return False
        leaves = {n: self.leaf(n, i) for i, n in enumerate(node.all_input_nodes)}
        return is_expressed(node, leaves, self.dtype)

    def leaf(self, node: fx.Node, index: int) -> Operand:
        """The kernel's operand for a tensor."""
        made = leaf("drive", index)
        return make("ne", made, 0.0) if self.values[node].dtype is torch.bool else made

    def module(self) -> fx.GraphModule:
        """Build the new graph."""
        for node in self.old.nodes:
            if node.op == "placeholder":
                self.made[node] = self.new.placeholder(str(node.target))
        for stage in range(max(self.stages.values()) + 1):
            for node in self.operations:
                alone = node not in self.of and node not in self.made
                if alone and self.stages[node] == stage:
                    self.made[node] = self.copied(node)
            for (at, _), cluster in self.clusters.items():
                if at == stage and len(cluster.nodes) > 1:
                    self.generate(cluster)
        (results,) = next(n for n in self.old.nodes if n.op == "output").args
        self.new.output(fx.map_arg(results, self.as_recorded))
        return fx.GraphModule(torch.nn.Module(), self.new)

    def copied(self, node: fx.Node) -> fx.Node:
        """Copy an operation that is not fused; sums over rows become `sum_of_rows`."""
        if operation_of(node) == "sum" and len(node.args) > 1 and node.args[1] == [0]:
            (summed,) = node.all_input_nodes
            if self.values[summed].dim() > 1 and not node.kwargs:
                keep = bool(node.args[2]) if len(node.args) > 2 else False
                return self.new.call_function(sum_of_rows, (self.as_recorded(summed), keep))
        return self.new.node_copy(node, self.as_recorded)

    def as_recorded(self, node: fx.Node) -> fx.Node:
        """A value as the recording had it: an argument is made contiguous."""
        if node.op != "placeholder":
            return self.made[node]
        if node not in self.contiguous:
            call = self.new.call_method("contiguous", (self.made[node],))
            self.contiguous[node] = call
        return self.contiguous[node]

    def generate(self, cluster: _Cluster) -> None:
        """Add the call of a cluster's kernel, and its results."""
        inputs: list[fx.Node] = []
        expressions: dict[fx.Node, Operand] = {}
        for node in cluster.nodes:
            for operand in node.all_input_nodes:
                if operand not in expressions:
                    expressions[operand] = self.leaf(operand, len(inputs))
                    inputs.append(operand)
            expressions[node] = express_node(node, expressions, self.dtype)
        users = {n: [u for u in n.users if self.of.get(u) is not cluster] for n in cluster.nodes}
        joined = self.joined(cluster, [u for found in users.values() for u in found])
        alone = [n for n, found in users.items() if any(u not in joined for u in found)]
        buffers = [*([n] for n in alone), *joined.values()]
        roots = [[expressions[n] for n in buffer] for buffer in buffers]
        kinds = [self.values[buffer[0]].dtype for buffer in buffers]
        whole = next(i for i, n in enumerate(inputs) if self.values[n].shape == cluster.shape)
        size = cluster.shape[-1]
        kernel = _kernel(size, whole, roots, kinds, len(inputs), self.dtype)
        call = self.new.call_function(kernel, tuple(self.made[n] for n in inputs))
        for i, node in enumerate([*alone, *joined]):
            self.made[node] = self.new.call_function(operator.getitem, (call, i))

    def joined(self, cluster: _Cluster, users: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """Concatenations of a cluster's results, with their parts; the kernel writes them."""
        last = len(cluster.shape) - 1
        found = {}
        for user in users:
            if operation_of(user) == "cat" and user.args[1:] in ((last,), (-1,)):
                parts: Any = user.args[0]
                kinds = {self.values[part].dtype for part in parts}
                if len(kinds) == 1 and all(self.of.get(part) is cluster for part in parts):
                    found[user] = list(parts)
        return found


def operation_of(node: fx.Node) -> str:
    """The name of the aten operation of a node."""
    target = operation(node)
    return operation_name(target) if hasattr(target, "_schema") else ""


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def sum_of_rows(x: Tensor, keepdim: bool) -> Tensor:
    """`x.sum(0, keepdim)`; long sums in parts first."""
    if len(x) < COSTS.long_sum:
        return x.sum(0, keepdim)
    count = COSTS.parts_of_a_sum
    size = len(x) // count
    parts = x[: size * count].unflatten(0, (count, size)).sum(1)
    return torch.cat([parts, x[size * count :]]).sum(0, keepdim)


def _kernel(
    size: int,
    whole: int,
    roots: Sequence[Sequence[Operand]],
    kinds: Sequence[torch.dtype],
    count: int,
    dtype: torch.dtype,
) -> Callable[..., list[Tensor]]:
    """A function of `count` tensors that runs one kernel.

    Args:
        size: Size of the last axis of all values.
        whole: Index of an argument with the shape of the values; others are broadcast to it.
        roots: For each result, the expressions to concatenate in it; their leaves are `drive`.
        kinds: Types of the results.
        count: Number of arguments.
        dtype: Type of the arithmetic.
    """
    from pararnn.kernels.triton import pointwise  # needs Triton, which this module does not

    flat = [root for buffer in roots for root in buffer]
    operations = function("operations", {"drive": count}, flat, dtype is torch.float64)
    places = tuple((i, size * n) for i, buffer in enumerate(roots) for n, _ in enumerate(buffer))
    columns, rows_at_once = pointwise_block(size)

    def fused_operations(*tensors: Tensor) -> list[Tensor]:
        shape = tensors[whole].shape
        rows = math.prod(shape[:-1])
        inputs = [_as_bytes(t.expand(shape).reshape(rows, size)) for t in tensors]
        results = [
            tensors[0].new_empty((*shape[:-1], size * len(buffer)), dtype=kind)
            for buffer, kind in zip(roots, kinds, strict=True)
        ]
        with on_device(tensors[0]):
            pointwise.run[-(-rows // rows_at_once), -(-size // columns)](
                tuple((t, *t.stride()) for t in inputs),
                tuple((_as_bytes(r), r.shape[-1]) for r in results),
                rows,
                OPERATIONS=operations,
                PLACES=places,
                SIZE=size,
                DOUBLE=dtype is torch.float64,
                ROWS=rows_at_once,
                COLUMNS=columns,
            )
        return results

    return fused_operations


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype is torch.bool else x
