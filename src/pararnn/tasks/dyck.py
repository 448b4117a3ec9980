"""Dyck-2: which bracket must be closed next.

Words begin as well-nested words of two kinds of brackets do, at most `max_depth` deep (Hewitt et
al. 2020, arXiv 2010.07515: then a finite memory is enough). What counts are the positions after a
closing bracket: after an opening one the answer is that bracket.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pararnn.tasks.task import Batch, Task

KINDS = 2


@dataclass(frozen=True)
class Dyck2(Task):
    """Tokens 0 and 1 open brackets of kind 0 and 1, tokens 2 and 3 close them.

    The class after a closing bracket is 0 if none is open, else 1 or 2 for the kind of the
    innermost open one.

    Args:
        max_depth: Most brackets that are open at a time.
    """

    max_depth: int = 8
    source: ClassVar[str] = "Hewitt et al. 2020, arXiv 2010.07515"

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return 2 * KINDS

    @property
    def num_classes(self) -> int:  # noqa: D102
        return 1 + KINDS

    @property
    def min_length(self) -> int:  # noqa: D102
        return 2

    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:  # noqa: D102
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        kinds = torch.randint(KINDS, (size, length), **options)
        wants_open = torch.rand(size, length, **options) < 0.5
        tokens, targets = torch.empty_like(kinds), torch.empty_like(kinds)
        stack = torch.zeros(size, self.max_depth + 1, dtype=torch.int64, device=generator.device)
        depth = torch.zeros(size, 1, dtype=torch.int64, device=generator.device)
        for t in range(length):
            kind = kinds[:, t : t + 1]
            opens = (wants_open[:, t : t + 1] | (depth == 0)) & (depth < self.max_depth)
            closed = stack.gather(1, depth)  # 1 + kind of the innermost, 0 at the bottom
            depth = torch.where(opens, depth + 1, depth - 1)
            stack = torch.where(opens, stack.scatter(1, depth, 1 + kind), stack)
            tokens[:, t : t + 1] = torch.where(opens, kind, KINDS + closed - 1)
            targets[:, t : t + 1] = stack.gather(1, depth)
        counts = tokens >= KINDS
        return Batch(tokens, targets * counts, counts)
