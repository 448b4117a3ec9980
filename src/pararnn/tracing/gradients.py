"""Compares the derivatives of a traced step with autograd on the step itself.

What is recorded may have lost a gradient: a value may have a history that its recording does not
show, and an operation a backward that does something else where it is recorded. So one step is run
both ways on random numbers, in float64 or, where it makes tensors of a type of its own, in that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pararnn.tracing.derivatives import torch_function
from pararnn.tracing.example import Example, InType, differing, draw, gradients
from pararnn.tracing.recorder import TraceError, is_differentiable
from pararnn.tracing.step import arithmetic, in_type, recording
from pararnn.tracing.traced import Traced

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
_MOST_KNOWN = 4096
_known: dict[int, None] = {}


class _NoGradient(RuntimeError):
    """Autograd refuses the step itself, so that there is nothing to compare with."""


def check_gradients(traced: Traced, device: torch.device) -> None:
    """Compare values and gradients of one step, as traced, with those of the step itself.

    Steps that are traced alike from the same lines are compared once in a process.

    Args:
        traced: The step.
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
        agrees = _differing(traced, device, torch.float64) is None
    except (RuntimeError, TypeError, ValueError):
        agrees = False  # float64 does not go with tensors that it makes itself
    if not agrees:
        try:
            difference = _differing(traced, device, traced.capture.dtype)
        except _NoGradient:
            difference = None
        if difference is not None:
            raise _refusal(traced, device, difference)
    _known[key] = None
    if len(_known) > _MOST_KNOWN:
        del _known[next(iter(_known))]


def _key(traced: Traced) -> int:
    step, capture, subject = traced.step, traced.capture, traced.subject
    places = tuple(n.meta.get("place") for n in capture.graph.nodes)
    kinds = tuple((t.shape, t.dtype, t.requires_grad) for t in subject.tensors.values())
    function = getattr(subject.source, "__code__", None)
    code = traced.input_part.module.code, traced.readout and traced.readout.module.code
    ran = function, frozenset(capture.ran.codes)
    return hash((step.key, code, places, kinds, ran, capture.dtype, capture.hidden_size))


def _refusal(traced: Traced, device: torch.device, difference: str) -> TraceError:
    from pararnn.tracing.lost import find  # rarely needed

    example = draw(traced, device, traced.capture.dtype)
    return TraceError(
        f"{traced.subject.name}: {find(traced, example)} cannot be traced with its gradient: "
        f"{difference} differs from what autograd gives for one step. Use other operations "
        "there, or loop over the cell."
    )


def _differing(traced: Traced, device: torch.device, dtype: torch.dtype) -> str | None:
    """Which value or gradient differs, if one does."""
    example = draw(traced, device, dtype)
    expected = _of_the_step(traced, example, device)
    if not all(math.isfinite(t.norm().item()) for t in expected.values()):
        example = draw(traced, device, dtype, positive=True)
        expected = _of_the_step(traced, example, device)
    kinds = {dtype}
    if dtype is traced.capture.dtype:
        kinds |= {n.meta["dtype"] for n in traced.capture.graph.nodes if "dtype" in n.meta}
    tolerance = max(_TOLERANCE.get(kind, 0.0) for kind in kinds)
    found = _of_the_trace(traced, example, device, dtype)
    return next(iter(differing(expected, found, tolerance)), None)


def _of_the_step(traced: Traced, example: Example, device: torch.device) -> dict[str, Tensor]:
    """New components and gradients by autograd on the step itself."""
    is_tuple = traced.capture.is_tuple
    with recording(device):
        state: Any = example.state if is_tuple else example.state[0]
        new = traced.subject.step(example.tensors, example.inputs, state)
        new = tuple(new) if is_tuple else (new,)
        cotangents = example.total
        if traced.subject.readout is not None and example.handed is not None:
            after = new if is_tuple else new[0]
            new = *new, traced.subject.readout(example.tensors, example.inputs, after)
            cotangents = [*cotangents, example.handed]
        try:
            grads = gradients(new, cotangents, [t for _, t in example.sources])
        except RuntimeError as error:
            raise _NoGradient from error
    return _named(example, new, grads)


