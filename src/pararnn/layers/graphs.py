"""Work captured once in a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """The same work as a CUDA graph, which Python launches in one call.

    It is run twice before, to compile and to allocate, on a stream of its own.

    Args:
        run: Enqueues work on the current stream; reads and writes the same tensors in every call.
    """
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
