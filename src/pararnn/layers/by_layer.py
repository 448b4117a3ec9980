"""Plans and reports of all layers of a stack, to look at together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from pararnn._notebook import Made, table

Shown = TypeVar("Shown")


class ByLayer(tuple[Shown, ...]):
    """One plan or report for each layer and direction, layer by layer, forwards first.

    `print` names the layers; those that are alike are printed once. A notebook shows a table.

    Args:
        parts: The plans or reports.
        directions: Of each layer: 1, or 2.
    """

    directions: int

    def __new__(cls, parts: Iterable[Shown], directions: int) -> ByLayer[Shown]:  # noqa: D102
        made = super().__new__(cls, parts)
        made.directions = directions
        return made

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), self.directions

    def __str__(self) -> str:
        texts = []
        for name, part in self._named():
            lines = str(part).splitlines()
            if len(lines) == 1:
                texts.append(f"{name}: {lines[0]}")
            else:
                texts.append("\n".join([name, *(f"  {line}" for line in lines)]))
        return "\n".join(texts)

    def _repr_html_(self) -> str:
        shown: list[tuple[str, Any]] = self._named()
        return table((name, Made(part._repr_html_())) for name, part in shown)

    def _named(self) -> list[tuple[str, Shown]]:
        """What differs from the part before it, with the names of its layers."""
        found: list[tuple[list[str], Shown]] = []
        for i, part in enumerate(self):
            name = f"layer {i // self.directions}"
            if self.directions > 1:
                name += " backwards" if i % self.directions else " forwards"
            if found and str(found[-1][1]) == str(part):
                found[-1][0].append(name)
            else:
                found.append(([name], part))
        return [(_joined(names), part) for names, part in found]


def _joined(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    first, last = (name.removeprefix("layer ") for name in (names[0], names[-1]))
    return f"layers {first} to {last}"
