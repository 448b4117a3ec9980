"""The Jacobian of a step in tiles, where each entry of its state depends on the same entry alone.

The adjoint before a step is linear in the adjoint after it. Where only operations on each element
lead from one to the other, the Jacobian has one number for each entry, and these operations make it
of the number 1. So there are no further rules for derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence

from pararnn.tracing.expressions import Expression, Operand, make, topological
from pararnn.tracing.tiles import Place


class _Mixes(Exception):
    """An entry of an adjoint depends on other entries."""


def tangents(
    adjoints: Sequence[Operand], state: Sequence[Place]
) -> tuple[tuple[Operand, ...], ...]:
    """The Jacobian of a step by columns, each with an entry for every tensor of the state.

    Where no tensor depends on another, one column holds the diagonal.

    Args:
        adjoints: Those of the tensors before the step, see `Tiles`.
        state: Where the tensors lie.

    Returns:
        No columns if entries of the state reach each other.
    """
    count = range(len(state))
    try:
        columns = [[_factor(adjoints[j], i) for i in count] for j in count]
    except _Mixes:
        return ()
    if all(columns[j][i] == 0.0 for j in count for i in count if i != j):
        return (tuple(columns[i][i] for i in count),)
    if len({(p.rows.size, p.columns.size) for p in state}) > 1:  # one is summed or repeated
        return ()
    return tuple(map(tuple, columns))


def _factor(adjoint: Operand, number: int) -> Operand:
    """By what the adjoint of a tensor after the step is multiplied in one before it.

    Raises:
        _Mixes: It is not just multiplied.
    """
    found: dict[Expression, Operand] = {}  # of those that depend on adjoints
    for node in topological([adjoint]):
        if node.op == "adjoint":
            found[node] = 1.0 if node.args[0] == number else 0.0
        elif any(a in found for a in node.args if isinstance(a, Expression)):
            found[node] = _linear(node, found)
    return found.get(adjoint, 0.0) if isinstance(adjoint, Expression) else 0.0


def _linear(node: Expression, found: dict[Expression, Operand]) -> Operand:
    """The factor of an operation that is linear in adjoints, from those of its operands."""
    depends = [isinstance(a, Expression) and a in found for a in node.args]
    given = [found[a] if d else a for a, d in zip(node.args, depends, strict=True)]  # type: ignore[index]
    if all(g == 0.0 for g, d in zip(given, depends, strict=True) if d):
        return 0.0
    alone = sum(depends) == 1
    terms = {"add": (0, 1), "sub": (0, 1), "where": (1, 2)}.get(node.op)
    if terms is not None:
        others = [i for i, d in enumerate(depends) if d != (i in terms)]
        if all(i in terms and given[i] == 0.0 for i in others):
            return make(node.op, *given)
        raise _Mixes
    first = depends[0] and (node.op == "div" or node.op.endswith("_backward"))
    if node.op in ("neg", "to_float") or (alone and (first or node.op == "mul")):
        return make(node.op, *given)
    raise _Mixes
