r"""A step, and its adjoint by recording autograd on it.

With $h_t = f(h_{t-1}, e_t)$ and inputs $e$ from the input part, adjoints follow
$c_{t-1} = J_t^\top (c_t + g_t)$: a recurrence backwards in time, whose step is the vector-Jacobian
product of $f$. It is recorded and split like a cell, so that what does not depend on $c$ (all that
belongs to the forward pass) is computed for all times at once, and so are, from its solution, the
gradients of the inputs: no sums of weights' gradients over the steps.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from pararnn.tracing.capture import Capture, record_rows
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.modes import untransformed, without_autocast
from pararnn.tracing.partition import (
    AsItIs,
    InputPart,
    Output,
    Partition,
    direct,
    input_part,
    module_from,
    module_of,
    partition,
)
from pararnn.tracing.recorder import aten, is_differentiable, record

_SUBJECT = "the derivative of the cell"

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Input:
    """A tensor that a step takes besides its state.

    Attributes:
        shape: Without the rows.
        dtype: Its type.
        by_rows: Whether it is a drive, with one row per sample; else it is the same at all times.
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
class Layout:
    """Where drives and coefficients of one channel are: (index of the input, slot in it) of each.

    Inputs with drives come first. Coefficients count from the first input after them.
    """

    drives: tuple[tuple[int, int], ...]
    coefficients: tuple[tuple[int, int], ...]

    @property
    def num_drive_inputs(self) -> int:
        """Tensors that the drives are slices of."""
        return 1 + max(number for number, _ in self.drives)

    def drives_of(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The drives (batch, time, heads, head_size), views of inputs with slots behind time."""
        return [inputs[number].select(2, slot) for number, slot in self.drives]

    def coefficients_of(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The coefficients (hidden,), views of inputs (slots, hidden)."""
        first = self.num_drive_inputs
        return [inputs[first + number].select(0, slot) for number, slot in self.coefficients]


@dataclass(frozen=True)
class Step:
    """One application of a cell: all that solvers and backends see of it.

    It was recorded on contiguous tensors, so that a `contiguous()` on the way may have left no
    trace, and some of PyTorch's inner operations take it for granted: states and inputs with rows
    must be contiguous.

    Attributes:
        build: Builds `module`; called when it is needed, as kernels do without.
        inputs: What it takes besides the state.
        num_components: Tensors in the state.
        hidden: Channels of each.
        group: Channels that reach each other: 1, the size of a head, or all.
        device: Where it was traced.
        dtype: The type of the arithmetic it was traced in, float32 or float64.
        recurrence: The step of one channel as expressions, if channels do not reach each other.
        layout: Where the drives and coefficients of these are. Such inputs have the shapes (slots,
            heads, head_size) with rows, and (slots, hidden) without.
    """

    build: Callable[[], fx.GraphModule]
    inputs: tuple[Input, ...]
    num_components: int
    hidden: int
    group: int
    device: torch.device
    dtype: torch.dtype
    recurrence: Recurrence | None = None
    layout: Layout | None = None

    @functools.cached_property
    def module(self) -> fx.GraphModule:
        """The reference, `(*state, *inputs) -> state` with components (rows, hidden).

        It computes in float32 or float64.
        """
        return self.build()

    @functools.cached_property
    def by_rows(self) -> tuple[bool, ...]:
        """Which inputs have one row per sample."""
        return tuple(i.by_rows for i in self.inputs)

    @functools.cached_property
    def key(self) -> str:
        """Equal keys, equal functions."""
        sizes = f"{self.num_components} {self.hidden} {self.group} {self.dtype} {self.layout}"
        function = self.module.code if self.recurrence is None else self.recurrence.key
        return f"{function}{self.inputs}{sizes}"

    @functools.cached_property
    def work(self) -> int:
        """Multiplications per row and step, roughly."""
        given, channel = len(self.inputs), self.recurrence
        if channel is not None:
            given = channel.num_drives + channel.num_coefficients
        values = self.num_components + given + self.launches + 1
        sizes = sum(math.prod(i.shape) for i in self.inputs)
        return sizes + values * self.num_components * self.hidden

    @functools.cached_property
    def launches(self) -> int:
        """Operations of a step; views of inputs with slots do not count."""
        nodes = list(self.module.graph.nodes)
        if self.recurrence is None:
            return sum(n.op == "call_function" for n in nodes)
        recurrent = set(nodes[: self.num_components])
        for node in nodes[self.num_components : -1]:
            sizes = node.target is torch.Tensor.size
            if not sizes and not recurrent.isdisjoint(node.all_input_nodes):
                recurrent.add(node)
        return len(recurrent) - self.num_components

    @functools.cached_property
    def adjoint(self) -> Adjoint:
        """The same backwards in time."""
        return untransformed(lambda: _adjoint(self))

    @functools.cached_property
    def differentiable(self) -> tuple[int, ...]:
        """Which inputs have a gradient."""
        return tuple(n for n, i in enumerate(self.inputs) if is_differentiable(i.dtype))


@dataclass(frozen=True)
class Adjoint:
    """The adjoint recurrence, and the gradients that follow from its solution.

    Attributes:
        part: Computes what `step` and `gradients` take besides the adjoint, for all times at once.
        by_rows: Which of its results have one row per sample.
        moving: Which inputs of the recurrence have one row per sample.
        step: `(*adjoint, *some results of part) -> adjoint before`.
        step_inputs: Which results of `part` the step takes.
        gradients: `(*adjoint, *results of part) -> gradients of the recurrence's differentiable
            inputs`, for any rows at once; those of inputs without rows are sums over the rows.
    """

    part: InputPart
    by_rows: tuple[bool, ...]
    moving: tuple[int, ...]
    step: Step
    step_inputs: tuple[int, ...]
    gradients: fx.GraphModule

    def part_arguments(
        self, before: Sequence[Tensor], inputs: Sequence[Tensor], grad_states: Sequence[Tensor]
    ) -> list[Tensor]:
        """What `part.module` computes the inputs from, for any rows at once.

        Args:
            before: The state before each step, components (rows, hidden).
            inputs: Those of the recurrence.
            grad_states: The gradient of the state after it from outside, components (rows, hidden).
        """
        fixed = [inputs[int(name.removeprefix("input_"))] for name in self.part.names]
        moving = (*before, *(inputs[i] for i in self.moving), *grad_states)
        return [*self.part.fixed(fixed, before[0].device), *moving]


def step_of(
    parts: Partition,
    outputs: Sequence[Output],
    inputs: Sequence[Input],
    group: int,
    device: torch.device,
    recurrence: Recurrence | None = None,
    layout: Layout | None = None,
) -> Step:
    """The recurrent part of a split cell as a step, which takes the outputs of the input part.

    Inputs in half precision become float32. So do the tensors that the step of a cell in half
    precision makes itself; a wider cell that computes in half precision rounds as it says.
    """
    captured = parts.capture

    def build() -> fx.GraphModule:
        graph = fx.Graph()
        graph.output(graph.graph_copy(module_from(parts, outputs).graph, {}))
        for node in graph.nodes if captured.dtype in _HALF else ():
            if node.kwargs.get("dtype") in _HALF:
                node.kwargs = {**node.kwargs, "dtype": torch.float32}
        return module_of(direct(graph))

    inputs = [replace(i, dtype=torch.float32) if i.dtype in _HALF else i for i in inputs]
    return Step(
        build,
        tuple(inputs),
        captured.num_components,
        captured.hidden_size,
        group,
        device,
        arithmetic((captured.dtype, *(i.dtype for i in inputs))),
        recurrence,
        layout,
    )


def step_of_channels(recurrence: Recurrence, layout: Layout) -> Step:
    """A step that is known by its expressions alone: kernels run it, for any number of channels."""
    device, dtype = torch.device("cpu"), torch.float32
    count = recurrence.num_components
    return Step(_no_module, (), count, 1, 1, device, dtype, recurrence, layout)


def _no_module() -> fx.GraphModule:
    raise NotImplementedError("this step is known by its expressions alone")


def input_of(node: fx.Node) -> Input:
    """A value of the input part as an input of the step."""
    by_rows = bool(node.meta["by_rows"])
    shape = tuple(node.meta["shape"][1:] if by_rows else node.meta["shape"])
    return Input(shape, node.meta["dtype"], by_rows)


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
        without_autocast(device.type),
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


def _adjoint(of: Step) -> Adjoint:
    with recording(of.device):
        return _recorded_adjoint(of)


def _recorded_adjoint(of: Step) -> Adjoint:
    count = of.num_components
    moving = tuple(i for i, e in enumerate(of.inputs) if e.by_rows)
    fixed = [i for i, e in enumerate(of.inputs) if not e.by_rows]
    vector = Input((of.hidden,), of.dtype, True)
    inputs = [vector] * count + [of.inputs[i] for i in moving] + [vector] * count
    kinds = {f"attribute_{n}": of.inputs[i] for n, i in enumerate(fixed)}
    kinds |= {f"x_{n}": kind for n, kind in enumerate(inputs)}
    kinds |= {f"state_{n}": vector for n in range(count)}

    def run(*flat: Tensor) -> Sequence[Tensor]:
        given = dict(zip(fixed, flat, strict=False))
        before, flat = flat[len(fixed) : len(fixed) + count], flat[len(fixed) + count :]
        given |= dict(zip(moving, flat, strict=False))
        grads, after = flat[len(moving) : -count], flat[-count:]
        adjoints = [a + g for a, g in zip(after, grads, strict=True)]
        new = of.module(*before, *(given[i] for i in range(len(of.inputs))))
        return vjp(new, adjoints, [*before, *(given[i] for i in of.differentiable)])

    def at(rows: int) -> tuple[fx.Graph, list[Tensor]]:
        given = {name: kind.example(rows, of.device) for name, kind in kinds.items()}
        for name, tensor in given.items():
            tensor.requires_grad_(is_differentiable(tensor.dtype) and not name.startswith("state"))
        return record(run, given, _SUBJECT)

    graph, constants = record_rows(at, _SUBJECT)
    assert not constants, "a step takes everything as an argument"
    for node in [n for n in graph.nodes if n.target is aten.detach.default]:
        node.replace_all_uses_with(node.args[0])  # it has done its work, and would be an input
    names = [f"input_{i}" for i in fixed]
    captured = Capture(graph, names, {}, count, True, of.hidden, of.dtype, _SUBJECT)
    parts = partition(captured, draw_in=True, keep_small=True)
    found = tuple(map(input_of, parts.edges))
    edges = [AsItIs(e) for e in parts.edges]
    module, used = _without_unused(module_from(parts, edges, parts.results[:count]), count)
    return Adjoint(
        input_part(parts, edges),
        tuple(i.by_rows for i in found),
        moving,
        replace(
            of,
            build=lambda: module,
            inputs=tuple(found[i] for i in used),
            recurrence=None,
            layout=None,
        ),
        used,
        module_from(parts, edges, parts.results[count:]),
    )


def _without_unused(module: fx.GraphModule, count: int) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The module without inputs that it does not use, and which are left."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    inputs = [n for n in graph.nodes if n.op == "placeholder"][count:]
    used = tuple(i for i, n in enumerate(inputs) if n.users)
    for node in inputs:
        if not node.users:
            graph.erase_node(node)
    return module_of(direct(graph)), used
