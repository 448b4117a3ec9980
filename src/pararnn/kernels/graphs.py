"""Work captured once in a CUDA graph and replayed, and who runs the steps of chunks on a GPU."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pararnn.kernels import fused
from pararnn.solvers import chunks as plain
from pararnn.solvers.chunks import Chunks, Rows, Swept

_STEPS = 128  # of a sweep in one graph; longer sweeps replay it
_GRAPHS = 16  # kept per step


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


def is_capturing(device: torch.device) -> bool:
    """Whether what is enqueued on a device goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def run_steps(
    chunks: Chunks,
    state: Sequence[Tensor],
    first: int = 0,
    copies: int = 1,
    keep: bool = True,
) -> Swept:
    """See `pararnn.solvers.chunks.Run`: on a GPU in one kernel, or by CUDA graphs."""
    device = state[0].device
    if device.type != "cuda":
        return plain.run_steps(chunks, state, first, copies, keep)
    with torch.cuda.device(device):
        try:
            return fused.run_steps(chunks, state, first, copies, keep)
        except fused.NotFused:  # `fused.reasons` says why
            return replayed(chunks, state, first, copies, keep)


def replayed(
    chunks: Chunks,
    state: Sequence[Tensor],
    first: int = 0,
    copies: int = 1,
    keep: bool = True,
) -> Swept:
    """See `pararnn.solvers.chunks.Run`: by CUDA graphs, or as one where one is captured."""
    rows = chunks.rows
    if is_capturing(state[0].device) or rows.steps - first == 1:
        return plain.run_steps(chunks, state, first, copies, keep)
    pieces: list[list[Tensor]] = []
    for begin in range(first, rows.steps, _STEPS):
        piece = rows.piece(begin, min(begin + _STEPS, rows.steps))
        pieces.append(_replayed(piece, state, copies))
        state = [p[-1] for p in pieces[-1]]
    whole = pieces[0] if len(pieces) == 1 else [torch.cat(p) for p in zip(*pieces, strict=True)]
    return plain.swept(chunks, whole, keep)


_known: weakref.WeakKeyDictionary[fx.GraphModule, OrderedDict[Hashable, _Sweep]] = (
    weakref.WeakKeyDictionary()
)


_lock = threading.Lock()  # what is enqueued for one call must not mix with that for another


def _replayed(rows: Rows, state: Sequence[Tensor], copies: int) -> list[Tensor]:
    tensors = [*state, *rows.tensors()]
    form = (rows.steps, rows.reverse, rows.begins is None, copies)
    key = (form, _context(state[0].device), *((t.shape, t.dtype, t.device) for t in tensors))
    with _lock:
        known = _known.setdefault(rows.step.module, OrderedDict())
        if key not in known:
            known[key] = _Sweep(rows, state, copies)
            if len(known) > _GRAPHS:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key](tensors)


def _context(device: torch.device) -> Hashable:
    """What else a graph depends on: precision, and the stream, on which its tensors are used."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return torch.get_float32_matmul_precision(), stream


class _Sweep:
    """The steps of rows of one shape as a CUDA graph, with tensors of its own."""

    def __init__(self, rows: Rows, state: Sequence[Tensor], copies: int) -> None:
        own = [t.clone(memory_format=torch.contiguous_format) for t in state]
        mine = rows.mapped(lambda t: t.clone(memory_format=torch.contiguous_format))
        self.inputs = [*own, *mine.tensors()]
        self.outputs: list[Tensor] = []

        def run() -> list[Tensor]:
            self.outputs = plain.run_rows(mine, own, copies=copies)
            return self.outputs

        self.replay = captured(run)

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)
        self.replay()
        return [o.clone() for o in self.outputs]
