"""State tracking: the word problem of the symmetric groups.

Every token is a permutation, and the class after it is the product of all so far. S3 is solvable
and S5 is not: no circuit of constant depth multiplies in it unless TC0 = NC1, and a Transformer or
a linear state space model of fixed depth is such a circuit (Merrill et al. 2024, arXiv 2404.08819).
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pararnn.tasks.task import Batch, Task
from pararnn.tasks.walks import walk


def permutations(degree: int) -> list[tuple[int, ...]]:
    """The elements of the symmetric group, in the order of their numbers; 0 is the identity."""
    return list(itertools.permutations(range(degree)))


@functools.cache
def products(degree: int) -> Tensor:
    """Number of the product `a b`, in which b is applied first, at [a, b]."""
    elements = permutations(degree)
    number = {element: i for i, element in enumerate(elements)}
    return torch.tensor([[number[tuple(a[i] for i in b)] for b in elements] for a in elements])


@dataclass(frozen=True)
class WordProblem(Task):
    """The class is the product of the permutations so far, the newest applied last.

    Args:
        degree: Number of things that are permuted; tokens and classes are numbers of
            `permutations(degree)`, `degree!` of them.
    """

    degree: int
    source: ClassVar[str] = "Merrill et al. 2024, arXiv 2404.08819"

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return math.factorial(self.degree)

    @property
    def num_classes(self) -> int:  # noqa: D102
        return self.vocab_size

    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:  # noqa: D102
        device = generator.device
        tokens = torch.randint(self.vocab_size, (size, length), generator=generator, device=device)
        targets = walk(products(self.degree).to(device), tokens)
        return Batch(tokens, targets, torch.ones_like(tokens, dtype=torch.bool))
