"""Find the operation of a step whose recorded gradient differs from that of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pararnn.tracing.capture import ROWS, record_step
from pararnn.tracing.example import Example, InType, differing, gradients
from pararnn.tracing.operations import operation_name
from pararnn.tracing.recorder import (
    NeedsFunctionalization,
    is_differentiable,
    record,
    show_place,
)
from pararnn.tracing.step import recording
from pararnn.tracing.traced import Traced

_TOLERANCE = 1e-3


def find(traced: Traced, example: Example) -> str:
    """Name the first operation whose recorded gradient differs, with its line, for a message.

    If none is found, it names all operations of the recurrent part.
    """
    with recording(example.state[0].device):
        try:
            node = _lost_by_recording(traced, example)
        except NeedsFunctionalization as error:
            return error.write
        node = node or _lost_backwards(traced, example)
    if node is None:
        names = dict.fromkeys(map(_name, traced.parts.recurrent))
        return f"its recurrent part ({', '.join(names)})"
    return f"the operation {_name(node)} at {show_place(node.meta.get('place'))}"


def _name(node: fx.Node) -> str:
    return operation_name(node.target) if hasattr(node.target, "_schema") else str(node.target)


def _lost_by_recording(traced: Traced, example: Example) -> fx.Node | None:
    """The first operation whose recorded value or gradient differs from the run's own."""
    capture, own = traced.capture, example.tensors
    given = {f"attribute_{i}": tensor for i, tensor in enumerate(own.values())}
    given |= {f"x_{i}": x for i, x in enumerate(example.inputs)}
    given |= {f"state_{i}": s for i, s in enumerate(example.state)}
    sources = [t for _, t in example.sources]
    lost: list[fx.Node] = []

    def look(graph: fx.Graph, constants: list[Tensor], values: dict[fx.Node, Tensor]) -> None:
        found = _values(graph, given | {f"constant_{i}": c for i, c in enumerate(constants)})
        for node, value in values.items():
            if node.op == "call_function" and is_differentiable(value.dtype):
                same = torch.allclose(found[node], value, rtol=_TOLERANCE, equal_nan=True)
                if not same or _differ(*(_pulled([v], sources) for v in (value, found[node]))):
                    lost.append(node)
                    return

    shape = (ROWS[0], capture.hidden_size)
    record_step(traced.subject, given, len(example.inputs), capture.is_tuple, shape, look)
    return lost[0] if lost else None


def _values(graph: fx.Graph, given: dict[str, Tensor]) -> dict[fx.Node, Any]:
    """Run a graph; the value of each node."""
    run, values = InType(None), dict[fx.Node, Any]()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            values[node] = given[str(node.target)]
        elif node.op == "call_function":
            values[node] = run.call(node, values)
    return values


def _lost_backwards(traced: Traced, example: Example) -> fx.Node | None:
    """The first recurrent operation whose backward, when recorded, gives other gradients."""
    capture = traced.capture
    own = example.tensors.values()
    given = {f"attribute_{i}": tensor for i, tensor in enumerate(own)} | capture.constants
    given |= {f"x_{i}": x for i, x in enumerate(example.inputs)}
    given |= {f"state_{i}": s for i, s in enumerate(example.state)}
    values = _values(capture.graph, given)
    for node in traced.parts.recurrent:
        taken = [n for n in node.all_input_nodes if isinstance(values[n], Tensor)]
        sources = {
            f"x_{i}": values[n].detach().clone().requires_grad_()
            for i, n in enumerate(taken)
            if is_differentiable(values[n].dtype)
        }
        if not sources or not isinstance(values[node], Tensor):
            continue
        if _differ(*_both_ways(node, values, taken, sources)):
            return node
    return None


def _both_ways(
    node: fx.Node, values: dict[fx.Node, Any], taken: list[fx.Node], sources: dict[str, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of an operation's arguments, by autograd and by a recording of autograd."""

    def pulled(*flat: Tensor) -> list[Tensor]:
        now = dict(zip(sources, flat, strict=True))
        mine = {n: now.get(f"x_{i}", values[n]) for i, n in enumerate(taken)}
        return _pulled([InType(None).call(node, values | mine)], flat)

    graph, constants = record(pulled, sources, "the operation")
    named = sources | {f"constant_{i}": c for i, c in enumerate(constants)}
    found = _values(graph, named)
    (results,) = next(n for n in graph.nodes if n.op == "output").args
    return pulled(*sources.values()), [found[n] for n in results]


def _pulled(values: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed weighted sum of all entries of some values."""
    weights = [
        torch.arange(1.0, v.numel() + 1, device=v.device).cos().view(v.shape) for v in values
    ]
    return gradients(values, weights, sources)


def _differ(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    named = [{str(i): t for i, t in enumerate(tensors)} for tensors in (expected, found)]
    return bool(differing(named[0], named[1], _TOLERANCE))
