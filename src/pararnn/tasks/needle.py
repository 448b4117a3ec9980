"""Needles in a haystack: recall under noise, at a distance that grows with the sequence.

Somewhere in the noise stand needles: a mark, a key and its value. At the end one key is asked for.
Noise, keys and values are the same tokens, so only the mark tells what is to be remembered.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pararnn.tasks.task import Batch, Task

_NEEDLE, _QUESTION = 3, 2  # tokens of each


@dataclass(frozen=True)
class Needle(Task):
    """After the last token, a key, the class is the value that the needle with this key has.

    Args:
        needles: How many there are, with different keys.
        values: Number of different tokens without the two marks, `values` and `values + 1`.
    """

    needles: int = 4
    values: int = 64
    source: ClassVar[str] = "ours, after the tests of long contexts of language models"

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return self.values + 2

    @property
    def num_classes(self) -> int:  # noqa: D102
        return self.values

    @property
    def min_length(self) -> int:  # noqa: D102
        return _NEEDLE * self.needles + _QUESTION

    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:  # noqa: D102
        options: dict[str, Any] = {"generator": generator, "device": generator.device}
        tokens = torch.randint(self.values, (size, length), **options)
        keys = torch.rand(size, self.values, **options).topk(self.needles).indices
        values = torch.randint(self.values, (size, self.needles), **options)
        # Needles as single things among the noise: their places, then moved apart by their sizes.
        things = length - _QUESTION - (_NEEDLE - 1) * self.needles
        order = torch.rand(size, things, **options).topk(self.needles).indices.sort(1).values
        places = order + (_NEEDLE - 1) * torch.arange(self.needles, device=tokens.device)
        tokens.scatter_(1, places, self.values)
        tokens.scatter_(1, places + 1, keys)
        tokens.scatter_(1, places + 2, values)
        asked = torch.randint(self.needles, (size, 1), **options)
        tokens[:, -2] = self.values + 1
        tokens[:, -1:] = keys.gather(1, asked)
        targets = torch.zeros_like(tokens)
        targets[:, -1:] = values.gather(1, asked)
        counts = torch.zeros_like(tokens, dtype=torch.bool)
        counts[:, -1] = True
        return Batch(tokens, targets, counts)
