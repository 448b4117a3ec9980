"""Compute once what a step and its readout both compute from x, such as a projection."""

from __future__ import annotations

from typing import Any

from torch import fx

from pararnn.tracing.capture import AFTER, followers
from pararnn.tracing.partition import is_random


def compute_once(graph: fx.Graph) -> None:
    """Replace, in place, operations on x and weights alone that repeat an earlier one."""
    starts = ("state_", AFTER)
    states = {n for n in graph.nodes if n.op == "placeholder" and str(n.target).startswith(starts)}
    moving = followers(graph, states)
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node in moving or is_random(node):
            continue
        first = known.setdefault((node.target, _frozen(node.args), _frozen(node.kwargs)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _frozen(value: Any) -> Any:
    """An argument as something that can be compared and hashed; 1, 1.0 and True differ."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((name, _frozen(v)) for name, v in value.items())
    if isinstance(value, slice):
        return "slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step)
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
