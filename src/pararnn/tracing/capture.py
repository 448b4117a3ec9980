"""Capture one step of a cell as a graph of aten operations, valid for any number of rows."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.overrides import TorchFunctionMode

from pararnn.tracing.modes import without_autocast
from pararnn.tracing.names import name_nodes
from pararnn.tracing.parametrised import computed, given
from pararnn.tracing.ran import Ran
from pararnn.tracing.recorder import (
    Look,
    TraceError,
    is_differentiable,
    record,
    show_place,
)

# Each step is recorded at these two numbers of rows. An integer that differs between the two graphs
# depends on the number of rows; the two recordings give its slope and offset.
ROWS = (3, 5)


@dataclass
class Capture:
    """One recorded step of a cell.

    Attributes:
        graph: Placeholders are the tensors of the cell (parameters, buffers, tensor attributes),
            then the inputs `x_0`, ..., then the components of the state; the output is the tuple of
            new components, and what the readout makes of them if the step has one. The readout
            takes the new components from placeholders `after_0`, .... Each node's `meta` has
            `shape` and `dtype` (at `ROWS[0]` rows), `by_rows` (the first axis has one entry per
            row), `slopes` (by how much each size grows with a row), `row_axes` (how many sizes
            grow) and `place` (file and line of the user).
        attributes: Qualified names of the cell's tensors, in the order of their placeholders.
        constants: Tensors from elsewhere (closures, globals), by placeholder name.
        num_components: Tensors in the state.
        is_tuple: Whether the cell takes and returns a tuple.
        hidden_size: Channels of each component.
        dtype: The type the cell was traced in.
        subject: What messages call the cell.
        ran: The Python code that ran.
        has_readout: Whether the last result is what the readout makes of the new components.
    """

    graph: fx.Graph
    attributes: list[str]
    constants: dict[str, Tensor]
    num_components: int
    is_tuple: bool
    hidden_size: int
    dtype: torch.dtype
    subject: str
    ran: Ran = field(default_factory=Ran)
    has_readout: bool = False


@dataclass(frozen=True)
class Snapshot:
    """The tensors of a cell at one moment.

    Attributes:
        tensors: Parameters, buffers and plain tensor attributes, by qualified name.
    """

    tensors: dict[str, Tensor]

    @property
    def own_dtype(self) -> torch.dtype | None:
        """The type of the first floating-point tensor; None if none is."""
        return next((t.dtype for t in self.tensors.values() if t.is_floating_point()), None)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the first floating-point tensor; PyTorch's default if none is."""
        return self.own_dtype or torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """The device of the first tensor; the CPU if there is none."""
        return next((t.device for t in self.tensors.values()), torch.device("cpu"))


def snapshot(cell: nn.Module) -> Snapshot:
    """Collect the current tensors of a cell, each once."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in cell.named_modules():
        for store in (module._parameters, module._buffers, vars(module)):
            for name, value in store.items():
                if isinstance(value, Tensor) and id(value) not in seen and "." not in name:
                    seen.add(id(value))
                    tensors[f"{prefix}.{name}" if prefix else name] = value
    return Snapshot(tensors)


def resolve(cell: nn.Module, name: str) -> Tensor:
    """The current tensor with a qualified name."""
    return getattr(*owner_of(cell, name))


def owner_of(cell: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor with a qualified name, and the attribute's name there.

    A module made by `torch.compile` answers for the one inside, which compiled code sees alone.
    """
    *path, attribute = (part for part in name.split(".") if part != "_orig_mod")
    owner: Any = cell
    for part in path:  # not by get_submodule, which a strict export of PyTorch 2.9 cannot follow
        owner = getattr(owner, part)
    return owner, attribute


StepFunction = Callable[[dict[str, Tensor], tuple[Tensor, ...], Any], Any]
AFTER = "after_"
"""The readout's placeholders of the new components are named so."""


