"""A random finite automaton: name its state after every letter.

Half of its letters permute the states, so that they never forget; the others send every state
anywhere. The automaton is the same in all samples: it is drawn from a seed of its own.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

import torch

from pararnn.tasks.task import Batch, Task
from pararnn.tasks.walks import walk


@dataclass(frozen=True)
class FiniteAutomaton(Task):
    """The class is the state of an automaton that began in state 0 and read the tokens.

    Args:
        states: Number of states.
        letters: Number of letters; the first half of them permute the states.
        number: Which automaton.
    """

    states: int = 8
    letters: int = 4
    number: int = 0
    source: ClassVar[str] = "ours, in the manner of Merrill et al. 2024, arXiv 2404.08819"

    @property
    def vocab_size(self) -> int:  # noqa: D102
        return self.letters

    @property
    def num_classes(self) -> int:  # noqa: D102
        return self.states

    @property
    def steps(self) -> list[list[int]]:
        """Where each letter leads from each state."""
        source = random.Random(self.number)
        places = range(self.states)
        permuting = [source.sample(places, self.states) for _ in range(self.letters // 2)]
        return permuting + [
            source.choices(places, k=self.states) for _ in range(self.letters - len(permuting))
        ]

    def sample(self, size: int, length: int, generator: torch.Generator) -> Batch:  # noqa: D102
        device = generator.device
        tokens = torch.randint(self.letters, (size, length), generator=generator, device=device)
        targets = walk(torch.tensor(self.steps, device=device), tokens)
        return Batch(tokens, targets, torch.ones_like(tokens, dtype=torch.bool))
