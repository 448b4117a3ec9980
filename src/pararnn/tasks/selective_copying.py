"""Selective copying (Gu and Dao 2023, arXiv 2312.00752, section 4.1.1).

A few tokens stand at random places in a long row of blanks. At the end as many marks ask for them,
in their order.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pararnn.tasks.task import Batch, Task


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """At the last `items` positions the classes are the tokens that are no blanks, in order.

    Args:
        items: How many there are.
        values: Number of different ones; `values` is the blank and `values + 1` the mark.
    """

    items: int = 8
    values: int = 14
    source: ClassVar[str] = "Gu and Dao 2023, arXiv 2312.00752"

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return self.values + 2

    @property
    def num_classes(self) -> int:  # noqa: D102
        return self.values

    @property
    def min_length(self) -> int:  # noqa: D102
        return 2 * self.items

    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:  # noqa: D102
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        tokens = torch.full((size, length), self.values, device=generator.device)
        items = torch.randint(self.values, (size, self.items), **options)
        room = length - self.items
        places = torch.rand(size, room, **options).topk(self.items).indices.sort(1).values
        tokens.scatter_(1, places, items)
        tokens[:, room:] = self.values + 1
        targets = torch.zeros_like(tokens)
        targets[:, room:] = items
        counts = torch.zeros_like(tokens, dtype=torch.bool)
        counts[:, room:] = True
        return Batch(tokens, targets, counts)
