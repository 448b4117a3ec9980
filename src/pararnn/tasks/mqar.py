"""Multi-query associative recall (Arora et al. 2024, arXiv 2312.04927).

Danieli et al. 2025 (arXiv 2510.21450, C.2) use it with 128 tokens and a kappa of 2, which is taken
for the number of pairs here.

Pairs of a key and a value come first; then, among noise, each key once more, and its value is the
class there. Keys are the first half of the tokens, values and noise the second, so that noise is
never a query.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pararnn.tasks.task import Batch, Known, Task, table_6


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """After a key that comes again, the class is the value that followed it first.

    Args:
        pairs: Keys with a value, all different.
        values: Number of different tokens; the first half are keys.
    """

    pairs: int = 2
    values: int = 128
    source: ClassVar[str] = "Arora et al. 2024, arXiv 2312.04927; Danieli et al. 2025, C.2"

    @property
    def known(self) -> tuple[Known, ...]:  # noqa: D102
        if (self.pairs, self.values) != (2, 128):
            return ()
        return table_6("kappa = 2, V = 128, 100 tokens", transformer=100, mamba2=100)

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return self.values

    @property
    def num_classes(self) -> int:  # noqa: D102
        return self.values

    @property
    def min_length(self) -> int:  # noqa: D102
        return 3 * self.pairs

    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:  # noqa: D102
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        half, first = self.values // 2, 2 * self.pairs
        keys = torch.rand(size, half, **options).topk(self.pairs).indices
        tokens = torch.randint(half, self.values, (size, length), **options)
        values = tokens[:, 1:first:2].clone()
        tokens[:, :first:2] = keys
        places = torch.rand(size, length - first, **options).topk(self.pairs).indices + first
        tokens.scatter_(1, places, keys)
        targets = torch.zeros_like(tokens).scatter_(1, places, values)
        counts = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, places, True)
        return Batch(tokens, targets, counts)
