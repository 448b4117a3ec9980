"""What the printers of kernels share: expressions as statements of a target language."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count

from pararnn.kernels.lowering import lower
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.expressions import (
    LEAVES,
    PRECEDENCE,
    Expression,
    Operand,
    formula,
    is_boolean,
    leaf,
    operands,
    topological,
)

# Not with "_" in front: __linux_ would become a macro of C
_PLAIN = re.compile("[A-Za-z][A-Za-z0-9_]*", re.ASCII).fullmatch


# How tightly operations bind that are not written as calls; a condition binds least.
_LOGIC = frozenset("logical_and logical_or logical_xor logical_not".split())
_LEVELS = {**PRECEDENCE, **dict.fromkeys([*_LOGIC, "where", "to_float"], 0)}
_LONGEST = 6  # operations of a term that is written inside of another


@dataclass(frozen=True)
class Language:
    """How a target writes things.

    Attributes:
        term: The call of a primitive on operands.
        number: A constant.
        truth: A constant truth value.
        declaration: Gives a name to a term; the last argument says whether it is a truth value.
        nested: Whether a value without a name that is used once is written where it is used.
    """

    term: Callable[[str, Sequence[str]], str]
    number: Callable[[float], str]
    truth: Callable[[bool], str]
    declaration: Callable[[str, str, bool], str]
    nested: bool = False


def statements(
    language: Language,
    roots: Iterable[Operand],
    names: Mapping[Expression, str],
    leaves: Mapping[str, str] | None = None,
) -> tuple[list[str], list[str]]:
    """Statements that compute `roots`.

    Args:
        language: That of the statements.
        roots: What they compute.
        names: What values are called, with "_" behind, for no language knows such names.
        leaves: For every kind of leaf, the text that reads leaf number `{}`. Without them, the
            leaves are variables that are called after them, such as `state0`.

    Returns:
        The statements, and what stands for each root after them.
    """
    lowered = lower(roots)
    order = topological(lowered)
    inside = _inside(order, lowered, names) if language.nested else set()
    texts: dict[Expression, str] = {}
    taken: set[str] = set()

    def show(operand: Operand, user: str | None = None, position: int = 0) -> str:
        if isinstance(operand, Expression):
            brackets = operand in inside and _needs_brackets(operand.op, user, position)
            return f"({texts[operand]})" if brackets else texts[operand]
        if isinstance(operand, bool):
            return language.truth(operand)
        return language.number(float(operand))  # type: ignore[arg-type]

    lines: list[str] = []
    reads: dict[tuple[int, float], str] = {}
    for node in order:
        if node.op in LEAVES:
            texts[node] = plain = f"{node.op}{node.args[0]}"
            if leaves is None:
                continue
            term = leaves[node.op].format(node.args[0])
        else:
            shown = [show(a, node.op, i) for i, a in enumerate(node.args)]
            plain, term = f"t{len(texts)}", language.term(node.op, shown)
        if node in inside:
            texts[node] = term
            continue
        name = f"{names[node]}_" if node in names else plain
        name = name if name not in taken and _PLAIN(name) else plain
        taken.add(name)
        texts[node] = name
        line = language.declaration(name, term, is_boolean(node))
        if node.op in LEAVES:
            reads[LEAVES.index(node.op), float(node.args[0])] = line  # type: ignore[arg-type]
        else:
            lines.append(line)
    return [*(reads[place] for place in sorted(reads)), *lines], list(map(show, lowered))


def _inside(
    order: Sequence[Expression], roots: Iterable[Operand], names: Mapping[Expression, str]
) -> set[Expression]:
    """What is written inside of the one term that uses it: short terms without a name.

    Which operations a compiler contracts depends on their order, on branches and on signs, which it
    moves within a term. So all stays as it is: a term waits for its use only while nothing else is
    computed; conditions, what they choose from, and negative terms do not wait.
    """
    uses = Counter(a for node in order for a in operands(node))
    uses.update(root for root in roots if isinstance(root, Expression))
    chosen = {a for node in order if node.op == "where" for a in node.args[1:]}
    sizes: dict[Expression, int] = {}
    inside: set[Expression] = set()
    waiting: set[Expression] = set()
    for node in order:
        if node.op in LEAVES:
            continue
        waiting.difference_update(operands(node))
        sizes[node] = 1 + sum(sizes[a] for a in operands(node) if a in inside)
        alone = uses[node] == 1 and node not in names and node.op not in ("where", "neg")
        if alone and sizes[node] <= _LONGEST and node not in chosen:
            inside.add(node)
            waiting.add(node)
        else:
            inside -= waiting
            waiting.clear()
    return inside


def _needs_brackets(op: str, user: str | None, position: int) -> bool:
    """Whether an operation is put into brackets as an operand of another."""
    inner, outer = _LEVELS.get(op), _LEVELS.get(user or "")
    if inner is None or outer is None:  # a call, or an argument of one
        return False
    if user in _LOGIC:
        return True
    if inner == outer:  # Python chains comparisons
        return position > 0 or user == "neg" or inner == PRECEDENCE["lt"]
    return inner < outer


def lowered_names(recurrence: Recurrence) -> dict[Expression, str]:
    """The names of a recurrence's values, for their lowered expressions; those of its leaves."""
    named = list(recurrence.names)
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
    given = recurrence.names
    news = [f"{given.get(leaf('state', i), f'state{i}')}'" for i in range(len(recurrence.step))]
    names = {e: name for e, name in given.items() if e.op in LEAVES}
    taken = {*names.values(), *news}
    lines = []
    for e in topological(recurrence.step):
        if e in given and e.op not in LEAVES:
            names[e] = given[e]
            if (e, given[e]) not in zip(recurrence.step, news, strict=True):
                names[e] = _unlike(given[e].removesuffix("'"), taken)
            lines.append(f"{names[e]} = {formula(e, names)}")
    for root, new in zip(recurrence.step, news, strict=True):
        if not isinstance(root, Expression) or names.get(root) != new:
            lines.append(f"{new} = {formula(root, names)}")
    return lines


def _unlike(name: str, taken: set[str]) -> str:
    """The name, with a number behind where another value has it; it is taken from then on."""
    numbered = (f"{name}_{i}" for i in count(2))
    new = next(n for n in chain([name], numbered) if n not in taken)
    taken.add(new)
    return new
