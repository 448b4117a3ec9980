"""Gives the nodes of a graph the names their values have in the user's source."""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import re
import textwrap
import tokenize
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any

from torch import fx


def name_nodes(
    graph: fx.Graph, function: Callable[..., Any], attributes: Mapping[str, str], state: int
) -> None:
    """Set `meta["name"]` where the function assigns a node's value to a variable.

    Args:
        graph: Nodes carry `meta["line"]`, their line in `function`.
        function: The user's step; when its source is not to be had, nothing is named.
        attributes: Names for placeholders; what no identifier can have becomes "_", so that none
            leaves the comments of generated code.
        state: Position of the state among the function's parameters.
    """
    states = [n for n in graph.nodes if n.op == "placeholder" and n.target.startswith("state_")]
    for node, name in zip(states, _state_names(function, state, len(states)), strict=False):
        node.meta["name"] = name
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in attributes:
            node.meta["name"] = re.sub(r"\W", "_", attributes[node.target])
    for (first, last), names, in_order in _assignments(function):
        inside = [n for n in graph.nodes if first <= n.meta.get("line", 0) <= last]
        values = [n for n in inside if not n.name.startswith("detach")]
        if len(names) == 1 and values:
            values[-1].meta["name"] = names[0]
        elif len(names) > 1:
            for node, name in _parts(inside, values, names, in_order):
                node.meta["name"] = name


def _parts(
    inside: list[fx.Node], values: list[fx.Node], names: list[str], in_order: bool
) -> Iterable[tuple[fx.Node, str]]:
    """The values that an assignment to several variables gives to each."""
    seen = {n.meta["variable"]: n for n in values if n.meta.get("variable") in names}
    if seen:
        return [(node, name) for name, node in seen.items()]
    leaving = [n for n in values if in_order and not set(n.users) <= set(inside)]
    unpacked = [n for n in values if n.target is operator.getitem]
    parts = next((p for p in (leaving, unpacked) if len(p) == len(names)), [])
    return zip(parts, names, strict=False)


def _assignments(
    function: Callable[..., Any],
) -> list[tuple[tuple[int, int], list[str], bool]]:
    """Lines and variables of assignments; whether values are made in the order of the variables."""
    parsed = _parse(function)
    if parsed is None:
        return []
    tree, start = parsed
    found = []
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            if all(isinstance(p, ast.Name) for p in parts):
                span = (statement.lineno + start - 1, (statement.end_lineno or 0) + start - 1)
                names = [p.id for p in parts if isinstance(p, ast.Name)]
                found.append((span, names, not isinstance(statement.value, ast.Call)))
    return found


def _state_names(function: Callable[..., Any], position: int, count: int) -> list[str]:
    """What the function calls its state: the parameter, or what that is assigned to."""
    parsed = _parse(function)
    code = getattr(function, "__code__", None)
    if parsed is None or code is None or position >= code.co_argcount:
        return []
    parameter = code.co_varnames[position]
    for statement in ast.walk(parsed[0]):
        if (
            isinstance(statement, ast.Assign)
            and isinstance(statement.value, ast.Name)
            and statement.value.id == parameter
        ):
            target = statement.targets[0]
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            names = [p.id for p in parts if isinstance(p, ast.Name)]
            if len(names) == count:
                return names
    return [parameter] if count == 1 else [f"{parameter}[{i}]" for i in range(count)]


def _parse(function: Callable[..., Any]) -> tuple[ast.AST, int] | None:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else _parse_code(code, code.co_filename)


@functools.lru_cache(maxsize=64)
def _parse_code(code: CodeType, _file: str) -> tuple[ast.AST, int] | None:
    """The syntax tree of a function and its first line; equal code may come from another file."""
    try:
        lines, start = inspect.getsourcelines(code)
        return ast.parse(textwrap.dedent("".join(lines))), start
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):  # the file may have changed
        return None
