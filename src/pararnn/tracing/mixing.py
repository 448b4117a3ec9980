r"""A recurrence whose channels mix: its step, and derivatives by recording autograd on it.

With $h_t = f(h_{t-1}, e_t)$ and edges $e$ from the input part, adjoints follow
$c_{t-1} = J_t^\top (c_t + g_t)$: a recurrence backwards in time, whose step is the vector-Jacobian
product of $f$. It is recorded and split like a cell, so that what does not depend on $c$ (all that
belongs to the forward pass) is computed for all times at once, and so are, from its solution, the
gradients of the edges: no sums of weights' gradients over the steps.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pararnn.tracing.capture import Capture, record_rows
from pararnn.tracing.modes import untransformed
from pararnn.tracing.partition import (
    AsItIs,
    InputPart,
    Partition,
    direct,
    input_part,
    module_of,
    partition,
    recurrent_module,
)
from pararnn.tracing.recorder import aten, is_differentiable, record

_SUBJECT = "the derivative of the cell"
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Edge:
    """A value that a step takes besides its state.

    Attributes:
        shape: Without the rows.
        dtype: Its type.
        by_rows: Whether it has one row per sample.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    by_rows: bool

    def example(self, rows: int, device: torch.device) -> Tensor:
        """Random numbers like it."""
        shape = (rows, *self.shape) if self.by_rows else self.shape
        if is_differentiable(self.dtype):
            return torch.rand(shape, dtype=self.dtype, device=device)
        return torch.zeros(shape, dtype=self.dtype, device=device)


@dataclass(frozen=True)
class Step:
    """One step of a recurrence.

    It was recorded on contiguous tensors, so that a `contiguous()` on the way may have left no
    trace, and some of PyTorch's inner operations take it for granted: states and edges with rows
    must be contiguous.

    Attributes:
        module: `(*state, *edges) -> state`, components (rows, hidden).
        by_rows: Which edges have one row per sample.
    """

    module: fx.GraphModule
    by_rows: tuple[bool, ...]


@dataclass(frozen=True)
class Adjoint:
    """The adjoint recurrence, and the gradients that follow from its solution.

    Attributes:
        part: Computes the edges of both, for all times at once.
        by_rows: Which of these have one row per sample.
        moving: Which edges of the recurrence have.
        step: `(*adjoint, *its edges) -> adjoint before`.
        step_edges: Which edges these are.
        gradients: `(*adjoint, *all edges) -> gradients of the differentiable edges`, for any rows
            at once; those of edges without rows are sums over the rows.
    """

    part: InputPart
    by_rows: tuple[bool, ...]
    moving: tuple[int, ...]
    step: Step
    step_edges: tuple[int, ...]
    gradients: fx.GraphModule

    def part_arguments(
        self, before: Sequence[Tensor], edges: Sequence[Tensor], grad_states: Sequence[Tensor]
    ) -> list[Tensor]:
        """What `part.module` computes the edges from, for any rows at once.

        Args:
            before: The state before each step, components (rows, hidden).
            edges: Those of the recurrence.
            grad_states: The gradient of the state after it from outside, components (rows, hidden).
        """
        fixed = [edges[int(name.removeprefix("edge_"))] for name in self.part.names]
        moving = (*before, *(edges[i] for i in self.moving), *grad_states)
        return [*fixed, *self.part.constants, *moving]


@dataclass(frozen=True)
class Mixing:
    """A recurrence whose channels mix: all that a solver has to know.

    Attributes:
        step: The recurrent part, in float32 or float64.
        edges: Its inputs besides the state.
        num_components: Tensors in the state.
        hidden: Channels of each.
        device: Where it was traced.
        dtype: The type of the arithmetic it was traced in, float32 or float64.
    """

    step: Step
    edges: tuple[Edge, ...]
    num_components: int
    hidden: int
    device: torch.device
    dtype: torch.dtype

    @functools.cached_property
    def key(self) -> str:
        """Equal keys, equal functions."""
        sizes = f"{self.num_components} {self.hidden} {self.dtype}"
        return f"{self.step.module.code}{self.edges}{sizes}"

    @functools.cached_property
    def work(self) -> int:
        """Multiplications per row and step, roughly."""
        return (
            sum(math.prod(e.shape) for e in self.edges)
            + len(self.step.module.graph.nodes) * self.num_components * self.hidden
        )

    @functools.cached_property
    def launches(self) -> int:
        """Operations of a step."""
        kept = ("placeholder", "output")
        return sum(n.op not in kept for n in self.step.module.graph.nodes)

    @functools.cached_property
    def adjoint(self) -> Adjoint:
        """The adjoint recurrence."""
        return untransformed(lambda: _adjoint(self))

    @functools.cached_property
    def differentiable(self) -> tuple[int, ...]:
        """Which edges have a gradient."""
        return tuple(i for i, e in enumerate(self.edges) if is_differentiable(e.dtype))


