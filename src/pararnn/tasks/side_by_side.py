"""Several models at once in one process: each on a stream of its own of one GPU.

A small model leaves most of a GPU idle. Its step is one CUDA graph, which Python launches in far
less time than the GPU takes to run it. So one thread goes round the models and gives each its next
piece of work, and the GPU runs them side by side.
"""

from __future__ import annotations

import functools
import gc
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pararnn.lm.data.words import say
from pararnn.tasks.training import Pieces, Unit

Outcome = tuple[Unit, dict[str, Any] | None, str | None]
"""A unit with its result, or what went wrong, or neither if it was stopped."""

_REST = 1e-4  # seconds until one looks again, when all have work to do; a step takes ten times that


class Lane(Protocol):
    """Where the pieces of one model are run, in their order."""

    def run(self, pieces: Pieces) -> int:
        """Enqueue the next piece; returns what it yields."""
        ...

    def unfinished(self) -> int:
        """How many of the pieces are not finished."""
        ...

    def clear(self) -> None:
        """Wait until all are finished, and let go of what they had."""
        ...


class Inline:
    """A lane whose pieces are finished when they return, as on a CPU."""

    def run(self, pieces: Pieces) -> int:
        """See `Lane`."""
        return next(pieces)

    def unfinished(self) -> int:
        """See `Lane`."""
        return 0

    def clear(self) -> None:
        """See `Lane`."""


class Stream:
    """A lane on a GPU.

    Args:
        device: The GPU.
        number: Of the lane, from 0; each has a stream of its own.
    """

    def __init__(self, device: torch.device, number: int) -> None:
        self._stream = _stream(device, number)
        self._ends: deque[torch.cuda.Event] = deque()

    def run(self, pieces: Pieces) -> int:
        """See `Lane`."""
        with torch.cuda.stream(self._stream):
            allowed = next(pieces)
        end = torch.cuda.Event()
        end.record(self._stream)
        self._ends.append(end)
        return allowed

    def unfinished(self) -> int:
        """See `Lane`."""
        while self._ends and self._ends[0].query():
            self._ends.popleft()
        return len(self._ends)

    def clear(self) -> None:
        """See `Lane`."""
        self._stream.synchronize()
        self._ends.clear()
        gc.collect()  # models and optimizers hold each other
        torch.cuda.empty_cache()


@functools.cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """One for a number: PyTorch has 32, and two that are the same would share cuBLAS's memory."""
    return torch.cuda.Stream(device)


def more_connections() -> None:
    """Let a GPU look at up to 32 streams at a time, and not at 8 of them; before its first use."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


@dataclass
class _Running:
    """A model in its lane; `allowed` is what its last piece yielded."""

    unit: Unit
    pieces: Pieces
    lane: Lane
    allowed: int = 0

    def is_ready(self) -> bool:
        return self.lane.unfinished() <= self.allowed

    def advance(self) -> _End | None:
        """Run the next piece; how it ended, if it did.

        No exception is kept, since its frames would hold the memory of the model.
        """
        try:
            self.allowed = self.lane.run(self.pieces)
        except StopIteration as end:
            return _End((self.unit, end.value, None))
        except Exception as error:  # the others go on
            text = f"{type(error).__name__}: {error}"
            return _End((self.unit, None, text), isinstance(error, torch.OutOfMemoryError))
        return None


@dataclass(frozen=True)
class _End:
    outcome: Outcome
    lacks_memory: bool = False


def side_by_side(
    units: Sequence[Unit],
    start: Callable[[Unit], Pieces],
    lanes: Sequence[Lane],
    should_stop: Callable[[], bool],
) -> Iterator[Outcome]:
    """Train models, as many at once as there are lanes, and fewer if memory does not suffice.

    Args:
        units: What is trained; the first begin.
        start: Gives the pieces of a unit. It is called again for one that had no memory beside
            others, which then goes on from its checkpoint.
        lanes: Where they run.
        should_stop: Once it is True, no unit begins.

    Yields:
        An outcome for every unit that was begun, as they end.
    """
    waiting, free = deque(units), deque(lanes)
    running: list[_Running] = []
    while running or (waiting and not should_stop()):
        while waiting and free and not should_stop():
            unit = waiting.popleft()
            running.append(_Running(unit, start(unit), free.popleft()))
        ready = [one for one in running if one.is_ready()]
        if not ready:
            time.sleep(_REST)
        for one in ready:
            end = one.advance()
            if end is None:
                continue
            running.remove(one)
            one.lane.clear()
            if end.lacks_memory and running:  # and the lane is not used again
                waiting.appendleft(one.unit)
                say(
                    f"The GPU has no memory for {len(running) + 1} models at once. From now on "
                    f"at most {len(running)} are trained side by side. {one.unit} waits until "
                    "another has ended, and goes on from its checkpoint, if it has one."
                )
            else:
                free.append(one.lane)
                yield end.outcome