@dataclass(frozen=True)
class Subject:
    """A step to capture.

    Attributes:
        step: `step(tensors, inputs, state) -> state`.
        source: The user's function; nodes are named after its variables.
        tensors: Tensors that the step reads besides inputs and state, by name.
        name: What messages call the step.
        state_position: Index of the state among the parameters of `source`.
        readout: `readout(tensors, inputs, state) -> y`, of the state after the step; None if the
            step hands out the first component.
    """

    step: StepFunction
    source: Callable[..., Any]
    tensors: dict[str, Tensor]
    name: str
    state_position: int
    readout: StepFunction | None = None

    def takes_state_first(self, tensors: dict[str, Tensor], given: Sequence[Tensor]) -> bool:
        """Whether a step that has failed returns a state if it is called with (state, x).

        Args:
            tensors: As for the step.
            given: x, and the only component of the state.
        """
        x, state = given
        try:
            new = self.step(tensors, (state,), x)
        except Exception:  # whatever a wrong call of the user's code raises
            return False
        return isinstance(new, Tensor) and new.shape == state.shape


def readout_of(cell: nn.Module) -> Callable[..., Any] | None:
    """The method `readout` of a cell, if its class has one; a submodule may be called so as well.

    A module made by `torch.compile` answers for the one inside.
    """
    inside = cell._modules.get("_orig_mod", cell)
    return inside.readout if callable(getattr(type(inside), "readout", None)) else None  # type: ignore


def cell_subject(cell: nn.Module) -> Subject:
    """Make a `Subject` of a cell.

    Raises:
        TraceError: The cell has backward hooks, or hooks that write.
    """
    _check_hooks(cell)
    held, weights = snapshot(cell).tensors, computed(cell)
    tensors = held | weights

    def with_own(function: Callable[..., Any]) -> StepFunction:
        def call(own: dict[str, Tensor], inputs: tuple[Tensor, ...], state: Any) -> Any:
            others = {id(held[name]): own[name] for name in held if own[name] is not held[name]}
            with given(cell, {name: own[name] for name in weights}):
                return _with_others(function, others, inputs, state)

        return call

    readout, source = readout_of(cell), inspect.unwrap(type(cell).forward)
    return Subject(
        with_own(cell),
        source,
        tensors,
        type(cell).__name__,
        2,
        None if readout is None else with_own(readout),
    )


def _with_others(
    function: Callable[..., Any],
    others: dict[int, Tensor],
    inputs: tuple[Tensor, ...],
    state: Any,
) -> Any:
    """Call a cell with other tensors in place of its own, in this thread alone.

    Args:
        function: The cell, or a method of it. It keeps its own tensors; other threads may compute
            with them meanwhile.
        others: Replacements, by the `id` of the tensor that each replaces.
        inputs: Inputs of the cell.
        state: State of the cell.
    """
    if not others:
        return function(*inputs, state)
    with _Others(others) as mode:
        return map_aggregate(function(*inputs, state), mode.instead)


class _Others(TorchFunctionMode):
    def __init__(self, others: dict[int, Tensor]) -> None:
        super().__init__()
        self.others = others

    def instead(self, argument: Any) -> Any:
        return self.others.get(id(argument), argument)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = map_aggregate(args, self.instead), map_aggregate(kwargs or {}, self.instead)
        return func(*args, **kwargs)


