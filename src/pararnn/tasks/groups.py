"""State tracking: the word problem of the symmetric groups (Merrill et al. 2024).

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


def swaps(degree: int) -> list[int]:
    """Numbers of the identity and of the swaps of neighbours, which generate the group."""
    numbers = []
    for first in range(-1, degree - 1):
        element = list(range(degree))
        if first >= 0:
            element[first : first + 2] = first + 1, first
        numbers.append(permutations(degree).index(tuple(element)))
    return numbers


@dataclass(frozen=True)
class WordProblem(Task):
    """The class is the product of the permutations so far, the newest applied last.

    Args:
        degree: Number of things that are permuted; classes are numbers of `permutations(degree)`,
            `degree!` of them.
        by_swaps: Tokens are the identity and the swaps of neighbours, `degree` of them, in place of
            all elements. Words are as hard to multiply, but there is no table of `degree!` times
            `degree!` products to be learnt first.
    """

    degree: int
    by_swaps: bool = False
    source: ClassVar[str] = "Merrill et al. 2024, arXiv 2404.08819"

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return self.degree if self.by_swaps else self.num_classes

    @property
    def num_classes(self) -> int:  # noqa: D102
        return math.factorial(self.degree)

    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:  # noqa: D102
        device = generator.device
        tokens = torch.randint(self.vocab_size, (size, length), generator=generator, device=device)
        steps = products(self.degree).to(device)
        if self.by_swaps:
            steps = steps[swaps(self.degree)]
        return Batch(tokens, walk(steps, tokens), torch.ones_like(tokens, dtype=torch.bool))
