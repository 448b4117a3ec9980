"""Split a captured step into its input part and its recurrent part.

The recurrent part has the operations that depend on the state. The input part has the others and
runs for all times at once; its values that the recurrent part takes are the edges.
"""

from __future__ import annotations

import functools
import math
import operator
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from pararnn.tracing.capture import AFTER, Capture, ancestors, followers
from pararnn.tracing.operations import MOVES, creation_value, is_pointwise, operation_name
from pararnn.tracing.recorder import TraceError, aten, show_place


@dataclass
class Partition:
    """A captured step, split.

    Attributes:
        capture: The whole graph.
        states: Placeholders of the state's components.
        recurrent: Operations of the recurrent part, in order: those that depend on the state; cheap
            ones whose value lacks one row per sample along the first axis; and those that number
            the rows (in the input part, all times are rows of one batch, numbered differently).
        edges: Nodes of the captured graph that the recurrent operations (or the result) take from
            the input part. Each input of the step is made from one of them, see `Output`.
        results: Nodes of the new components, in either part.
        readout: The readout; None if the step hands out its first component.
    """

    capture: Capture
    states: list[fx.Node]
    recurrent: list[fx.Node]
    edges: list[fx.Node]
    results: list[fx.Node]
    readout: ReadoutPart | None = None


@dataclass
class ReadoutPart:
    """What is computed from the state after the step.

    Attributes:
        after: Placeholders of the new components that it takes.
        operations: Those that depend on the new components, in order, and cheap ones as in
            `Partition.recurrent`.
        edges: Nodes that they take from the input part.
        result: The node of what is handed out.
    """

    after: list[fx.Node]
    operations: list[fx.Node]
    edges: list[fx.Node]
    result: fx.Node

    @property
    def components(self) -> list[int]:
        """The components that it takes, by their numbers."""
        return [int(str(n.target).removeprefix(AFTER)) for n in self.after]


def partition(
    capture: Capture, draw_in: bool = False, keep_small: bool = False, keep_few: bool = False
) -> Partition:
    """Split a captured step; operations without users are removed from its graph.

    Args:
        capture: The step.
        draw_in: Move a value of the input part that lacks one row per sample along its first axis
            into the recurrent part, even if it is costly, instead of refusing it.
        keep_small: Move cheap operations whose result is larger than all that it is made from, such
            as an outer product, into the recurrent part: less is kept for every time.
        keep_few: With `keep_small`, move into recurrent part and readout also what cheap operations
            make from values that they take anyway.

    Raises:
        TraceError: The recurrent part draws random numbers, or the input part moves or mixes rows.
    """
    graph, count = capture.graph, capture.num_components
    _drop_unused(graph)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    states = [n for n in inputs if str(n.target).startswith("state_")]
    results = list(next(n for n in graph.nodes if n.op == "output").args[0])
    new, handed = (results[:count], results[count:]) if capture.has_readout else (results, [])
    known: Sequence[fx.Node] | None = [] if keep_few else None
    recurrent, edges = _split(capture, states, new, draw_in, keep_small, known)
    for node in recurrent:
        if is_random(node):
            raise TraceError(
                f"{capture.subject} uses the random operation {node.target} on its state at "
                f"{show_place(node.meta.get('place'))}; draw random numbers in the input part "
                "(from x alone) or outside the cell."
            )
    readout = None
    if handed:
        after = [n for n in inputs if str(n.target).startswith(AFTER) and n.users]
        known = edges if keep_few else None
        read = _split(capture, after, handed, draw_in, keep_few, known)
        readout = ReadoutPart(after, *read, handed[0])
    return Partition(capture, states, recurrent, edges, new, readout)


def _split(
    capture: Capture,
    sources: Sequence[fx.Node],
    results: Sequence[fx.Node],
    draw_in: bool,
    keep_small: bool,
    known: Sequence[fx.Node] | None,
) -> tuple[list[fx.Node], list[fx.Node]]:
    """The operations on the way from some nodes to the results, and what they take besides.

    With `known`, what they take are few values beside these, see `partition`.
    """
    graph, needed = capture.graph, ancestors(results)
    from_x = followers(graph, {n for n in graph.nodes if _is_input(n)})
    given = followers(graph, {n for n in graph.nodes if n.op != "call_function" or is_random(n)})
    drawn: set[fx.Node] = set()
    while True:
        # What follows a value that only has its rows elsewhere may be computed for all times.
        begin = {n for n in drawn if not draw_in or n.meta["by_rows"] or n.meta["row_axes"] != 1}
        reached = followers(graph, {*sources, *begin}) | drawn
        found = [n for n in graph.nodes if n in reached & needed and n.op == "call_function"]
        taken = [a for n in found for a in n.all_input_nodes] + list(results)
        edges = [n for n in dict.fromkeys(taken) if n not in reached and not n.meta.get("is_count")]
        odd = [n for n in edges if _lacks_rows(n, from_x)]
        drawable = odd if draw_in else [n for n in odd if _costs_little(n)]
        drawable = [*drawable, *(n for n in edges if _numbers_rows(n, given))]
        if keep_small:
            drawable += [n for n in edges if _least_entries(n) < _entries(n)]
        if known is not None:
            drawable += [n for n in edges if _is_known(n, {*edges, *known} - {n})]
        if not drawable:
            break
        drawn.update(drawable)
    for node in odd:
        does = "moves" if node.meta["row_axes"] == 1 else "mixes"
        raise TraceError(
            f"{capture.subject} {does} the rows of x at {show_place(node.meta.get('place'))} "
            f"(a value of shape {node.meta['shape']} without one row per sample along its first "
            "axis); every row must be computed on its own, with the rows first."
        )
    return found, edges


