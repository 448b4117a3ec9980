"""Kernels whose programs wait for each other: one at a time on a device, whatever the streams.

All programs of such a kernel need a place on the device at once. A cooperative launch gives them
theirs; but of two kernels on two streams, each could hold places that the other waits for. So the
second waits until the first has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()  # between the wait and the mark of one launch there is no other
_ends: dict[torch.device, torch.cuda.Event] = {}
_captured = 0


@contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """Within this context one such kernel is launched, or a CUDA graph with some of them.

    Those launched before, on any stream of the device, end first. In a capture there is nothing to
    wait for: whoever replays the graph takes a turn.

    Args:
        device: Of the current stream, with its index; the interpreter has none and no turns.
    """
    global _captured
    if device.type != "cuda":
        yield
    elif torch.cuda.is_current_stream_capturing():
        _captured += 1
        yield
    else:
        with _lock:
            stream = torch.cuda.current_stream(device)
            end = _ends.setdefault(device, torch.cuda.Event())
            stream.wait_event(end)
            yield
            end.record(stream)


def captured_so_far() -> int:
    """How many turns were taken in captures, of this and all other threads."""
    return _captured