def _of_the_trace(
    traced: Traced, example: Example, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same from what was traced, as solvers use it."""
    part = traced.input_part
    run = InType(dtype if dtype is not traced.capture.dtype else None)
    compute = _on_rows if traced.step.recurrence is None else _by_channels
    with recording(device):
        tensors = [example.tensors[name] for name in part.names]
        inputs = run(part.module, [*part.fixed(tensors, device), *example.inputs])
        kind = arithmetic(t.dtype for t in (*inputs, *example.state))
        given = [in_type(t.detach(), kind).resolve_conj().contiguous() for t in inputs]
        state = [in_type(s.detach(), kind) for s in example.state]
        terms = [[in_type(c, kind) for c in term] for term in example.cotangents]
        count = len(traced.step.inputs)
        taken, read = given[:count], given[count:]
        new, of_state, of_inputs = compute(traced, run, state, taken, terms)
        if example.handed is not None:
            y, of_new, of_read = _through_readout(traced, run, new, read, example.handed)
            terms = [[a + b for a, b in zip(terms[0], of_new, strict=True)], terms[1]]
            new, of_state, of_inputs = compute(traced, run, state, taken, terms)
            new, of_inputs = [*new, y], [*of_inputs, *of_read]
        rest = [t for _, t in example.sources[len(state) :]]
        grads = [g.reshape(i.shape).to(i.dtype) for g, i in zip(of_inputs, inputs, strict=True)]
        found = gradients(inputs, grads, rest)
    return _named(example, new, [*of_state, *found])


def _through_readout(
    traced: Traced,
    run: InType,
    new: Sequence[Tensor],
    read: Sequence[Tensor],
    cotangent: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What the readout hands out, and the gradients of the new components and of its inputs."""
    readout = traced.readout
    assert readout is not None
    given = [*new, *read]
    if run.dtype is None:
        kinds = [readout.dtype] * len(new) + [i.dtype for i in readout.inputs]
        given = [t.to(kind) for t, kind in zip(given, kinds, strict=True)]
    leaves = [t.detach().requires_grad_(is_differentiable(t.dtype)) for t in given]
    (y,) = run(readout.module, [*(leaves[i] for i in readout.components), *leaves[len(new) :]])
    wanted = [t for t in leaves if t.requires_grad]
    found = iter(gradients([y], [cotangent], wanted))
    every = [next(found) if t.requires_grad else torch.zeros_like(t) for t in leaves]
    return y, every[: len(new)], every[len(new) :]


def _named(example: Example, new: Sequence[Tensor], grads: Sequence[Tensor]) -> dict[str, Tensor]:
    values = {f"component {i} of the new state": n.detach() for i, n in enumerate(new)}
    if example.handed is not None:
        values["the result of the readout"] = values.popitem()[1]
    for (name, _), gradient in zip(example.sources, grads, strict=True):
        values[f"the gradient of {name}"] = gradient
    return {name: in_type(value, torch.float64) for name, value in values.items()}


Results = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]
"""New components, and the gradients of the state and of all inputs of the step."""


def _by_channels(
    traced: Traced,
    run: InType,
    state: list[Tensor],
    inputs: list[Tensor],
    terms: list[list[Tensor]],
) -> Results:
    recurrence, layout = traced.step.recurrence, traced.step.layout
    assert recurrence is not None
    assert layout is not None
    count, of_inputs = layout.num_drive_inputs, [torch.zeros_like(i) for i in inputs]

    def places(of: list[Tensor]) -> list[Tensor]:
        drives = [of[source][:, slot].flatten(1) for source, slot in layout.drives]
        return [*drives, *(of[count + source][slot] for source, slot in layout.coefficients)]

    leaves = [*recurrence.leaves, *recurrence.adjoints]
    both = torch_function([*recurrence.step, *recurrence.vjp], leaves)
    total = [a + b for a, b in zip(*terms, strict=True)]
    results = both(*state, *places(inputs), *total)
    new, of_state, found = torch.tensor_split(torch.stack(results), (len(state), 2 * len(state)))
    for target, gradient in zip(places(of_inputs), found, strict=True):
        target += gradient if target.dim() == 2 else gradient.sum(0)
    return list(new), list(of_state), of_inputs


def _on_rows(
    traced: Traced,
    run: InType,
    state: list[Tensor],
    inputs: list[Tensor],
    terms: list[list[Tensor]],
) -> Results:
    adjoint, (now, later) = traced.step.adjoint, terms
    new = run(traced.step.module, [*state, *inputs])
    given = run(adjoint.part.module, adjoint.part_arguments(state, inputs, now))
    of_state = run(adjoint.step.module, [*later, *(given[i] for i in adjoint.step_inputs)])
    found = run(adjoint.gradients, [*later, *given])
    of_inputs = [torch.zeros_like(i) for i in inputs]
    for i, gradient in zip(traced.step.differentiable, found, strict=True):
        of_inputs[i] = gradient
    return new, of_state, of_inputs