def rows_lost_at(capture: Capture, prefix: str) -> str:
    """The first place where something of x or of the state has no rows, as " at ..."; else empty.

    `prefix` is that of the names of what is given: "x_" or "state_".
    """
    given = {n for n in capture.graph.nodes if str(n.target).startswith(prefix)}
    reached = followers(capture.graph, given)
    for node in capture.graph.nodes:
        if node in reached and node.meta.get("row_axes") == 0:
            return f" at {show_place(node.meta.get('place'))}"
    return ""


def is_random(node: fx.Node) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _lacks_rows(node: fx.Node, from_x: set[fx.Node]) -> bool:
    """Whether a value varies with x or the number of rows, but not one row per sample in front."""
    by_rows = node.meta["by_rows"]
    return (node in from_x and not by_rows) or node.meta["row_axes"] != int(by_rows)


def _costs_little(node: fx.Node) -> bool:
    """Whether an operation is cheap enough for every step: it moves, fills or is pointwise."""
    made_by: Any = node.args[0] if node.target is operator.getitem else node
    if not hasattr(made_by.target, "_schema") or is_random(made_by):
        return False
    fills = creation_value(made_by.target, made_by.args) is not None
    return fills or operation_name(made_by.target) in MOVES or is_pointwise(made_by.target)


def _is_known(node: fx.Node, others: set[fx.Node]) -> bool:
    """Whether cheap operations make a value from these, or it holds another in another shape."""
    if node.op != "call_function" or not hasattr(node.target, "_schema") or not _costs_little(node):
        return False
    tensors = [a for a in node.all_input_nodes if not a.meta.get("is_count")]
    if not tensors or not all("shape" in a.meta for a in tensors):
        return False
    taken = all(not a.meta["row_axes"] or a in others or _moved(a) in others for a in tensors)
    return taken or _moved(node) is not node


def _moved(node: fx.Node) -> fx.Node:
    """The value that a value holds in another shape or order."""
    while node.op == "call_function" and hasattr(node.target, "_schema"):
        tensors = [a for a in node.all_input_nodes if not a.meta.get("is_count")]
        moves = operation_name(node.target) in MOVES and len(tensors) == 1
        if not moves or "shape" not in tensors[0].meta or _entries(tensors[0]) != _entries(node):
            break
        if tensors[0].meta["row_axes"] != tensors[0].meta["by_rows"]:
            break
        node = tensors[0]
    return node


def _entries(node: fx.Node) -> int:
    """Entries of a value per row; none if it has no rows."""
    return math.prod(node.meta["shape"][1:]) if node.meta["by_rows"] else 0


def _least_entries(node: fx.Node) -> int:
    """Entries per row from which cheap operations make a value."""
    own = _entries(node)
    if not own or node.op != "call_function" or "shape" not in node.meta:
        return own
    tensors = [a for a in node.all_input_nodes if not a.meta.get("is_count")]
    moves = hasattr(node.target, "_schema") and operation_name(node.target) in MOVES
    if not (_costs_little(node) or _is_outer(node)) or (moves and len(tensors) > 1):
        return own
    if not all("shape" in a.meta and a.meta["row_axes"] == a.meta["by_rows"] for a in tensors):
        return own
    return min(own, sum(map(_least_entries, dict.fromkeys(tensors))))


def _is_outer(node: fx.Node) -> bool:
    """Whether a product of matrices sums over one entry."""
    return node.target is aten.bmm.default and node.args[0].meta["shape"][-1] == 1  # type: ignore


def _numbers_rows(node: fx.Node, given: set[fx.Node]) -> bool:
    """Whether a value has rows but depends on their number alone, as `torch.arange(len(x))`."""
    if node in given or not node.meta["row_axes"] or node.op != "call_function":
        return False
    made_by = getattr(node.target, "_schema", None)
    return made_by is None or creation_value(node.target, node.args) is None


