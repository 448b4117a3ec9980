"""Replay calls of small layers as one CUDA graph in each direction.

A small call is bound by the host: launching its kernels from Python takes longer than running them.
The forward graph computes the states from the inputs, and what the readout makes of them. The
backward graph computes the gradients of the inputs from those of the results; it runs the input
part and the readout again, so the forward graph keeps nothing of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from pararnn.kernels.graphs import Graphs
from pararnn.kernels.operators import gradients_of_loop
from pararnn.tracing.partition import InputPart

DEVICE = "cuda"
"""Type of the devices that have graphs."""


class Layer(Protocol):
    """The parts of a layer that a graph runs; see `pararnn.layers.runner.Runner`."""

    @property
    def request(self) -> str:
        """Name of the layer's `Request` in `kernels.operators`."""
        ...

    @property
    def reads(self) -> str:
        """The code of the readout; empty if there is none."""
        ...

    @property
    def input_part(self) -> InputPart:
        """The input part."""
        ...

    def inputs(self, fixed: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
        """The inputs of step and readout, from tensors and constants (`fixed`) and x (`given`)."""
        ...

    def solve(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """The states, and the values of the report."""
        ...

    def loop(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """The states, step by step by PyTorch operations."""
        ...

    def read(self, states: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor | None:
        """What the readout makes of the states; None if there is no readout."""
        ...

    def adjoint(
        self,
        inputs: Sequence[Tensor],
        initial: Tensor,
        starts: Tensor | None,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
    ) -> tuple[list[Tensor | None], Tensor]:
        """The gradients of the step's inputs and of the initial states."""
        ...


def can_replay(tensors: Sequence[Tensor | None], is_random: bool) -> bool:
    """Whether a graph can repeat a call.

    Not if it draws random numbers (`is_random`), a tensor is of a subclass, or a mode or transform
    is active.
    """
    return not (
        is_random
        or not all(t is None or type(t) in (Tensor, nn.Parameter) for t in tensors)
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


@dataclass(frozen=True)
class Replay:
    """A call of a layer.

    Its methods take `given`: the tensors and constants that the input part reads, then the inputs
    that change over time, the initial states and the starts.

    Attributes:
        layer: The layer.
        count: Number of tensors and constants that the input part reads.
        components: Number of components of the state.
        autocast: Whether autocast is on, and its type.
    """

    layer: Layer
    count: int
    components: int
    autocast: tuple[bool, torch.dtype]

    @classmethod
    def now(cls, layer: Layer, count: int, components: int, device: torch.device) -> Replay:
        """A call with the current autocast."""
        kind = device.type
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return cls(layer, count, components, autocast)

    def __call__(
        self, given: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, list[Tensor], Tensor]:
        """The result of the readout, if there is one, the states, and the values of the report."""
        *states, report = _Replayed.apply(self, *given)
        y = states.pop() if len(states) > self.components else None
        return y, states, report

    def replayed(self, given: Sequence[Tensor | None]) -> list[Tensor]:
        """The states, the result of the readout, if there is one, and the report; no autograd."""
        return self._graphs.call(("forward", *self._form), self._forward, given)

    def gradients(
        self,
        given: Sequence[Tensor | None],
        states: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of the given tensors; None where they are not needed.

        Args:
            given: See the class.
            states: The result.
            grads: Gradients of the states and of the result of the readout.
            needed: Which gradients are needed.
        """
        if torch.is_grad_enabled():  # create_graph=True: the gradients need gradients
            return gradients_of_loop(self._loop, given, grads)
        count, total = len(states), len(given)
        needed = tuple(needed)

        def run(tensors: Sequence[Any]) -> list[Tensor]:
            own, states = tensors[:total], tensors[total : total + count]
            # launch a kernel first: cuBLAS warns if it is the first to run in an autograd thread
            states[0].new_zeros(1)
            pairs = zip(own, needed, strict=True)
            own = [None if t is None else t.detach().requires_grad_(n) for t, n in pairs]
            return self._gradients(own, states, tensors[total + count :], needed)

        tensors = [*given, *states, *grads]
        found = self._graphs.call(("backward", needed, *self._form), run, tensors)
        remaining = iter(found)
        return [next(remaining) if n else None for n in needed]

    @property
    def _form(self) -> tuple[Any, ...]:
        return self.layer.request, self.layer.reads, self.count, self.components, self.autocast

    @property
    def _graphs(self) -> Graphs:
        return _graphs.setdefault(self.layer.input_part.module, Graphs())

    def _inputs(self, given: Sequence[Any]) -> list[Tensor]:
        enabled, dtype = self.autocast
        kind = given[-2].device.type
        # no cache: a tensor cast during a capture is in the memory of that graph
        with torch.autocast(kind, dtype, enabled, cache_enabled=False):
            return self.layer.inputs(given[: self.count], given[self.count : -2])

    def _forward(self, given: Sequence[Any]) -> list[Tensor]:
        *_, initial, starts = given
        inputs = self._inputs(given)
        *states, report = self.layer.solve(inputs, initial, starts)
        return [*self._with_read(states, inputs), report]

    def _loop(self, *given: Any) -> list[Tensor]:
        *_, initial, starts = given
        inputs = self._inputs(given)
        return self._with_read(self.layer.loop(inputs, initial, starts), inputs)

    def _with_read(self, states: list[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        y = self.layer.read(states, inputs)
        return states if y is None else [*states, y]

    def _gradients(
        self,
        given: Sequence[Any],
        states: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        needed: Sequence[bool],
    ) -> list[Tensor]:
        *rest, initial, starts = given
        with torch.enable_grad():
            inputs = self._inputs(given)
        plain, grad_states = [i.detach() for i in inputs], list(grads[: len(states)])
        of_read: Sequence[Tensor | None] = [None] * len(inputs)
        if any(g is not None for g in grads[len(states) :]):
            grad_states, of_read = self._through_readout(states, plain, grads)
        found, of_initial = self.layer.adjoint(plain, initial, starts, states, grad_states)
        of_inputs = [*found, *of_read[len(found) :]]
        pairs = [
            (i, g)
            for i, g in zip(inputs, of_inputs, strict=True)
            if g is not None and i.requires_grad
        ]
        wanted = [t for t, n in zip(rest, needed, strict=False) if n]
        gradients: Sequence[Tensor] = ()
        if wanted:
            gradients = torch.autograd.grad(
                [i for i, _ in pairs], wanted, [g for _, g in pairs], materialize_grads=True
            )
        return [*gradients, of_initial] if needed[-2] else list(gradients)

    def _through_readout(
        self, states: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], Sequence[Tensor | None]]:
        """The gradients of the states, and of the readout's inputs at their places."""
        enabled, dtype = self.autocast
        leaves = [
            t.detach().requires_grad_(t.is_floating_point() or t.is_complex())
            for t in (*states, *inputs)
        ]
        kind, count = states[0].device.type, len(states)
        with torch.enable_grad(), torch.autocast(kind, dtype, enabled, cache_enabled=False):
            y = self.layer.read(leaves[:count], leaves[count:])
        assert y is not None
        wanted = [t for t in leaves if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grads[count], allow_unused=True))
        every = [next(found) if t.requires_grad else None for t in leaves]
        pairs = zip(grads[:count], every[:count], strict=True)
        both = [a if b is None else b if a is None else a + b for a, b in pairs]
        return both, every[count:]


_graphs: weakref.WeakKeyDictionary[fx.GraphModule, Graphs] = weakref.WeakKeyDictionary()
"""Graphs by the module of the input part, which equal layers share."""


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Replay, *given: Tensor | None) -> tuple[Tensor, ...]:
        found = tuple(call.replayed(given))
        ctx.call, ctx.count = call, len(given)
        ctx.mark_non_differentiable(found[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*given, *found[: call.components])
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # read once: under checkpointing, each read recomputes them
        given, states = saved[: ctx.count], saved[ctx.count :]
        return None, *ctx.call.gradients(given, states, grads[:-1], ctx.needs_input_grad[1:])
