"""Modular counting: where a walk of steps -1, 0 and 1 stands on a circle.

It is "cycle navigation" of Deletang et al. 2023 (arXiv 2207.02098), but every position counts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pararnn.tasks.task import Batch, Task


@dataclass(frozen=True)
class ModularCounting(Task):
    """Tokens 0, 1, 2 are steps of -1, 0, 1; the class is their sum so far modulo `modulus`.

    Args:
        modulus: Places on the circle.
    """

    modulus: int = 5
    source: ClassVar[str] = "Deletang et al. 2023, arXiv 2207.02098, as cycle navigation"

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return 3

    @property
    def num_classes(self) -> int:  # noqa: D102
        return self.modulus

    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:  # noqa: D102
        device = generator.device
        tokens = torch.randint(3, (size, length), generator=generator, device=device)
        targets = (tokens - 1).cumsum(1) % self.modulus
        return Batch(tokens, targets, torch.ones_like(tokens, dtype=torch.bool))
