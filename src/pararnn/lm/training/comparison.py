"""Measures how much a train step gains from the parallel recurrence, on this machine."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from pararnn import RNN
from pararnn.lm.data.words import bar
from pararnn.lm.models.cache import State
from pararnn.testing import loop

_PARALLEL, _LOOPS = 6, 4  # steps that are run
Model = TypeVar("Model", bound=nn.Module)


class StepLoop(nn.Module):
    """The recurrence of an `RNN` as a plain loop over its cell, one call per time step.

    Args:
        rnn: Whose cell to run; parameters are shared.
    """

    def __init__(self, rnn: RNN) -> None:
        super().__init__()
        self.cell = rnn.cell
        self.shapes = rnn.state_shapes
        self.ranks = None  # as of an `RNN`: its time is not split

    def forward(
        self, x: Tensor, state: State | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """As `RNN.forward` with the batch first; without a state it starts from zeros."""
        if state is None:
            zeros = tuple(x.new_zeros(x.shape[0], *shape) for shape in self.shapes)
            state = zeros if len(zeros) > 1 else zeros[0]
        return loop(self.cell, x, state, resets)


def step_by_step(model: Model) -> Model:
    """A copy of a model whose recurrences are plain loops over time."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, RNN):
                setattr(module, name, StepLoop(child))
    return model


@dataclass(frozen=True)
class Comparison:
    """Median times of one train step, in seconds."""

    parallel_s: float
    sequential_s: float

    @property
    def ratio(self) -> float:
        """How many times faster the parallel evaluation is."""
        return self.sequential_s / self.parallel_s


def compare_train_steps(
    model: Model, prepare: Callable[[Model], Callable[[], object]]
) -> Comparison:
    """Time a train step on two copies of a model, which is left as it is.

    Args:
        model: Holds `RNN` layers.
        prepare: Given a model, returns a function that runs one whole train step of it (forward,
            backward and optimiser) and waits for its end.
    """
    with bar("Comparing with the loop", _PARALLEL + _LOOPS, "step", leave=False, delay=2) as shown:
        return Comparison(
            parallel_s=_median_time(prepare(copy.deepcopy(model)), _PARALLEL, shown.update),
            sequential_s=_median_time(prepare(step_by_step(model)), _LOOPS, shown.update),
        )


def _median_time(run: Callable[[], object], runs: int, done: Callable[[], object]) -> float:
    """Of some runs; the first one, which compiles, does not count."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        done()
    return statistics.median(times[1:])
