"""Gradients of a step by one CUDA graph, so that a GPU does not wait for Python.

A pass over a model of 24 million parameters has some 800 kernels. A GPU runs them in less time than
Python takes to launch them; a graph is launched in one call.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pararnn import RNN
from pararnn.layers.stepping import Captured, captured, rehearsed
from pararnn.lm.data.words import say
from pararnn.lm.training.config import ExecutionConfig
from pararnn.lm.training.parallel import Processes
from pararnn.lm.training.random_state import random_state, set_random_state

Run = Callable[[list[Tensor]], Tensor]

MOST_MEMORY = 0.5
"""Share of a GPU's memory that passes may take and be captured. A graph keeps its memory for
itself, so validation needs other memory. Passes that take more are long enough to be launched."""
_FUSED = ("kernel", "tiles")  # paths on which a recurrence is a few kernels, however long


def replays(execution: ExecutionConfig, processes: Processes, recomputes: bool) -> bool:
    """Whether passes are tried as a graph: compiled ones on one GPU that keep their activations."""
    alone = processes.device.type == "cuda" and processes.count == 1
    return execution.compile and alone and not recomputes


class Replay:
    """Runs passes over batches, which leave gradients; one CUDA graph for each form of them.

    The first passes of a form run as they are, and tell whether they can be captured. What they
    changed is set back before the graph is made, so that every step of a run is a replay, also
    after a checkpoint.

    Args:
        model: Whose gradients are computed. Passes begin without any. They may overwrite buffers.
        carried: Other tensors that passes read and overwrite.

    Attributes:
        reason: Why passes are launched kernel by kernel; None while they are not.
        settle: Called before a graph is made; ends what other threads do with the GPU. Where they
            wait for it meanwhile, they would get the errors that show what passes wait for.
    """

    def __init__(self, model: nn.Module, carried: Sequence[Tensor] = ()) -> None:
        self.model, self.carried = model, carried
        self.reason: str | None = None
        self.settle: Callable[[], None] = lambda: None
        self._known: dict[Hashable, _Recorded] = {}

    def __call__(self, passes: Run, batches: list[Tensor], form: Hashable = None) -> Tensor:
        """What `passes(batches)` returns. The next call overwrites it, and all gradients.

        Args:
            passes: Has no host sync. Reads and writes the same tensors in all calls of a form.
            batches: Tensors on the CPU or the GPU.
            form: What else differs between calls: such as whether documents are separated.

        Raises:
            torch.OutOfMemoryError: Passes do not fit into memory, captured or not.
        """
        key = (form, *(batch.shape for batch in batches))
        device = next(self.model.parameters()).device
        # streams are those of the current device, which another one's passes would not be on
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if self.reason is None and key not in self._known:
                first = self._record(key, passes, batches)
                if first is not None:
                    return first
            return passes(batches) if self.reason else self._known[key](batches)

    def _record(self, key: Hashable, passes: Run, batches: list[Tensor]) -> Tensor | None:
        """Make a graph; or return what the passes returned that could not be captured."""
        device = next(self.model.parameters()).device
        buffers = [buffer for buffer in self.model.buffers() if 0 not in buffer.stride()]
        changed = [*self.carried, *buffers]  # nothing can overwrite one that is expanded
        before, numbers = [tensor.clone() for tensor in changed], random_state(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # of these passes, also in a resumed run
        losses = rehearsed(lambda: passes(batches))
        self.reason = self._obstacle(batches, device)
        if self.reason is not None:
            say(f"Steps are launched kernel by kernel: {self.reason}.")
            self._let_go()
            return losses
        del losses
        gc.collect()  # graphs of autograd in reference cycles, which belong to no capture

        def set_back() -> None:
            self.model.zero_grad(set_to_none=True)
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)

        def run() -> Tensor:
            self.model.zero_grad(set_to_none=True)
            return passes(held)

        held = [batch.to(device, copy=True) for batch in batches]
        first = next(iter(self._known.values()), None)
        set_back()
        self.settle()
        try:
            rehearsed(run, strict=True)
            graph = captured(run, None if first is None else first.graph.graph)
            gradients = [(p, p.grad) for p in self.model.parameters() if p.grad is not None]
            self._known[key] = _Recorded(graph, held, gradients)
        except RuntimeError as error:  # something waits for the GPU, or memory ran out
            self.reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            say(f"Note: steps are launched kernel by kernel, and slower: {self.reason}")
        set_back()
        set_random_state(device, numbers)
        if self.reason is not None:
            self._let_go()
        return None

    def _let_go(self) -> None:
        """Free the memory of the stream of captures, and of graphs: launched passes use neither."""
        self._known.clear()
        gc.collect()  # frames of an error
        torch.cuda.empty_cache()

    def _obstacle(self, batches: list[Tensor], device: torch.device) -> str | None:
        """Why passes are not captured, after they ran."""
        most = torch.cuda.max_memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
        if most > MOST_MEMORY * total:
            return (
                f"they take {most / 2**30:.0f} GiB, more than {MOST_MEMORY:.0%} of the GPU's memory"
            )
        rows, time = batches[0].shape
        for layer in self.model.modules():
            if isinstance(layer, RNN):
                path = layer.plan((rows, time - 1, *layer.runner().features)).path
                if path not in _FUSED:
                    kind = type(layer.cell).__name__
                    return f"{kind} has many kernels for a sequence (path {path!r})"
        return None


@dataclass(frozen=True)
class _Recorded:
    """Passes of one form.

    Attributes:
        graph: Runs them.
        batches: What they read.
        gradients: What they leave, for each parameter.
    """

    graph: Captured
    batches: list[Tensor]
    gradients: list[tuple[nn.Parameter, Tensor]]

    def __call__(self, batches: list[Tensor]) -> Tensor:
        for held, batch in zip(self.batches, batches, strict=True):
            held.copy_(batch, non_blocking=True)
        self.graph()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        losses: Tensor = self.graph.kept
        return losses
