"""Trace a step: capture it, split it into input part and recurrent part, and find its structure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pararnn.tracing.capture import ROWS, Subject, capture
from pararnn.tracing.dependencies import group_size, rows_mix
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.elementwise import Elementwise, NotElementwise, elementwise
from pararnn.tracing.gradients import check_gradients
from pararnn.tracing.modes import stand_in, transformed, uncompiled, untransformed, without_tools
from pararnn.tracing.partition import (
    AsItIs,
    Output,
    Partition,
    input_part,
    partition,
)
from pararnn.tracing.recorder import TraceError, is_differentiable
from pararnn.tracing.shared import share_weights
from pararnn.tracing.step import Input, Layout, in_type, input_of, step_of
from pararnn.tracing.traced import Traced


def trace(
    subject: Subject,
    inputs: Sequence[tuple[Sequence[int], torch.dtype]],
    hidden_size: int,
    num_components: int,
    is_tuple: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Traced:
    """Trace a step; the arguments are those of `capture`.

    Raises:
        TraceError: The step cannot be evaluated for all times at once; the message says why and,
            where it can, names the line.
    """
    if transformed():
        subject = replace(subject, tensors={n: stand_in(t) for n, t in subject.tensors.items()})
    devices = [device] if device.type == "cuda" else []

    def traced() -> Traced:
        with (
            torch.inference_mode(False),
            torch.random.fork_rng(devices),
            without_tools(),
            uncompiled(),
        ):
            captured = capture(
                subject, inputs, hidden_size, num_components, is_tuple, dtype, device
            )
            share_weights(captured.graph)
            parts = partition(captured)
            given = tuple(Input(tuple(shape), kind, True) for shape, kind in inputs)
            found = _elementwise_or_not(subject, given, parts, device)
            _check_rows(found, device)
            check_gradients(found, device)
        return found

    return untransformed(traced)


def _elementwise_or_not(
    subject: Subject, given: tuple[Input, ...], parts: Partition, device: torch.device
) -> Traced:
    try:
        found = elementwise(parts)
    except NotElementwise as error:
        return _mixing(subject, given, parts, str(error), device)
    if not found.drives:
        raise TraceError(
            f"{parts.capture.subject} does not use x in its new state; there is nothing to "
            "evaluate over time."
        )
    return _elementwise(subject, given, parts, found, device)


def _elementwise(
    subject: Subject,
    given: tuple[Input, ...],
    parts: Partition,
    found: Elementwise,
    device: torch.device,
) -> Traced:
    drives = list(dict.fromkeys(source for source, _ in found.drives))
    coefficients = list(dict.fromkeys(source for source, _ in found.coefficients))
    recurrence = Recurrence(found.step, len(found.drives), len(found.coefficients), found.names)
    layout = Layout(
        tuple((drives.index(source), slot) for source, slot in found.drives),
        tuple((coefficients.index(source), slot) for source, slot in found.coefficients),
    )
    sources = [*drives, *coefficients]
    inputs = [source.as_input for source in sources]
    step = step_of(parts, sources, inputs, 1, device, recurrence, layout)
    reason = "every operation on the state works on each channel by itself"
    return Traced(subject, given, parts, input_part(parts, sources), step, reason, device)


def _mixing(
    subject: Subject,
    given: tuple[Input, ...],
    parts: Partition,
    reason: str,
    device: torch.device,
) -> Traced:
    outputs: list[Output] = [AsItIs(e) for e in parts.edges]
    inputs = [input_of(e) for e in parts.edges]
    if not any(i.by_rows for i in inputs):  # nothing uses x, but it gives the number of steps
        first = next(n for n in parts.capture.graph.nodes if str(n.target) == "x_0")
        outputs.append(AsItIs(first))
        inputs.append(input_of(first))
    step = step_of(parts, outputs, inputs, group_size(parts), device)
    part = input_part(parts, outputs)
    return Traced(subject, given, parts, part, step, reason, device)


def _check_rows(traced: Traced, device: torch.device) -> None:
    """Check that no row of x or of the state reaches another row.

    Marks (`rows_mix`) prove it, even for values that occur rarely, except through operations
    without a rule. For these the step is run with one row changed; no other row may change.

    Raises:
        TraceError: Rows mix, or a value depends on their number.
    """
    subject, name = traced.subject, traced.subject.name
    if rows_mix(traced.parts, "x_"):
        raise _mixes_x(name)
    if rows_mix(traced.parts, "state_"):
        raise _mixes_state(name)
    examples = [_random((ROWS[0], *i.shape), i.dtype, device) for i in traced.given]
    tensors = [subject.tensors[n] for n in traced.input_part.names]
    devices = [device] if device.type == "cuda" else []

    def inputs(x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.random.fork_rng(devices):
            return traced.input_part(tensors, *x)

    with torch.no_grad():
        given, doubled = inputs(examples), inputs([torch.cat([x, x]) for x in examples])
        if not traced.input_part.is_random and not _are_doubled(
            given, doubled, traced.step.by_rows
        ):
            raise _counts_rows(name)
        moved = [inputs([_with_other(x, row) for x in examples]) for row in range(ROWS[0])]
        for row, others in enumerate(moved):
            for one, other, by_rows in zip(given, others, traced.step.by_rows, strict=True):
                if by_rows and not _equal_beside(one, other, row):
                    raise _mixes_x(name)
        if traced.step.recurrence is not None:
            return
        module, wide = traced.step.module, traced.step.dtype
        given, *moved = (tuple(in_type(i, wide) for i in every) for every in (given, *moved))
        size = (ROWS[0], traced.capture.hidden_size)
        state = [_random(size, wide, device) for _ in range(traced.capture.num_components)]
        new = module(*state, *given)
        twice = module(*(torch.cat([s, s]) for s in state), *_doubled(given, traced.step.by_rows))
        if not _are_doubled(new, twice, [True] * len(new)):
            raise _counts_rows(name)
        for row in range(ROWS[0]):
            others = module(*(_with_other(s, row) for s in state), *given)
            if not all(_equal_beside(a, b, row) for a, b in zip(new, others, strict=True)):
                raise _mixes_state(name)
            others = module(*state, *moved[row])
            if not all(_equal_beside(a, b, row) for a, b in zip(new, others, strict=True)):
                raise _mixes_x(name)


def _mixes_state(name: str) -> TraceError:
    return TraceError(f"{name} mixes the rows of its state; every row must be computed on its own.")


def _mixes_x(name: str) -> TraceError:
    return TraceError(
        f"{name} mixes the rows of x (batch normalisation or a statistic over the batch?); every "
        "row must be computed on its own."
    )


def _counts_rows(name: str) -> TraceError:
    return TraceError(
        f"{name} computes with the number of rows (len(x), x.shape[0], or numbers along the rows); "
        "all times together are rows of one batch, so no value may depend on their number."
    )


def _doubled(values: Sequence[Tensor], by_rows: Sequence[bool]) -> list[Tensor]:
    """Repeat the rows of values that have rows."""
    return [torch.cat([v, v]) if r else v for v, r in zip(values, by_rows, strict=True)]


def _are_doubled(once: Sequence[Tensor], twice: Sequence[Tensor], by_rows: Sequence[bool]) -> bool:
    """Whether the values computed from repeated rows are the repeated values."""
    pairs = zip(_doubled(once, by_rows), twice, strict=True)
    return all(a.shape == b.shape and _equal(a, b) for a, b in pairs)


def _with_other(x: Tensor, row: int) -> Tensor:
    """A copy with one row changed."""
    changed = x.clone()
    changed[row] = changed[row] * 2 + 1  # integers go from 0 to 1, a valid index in most tables
    return changed


def _equal_beside(a: Tensor, b: Tensor, row: int) -> bool:
    """Whether all rows except `row` are equal."""
    rest = [i for i in range(a.shape[0]) if i != row]
    return _equal(a[rest], b[rest])


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if is_differentiable(dtype):
        return torch.rand(shape, dtype=dtype, device=device)
    return torch.zeros(shape, dtype=dtype, device=device)


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "meta" or not is_differentiable(a.dtype):
        return a.device.type == "meta" or torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
