"""Gives the nodes of a graph the names their values have in the user's source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx


def name_nodes(graph: fx.Graph, function: Callable[..., Any], attributes: Mapping[str, str]) -> None:
    """Set `meta["name"]` where the function assigns a node's value to a variable.

    Args:
        graph: Nodes carry `meta["line"]`, their line in `function`.
        function: The cell's `forward`; when its source is not to be had, nothing is named.
        attributes: Names for placeholders.
    """
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in attributes:
            node.meta["name"] = attributes[node.target].replace(".", "_")
    for (first, last), names in _assignments(function):
        inside = [n for n in graph.nodes if first <= n.meta.get("line", 0) <= last]
        values = [n for n in inside if not n.name.startswith("detach")]
        if len(names) == 1 and values:
            values[-1].meta["name"] = names[0]
        elif len(names) > 1:
            parts = [n for n in values if "getitem" in n.name or len(values) == len(names)]
            for node, name in zip(parts[-len(names) :], names, strict=False):
                node.meta["name"] = name


def _assignments(function: Callable[..., Any]) -> list[tuple[tuple[int, int], list[str]]]:
    try:
        lines, start = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return []
    found = []
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            if all(isinstance(p, ast.Name) for p in parts):
                span = (statement.lineno + start - 1, (statement.end_lineno or 0) + start - 1)
                found.append((span, [p.id for p in parts if isinstance(p, ast.Name)]))
    return found
