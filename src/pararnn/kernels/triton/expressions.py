"""Generates the functions that written kernels of vectors call, from expressions.

Products with weights and means go over the entries of a vector: in the functions they are calls of
`functions.dot` and `functions.mean`, which are told how many entries there are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_map

from pararnn.kernels.lowering import REDUCTIONS, NotLowered, lower
from pararnn.kernels.spread import Spread
from pararnn.kernels.stages import Stages
from pararnn.kernels.triton.build import load
from pararnn.kernels.triton.steps import Module
from pararnn.tracing.expressions import (
    LEAVES,
    Expression,
    Operand,
    formula,
    operands,
    topological,
)
from pararnn.tracing.operations import UnknownOperation, express, is_pointwise
from pararnn.tracing.partition import operation


def express_node(node: fx.Node, operands: Mapping[fx.Node, Operand], dtype: torch.dtype) -> Any:
    """What a node computes on each element, in arithmetic of a type."""
    pick = lambda a: operands[a] if isinstance(a, fx.Node) else a  # noqa: E731
    args, kwargs = tree_map(pick, tuple(node.args)), tree_map(pick, dict(node.kwargs))
    return express(operation(node), args, kwargs, dtype)


def is_expressed(node: fx.Node, operands: Mapping[fx.Node, Operand], dtype: torch.dtype) -> bool:
    """Whether a node is an operation on each element, and one that a kernel can compute."""
    if not hasattr(operation(node), "_schema") or not is_pointwise(operation(node)):
        return False
    try:
        expression = express_node(node, operands, dtype)
        lower([expression])
    except (UnknownOperation, NotLowered):
        return False
    return isinstance(expression, Expression)


def function(name: str, leaves: Mapping[str, int], roots: Sequence[Operand], double: bool) -> Any:
    """The function of `source`."""
    return getattr(load(source(name, leaves, roots, double)), name)


def source(name: str, leaves: Mapping[str, int], roots: Sequence[Operand], double: bool) -> str:
    """A module with a function that computes expressions.

    Args:
        name: Of the function; its arguments are `SIZE`, the entries of a vector, and the leaves.
        leaves: How many there are of each kind.
        roots: What it returns, as a tuple.
        double: Whether it computes in float64, else in float32.
    """
    module = Module("double" if double else "single")
    plain = module.language

    def term(op: str, args: Sequence[str]) -> str:
        if op not in REDUCTIONS:
            return plain.term(op, args)
        module.used.add(op)
        return f"{op}({', '.join(args)}, SIZE)"

    module.language = dataclasses.replace(plain, term=term)
    # Products first, as far as they do not depend on each other, so that they overlap.
    products = [e for e in topological(roots) if e.op == "dot"]
    module.function(name, leaves, [roots], flags=["SIZE: tl.constexpr"], first=products)
    return module.text(f"a {name}", equations(roots))


def staged_source(stages: Stages, leaves: Mapping[str, int], double: bool) -> str:
    """A module with the functions of a step that is taken apart where its channels mix.

    `factors0` computes the vectors of the first level that are stored, and then those whose totals
    are taken; `late0` vectors that are multiplied in this level but need such a total; `factors1`
    those of the second level, and so on; `new_state` the new components.

    Args:
        stages: The step.
        leaves: How many there are of each kind, products and totals included.
        double: Whether it computes in float64, else in float32.
    """
    module = Module("double" if double else "single")
    for level in range(stages.levels):
        summed = [stages.totals[n].factor for n in stages.totals_at(level)]
        module.function(f"factors{level}", leaves, [[*stages.computed(level), *summed]])
        module.function(f"late{level}", leaves, [stages.at(level, late=True)])
    module.function("new_state", leaves, [stages.roots])
    return module.text("a step in stages", stages.equations())


def spread_source(spread: Spread, leaves: Mapping[str, int], double: bool) -> str:
    """A module with the functions of a step that is spread over programs.

    `vectors0` computes what is multiplied or summed in the first stage, in the channels of a
    program; `repeated0` the vectors that every program computes as a whole; `vectors1` and
    `repeated1` the same of the second stage, and so on; `new_state` the new components.

    Args:
        spread: The step.
        leaves: How many there are of each kind, products and totals included.
        double: Whether it computes in float64, else in float32.
    """
    module = Module("double" if double else "single")
    for stage, moment in enumerate(spread.moments):
        module.function(f"vectors{stage}", leaves, [spread.vectors(moment, repeated=False)])
        module.function(f"repeated{stage}", leaves, [spread.vectors(moment, repeated=True)])
    module.function("new_state", leaves, [spread.roots])
    return module.text(
        "a step for programs that share channels", equations(spread.everything(False))
    )


def equations(roots: Sequence[Operand]) -> list[str]:
    """Mathematics, one line per value that is used more than once and per result."""
    order = topological(roots)
    uses = Counter(a for e in order for a in operands(e))
    names: dict[Expression, str] = {e: f"{e.op}{e.args[0]}" for e in order if e.op in LEAVES}
    results = {e: f"result{i}" for i, e in enumerate(roots) if isinstance(e, Expression)}
    shared = [e for e in order if uses[e] > 1 and e not in names | results]
    names = results | names | {e: f"t{n}" for n, e in enumerate(shared)}
    lines = [f"{names[e]} = {formula(e, names)}" for e in shared]
    return lines + [f"result{i} = {formula(root, names)}" for i, root in enumerate(roots)]
