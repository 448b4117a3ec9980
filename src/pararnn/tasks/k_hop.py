"""k-hop (Sanford et al. 2024, arXiv 2402.09268), as Danieli et al. 2025 use it.

One hop leads from a token to the one that followed its previous occurrence; with one hop the task
is that of an induction head. Positions from which some hop leads nowhere do not count.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pararnn.tasks.task import Batch, Known, Task, table_6


@dataclass(frozen=True)
class KHop(Task):
    """The class is the token that `hops` hops lead to.

    Args:
        hops: How many.
        values: Number of different tokens.
    """

    hops: int
    values: int
    source: ClassVar[str] = "Sanford et al. 2024, arXiv 2402.09268; Danieli et al. 2025, C.2"

    @property
    def known(self) -> tuple[Known, ...]:  # noqa: D102
        figures = {(1, 10): (82, 100), (2, 5): (78, 98)}.get((self.hops, self.values))
        if figures is None:
            return ()
        transformer, mamba2 = figures
        settings = f"V = {self.values}, 100 tokens"
        return table_6(settings, transformer=transformer, mamba2=mamba2)

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return self.values

    @property
    def num_classes(self) -> int:  # noqa: D102
        return self.values

    @property
    def min_length(self) -> int:  # noqa: D102
        return 1 + self.hops

    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:  # noqa: D102
        device = generator.device
        tokens = torch.randint(self.values, (size, length), generator=generator, device=device)
        hop = _one_hop(tokens, self.values)
        place, counts = hop, hop >= 0
        for _ in range(self.hops - 1):
            place = hop.gather(1, place.clamp(min=0)).where(counts, -1)
            counts = place >= 0
        targets = tokens.gather(1, place.clamp(min=0)) * counts
        return Batch(tokens, targets, counts)


def _one_hop(tokens: Tensor, values: int) -> Tensor:
    """Where one hop leads from every position: after the previous occurrence; -1 for nowhere."""
    last = torch.full((len(tokens), values), -2, device=tokens.device)
    hop = torch.empty_like(tokens)
    for t in range(tokens.shape[1]):
        token = tokens[:, t : t + 1]
        hop[:, t : t + 1] = last.gather(1, token) + 1
        last.scatter_(1, token, t)
    return hop
