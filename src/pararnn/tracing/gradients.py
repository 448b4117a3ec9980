"""Compares the derivatives of a traced step with autograd on the step itself.

What is recorded may have lost a gradient: a value may have a history that its recording does not
show, and an operation a backward that does something else where it is recorded. So one step is run
both ways on random numbers, in float64 or, where it makes tensors of a type of its own, in that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from pararnn.tracing.capture import ROWS, recordable
from pararnn.tracing.derivatives import torch_function
from pararnn.tracing.recorder import TraceError, is_differentiable, mapped
from pararnn.tracing.step import arithmetic, in_type, recording

if TYPE_CHECKING:
    from pararnn.tracing.structure import Traced

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
_LEAST = 1e-3  # what gradients are compared relative to, at least, of the largest of them
_MOST_KNOWN = 4096
_known: dict[int, None] = {}


class _NoGradient(RuntimeError):
    """Autograd refuses the step itself, so that there is nothing to compare with."""


Inputs = Sequence[tuple[Sequence[int], torch.dtype]]


def check_gradients(traced: Traced, inputs: Inputs, device: torch.device) -> None:
    """Compare values and gradients of one step, as traced, with those of the step itself.

    Steps that are traced alike from the same lines are compared once in a process.

    Args:
        traced: The step.
        inputs: Shape (without the rows) and type of every input.
        device: Where it was traced.

    Raises:
        TraceError: They differ; the message names the operation and its line.
    """
    if device.type == "meta" or any(t.is_meta for t in traced.subject.tensors.values()):
        return
    key = _key(traced)
    if key in _known and "register_hook" not in traced.capture.ran.names:
        return
    try:
        agrees = _differing(traced, inputs, device, torch.float64) is None
    except (RuntimeError, TypeError, ValueError):
        agrees = False  # float64 does not go with tensors that it makes itself
    if not agrees:
        try:
            difference = _differing(traced, inputs, device, traced.capture.dtype)
        except _NoGradient:
            difference = None
        if difference is not None:
            raise _refusal(traced, inputs, device, difference)
    _known[key] = None
    if len(_known) > _MOST_KNOWN:
        del _known[next(iter(_known))]


def _key(traced: Traced) -> int:
    step, capture, subject = traced.step, traced.capture, traced.subject
    places = tuple(n.meta.get("place") for n in capture.graph.nodes)
    kinds = tuple((t.shape, t.dtype, t.requires_grad) for t in subject.tensors.values())
    function = getattr(subject.source, "__code__", None)
    code = traced.input_part.module.code
    ran = function, frozenset(capture.ran.codes)
    return hash((step.key, code, places, kinds, ran, capture.dtype, capture.hidden_size))


def _refusal(traced: Traced, inputs: Inputs, device: torch.device, difference: str) -> TraceError:
    from pararnn.tracing.lost import find  # rarely needed

    example = draw(traced, inputs, device, traced.capture.dtype)
    return TraceError(
        f"{traced.subject.name}: {find(traced, example)} cannot be traced with its gradient: "
        f"{difference} differs from what autograd gives for one step. Use other operations "
        "there, or loop over the cell."
    )


@dataclass(frozen=True)
class Example:
    """What one step is run on.

    Attributes:
        tensors: Those of the step, by name.
        inputs: What differs over time.
        state: Components.
        cotangents: What arrives at the new components from outside, and from later steps.
    """

    tensors: dict[str, Tensor]
    inputs: tuple[Tensor, ...]
    state: tuple[Tensor, ...]
    cotangents: tuple[list[Tensor], list[Tensor]]

    @property
    def sources(self) -> list[tuple[str, Tensor]]:
        """What has a gradient, with what messages call it; the components of the state first."""
        found = [(f"component {i} of the state", s) for i, s in enumerate(self.state)]
        found += [("x" if not i else f"drive {i}", x) for i, x in enumerate(self.inputs)]
        return [(name, t) for name, t in [*found, *self.tensors.items()] if t.requires_grad]

    @property
    def total(self) -> list[Tensor]:
        """What arrives at the new components in all."""
        return [a + b for a, b in zip(*self.cotangents, strict=True)]


def draw(
    traced: Traced,
    inputs: Inputs,
    device: torch.device,
    dtype: torch.dtype,
    positive: bool = False,
) -> Example:
    """Random numbers to run a step on, the same at every call.

    Args:
        traced: The step.
        inputs: Its inputs.
        device: Where to run it.
        dtype: Of everything that is floating point. In the step's own type the tensors are its
            very own; in another one they are copies, with small numbers in place of zeros, behind
            which gradients could hide.
        positive: States and inputs have no negative numbers.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def numbers(shape: Sequence[int], kind: torch.dtype) -> Tensor:
        if not is_differentiable(kind):
            rows = torch.arange(shape[0], device="cpu") % 2  # most tables have entries 0 and 1
            return rows.view(-1, *[1] * (len(shape) - 1)).expand(*shape).to(device, kind)
        wide = torch.complex128 if kind.is_complex else torch.float64
        x = torch.rand(tuple(shape), generator=generator, dtype=wide, device="cpu")
        x = in_type(x if positive else 2 * x - 1, dtype).to(device)
        return x.requires_grad_().clone()  # no leaf, into which autograd lets nobody write

    def widened(tensor: Tensor) -> Tensor:
        copy = in_type(tensor.detach(), dtype).clone()
        if tensor.requires_grad and tensor.dim():
            copy += 0.1 * numbers(tensor.shape, tensor.dtype).detach().abs() * (copy == 0)
        return copy.requires_grad_(tensor.requires_grad)

    capture = traced.capture
    tensors = {name: recordable(tensor) for name, tensor in traced.subject.tensors.items()}
    size = (ROWS[0], capture.hidden_size)
    given = tuple(numbers((ROWS[0], *features), kind) for features, kind in inputs)
    count = range(capture.num_components)
    state, *terms = ([numbers(size, dtype) for _ in count] for _ in range(3))
    if dtype is not capture.dtype:
        tensors = {name: widened(tensor) for name, tensor in tensors.items()}
    cotangents = [[c.detach() for c in term] for term in terms]
    return Example(tensors, given, tuple(state), (cotangents[0], cotangents[1]))


