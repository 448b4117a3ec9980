"""`pararnn reproduce`."""

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from pararnn.cli.arguments import parse
from pararnn.reproduce.catalogue import ALL, CATALOGUE, names_of
from pararnn.reproduce.settings import ReproduceConfig


@dataclass(kw_only=True)
class ReproduceArguments:
    """Measure the paper's figures and tables, beside its numbers."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """Which figure or table, or all."""
    config: Annotated[ReproduceConfig, tyro.conf.arg(name="")] = field(
        default_factory=ReproduceConfig
    )

    def __post_init__(self) -> None:
        names_of(self.name)


def run(arguments: list[str]) -> int:
    """Measure, and write tables, plots and JSON.

    Returns:
        0; 128 plus the number of the signal that stopped it.
    """
    parsed = parse(ReproduceArguments, "reproduce", arguments, description=_description())
    from pararnn.reproduce.parts import reproduce  # transformers is slow to import

    command = " ".join(["pararnn reproduce", *arguments])
    result = reproduce(parsed.name, parsed.config, command)
    return 0 if result.stopped_by is None else 128 + result.stopped_by


def _description() -> str:
    paragraphs = [
        "Measure the paper's figures and tables (Danieli et al. 2025), each beside its numbers. "
        "Call it again to continue a stopped run.",
        *(f"{name}: {entry.shows}; {entry.takes}." for name, entry in CATALOGUE.items()),
        f"{ALL}: all of these, one after another.",
        "With --preset smoke everything takes seconds on a CPU.",
    ]
    return "\n\n".join(paragraphs)
