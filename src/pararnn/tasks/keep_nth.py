"""Keep-nth (Danieli et al. 2025, arXiv 2510.21450, C.2): name the n-th token at the end.

Tokens are drawn evenly. Whoever cannot tell positions apart, and keep one token against all that
follow, is left with a guess.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from pararnn.tasks.task import Batch, Known, Task, table_6


@dataclass(frozen=True)
class KeepNth(Task):
    """After the last token, the class is the n-th token.

    Args:
        nth: Which one, counted from 1.
        values: Number of different tokens.
    """

    nth: int = 5
    values: int = 128
    source: ClassVar[str] = "Danieli et al. 2025, arXiv 2510.21450, C.2"

    @property
    def known(self) -> tuple[Known, ...]:  # noqa: D102
        if (self.nth, self.values) != (5, 128):
            return ()
        return table_6("n = 5, V = 128, 100 tokens", transformer=100, mamba2=1)

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return self.values

    @property
    def num_classes(self) -> int:  # noqa: D102
        return self.values

    @property
    def min_length(self) -> int:  # noqa: D102
        return self.nth

    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:  # noqa: D102
        device = generator.device
        tokens = torch.randint(self.values, (size, length), generator=generator, device=device)
        targets = torch.zeros_like(tokens)
        targets[:, -1] = tokens[:, self.nth - 1]
        counts = torch.zeros_like(tokens, dtype=torch.bool)
        counts[:, -1] = True
        return Batch(tokens, targets, counts)
