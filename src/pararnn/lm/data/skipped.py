"""What is left out of a source: for each reason, the number and the first names."""

from dataclasses import dataclass, field
from typing import Any

FIRST = 5
"""Number of names that are kept for each reason."""
EMPTY, HIDDEN = "empty", "hidden"


@dataclass(frozen=True)
class Skip:
    """One thing that is left out.

    Attributes:
        name: A file, a folder (with / at its end), or a line or row of a file.
        reason: A few words to count it under.
    """

    name: str
    reason: str


@dataclass
class Skipped:
    """Everything that is left out.

    Attributes:
        reasons: JSON values: for each reason, the count and the first names.
    """

    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, skip: Skip) -> None:
        """Count one more thing."""
        self.update(Skipped({skip.reason: {"count": 1, "first": [printable(skip.name)]}}))

    def update(self, later: "Skipped") -> None:
        """Add what was left out later."""
        for reason, more in later.reasons.items():
            here = self.reasons.setdefault(reason, {"count": 0, "first": []})
            here["count"] += more["count"]
            here["first"] = [*here["first"], *more["first"]][:FIRST]

    @property
    def lost(self) -> "Skipped":
        """The same without hidden and empty things."""
        return Skipped({r: e for r, e in self.reasons.items() if r not in (EMPTY, HIDDEN)})

    @property
    def total(self) -> int:
        """The number of things."""
        return sum(entry["count"] for entry in self.reasons.values())

    def describe(self) -> list[str]:
        """A line for each reason."""
        return [f"{reason}: {_listed(**entry)}" for reason, entry in self.reasons.items()]


def printable(text: object) -> str:
    """A name in UTF-8; other bytes are written as escapes."""
    return str(text).encode(errors="backslashreplace").decode()


def _listed(count: int, first: list[str]) -> str:
    more = f" and {count - len(first):,} more" if count > len(first) else ""
    return f"{count:,} ({', '.join(first)}{more})"