def mixing(parts: Partition, module: fx.GraphModule, device: torch.device) -> Mixing:
    """The recurrence with the recurrent part of a split step.

    Half precision becomes float32, in what the step makes itself too.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.kwargs.get("dtype") in _HALF:
            node.kwargs = {**node.kwargs, "dtype": torch.float32}
    edges = []
    for node in parts.edges:
        dtype, by_rows = node.meta["dtype"], bool(node.meta["by_rows"])
        shape = tuple(node.meta["shape"][1:] if by_rows else node.meta["shape"])
        edges.append(Edge(shape, torch.float32 if dtype in _HALF else dtype, by_rows))
    step = Step(module_of(direct(graph)), tuple(e.by_rows for e in edges))
    captured = parts.capture
    dtype = arithmetic((captured.dtype, *(e.dtype for e in edges)))
    return Mixing(step, tuple(edges), captured.num_components, captured.hidden_size, device, dtype)


def arithmetic(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The type in which numbers of some types are computed: float64 if one is as wide."""
    double = not {torch.float64, torch.complex128}.isdisjoint(dtypes)
    return torch.float64 if double else torch.float32


def in_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A floating-point or complex tensor in the type of the arithmetic; others as they are."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@contextlib.contextmanager
def recording(device: torch.device) -> Iterator[None]:
    """The modes in which autograd's operations are recorded."""
    devices = [device] if device.type == "cuda" else []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices),
        torch.autocast(device.type, enabled=False),
    ):
        yield


def vjp(
    outputs: Sequence[Tensor], adjoints: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the inputs. Grad mode stays on, in which PyTorch's rules are operations."""
    pairs = [(o, a) for o, a in zip(outputs, adjoints, strict=True) if o.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if pairs and inputs:
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            inputs,
            [a for _, a in pairs],
            create_graph=True,
            allow_unused=True,
        )
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


def _adjoint(of: Mixing) -> Adjoint:
    with recording(of.device):
        return _recorded_adjoint(of)


def _recorded_adjoint(of: Mixing) -> Adjoint:
    count = of.num_components
    moving = tuple(i for i, e in enumerate(of.edges) if e.by_rows)
    fixed = [i for i, e in enumerate(of.edges) if not e.by_rows]
    vector = Edge((of.hidden,), of.dtype, True)
    inputs = [vector] * count + [of.edges[i] for i in moving] + [vector] * count
    kinds = {f"attribute_{n}": of.edges[i] for n, i in enumerate(fixed)}
    kinds |= {f"x_{n}": kind for n, kind in enumerate(inputs)}
    kinds |= {f"state_{n}": vector for n in range(count)}

    def run(*flat: Tensor) -> Sequence[Tensor]:
        edges = dict(zip(fixed, flat, strict=False))
        before, flat = flat[len(fixed) : len(fixed) + count], flat[len(fixed) + count :]
        edges |= dict(zip(moving, flat, strict=False))
        grads, after = flat[len(moving) : -count], flat[-count:]
        adjoints = [a + g for a, g in zip(after, grads, strict=True)]
        new = of.step.module(*before, *(edges[i] for i in range(len(of.edges))))
        return vjp(new, adjoints, [*before, *(edges[i] for i in of.differentiable)])

    def at(rows: int) -> tuple[fx.Graph, list[Tensor]]:
        given = {name: kind.example(rows, of.device) for name, kind in kinds.items()}
        for name, tensor in given.items():
            tensor.requires_grad_(is_differentiable(tensor.dtype) and not name.startswith("state"))
        return record(run, given, _SUBJECT)

    graph, constants = record_rows(at, _SUBJECT)
    assert not constants, "a step takes everything as an argument"
    for node in [n for n in graph.nodes if n.target is aten.detach.default]:
        node.replace_all_uses_with(node.args[0])  # it has done its work, and would be an edge
    names = [f"edge_{i}" for i in fixed]
    captured = Capture(graph, names, {}, count, True, of.hidden, of.dtype, _SUBJECT)
    parts = partition(captured, draw_in=True)
    by_rows = tuple(bool(e.meta["by_rows"]) for e in parts.edges)
    step, used = _without_unused(recurrent_module(parts, parts.results[:count]), count)
    return Adjoint(
        input_part(parts, [AsItIs(e) for e in parts.edges]),
        by_rows,
        moving,
        Step(step, tuple(by_rows[i] for i in used)),
        used,
        recurrent_module(parts, parts.results[count:]),
    )


def _without_unused(module: fx.GraphModule, count: int) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The module without edges that it does not use, and which are left."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    edges = [n for n in graph.nodes if n.op == "placeholder"][count:]
    used = tuple(i for i, n in enumerate(edges) if n.users)
    for node in edges:
        if not node.users:
            graph.erase_node(node)
    return module_of(direct(graph)), used