def _differing(
    traced: Traced, inputs: Inputs, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Which value or gradient differs, if one does."""
    example = draw(traced, inputs, device, dtype)
    expected = _of_the_step(traced, example, device)
    if not all(math.isfinite(t.norm().item()) for t in expected.values()):
        example = draw(traced, inputs, device, dtype, positive=True)
        expected = _of_the_step(traced, example, device)
    kinds = {dtype}
    if dtype is traced.capture.dtype:
        kinds |= {n.meta["dtype"] for n in traced.capture.graph.nodes if "dtype" in n.meta}
    tolerance = max(_TOLERANCE.get(kind, 0.0) for kind in kinds)
    found = _of_the_trace(traced, example, device, dtype)
    return next(iter(differing(expected, found, tolerance)), None)


def differing(expected: dict[str, Tensor], found: dict[str, Tensor], tolerance: float) -> list[str]:
    """The names under which two tensors differ where both are finite."""
    apart, sizes = {}, {}
    for name, reference in expected.items():
        apart[name] = (found[name] - reference).norm().item()
        sizes[name] = reference.norm().item()
        if not math.isfinite(apart[name]):
            finite = reference.isfinite() & found[name].isfinite()
            apart[name] = (found[name] - reference)[finite].norm().item()
            sizes[name] = reference[finite].norm().item()
    least = _LEAST * max(sizes.values())
    return [name for name in expected if apart[name] > tolerance * (sizes[name] + least)]


def _of_the_step(traced: Traced, example: Example, device: torch.device) -> dict[str, Tensor]:
    """New components and gradients by autograd on the step itself."""
    is_tuple = traced.capture.is_tuple
    with recording(device):
        state: Any = example.state if is_tuple else example.state[0]
        new = traced.subject.step(example.tensors, example.inputs, state)
        new = tuple(new) if is_tuple else (new,)
        try:
            grads = gradients(new, example.total, [t for _, t in example.sources])
        except RuntimeError as error:
            raise _NoGradient from error
    return _named(example, new, grads)


def _of_the_trace(
    traced: Traced, example: Example, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same from what was traced, as solvers use it."""
    part = traced.input_part
    run = Runner(dtype if dtype is not traced.capture.dtype else None)
    compute = _on_rows if traced.step.recurrence is None else _by_channels
    with recording(device):
        tensors = [example.tensors[name] for name in part.names]
        edges = run(part.module, [*tensors, *part.constants, *example.inputs])
        kind = arithmetic(t.dtype for t in (*edges, *example.state))
        given = [in_type(t.detach(), kind).resolve_conj().contiguous() for t in edges]
        state = [in_type(s.detach(), kind) for s in example.state]
        terms = [[in_type(c, kind) for c in term] for term in example.cotangents]
        new, of_state, of_edges = compute(traced, run, state, given, terms)
        rest = [t for _, t in example.sources[len(state) :]]
        grads = [g.reshape(e.shape).to(e.dtype) for g, e in zip(of_edges, edges, strict=True)]
        found = gradients(edges, grads, rest)
    return _named(example, new, [*of_state, *found])


def _named(example: Example, new: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Tensor]:
    values = {f"component {i} of the new state": n.detach() for i, n in enumerate(new)}
    for (name, _), gradient in zip(example.sources, grads, strict=True):
        values[f"the gradient of {name}"] = gradient
    return {name: in_type(value, torch.float64) for name, value in values.items()}


Results = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]
"""New components, and the gradients of the state and of all edges."""


