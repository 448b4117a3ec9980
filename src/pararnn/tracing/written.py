"""Steps as text, so that an exported program can run where its cell was never traced.

A text may come from anywhere: reading one makes nothing but operations of PyTorch that compute
tensors from tensors, and runs none of them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from pararnn.tracing.derivatives import Recurrence, is_operation
from pararnn.tracing.expressions import LEAVES, Expression, Operand, intern, leaf, topological
from pararnn.tracing.partition import direct, module_of, operation
from pararnn.tracing.recorder import aten
from pararnn.tracing.step import Input, Layout, Step
from pararnn.tracing.traced import Readout

_PLAIN: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "neg")
}
_PLAIN["size"] = torch.Tensor.size
_MAKERS = frozenset("arange empty eye full linspace ones scalar_tensor zeros".split())
_KINDS = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def write_expressions(roots: Sequence[Operand]) -> dict[str, Any]:
    """Expressions in lists, numbers and texts."""
    order = topological(roots)
    places = {node: i for i, node in enumerate(order)}

    def show(operand: Operand) -> Any:
        return [places[operand]] if isinstance(operand, Expression) else operand

    nodes = [[node.op, *map(show, node.args)] for node in order]
    return {"nodes": nodes, "roots": [show(root) for root in roots]}


def read_expressions(
    text: dict[str, Any], counts: dict[str, int], also: Collection[str] = ()
) -> tuple[Operand, ...]:
    """What `write_expressions` wrote.

    Args:
        text: What was written.
        counts: How many leaves of every kind there may be.
        also: Operations that may be there, beside those on each element.

    Raises:
        ValueError: It did not write that.
    """
    made: list[Expression] = []

    def pick(operand: Any) -> Operand:
        if isinstance(operand, list):
            return made[_index(operand[0], len(made))]
        if isinstance(operand, (dict, tuple)):
            raise ValueError(f"{operand!r} is no operand")
        return operand

    for op, *args in text["nodes"]:
        if op in LEAVES:
            made.append(leaf(op, _index(args[0], counts.get(op, 0))))
        elif is_operation(op) or op in also:
            made.append(intern(op, tuple(map(pick, args))))
        else:
            raise ValueError(f"{op!r} is no operation on each element")
    return tuple(map(pick, text["roots"]))


def write_step(of: Step) -> dict[str, Any]:
    """A step in lists, numbers and texts."""
    nodes = list(of.module.graph.nodes)
    places = {node: i for i, node in enumerate(nodes)}
    show = lambda value: _written(value, places)  # noqa: E731
    (results,) = nodes[-1].args
    return {
        "nodes": [
            [_name_of(n), show(n.args), show(dict(n.kwargs))]
            for n in nodes
            if n.op == "call_function"
        ],
        "step": show(results),
        "inputs": [[list(i.shape), str(i.dtype).split(".")[1], i.by_rows] for i in of.inputs],
        "states": of.num_components,
        "hidden": of.hidden,
        "group": of.group,
        "device": of.device.type,
        "dtype": str(of.dtype).split(".")[1],
        "channel": _write_channel(of),
    }


def read_step(text: dict[str, Any], rows: bool = True) -> Step:
    """What `write_step` wrote.

    Args:
        text: What was written.
        rows: Whether an input has rows, as those of every step do.

    Raises:
        ValueError: It did not write that.
    """
    inputs = tuple(
        Input(tuple(map(int, shape)), _kind("dtype", dtype), bool(by_rows))
        for shape, dtype, by_rows in text["inputs"]
    )
    if (rows and not any(i.by_rows for i in inputs)) or any(s < 0 for i in inputs for s in i.shape):
        raise ValueError("no input has rows, or a size is negative")
    count, graph = int(text.get("states", len(text["step"]))), fx.Graph()
    made = [graph.placeholder(f"state_{i}") for i in range(count)]
    made += [graph.placeholder(f"input_{i}") for i in range(len(inputs))]
    for name, args, kwargs in text["nodes"]:
        given = [_read(a, made) for a in args], {k: _read(a, made) for k, a in kwargs.items()}
        made.append(graph.call_function(_operation(name), tuple(given[0]), given[1]))
    results = _read(text["step"], made)
    if not results or not all(isinstance(r, fx.Node) for r in results):
        raise ValueError("the components of the new state are no values")
    graph.output(tuple(results))
    hidden, group = int(text["hidden"]), int(text["group"])
    if hidden < 1 or group < 1 or hidden % group:
        raise ValueError(f"{hidden} channels are no groups of {group}")
    device, dtype = torch.device(text["device"]), _kind("dtype", text["dtype"])
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{dtype} is no type of arithmetic")
    channel = _read_channel(text["channel"], inputs, count, hidden)
    module = module_of(direct(graph))
    return Step(lambda: module, inputs, count, hidden, group, device, dtype, *channel)


def write_readout(step: Step, of: Readout | None) -> dict[str, Any] | None:
    """A readout, written as a step that reads some components of the state; None for none."""
    if of is None:
        return None
    sizes = step.hidden, step.hidden
    given = Step(lambda: of.module, of.inputs, len(of.components), *sizes, step.device, step.dtype)
    return {
        "module": write_step(given),
        "components": list(of.components),
        "shared": list(of.shared),
        "shape": list(of.shape),
        "dtype": str(of.dtype).split(".")[1],
    }


def read_readout(text: dict[str, Any] | None) -> Readout | None:
    """What `write_readout` wrote.

    Raises:
        ValueError: It did not write that.
    """
    if text is None:
        return None
    step = read_step(text["module"], rows=False)
    components, shape = (tuple(map(int, text[name])) for name in ("components", "shape"))
    shared = tuple(None if n is None else int(n) for n in text["shared"])
    kind = _kind("dtype", text["dtype"])
    if len(components) != step.num_components or len(shared) != len(step.inputs):
        raise ValueError("the readout takes something else")
    return Readout(step.module, components, step.inputs, shared, shape, False, kind)


def _write_channel(of: Step) -> dict[str, Any] | None:
    recurrence, layout = of.recurrence, of.layout
    if recurrence is None or layout is None:
        return None
    places = {"drives": layout.drives, "coefficients": layout.coefficients}
    return write_expressions(recurrence.step) | places


def _read_channel(
    text: dict[str, Any] | None, inputs: Sequence[Input], count: int, hidden: int
) -> tuple[Recurrence | None, Layout | None]:
    if text is None:
        return None, None
    places = [
        tuple((int(number), int(slot)) for number, slot in text[kind])
        for kind in ("drives", "coefficients")
    ]
    layout = Layout(*places)
    first = layout.num_drive_inputs
    both = [*layout.drives, *((first + number, slot) for number, slot in layout.coefficients)]
    if {number for number, _ in both} != set(range(len(inputs))):
        raise ValueError("an input has no drive or coefficient, or one of them no input")
    for number, slot in both:
        of, drives = inputs[number], number < first
        kind = len(of.shape), of.by_rows, math.prod(of.shape[1:])
        if kind != (3 if drives else 2, drives, hidden) or not 0 <= slot < of.shape[0]:
            raise ValueError(f"input {number} of shape {of.shape} is no place for it")
    sizes = [len(kind) for kind in places]
    counts = {"state": count, "drive": sizes[0], "coefficient": sizes[1]}
    roots = read_expressions(text, counts)
    if len(roots) != count:
        raise ValueError(f"{len(roots)} expressions for {count} components")
    return Recurrence(roots, sizes[0], sizes[1], {}), layout


def _written(value: Any, places: dict[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"node": places[value]}
    if isinstance(value, (tuple, list)):
        return [_written(v, places) for v in value]
    if isinstance(value, dict):
        return {k: _written(v, places) for k, v in value.items()}
    if isinstance(value, slice):
        return {"slice": _written([value.start, value.stop, value.step], places)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.device):
        return {"device": value.type}
    for kind, made in _KINDS.items():
        if isinstance(value, made):
            return {kind: str(value).split(".")[1]}
    assert value is None or isinstance(value, (bool, int, float, str)), value
    return value


def _read(value: Any, made: Sequence[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(v, made) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return made[_index(content, len(made))]
    if kind == "slice":
        return slice(*_read(content, made))
    if kind == "complex":
        return complex(*content)
    if kind == "device":
        return torch.device(content)
    return _kind(kind, content)


def _kind(kind: str, name: str) -> Any:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if kind not in _KINDS or not isinstance(found, _KINDS[kind]):
        raise ValueError(f"{name!r} is no {kind}")
    return found


def _index(value: Any, size: int) -> int:
    if type(value) is not int or not 0 <= value < size:
        raise ValueError(f"there is no {value!r} among {size}")
    return value


def _name_of(node: fx.Node) -> str:
    target = operation(node)
    if hasattr(target, "_schema"):
        return str(target)
    return next(name for name, plain in _PLAIN.items() if plain is target)


def _operation(name: str) -> Any:
    """The operation of a name: on numbers, or one of aten that returns new tensors."""
    if name in _PLAIN:
        return _PLAIN[name]
    space, packet, overload = (*name.split("."), "", "")[:3]
    found = getattr(getattr(aten, packet, None), overload, None) if space == "aten" else None
    schema = getattr(found, "_schema", None)
    takes_tensors = schema is not None and any("Tensor" in str(a.type) for a in schema.arguments)
    if schema is None or schema.is_mutable or not (takes_tensors or packet in _MAKERS):
        raise ValueError(f"{name!r} is no operation that only computes")
    return found
