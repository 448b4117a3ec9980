"""The paper's figures and tables of speed, convergence and synthetic tasks, measured again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pararnn.reproduce.settings import ReproduceConfig as ReproduceConfig

if TYPE_CHECKING:
    from pararnn.reproduce.parts import Reproduced


def run(name: str, **options: Any) -> Reproduced:
    """Reproduce one figure or table of the paper, or all: what `pararnn reproduce` does.

    Args:
        name: In `pararnn.reproduce.catalogue.CATALOGUE`, or "all".
        options: Fields of `ReproduceConfig`: `preset="smoke"`, `out="folder"` and so on.

    Raises:
        ValueError: There is no such name, or an option is refused.
        RunError: The device cannot be used, or the folder holds other measurements.
    """
    from pararnn.reproduce.parts import reproduce  # transformers is slow to import

    config = ReproduceConfig(**options)
    shown = ", ".join([repr(name), *(f"{key}={value!r}" for key, value in options.items())])
    return reproduce(name, config, f"pararnn.reproduce.run({shown})")
