"""What the printers of kernels share: expressions as statements of a target language."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pararnn.kernels.lowering import lower
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.expressions import (
    LEAVES,
    Expression,
    Operand,
    formula,
    is_boolean,
    leaf,
    topological,
)

# Not with "_" in front: __linux_ would become a macro of C
_PLAIN = re.compile("[A-Za-z][A-Za-z0-9_]*", re.ASCII).fullmatch


@dataclass(frozen=True)
class Language:
    """How a target writes things.

    Attributes:
        term: The call of a primitive on operands.
        number: A constant.
        truth: A constant truth value.
        declaration: Gives a name to a term; the last argument says whether it is a truth value.
    """

    term: Callable[[str, Sequence[str]], str]
    number: Callable[[float], str]
    truth: Callable[[bool], str]
    declaration: Callable[[str, str, bool], str]


def statements(
    language: Language, roots: Iterable[Operand], names: dict[Expression, str]
) -> tuple[list[str], list[str]]:
    """Statements that compute `roots` from variables named after the leaves (`state0`).

    Returns:
        The statements, and what stands for each root after them.
    """
    lowered = lower(roots)
    variables: dict[Expression, str] = {}
    taken: set[str] = set()

    def show(operand: Operand) -> str:
        if isinstance(operand, Expression):
            return variables[operand]
        if isinstance(operand, bool):
            return language.truth(operand)
        return language.number(float(operand))  # type: ignore[arg-type]

    lines = []
    for node in topological(lowered):
        if node.op in LEAVES:
            variables[node] = f"{node.op}{node.args[0]}"
            continue
        name = f"{names[node]}_" if node in names else f"t{len(variables)}"
        name = name if name not in taken and _PLAIN(name) else f"t{len(variables)}"
        taken.add(name)
        term = language.term(node.op, list(map(show, node.args)))
        lines.append(language.declaration(name, term, is_boolean(node)))
        variables[node] = name
    return lines, list(map(show, lowered))


def lowered_names(recurrence: Recurrence) -> dict[Expression, str]:
    """The names of a recurrence's values, for their lowered expressions."""
    named = [e for e in recurrence.names if e.op not in LEAVES]
    return {
        new: recurrence.names[old]
        for old, new in zip(named, lower(named), strict=True)
        if isinstance(new, Expression)
    }


def pair(i: int, j: int) -> str:
    """Two numbers in a name, so that those of (1, 11) and (11, 1) differ."""
    return f"{i}{j}" if max(i, j) < 10 else f"{i}_{j}"


def equations(recurrence: Recurrence) -> list[str]:
    """The step as mathematics, one line per named intermediate value and component."""
    names = dict(recurrence.names)
    lines = [
        f"{names[e]} = {formula(e, names)}"
        for e in topological(recurrence.step)
        if e in names and e.op not in LEAVES
    ]
    for i, root in enumerate(recurrence.step):
        new = f"{names.get(leaf('state', i), f'state{i}')}'"
        if not isinstance(root, Expression) or names.get(root) != new:
            lines.append(f"{new} = {formula(root, names)}")
    return lines
