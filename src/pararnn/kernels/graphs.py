"""CUDA graphs: capture and replay, and sweeps of mixing cells on a GPU."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from pararnn.kernels import fused
from pararnn.kernels.turns import captured_so_far, turn
from pararnn.planning.costs import COSTS
from pararnn.planning.kernel_plans import steps_of_graphs
from pararnn.solvers import chunks as plain
from pararnn.solvers.chunks import WHOLE, BatchedChunks, Chunks, Sweep, Swept

_Result = TypeVar("_Result")

_GRAPHS = 64  # kept per step, path or layer
_UNUSED = 1024  # calls without use after which a new graph may replace one
_FORMS = 256  # remembered after their first call


def captured(run: Callable[[], Any], beside: torch.cuda.CUDAGraph | None = None) -> Captured:
    """Capture work in a CUDA graph, which Python launches in one call.

    The work runs twice before the capture, to compile and to allocate. Each current stream has one
    stream for captures, since memory and cuBLAS's workspace are shared per stream. (By default
    PyTorch captures on one stream for all, of the first device.)

    Args:
        run: Enqueues the work on the current stream; reads and writes the same tensors every time.
        beside: A graph to share memory with; the two must never run at the same time.

    Raises:
        RuntimeError: What cannot be captured, such as a host sync.
    """
    current = torch.cuda.current_stream()
    with _beside_captures() as stream:
        for _ in range(2):
            run()
    graph, turns = torch.cuda.CUDAGraph(), captured_so_far()
    pool = torch.cuda.graph_pool_handle() if beside is None else beside.pool()
    try:
        # Other threads may work during the capture: they pin memory or watch collectives. Where its
        # end fails, PyTorch stays on its stream: so the current one is put back around it.
        capture = torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local")
        with torch.cuda.stream(current), capture:
            kept = run()
    except RuntimeError as error:
        _give_up(stream.device, pool)
        raise _first(error) from None
    return Captured(graph, kept, stream.device if captured_so_far() > turns else None)


def rehearsed(run: Callable[[], _Result], *, strict: bool = False) -> _Result:
    """What work returns, where it would be captured.

    Autograd keeps the stream of a parameter's first gradient while a graph of it lives. A capture
    fails if that is another stream.

    Args:
        run: As for `captured`.
        strict: Raise RuntimeError where it waits for the GPU: a capture would fail there.
    """
    before = torch.cuda.get_sync_debug_mode()
    with _beside_captures():
        torch.cuda.set_sync_debug_mode("error" if strict else before)
        try:
            return run()
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _beside_captures() -> Iterator[torch.cuda.Stream]:
    """Within this context, code is on the stream of captures and behaves as in one."""
    current = torch.cuda.current_stream()
    place = current.device, current.cuda_stream
    stream = _streams.get(place) or _streams.setdefault(place, torch.cuda.Stream())
    stream.wait_stream(current)
    try:
        with _as_captured(), torch.cuda.stream(stream):
            yield stream
    finally:
        current.wait_stream(stream)


def _first(error: RuntimeError) -> RuntimeError:
    """Why a capture failed: its end fails as well then, and says less.

    The two and their frames are not to keep each other, and all memory of the capture, until the
    next garbage collection.
    """
    first = error.__context__
    if not isinstance(first, RuntimeError):
        return error
    error.__traceback__ = None
    return first


def _give_up(device: torch.device, pool: Any) -> None:
    """Undo what PyTorch leaves of a capture that failed.

    Memory would still come from the graph's pool and stay there, and random numbers would be
    refused.
    """
    with suppress(RuntimeError):  # the capture ended as others do, and its graph frees the pool
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state().graphsafe_get_state())


_streams: dict[tuple[torch.device, int], torch.cuda.Stream] = {}


@dataclass(frozen=True)
class Captured:
    """Runs a CUDA graph.

    Attributes:
        graph: The graph.
        kept: The memory that it writes to.
        takes_turns: The device, if there are kernels in it whose programs wait for each other.
    """

    graph: torch.cuda.CUDAGraph
    kept: Any
    takes_turns: torch.device | None = None

    def __call__(self) -> None:
        """Enqueue it on the current stream."""
        with nullcontext() if self.takes_turns is None else turn(self.takes_turns):
            self.graph.replay()


def is_capturing(device: torch.device) -> bool:
    """Whether work on a device is captured in a CUDA graph, or prepared for a capture."""
    if device.type != "cuda":
        return False
    return getattr(_here, "prepares", False) or torch.cuda.is_current_stream_capturing()


_here = threading.local()


@contextmanager
def _as_captured() -> Iterator[None]:
    """Within this context, code behaves as in a capture and makes no graphs."""
    before = getattr(_here, "prepares", False)
    _here.prepares = True
    try:
        yield
    finally:
        _here.prepares = before


def run_steps(chunks: Chunks, state: Sequence[Tensor], sweep: Sweep = WHOLE) -> Swept:
    """See `pararnn.solvers.chunks.Run`: in one kernel, or like `run_operations`."""
    device = state[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            return fused.run_steps(chunks, state, sweep)
        except fused.NotFused:  # `fused.reason` says why
            return run_operations(chunks, state, sweep)


def run_operations(chunks: Chunks, state: Sequence[Tensor], sweep: Sweep = WHOLE) -> Swept:
    """See `pararnn.solvers.chunks.Run`: PyTorch operations, on a GPU by CUDA graphs."""
    device = state[0].device
    if device.type != "cuda":
        return plain.run_steps(chunks, state, sweep)
    with torch.cuda.device(device):
        return replayed(chunks, state, sweep)


def replayed(chunks: Chunks, state: Sequence[Tensor], sweep: Sweep = WHOLE) -> Swept:
    """See `pararnn.solvers.chunks.Run`: by CUDA graphs; within a capture, step by step."""
    rows = chunks.rows
    if is_capturing(state[0].device) or rows.steps - sweep.first == 1:
        return plain.run_steps(chunks, state, sweep)
    pieces: list[list[Tensor]] = []
    for begin, end in steps_of_graphs(sweep.first, rows.steps):
        pieces.append(_replayed(rows.piece(begin, end), state, sweep.copies))
        state = [p[-1] for p in pieces[-1]]
    whole = pieces[0] if len(pieces) == 1 else [torch.cat(p) for p in zip(*pieces, strict=True)]
    return plain.swept(chunks, whole, sweep)


_Function = Callable[[Sequence[Any]], list[Tensor]]


class Graphs:
    """CUDA graphs of functions of tensors, one for each form of arguments that comes again."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, _Graph] = OrderedDict()  # the latest used comes last
        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self._calls = 0

    def call(
        self, form: Hashable, function: _Function, tensors: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The results of `function(tensors)`; a graph computes them from a form's second call on.

        Args:
            form: Identifies the function; shapes, strides, types and devices are added to it.
            function: Reads these tensors only, returns new ones, and has no host sync.
            tensors: Arguments on one device.
        """
        given = [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors]
        device = next(t.device for t in tensors if t is not None)
        context = _context(device)
        key = (form, context, *given)
        with _lock, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._calls += 1
            graph = self._known.get(key)
            if graph is None and key in self._met and self._has_room():
                with torch.inference_mode(False), torch.no_grad():  # its tensors outlive the mode
                    graph = self._known[key] = _Graph(function, tensors, context)
            if graph is not None:
                self._known.move_to_end(key)
                graph.used = self._calls
                return graph(tensors)
            self._met[key] = None
            if len(self._met) > _FORMS:
                self._met.popitem(last=False)
        with _as_captured():
            return function(tensors)

    def _has_room(self) -> bool:
        """Whether a new graph is allowed; it may replace one that was not used for long.

        The wait keeps many forms in turn from making a graph at every call.
        """
        if len(self._known) < _GRAPHS:
            return True
        oldest = next(iter(self._known.values()))
        if self._calls - oldest.used < _UNUSED:
            return False
        self._known.popitem(last=False)
        return True


_lock = threading.Lock()  # the launches of two calls must not mix


def _context(device: torch.device) -> Hashable:
    """Further conditions of a graph: matmul precision, device, and the stream of its tensors."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return torch.get_float32_matmul_precision(), device, stream


_firsts: weakref.WeakValueDictionary[Hashable, torch.cuda.CUDAGraph] = weakref.WeakValueDictionary()
"""The first graph of each context. All others of the context share its memory.

They can, since graphs on one stream run one after another. They keep the first graph alive.
"""


class _Graph:
    """A CUDA graph of a function, with its own input and output tensors."""

    def __init__(
        self, function: _Function, tensors: Sequence[Tensor | None], context: Hashable
    ) -> None:
        own = [None if t is None else t.clone() for t in tensors]
        self._replay = captured(lambda: function(own), _firsts.get(context))
        self._first = _firsts.setdefault(context, self._replay.graph)
        self._inputs = [t for t in own if t is not None]
        self._outputs: list[Tensor] = self._replay.kept
        self.used = 0
        self._into = _alike(self._inputs, [t for t in tensors if t is not None])
        self._out = _alike(self._outputs, [torch.empty_like(o) for o in self._outputs])

    def __call__(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        _copy(self._into, self._inputs, [t for t in tensors if t is not None])
        self._replay()
        results = [torch.empty_like(o) for o in self._outputs]
        _copy(self._out, results, self._outputs)
        return results


def _alike(to: Sequence[Tensor], source: Sequence[Tensor]) -> list[list[int]]:
    """Groups of pairs to copy in one launch: small, with equal types and strides."""
    groups: dict[Hashable, list[int]] = {}
    for i, (a, b) in enumerate(zip(to, source, strict=True)):
        together = a.stride() == b.stride() and a.numel() <= COSTS.copied_together
        groups.setdefault((a.dtype, b.dtype) if together else i, []).append(i)
    return list(groups.values())


def _copy(groups: list[list[int]], to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for group in groups:
        if len(group) == 1:
            to[group[0]].copy_(source[group[0]])
        else:
            torch._foreach_copy_([to[i] for i in group], [source[i] for i in group])


_sweeps: weakref.WeakKeyDictionary[fx.GraphModule, Graphs] = weakref.WeakKeyDictionary()


def _replayed(rows: BatchedChunks, state: Sequence[Tensor], copies: int) -> list[Tensor]:
    def run(tensors: Sequence[Any]) -> list[Tensor]:
        given = iter(tensors[len(state) :])
        mine = rows.mapped(lambda _: next(given))
        return plain.run_rows(mine, tensors[: len(state)], copies=copies)

    form = (rows.steps, rows.reverse, rows.resets is None, copies)
    tensors = [*state, *rows.tensors()]
    return _sweeps.setdefault(rows.step.module, Graphs()).call(form, run, tensors)