def capture(
    subject: Subject,
    inputs: Sequence[tuple[Sequence[int], torch.dtype]],
    hidden_size: int,
    num_components: int,
    is_tuple: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Capture:
    """Record one step.

    Args:
        subject: The step.
        inputs: Shape (without the rows) and type of every input.
        hidden_size: Channels of each component.
        num_components: Tensors in the state.
        is_tuple: Whether the step takes its state as a tuple.
        dtype: Type of the state.
        device: Device of the example tensors.

    Raises:
        TraceError: The step has no parallel form; the message says why and names the line.
    """
    ran = Ran()

    def run(rows: int) -> tuple[fx.Graph, list[Tensor]]:
        own = map(recordable, subject.tensors.values())
        examples = {f"attribute_{i}": tensor for i, tensor in enumerate(own)}
        for i, (features, kind) in enumerate(inputs):
            examples[f"x_{i}"] = _example((rows, *features), kind, device)
        for i in range(num_components):
            examples[f"state_{i}"] = _example((rows, hidden_size), dtype, device)
        with ran.noting() if rows == ROWS[0] else nullcontext():
            return record_step(subject, examples, len(inputs), is_tuple, (rows, hidden_size))

    graph, constants = record_rows(run, subject.name)
    _check_taken(subject, ran)
    if subject.readout is not None:
        cut_readout(graph, subject.name)
    names = {f"attribute_{i}": name for i, name in enumerate(subject.tensors)}
    name_nodes(graph, subject.source, names, subject.state_position)
    return Capture(
        graph,
        list(subject.tensors),
        {f"constant_{i}": t for i, t in enumerate(constants)},
        num_components,
        is_tuple,
        hidden_size,
        dtype,
        subject.name,
        ran,
        subject.readout is not None,
    )


def _check_taken(subject: Subject, ran: Ran) -> None:
    """Refuse a step that copied values of a tensor into Python: they would be frozen in the trace.

    Raises:
        TraceError: It did, for example by `.tolist()`.
    """
    if ran.taken is not None:
        way, place = ran.taken
        raise TraceError(
            f"{subject.name} takes the values of a tensor into Python at {show_place(place)} "
            f"(.{way}()); a trace would keep these values when the tensor changes. Use PyTorch "
            "operations, and keep constants as Python numbers or NumPy arrays."
        )


def _check_hooks(cell: nn.Module) -> None:
    """Refuse hooks that need the backward pass of a single step, or that write at every step."""
    for name, module in cell.named_modules():
        hooks = module._forward_pre_hooks.values()
        if module.training and any(isinstance(hook, SpectralNorm) for hook in hooks):
            raise TraceError(
                f"self.{name} of {type(cell).__name__} has the older torch.nn.utils.spectral_norm, "
                "which updates its vectors at every step in training. Use "
                "torch.nn.utils.parametrizations.spectral_norm, which updates them once per call."
            )
    everywhere = nn.modules.module
    found = everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks
    place = "for all modules" if found else ""
    for name, module in cell.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            place = f"on self.{name}" if name else "on the cell"
    if place:
        raise TraceError(
            f"{type(cell).__name__} has a backward hook ({place}), which cannot run: all steps are "
            "differentiated at once, so a single step has no backward pass. Remove the hook, or "
            "register it on the layer."
        )


def record_rows(
    run: Callable[[int], tuple[fx.Graph, list[Tensor]]], subject: str
) -> tuple[fx.Graph, list[Tensor]]:
    """Merge recordings at the two numbers in `ROWS` into one graph for any number of rows.

    Args:
        run: `run(rows)` records a graph and its constants; the graph has a placeholder `x_0`, whose
            first axis is the rows.
        subject: What messages call the recorded function.

    Returns:
        The graph and its constants.
    """
    (graph, constants), (other, others) = (run(rows) for rows in ROWS)
    graph = _merge(graph, other, subject)
    _check_constants(graph, constants, others, subject)
    _mark_rows(graph, other)
    return graph, constants


def recordable(tensor: Tensor) -> Tensor:
    """A tensor that autograd accepts: a copy if the tensor was made in inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.no_grad():
        return tensor.clone().requires_grad_(tensor.requires_grad)


def _example(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if is_differentiable(dtype):
        # Not a leaf: autograd would refuse a write into a leaf itself, without naming the line.
        return torch.rand(shape, dtype=dtype, device=device).requires_grad_().clone()
    return torch.zeros(shape, dtype=dtype, device=device)


def record_step(
    subject: Subject,
    examples: dict[str, Tensor],
    num_inputs: int,
    is_tuple: bool,
    shape: tuple[int, int],
    look: Look | None = None,
) -> tuple[fx.Graph, list[Tensor]]:
    """Record one step at fixed shapes.

    Args:
        subject: The step.
        examples: Tensors of the step, then its inputs, then the components of its state.
        num_inputs: How many of the examples are inputs.
        is_tuple: Whether the step takes its state as a tuple.
        shape: (rows, hidden_size), which every new component must have.
        look: See `record`.

    Returns:
        The graph and its constants.
    """
    own = len(subject.tensors)
    num_components = len(examples) - own - num_inputs

    def step(*flat: Tensor) -> tuple[Tensor, ...]:
        tensors = dict(zip(subject.tensors, flat[:own], strict=True))
        inputs, state = flat[own : own + num_inputs], flat[own + num_inputs :]
        try:
            new = subject.step(tensors, inputs, state if is_tuple else state[0])
        except (RuntimeError, TypeError, ValueError) as error:
            if not is_tuple and num_inputs == 1 and subject.takes_state_first(tensors, flat[own:]):
                raise TraceError(
                    f"{subject.name} takes its state first, but is called with (x, state): swap "
                    f"the two parameters. As it is, it raised: {error}"
                ) from error
            raise
        new = checked_state(new, subject.name, [shape] * num_components, is_tuple)
        if subject.readout is None:
            return new
        y = subject.readout(tensors, inputs, new if is_tuple else new[0])
        return *new, _checked_output(y, subject.name, shape[0])

    device = examples["state_0"].device
    with (
        torch.enable_grad(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        without_autocast(device.type),
    ):
        focus = getattr(subject.source, "__code__", None)
        labels = {f"attribute_{i}": f"self.{name}" for i, name in enumerate(subject.tensors)}
        labels |= {f"x_{i}": "x" if num_inputs == 1 else f"drive {i}" for i in range(num_inputs)}
        for i in range(num_components):
            labels[f"state_{i}"] = f"component {i} of its state" if is_tuple else "its state"
        return record(step, examples, subject.name, focus, labels, look)


def checked_state(
    new: Any, subject: str, shapes: Sequence[tuple[int, ...]], is_tuple: bool
) -> tuple[Tensor, ...]:
    """The components of a new state.

    Args:
        new: What a step returned.
        subject: What messages call the step.
        shapes: Of the state that it was given, with the rows.
        is_tuple: Whether that was a tuple.

    Raises:
        TraceError: It has another form.
    """
    components = tuple(new) if isinstance(new, (tuple, list)) else (new,)
    if new is None or is_tuple != isinstance(new, (tuple, list)) or len(components) != len(shapes):
        given = f"a tuple of {len(shapes)} tensors" if is_tuple else "one tensor"
        raise TraceError(
            f"{subject} was given {given} as state but returned {_describe(new)}; it must return "
            f"the new state in the same form.{how_to_return(new, len(shapes))}"
        )
    for i, (component, shape) in enumerate(zip(components, shapes, strict=True)):
        if not isinstance(component, Tensor) or tuple(component.shape) != shape:
            seen = f"as {_describe(component)}"
            if isinstance(component, Tensor):
                seen = f"of shape {tuple(component.shape)}"
            raise TraceError(
                f"{subject} returned component {i} {seen} for one of shape {shape}; a state must "
                "keep its shape."
            )
        if not component.is_floating_point():
            parts = "; keep real and imaginary part as two components"
            raise TraceError(
                f"{subject} returned component {i} of type {component.dtype}; "
                f"the state must be floating point{parts if component.is_complex() else ''}."
            )
    return components


def how_to_return(new: Any, components: int) -> str:
    """A sentence about what to change in a step that returned something else than its state.

    Args:
        new: What it returned.
        components: Tensors in the state that it was given.
    """
    if new is None:
        return " Is a `return` missing?"
    if components != 1 or not isinstance(new, (tuple, list)):
        return ""
    if len(new) == 1:
        return " Return the tensor itself."
    return (
        " Return one tensor, the state, which is what the layer returns for all times; what else "
        "it is to return, a method readout(self, x, state) computes (in scan: readout=...). For a "
        f"state of several tensors set num_components = {len(new)} (in scan: pass a tuple of them)."
    )


def _describe(value: Any) -> str:
    """What a step returned, in words."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    number = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"a {type(value).__name__}{number}"


def _checked_output(y: Any, subject: str, rows: int) -> Tensor:
    if not isinstance(y, Tensor):
        raise TraceError(
            f"{subject}.readout returned {_describe(y)}; it must return one tensor with the rows "
            "first."
        )
    if not y.dim() or y.shape[0] != rows or not y.is_floating_point():
        way = "; return torch.view_as_real(...)" if y.is_complex() else ""
        raise TraceError(
            f"{subject}.readout returned a tensor of shape {tuple(y.shape)} and type {y.dtype} for "
            f"{rows} rows; it must be floating point, of shape (N, ...){way}."
        )
    return y


def cut_readout(graph: fx.Graph, subject: str) -> None:
    """Let the readout take the new components from placeholders of its own, in place.

    Raises:
        TraceError: It takes something else that depends on the state before the step.
    """
    *new, y = next(n for n in graph.nodes if n.op == "output").args[0]
    before = [n for n in graph.nodes if n.op == "placeholder" and n.target.startswith("state_")]
    reached = followers(graph, set(before))
    instead: dict[fx.Node, fx.Node] = {}  # of a value that the step computes as well
    last = before[-1]
    for i, node in enumerate(new):
        if node in reached and node not in instead:
            with graph.inserting_after(last):
                last = instead[node] = graph.placeholder(f"{AFTER}{i}")
            last.meta.update(node.meta)
    own = ancestors([y], set(instead))
    (output,) = (n for n in graph.nodes if n.op == "output")
    with graph.inserting_before(output):
        for node in [n for n in graph.nodes if n in own]:
            if not instead.keys().isdisjoint(node.all_input_nodes):
                instead[node] = graph.node_copy(node, lambda n: instead.get(n, n))
    y = instead.get(y, y)
    output.args = ((*new, y),)
    used = ancestors([y])
    if not used.isdisjoint(before):
        taken = {u for n in used & reached for u in (n, *n.users)} & used
        places = [n.meta["place"] for n in graph.nodes if n in taken and n.meta.get("place")]
        raise TraceError(
            f"{subject}.readout depends on the state before the step, at "
            f"{show_place(next(iter(places), None))}; it may use x and the state after the step, "
            "as it is given. Make what it needs a component of the state."
        )
    if used.isdisjoint(instead.values()):
        raise TraceError(
            f"{subject}.readout does not use the state; leave it out, and compute from x outside."
        )


def ancestors(nodes: Sequence[fx.Node], known: set[fx.Node] = frozenset()) -> set[fx.Node]:  # type: ignore
    """The nodes and all that they are computed from, without what is known already."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and node not in known:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def followers(graph: fx.Graph, sources: set[fx.Node]) -> set[fx.Node]:
    """The sources and all operations that depend on them."""
    reached = set(sources)
    operations = (n for n in graph.nodes if n.op == "call_function" and not n.meta.get("is_count"))
    for node in operations:
        if reached & set(node.all_input_nodes):
            reached.add(node)
    return reached


def _merge(graph: fx.Graph, other: fx.Graph, subject: str) -> fx.Graph:
    """Replace integers that depend on the number of rows by nodes computed from `x_0.size(0)`."""
    nodes, others = list(graph.nodes), list(other.nodes)
    targets = [(n.op, str(n.target)) for n in nodes], [(n.op, str(n.target)) for n in others]
    if targets[0] != targets[1]:
        raise TraceError(
            f"{subject} runs other operations for {ROWS[1]} rows than for {ROWS[0]}; the "
            "operations must not depend on the batch size."
        )
    x = next(n for n in nodes if n.target == "x_0")
    counts: dict[tuple[int, int], fx.Node] = {}

    def unify(a: Any, b: Any, place: tuple[str, int] | None) -> Any:
        if isinstance(a, (tuple, list)):
            return type(a)(unify(i, j, place) for i, j in zip(a, b, strict=True))
        if isinstance(a, slice):
            parts = zip((a.start, a.stop, a.step), (b.start, b.stop, b.step), strict=True)
            return slice(*(unify(i, j, place) for i, j in parts))
        if isinstance(a, fx.Node) or a == b or (a != a and b != b):
            return a
        if type(a) is int and (b - a) % (ROWS[1] - ROWS[0]) == 0:
            slope = (b - a) // (ROWS[1] - ROWS[0])
            return _rows_node(graph, x, slope, a - slope * ROWS[0], counts)
        raise TraceError(
            f"{subject} uses a number at {show_place(place)} that depends on the batch size "
            f"({a} for {ROWS[0]} rows, {b} for {ROWS[1]}), or that changes from call to call; the "
            "step must be the same for any batch and at every time."
        )

    for node, twin in zip(nodes, others, strict=True):
        if node.op == "call_function":
            place = node.meta.get("place")
            node.args = unify(node.args, twin.args, place)
            node.kwargs = {k: unify(v, twin.kwargs[k], place) for k, v in node.kwargs.items()}
    return graph


def _check_constants(
    graph: fx.Graph, constants: list[Tensor], others: list[Tensor], subject: str
) -> None:
    """Refuse a constant that differs between the recordings: PyTorch did not compute it."""
    nodes = [n for n in graph.nodes if n.op == "get_attr"]
    for node, one, other in zip(nodes, constants, others, strict=True):
        if one is other:
            continue
        same = one.shape == other.shape and one.dtype == other.dtype
        if same and one.device.type != "meta":
            same = torch.equal(one.nan_to_num(), other.nan_to_num())
        if not same:
            place = show_place(next(iter(node.users)).meta.get("place")) if node.users else "?"
            raise TraceError(
                f"{subject} uses a tensor at {place} that changes from call to call, but that "
                "PyTorch did not compute from x and the state (made with .numpy(), a list, or "
                "random numbers from elsewhere?); use PyTorch operations."
            )


def _rows_node(
    graph: fx.Graph,
    x: fx.Node,
    slope: int,
    offset: int,
    known: dict[tuple[int, int], fx.Node],
) -> fx.Node:
    """The count node with the value slope * x.size(0) + offset, made if it is not known."""
    if (slope, offset) not in known:
        with graph.inserting_after(x):
            node = graph.call_function(torch.Tensor.size, (x, 0))
        for function, value in ((operator.mul, slope), (operator.add, offset)):
            if value != (1 if function is operator.mul else 0):
                with graph.inserting_after(node):
                    node = graph.call_function(function, (node, value))
        known[slope, offset] = node
        while node is not x:
            node.meta.update(shape=(), dtype=torch.int64, place=None, is_count=True)
            node = node.args[0]  # type: ignore[assignment]
    return known[slope, offset]


def _mark_rows(graph: fx.Graph, other: fx.Graph) -> None:
    shapes = [n.meta.get("shape", ()) for n in other.nodes]
    originals = [n for n in graph.nodes if not n.meta.get("is_count")]
    for node, shape in zip(originals, shapes, strict=True):
        mark_rows(node, shape)


def mark_rows(node: fx.Node, other: tuple[int, ...]) -> None:
    """Note which axes of a value grow with the rows, given its shape at `ROWS[1]` rows."""
    mine = node.meta.get("shape", ())
    node.meta["by_rows"] = bool(mine) and mine[0] == ROWS[0] and other[0] == ROWS[1]
    sizes = zip(mine, other, strict=False)
    node.meta["slopes"] = tuple((b - a) // (ROWS[1] - ROWS[0]) for a, b in sizes)
    node.meta["row_axes"] = sum(slope != 0 for slope in node.meta["slopes"])


def shape_at(node: fx.Node, rows: int) -> tuple[int, ...]:
    """The shape of a value at a given number of rows."""
    sizes = zip(node.meta["shape"], node.meta["slopes"], strict=True)
    return tuple(size + slope * (rows - ROWS[0]) for size, slope in sizes)


def count_of(node: fx.Node, rows: int) -> int:
    """The integer that a count node has at a given number of rows (see `_rows_node`)."""
    if node.target is torch.Tensor.size:
        return rows
    count, number = node.args
    return node.target(count_of(count, rows), number)  # type: ignore
