"""A recorded step as equations, for cells whose channels mix.

Operations that only rearrange are left out, as in mathematics.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

from torch import fx

from pararnn.tracing.partition import Partition

_QUIET = {
    "view", "_unsafe_view", "reshape", "permute", "transpose", "unsqueeze", "squeeze", "expand",
    "clone", "alias", "detach", "contiguous", "_to_copy", "lift_fresh_copy",
}  # fmt: skip
_SPLITS = {"split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "unbind"}
_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "mm": "@", "bmm": "@", "matmul": "@"}
_SUM, _PRODUCT, _POWER, _ATOM = range(1, 5)  # how strongly an operator binds


def formulas(parts: Partition) -> list[str]:
    """A line for each value that has a name or is used again, and for each new component.

    A value of the input part without a name is `input`, with a number if there are several;
    `v[0]` is the first part of a value that is split.
    """
    return _Writer(parts).lines()


class _Writer:
    def __init__(self, parts: Partition) -> None:
        self.parts = parts
        count = len(parts.states)
        self.components = ["state"] if count == 1 else [f"state{i}" for i in range(count)]
        self.taken = {*self.components, *(f"{name}'" for name in self.components)}
        self.known = dict(zip(parts.states, self.components, strict=True))
        drives = [e for e in parts.edges if e.meta["by_rows"]]
        for number, edge in enumerate(drives, 1):
            name = edge.meta.get("name") or ("input" if len(drives) == 1 else f"input{number}")
            self.known[edge] = self._free(str(name))
        self.uses = self._uses()

    def lines(self) -> list[str]:
        """See `formulas`."""
        found = []
        news = dict(zip(self.parts.results, self.components, strict=True))
        written = set()
        for node in self.parts.recurrent:
            if node in self.known or _operation(node) in _SPLITS:
                continue
            name, again = node.meta.get("name"), self.uses[node] > 1 and self._base(node) is node
            if node in news and self.uses[node]:
                name = f"{news[node]}'"
                written.add(name)
            elif node in news or not (name or again):
                continue
            else:
                name = self._free(str(name or "v"))
            found.append(f"{name} = {self.text(node)[0]}")
            self.known[node] = name
        for name, root in zip(self.components, self.parts.results, strict=True):
            if f"{name}'" not in written:
                found.append(f"{name}' = {self.text(root)[0]}")
        return found

    def _uses(self) -> Counter[fx.Node]:
        """How often a value occurs; what is split occurs once for each part."""
        found: Counter[fx.Node] = Counter()
        for node in self.parts.recurrent:
            if self._base(node) is node:
                times = len(node.users) if _operation(node) in _SPLITS else 1
                for given in node.all_input_nodes:
                    found[self._base(given)] += times
        return found

    def _base(self, node: fx.Node) -> fx.Node:
        """What a node without a name rearranges; itself if it does more."""
        while node not in self.known and not node.meta.get("name") and _is_quiet(node):
            node = node.args[0]  # type: ignore[assignment] # as `_is_quiet` has seen
        return node

    def _free(self, name: str) -> str:
        """The name, with a number behind where another value has it, and always behind a v."""
        found, number = name, 1
        while found in self.taken or found == "v":
            found = f"v{number}" if name == "v" else f"{name}_{number + 1}"
            number += 1
        self.taken.add(found)
        return found

    def text(self, value: Any) -> tuple[str, int]:
        """A value as text, and how strongly its outermost operator binds."""
        if not isinstance(value, fx.Node):
            return (f"{value:.6g}" if isinstance(value, float) else str(value)), _ATOM
        node, kind, args = value, _operation(value), value.args
        if node in self.known:
            return self.known[node], _ATOM
        if node.op in ("placeholder", "get_attr"):
            return str(node.meta.get("name") or node.name), _ATOM
        if kind == "t":
            return f"{self.inside(args[0], _ATOM)}^T", _ATOM
        if _is_quiet(node):
            return self.text(args[0])
        if kind == "addmm":
            product = f"{self.inside(args[1], _PRODUCT)} @ {self.inside(args[2], _POWER)}"
            return f"{product} + {self.inside(args[0], _SUM)}", _SUM
        if kind == "rsub":
            return f"{self.text(args[1])[0]} - {self.inside(args[0], _PRODUCT)}", _SUM
        if kind == "neg":
            return f"-{self.inside(args[0], _PRODUCT)}", _SUM
        if kind == "pow":
            return f"{self.inside(args[0], _ATOM)}^{self.inside(args[1], _ATOM)}", _POWER
        if kind in _INFIX and len(args) > 1:
            sign = _INFIX[kind]
            binds = _SUM if sign in "+-" else _PRODUCT
            second = self.inside(args[1], binds + (sign in "-/@"))
            return f"{self.inside(args[0], binds)} {sign} {second}", binds
        if kind == "getitem" and isinstance(args[0], fx.Node):
            if _operation(args[0]) in _SPLITS:
                return f"{self.inside(args[0].args[0], _ATOM)}[{args[1]}]", _ATOM
            return self.text(args[0])
        shown = ", ".join(self.text(given)[0] for given in node.all_input_nodes)
        return f"{kind.removeprefix('native_')}({shown})", _ATOM

    def inside(self, value: Any, least: int) -> str:
        """A value within an operator that binds so strongly."""
        text, binds = self.text(value)
        return text if binds >= least else f"({text})"


def _is_quiet(node: fx.Node) -> bool:
    return _operation(node) in _QUIET and isinstance(node.args[0], fx.Node)


def _operation(node: fx.Node) -> str:
    """The name of what a node does, without its overload; of `operator.getitem` "getitem"."""
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return schema.name.split("::")[-1] if schema is not None else str(node.target)