def _is_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and str(node.target).startswith("x_")


def _drop_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr"):
            graph.erase_node(node)


class InputPart(nn.Module):
    """The input part of a cell as a module, for any number of rows.

    Takes the current tensors of `names` and the inputs, shape (rows, *features); returns one tensor
    for each requested output.
    """

    def __init__(self, names: list[str], constants: list[Tensor], graph: fx.Graph) -> None:
        super().__init__()
        self.names = names
        self.constants = constants
        self.is_random = any(map(is_random, graph.nodes))
        self.module = module_of(direct(graph))

    def forward(self, tensors: list[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return self.module.forward(*self.fixed(tensors, inputs[0].device), *inputs)

    def fixed(self, tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """What `module` takes before its inputs: tensors of the cell, and its constants.

        PyTorch's operations take a number on the CPU (`torch.tensor(0.5)`) on every device, and
        kernels do not. It is read at every call, without a copy that would keep it out of a graph.
        """
        moved = [
            torch.zeros((), dtype=c.dtype, device=device) + c
            if c.dim() == 0 and c.device.type == "cpu" != device.type
            else c
            for c in self.constants
        ]
        return [*tensors, *moved]


def operation(node: fx.Node) -> Any:
    """The operator that a node called before `direct` replaced it."""
    return node.meta.get("overload", node.target)


def direct(graph: fx.Graph) -> fx.Graph:
    """Replace operators in a graph by PyTorch's own functions, whose calls take a third less time.

    `operation` gives the operator that a node called before.
    """
    for node in graph.nodes:
        plain = not node.kwargs and None not in tree_leaves(node.args)
        if hasattr(node.target, "_schema") and plain:
            name = node.target._schema.name.removeprefix("aten::")
            function = getattr(torch, name, None)
            if isinstance(function, BuiltinFunctionType):
                node.meta["overload"], node.target = node.target, function
    return graph


_modules: weakref.WeakValueDictionary[str, fx.GraphModule] = weakref.WeakValueDictionary()


def module_of(graph: fx.Graph) -> fx.GraphModule:
    """A module that runs a graph without attributes; graphs with equal code share one module.

    torch.compile guards on modules: with a shared one it compiles one layer of a model for all.
    """
    code = graph.python_code("self").src
    module = _modules.get(code)
    if module is None:
        module = _modules[code] = fx.GraphModule(nn.Module(), graph)
    return module


def copy_graph(
    parts: Partition, nodes: Iterable[fx.Node], inputs: dict[fx.Node, str], rows_of: fx.Node
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copy `nodes` into a graph of their own.

    `view` becomes `reshape`: strides may differ from those of the recording.

    Args:
        parts: The partition that the nodes belong to.
        nodes: Operations to copy, in order.
        inputs: Values that become placeholders, with their names.
        rows_of: The input whose first size is the number of rows.

    Returns:
        The graph, still without an output, and the new node of each old one.
    """
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {n: graph.placeholder(name) for n, name in inputs.items()}
    _copy_nodes(parts, nodes, graph, new, new[rows_of])
    return graph, new


def _copy_nodes(
    parts: Partition,
    nodes: Iterable[fx.Node],
    graph: fx.Graph,
    new: dict[fx.Node, fx.Node],
    rows: fx.Node,
) -> None:
    """Copy `nodes` into `graph`; see `copy_graph`.

    Args:
        parts: The partition that the nodes belong to.
        nodes: Operations to copy, in order.
        graph: The graph to copy into.
        new: The node in `graph` of each node that is copied already; extended.
        rows: A node of `graph` whose first size is the number of rows.
    """
    first_input = next(n for n in parts.capture.graph.nodes if _is_input(n))

    def lookup(node: fx.Node) -> fx.Node:
        if node not in new:
            if node is first_input:
                return rows
            assert node.meta.get("is_count"), f"{node} is not available here"
            new[node] = graph.node_copy(node, lookup)
        return new[node]

    for node in nodes:
        if node not in new:
            new[node] = graph.node_copy(node, lookup)
            if node.target is aten.view.default:
                new[node].target = aten.reshape.default
            elif node.target is aten.convolution.default:
                new[node].meta["overload"], new[node].target = node.target, _convolution


def _convolution(input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    """In the widest type of its tensors: autocast converts for `F.conv1d`, but not for this."""
    given = [t for t in (input, weight, bias) if t is not None]
    wide = functools.reduce(torch.promote_types, [t.dtype for t in given])
    input, weight, *biases = (t.to(wide) for t in given)
    return aten.convolution.default(input, weight, biases[0] if biases else None, *rest)


def module_from(
    parts: Partition,
    outputs: Sequence[Output],
    results: Sequence[fx.Node] | None = None,
    states: Sequence[fx.Node] | None = None,
) -> fx.GraphModule:
    """The recurrent part as a module `(*state, *outputs of the input part) -> results`.

    The module begins with the operations that turn the outputs back into the edges (`Output.undo`).

    Args:
        parts: The split step.
        outputs: Of the input part.
        results: The new state when None.
        states: Placeholders that it takes as state; those before the step when None.
    """
    graph = fx.Graph()
    states = parts.states if states is None else states
    new = {n: graph.placeholder(f"state_{i}") for i, n in enumerate(states)}
    inputs = [graph.placeholder(f"input_{i}") for i in range(len(outputs))]
    for given, output in zip(inputs, outputs, strict=True):
        if output.edge not in new:
            edge = output.undo(graph, given)
            if _is_narrow(parts, output.edge) and any(
                "dtype" not in user.meta or _is_narrow(parts, user) for user in output.edge.users
            ):  # which compute, and so round, in its type
                kind = {"dtype": output.edge.meta["dtype"]}
                edge = graph.call_function(aten._to_copy.default, (edge,), kind)
            new[output.edge] = edge
    needed: set[fx.Node] = set()
    results = parts.results if results is None else results
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in needed and node not in new and not node.meta.get("is_count"):
            assert node.op == "call_function", f"{node} is not available here"
            needed.add(node)
            stack.extend(node.all_input_nodes)
    body = [n for n in parts.capture.graph.nodes if n in needed]
    _copy_nodes(parts, body, graph, new, next(iter(new.values())))
    graph.output(tuple(new[r] for r in results))
    graph.eliminate_dead_code()
    return module_of(graph)


class Output(Protocol):
    """A result of the input part: an edge, in the form that the step takes it."""

    @property
    def edge(self) -> fx.Node:
        """The node of the captured graph."""
        ...

    def emit(self, graph: fx.Graph, value: fx.Node, rows: fx.Node) -> fx.Node:
        """Add operations to `graph` that make the result from the edge's `value`."""
        ...

    def undo(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """Add operations to `graph` that turn the result `value` back into the edge's value."""
        ...


@dataclass(frozen=True)
class AsItIs:
    """An edge that the step takes unchanged."""

    edge: fx.Node

    def emit(self, graph: fx.Graph, value: fx.Node, rows: fx.Node) -> fx.Node:
        """See `Output.emit`."""
        return value

    def undo(self, graph: fx.Graph, value: fx.Node) -> fx.Node:
        """See `Output.undo`."""
        return value


def input_part(parts: Partition, outputs: Sequence[Output]) -> InputPart:
    """Build the input part that returns `outputs`."""
    capture = parts.capture
    needed: set[fx.Node] = set()
    stack = [o.edge for o in outputs]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    sources = [n for n in capture.graph.nodes if n.op in ("placeholder", "get_attr")]
    given = [n for n in sources if _is_input(n)]
    own = [n for n in sources if n in needed and n.op == "placeholder" and n not in given]
    constants = [n for n in sources if n in needed and n.op == "get_attr"]
    index = {f"attribute_{i}": name for i, name in enumerate(capture.attributes)}
    inputs = {n: str(n.target) for n in (*own, *constants, *given)}  # not the user's names
    body = [n for n in capture.graph.nodes if n in needed and n.op == "call_function"]
    graph, new = copy_graph(parts, body, inputs, given[0])
    rows = graph.call_function(torch.Tensor.size, (new[given[0]], 0))
    values = [o.emit(graph, new[o.edge], rows) for o in outputs]
    for i, output in enumerate(outputs):
        if _is_rounded(parts, output.edge):  # states are kept in the type of the drives
            values[i] = graph.call_function(torch.Tensor.to, (values[i], capture.dtype))
    graph.output(tuple(values))
    if not rows.users:
        graph.erase_node(rows)
    kept = [capture.constants[str(n.target)] for n in constants]
    return InputPart([index[n.target] for n in own], kept, graph)


def _is_narrow(parts: Partition, node: fx.Node) -> bool:
    """Whether a node's type has fewer bits than the cell's."""
    kind = node.meta["dtype"]
    return kind.is_floating_point and kind.itemsize < parts.capture.dtype.itemsize


def _is_rounded(parts: Partition, edge: fx.Node) -> bool:
    """Whether the step itself rounds an edge; where all inputs are as narrow, they are kept so."""
    kinds = [n.meta["dtype"] for n in parts.capture.graph.nodes if _is_input(n)]
    sizes = [kind.itemsize for kind in kinds if kind.is_floating_point]
    return _is_narrow(parts, edge) and edge.meta["dtype"].itemsize < max(sizes, default=8)
