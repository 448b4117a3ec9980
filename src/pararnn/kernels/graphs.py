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
from pararnn.solvers.chunks import WHOLE, Chunks, Rows, Sweep, Swept

_STEPS = 128  # of a sweep in one graph; longer sweeps replay it
_GRAPHS = 16  # kept per step, or plan


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """The same work as a CUDA graph, which Python launches in one call.

    It is run twice before, to compile and to allocate, on a stream of its own.

    Args:
        run: Enqueues work on the current stream; reads and writes the same tensors in every call.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    _here.prepares = True
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()
    finally:
        _here.prepares = False

    def replay() -> None:
        graph.replay()
        _ = kept  # the memory that the graph writes to

    return replay


def is_capturing(device: torch.device) -> bool:
    """Whether what is enqueued on a device goes into a CUDA graph, or will."""
    if device.type != "cuda":
        return False
    return getattr(_here, "prepares", False) or torch.cuda.is_current_stream_capturing()


_here = threading.local()


def run_steps(chunks: Chunks, state: Sequence[Tensor], sweep: Sweep = WHOLE) -> Swept:
    """See `pararnn.solvers.chunks.Run`: on a GPU in one kernel, or by CUDA graphs."""
    device = state[0].device
    if device.type != "cuda":
        return plain.run_steps(chunks, state, sweep)
    with torch.cuda.device(device):
        try:
            return fused.run_steps(chunks, state, sweep)
        except fused.NotFused:  # `fused.reasons` says why
            return replayed(chunks, state, sweep)


def replayed(chunks: Chunks, state: Sequence[Tensor], sweep: Sweep = WHOLE) -> Swept:
    """See `pararnn.solvers.chunks.Run`: by CUDA graphs, or as one where one is captured."""
    rows = chunks.rows
    if is_capturing(state[0].device) or rows.steps - sweep.first == 1:
        return plain.run_steps(chunks, state, sweep)
    pieces: list[list[Tensor]] = []
    for begin in range(sweep.first, rows.steps, _STEPS):
        piece = rows.piece(begin, min(begin + _STEPS, rows.steps))
        pieces.append(_replayed(piece, state, sweep.copies))
        state = [p[-1] for p in pieces[-1]]
    whole = pieces[0] if len(pieces) == 1 else [torch.cat(p) for p in zip(*pieces, strict=True)]
    return plain.swept(chunks, whole, sweep)


_Function = Callable[[Sequence[Any]], list[Tensor]]


class Graphs:
    """CUDA graphs of the latest forms in which some functions of tensors were called."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, _Graph] = OrderedDict()

    def call(
        self, form: Hashable, function: _Function, tensors: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The results of `function(tensors)`.

        Args:
            form: What tells functions apart, beside the forms of tensors.
            function: Reads these tensors only, returns new ones, and does not wait for the device.
            tensors: Arguments on one device.
        """
        given = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
        device = next(t.device for t in tensors if t is not None)
        key = (form, _context(device), *given)
        with _lock:
            if key not in self._known:
                with torch.inference_mode(False), torch.no_grad():  # its tensors outlive the mode
                    self._known[key] = _Graph(function, tensors)
                if len(self._known) > _GRAPHS:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            return self._known[key](tensors)


_lock = threading.Lock()  # what is enqueued for one call must not mix with that for another


def _context(device: torch.device) -> Hashable:
    """What else a graph depends on: precision, and the stream, on which its tensors are used."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return torch.get_float32_matmul_precision(), stream


class _Graph:
    """A function of tensors of certain shapes as a CUDA graph, with tensors of its own."""

    def __init__(self, function: _Function, tensors: Sequence[Tensor | None]) -> None:
        own = [None if t is None else t.clone(memory_format=_CONTIGUOUS) for t in tensors]
        self.inputs = [t for t in own if t is not None]
        self.outputs: list[Tensor] = []

        def run() -> list[Tensor]:
            self.outputs = function(own)
            return self.outputs

        self.replay = captured(run)

    def __call__(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        torch._foreach_copy_(self.inputs, [t for t in tensors if t is not None])
        self.replay()
        results = [torch.empty_like(o, memory_format=_CONTIGUOUS) for o in self.outputs]
        torch._foreach_copy_(results, self.outputs)
        return results


_CONTIGUOUS = torch.contiguous_format
_sweeps: weakref.WeakKeyDictionary[fx.GraphModule, Graphs] = weakref.WeakKeyDictionary()


def _replayed(rows: Rows, state: Sequence[Tensor], copies: int) -> list[Tensor]:
    def run(tensors: Sequence[Any]) -> list[Tensor]:
        given = iter(tensors[len(state) :])
        mine = rows.mapped(lambda _: next(given))
        return plain.run_rows(mine, tensors[: len(state)], copies=copies)

    form = (rows.steps, rows.reverse, rows.begins is None, copies)
    tensors = [*state, *rows.tensors()]
    return _sweeps.setdefault(rows.step.module, Graphs()).call(form, run, tensors)
