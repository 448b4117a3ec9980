"""Times on a GPU, with events, from a cold cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

_FLUSH_BYTES = 512 * 2**20  # far more than any cache; it also gives the host time to launch


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """The same work as a CUDA graph, so that launching it from Python is not what is timed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> None:
        graph.replay()
        _ = kept  # the memory that the graph writes to

    return replay


def milliseconds(run: Callable[[], Any], repeats: int = 20, budget_ms: float = 3000.0) -> float:
    """Median time of one call, the caches flushed before each.

    Args:
        run: Enqueues work on the current stream.
        repeats: Calls that are timed.
        budget_ms: Fewer calls, at least one, when they take longer than this together.
    """
    run()
    torch.cuda.synchronize()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    times: list[float] = []
    while len(times) < repeats and (not times or sum(times) < budget_ms):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_gigabytes_per_second() -> float:
    """Measured rate of a large copy on the device, bytes read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6