def _by_channels(
    traced: Traced,
    run: Runner,
    state: list[Tensor],
    edges: list[Tensor],
    terms: list[list[Tensor]],
) -> Results:
    recurrence, layout = traced.step.recurrence, traced.step.layout
    assert recurrence is not None
    assert layout is not None
    count, of_edges = layout.num_drive_inputs, [torch.zeros_like(e) for e in edges]

    def places(of: list[Tensor]) -> list[Tensor]:
        drives = [of[source][:, slot].flatten(1) for source, slot in layout.drives]
        return [*drives, *(of[count + source][slot] for source, slot in layout.coefficients)]

    leaves = [*recurrence.leaves, *recurrence.adjoints]
    both = torch_function([*recurrence.step, *recurrence.vjp], leaves)
    total = [a + b for a, b in zip(*terms, strict=True)]
    results = both(*state, *places(edges), *total)
    new, of_state, found = torch.tensor_split(torch.stack(results), (len(state), 2 * len(state)))
    for target, gradient in zip(places(of_edges), found, strict=True):
        target += gradient if target.dim() == 2 else gradient.sum(0)
    return list(new), list(of_state), of_edges


def _on_rows(
    traced: Traced,
    run: Runner,
    state: list[Tensor],
    edges: list[Tensor],
    terms: list[list[Tensor]],
) -> Results:
    adjoint, (now, later) = traced.step.adjoint, terms
    new = run(traced.step.module, [*state, *edges])
    given = run(adjoint.part.module, adjoint.part_arguments(state, edges, now))
    of_state = run(adjoint.step.module, [*later, *(given[i] for i in adjoint.step_inputs)])
    found = run(adjoint.gradients, [*later, *given])
    of_edges = [torch.zeros_like(e) for e in edges]
    for i, gradient in zip(traced.step.differentiable, found, strict=True):
        of_edges[i] = gradient
    return new, of_state, of_edges


def gradients(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the inputs; zeros for those that have no influence."""
    terms = [
        (o * c.to(o.dtype).conj()).sum()
        for o, c in zip(outputs, cotangents, strict=True)
        if o.requires_grad
    ]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if terms and inputs:
        # One number: of gradients that it is given, autograd checks shapes with sympy (0.3 s)
        total = functools.reduce(torch.add, (t.real if t.is_complex() else t for t in terms))
        found = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


class Runner:
    """Runs modules of operations, with every type they name replaced by `dtype` unless None."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def __call__(self, module: fx.GraphModule, given: Sequence[Tensor]) -> list[Tensor]:
        """The results of a module."""
        if self.dtype is None:
            return list(module(*given))
        values: dict[fx.Node, Any] = {}
        arguments = iter(given)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "output":
                return list(fx.map_arg(node.args[0], values.__getitem__))
            else:
                values[node] = self.call(node, values)
        raise AssertionError("graph without output")

    def call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """The result of one operation."""
        args, kwargs = mapped(node, values.__getitem__)
        kind: Any = kwargs.get("dtype")
        if self.dtype is not None and kind is not None and is_differentiable(kind):
            wide = self.dtype.to_complex() if kind.is_complex else self.dtype
            kwargs = {**kwargs, "dtype": wide}
        function: Any = node.target
        return function(*args, **kwargs)
