"""Multi-query associative recall (Arora et al. 2024, arXiv 2312.04927).

Danieli et al. 2025 (arXiv 2510.21450, C.2) use it with 128 tokens and a kappa of 2, which is taken
for the number of pairs here.

Pairs of a key and a value come first. Then every other token on average is one of these keys, and
its value is the class there; the rest is noise. Keys are the first half of the tokens, values and
noise the second, so that noise is never a query.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pararnn.tasks.task import Batch, Known, Task, table_6


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """After a key that comes again, the class is the value that followed it at first.

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
        return 2 * self.pairs + 1

    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:  # noqa: D102
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        half, first = self.values // 2, 2 * self.pairs
        keys = torch.rand(size, half, **options).topk(self.pairs).indices
        tokens = torch.randint(half, self.values, (size, length), **options)
        values = tokens[:, 1:first:2]
        tokens[:, :first:2] = keys
        counts = torch.rand(size, length, **options) < 0.5
        counts[:, :first] = False
        counts[:, -1] = True
        asked = torch.randint(self.pairs, (size, length), **options)
        targets = values.gather(1, asked) * counts
        tokens = torch.where(counts, keys.gather(1, asked), tokens)
        return Batch(tokens, targets, counts)
