"""Parity (Danieli et al. 2025, arXiv 2510.21450, C.2): the sum of all bits so far, modulo 2.

Every position counts. The paper does not say which do; its 53 % and 52 % for models that cannot
do the task are what some right answers at the beginning add to a guess, where every position
counts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pararnn.tasks.task import Batch, Known, Task, table_6


@dataclass(frozen=True)
class Parity(Task):
    """After every bit, the class is the sum of the bits so far modulo 2."""

    source: ClassVar[str] = "Danieli et al. 2025, arXiv 2510.21450, C.2"

    @property
    def known(self) -> tuple[Known, ...]:  # noqa: D102
        return table_6("100 tokens", transformer=53, mamba2=52)

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return 2

    @property
    def num_classes(self) -> int:  # noqa: D102
        return 2

    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:  # noqa: D102
        device = generator.device
        tokens = torch.randint(2, (size, length), generator=generator, device=device)
        return Batch(tokens, tokens.cumsum(1) % 2, torch.ones_like(tokens, dtype=torch.bool))
