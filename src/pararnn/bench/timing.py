"""Times: of kernels on a GPU, with events, from a cold cache; of whole steps on any device."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_FLUSH_BYTES = 512 * 2**20  # far more than any cache; it also gives the host time to launch


def milliseconds(run: Callable[[], Any], repeats: int = 20, budget_ms: float = 3000.0) -> float:
    """Median time of one call on a GPU, the caches flushed before each.

    Args:
        run: Enqueues work on the current stream.
        repeats: Calls that are timed.
        budget_ms: Fewer calls, at least one, when they take longer than this together.
    """
    device = torch.device("cuda")
    return statistics.median(call_milliseconds(run, device, repeats=repeats, budget_ms=budget_ms))


def call_milliseconds(
    run: Callable[[], Any],
    device: torch.device,
    *,
    warm_ups: int = 1,
    repeats: int,
    budget_ms: float,
) -> list[float]:
    """Time of every single call; on a GPU by events, the caches flushed before each.

    Args:
        run: Does the work, or enqueues it on the current stream.
        device: Where the work is done.
        warm_ups: Calls before, which are not timed.
        repeats: Calls that are timed.
        budget_ms: Fewer calls of both kinds, at least one of each, when those of one kind take
            longer than this together.
    """
    on_gpu = device.type == "cuda"
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device) if on_gpu else None

    def timed() -> float:
        if flush is None:
            begin = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - begin)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)

    times: list[float] = []
    for count in (warm_ups, repeats):
        times = []
        while len(times) < count and (not times or sum(times) < budget_ms):
            times.append(timed())
    return times


def steps_milliseconds(run: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median time from one call to the next, one right after the other, on any device.

    Args:
        run: Enqueues work on the current stream.
        device: Where it runs.
        repeats: Calls that are timed, after two that are not.
    """
    for _ in range(2):
        run()
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(repeats):
            run()
            marks.append(time.perf_counter())
        return statistics.median(1e3 * (b - a) for a, b in itertools.pairwise(marks))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def copy_gigabytes_per_second(device: torch.device | str = "cuda") -> float:
    """Measured rate of a large copy on the device, bytes read and written."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    source = torch.empty(2**30 if on_gpu else 2**26, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    time_ms = milliseconds(copy) if on_gpu else steps_milliseconds(copy, device)
    return 2 * source.numel() / time_ms / 1e6
