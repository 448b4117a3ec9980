"""Trace a step: capture it, split it into input part and recurrent part, and find its structure."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from pararnn.tracing.capture import AFTER, ROWS, Capture, Subject, capture
from pararnn.tracing.dependencies import axes_apart, group_size, rows_mix
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.elementwise import Elementwise, NotElementwise, elementwise
from pararnn.tracing.gradients import check_gradients
from pararnn.tracing.modes import stand_in, transformed, uncompiled, untransformed, without_tools
from pararnn.tracing.operations import MOVES, is_pointwise, operation_name
from pararnn.tracing.packed import Packing, Shape
from pararnn.tracing.partition import (
    AsItIs,
    Output,
    Partition,
    input_part,
    is_random,
    module_from,
    partition,
    rows_lost_at,
)
from pararnn.tracing.recorder import TraceError, is_differentiable, show_place
from pararnn.tracing.repeated import compute_once
from pararnn.tracing.shared import share_weights
from pararnn.tracing.step import Input, Layout, Step, in_type, input_of, step_of
from pararnn.tracing.traced import Readout, Traced


def trace(
    subject: Subject,
    inputs: Sequence[tuple[Sequence[int], torch.dtype]],
    shapes: tuple[Shape, ...],
    is_tuple: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Traced:
    """Trace a step.

    Args:
        subject: The step.
        inputs: Shape (without the rows) and type of every input.
        shapes: Of the tensors in the state, without the rows.
        is_tuple: Whether the step takes its state as a tuple.
        dtype: Type of the state.
        device: Device of the example tensors.

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
            given = tuple(Input(tuple(shape), kind, True) for shape, kind in inputs)
            found = _packed(subject, given, Packing(shapes), is_tuple, dtype, device)
            _check_rows(found, device)
            check_gradients(found, device)
        return found

    found = untransformed(traced)
    if found.forgets_all:
        warnings.warn(
            f"{subject.name} ignores its state: what it returns depends on x alone, so nothing is "
            "remembered from step to step. Compute the new state from the state as well.",
            stacklevel=2,
        )
    return found


def _packed(
    subject: Subject,
    given: tuple[Input, ...],
    packing: Packing,
    is_tuple: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Traced:
    """Trace a step whose state lies in memory as `packing` says, or so that groups are smaller."""
    packed = subject if packing.is_plain else packing.packed(subject, is_tuple)
    sizes = packing.hidden_size, packing.num_components, is_tuple or not packing.is_plain
    captured = capture(packed, [(i.shape, i.dtype) for i in given], *sizes, dtype, device)
    share_weights(captured.graph)
    if packed.readout is not None:
        compute_once(captured.graph)
    parts = partition(captured)
    try:
        found = _elementwise(packed, given, packing, parts, elementwise(parts), device)
        return found if packing.is_plain else _with_small(found, captured)
    except NotElementwise as error:
        reason = str(error)
        if not packing.is_plain:  # the reader may have stopped before, at a move of its axes
            reason = _first_mixing(parts) or reason
    if not packing.apart:
        better = Packing(packing.shapes, axes_apart(parts, packing))
        if not better.lies_like(packing):
            return _packed(subject, given, better, is_tuple, dtype, device)
        packing = better
    parts = partition(captured, keep_small=True)
    return _with_small(_mixing(packed, given, packing, parts, reason, device), captured)


def _with_small(of: Traced, captured: Capture) -> Traced:
    """The traced cell, which can be made with few and small inputs over time."""

    def small(of: Traced) -> Traced:
        parts = partition(captured, keep_small=True, keep_few=True)
        known = of.step.group  # of one cell in two ways, and takes long to find
        return _mixing(of.subject, of.given, of.packing, parts, of.reason, of.device, known)

    return replace(of, make_small=small)


def _first_mixing(parts: Partition) -> str | None:
    """The reason: the first operation on the state that is no move and not pointwise."""
    for node in parts.recurrent:
        name = operation_name(node.target) if hasattr(node.target, "_schema") else None
        if name is not None and name not in MOVES and not is_pointwise(node.target):
            place = show_place(node.meta.get("place"))
            return f"{name} at {place}: it is not a pointwise operation"
    return None


def _elementwise(
    subject: Subject,
    given: tuple[Input, ...],
    packing: Packing,
    parts: Partition,
    found: Elementwise,
    device: torch.device,
) -> Traced:
    if not found.drives:
        raise TraceError(
            f"{parts.capture.subject} does not use x in its new state; there is nothing to "
            "evaluate over time."
        )
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
    return _traced(subject, given, packing, parts, sources, step, reason, device)


def _mixing(
    subject: Subject,
    given: tuple[Input, ...],
    packing: Packing,
    parts: Partition,
    reason: str,
    device: torch.device,
    group: int | None = None,
) -> Traced:
    outputs: list[Output] = [AsItIs(e) for e in parts.edges]
    inputs = [input_of(e) for e in parts.edges]
    if not any(i.by_rows for i in inputs):  # nothing uses x, but it gives the number of steps
        first = next(n for n in parts.capture.graph.nodes if str(n.target) == "x_0")
        outputs.append(AsItIs(first))
        inputs.append(input_of(first))
    if group is None:
        group = group_size(parts, packing.blocks)
    step = step_of(parts, outputs, inputs, group, device)
    return _traced(subject, given, packing, parts, outputs, step, reason, device)


def _traced(
    subject: Subject,
    given: tuple[Input, ...],
    packing: Packing,
    parts: Partition,
    outputs: Sequence[Output],
    step: Step,
    reason: str,
    device: torch.device,
) -> Traced:
    """The traced cell, with its readout."""
    readout, taken = None, [AsItIs(e) for e in parts.readout.edges] if parts.readout else []
    if parts.readout is not None:
        after, result = parts.readout.after, parts.readout.result
        own = {o.edge: n for n, o in enumerate(outputs) if isinstance(o, AsItIs)}
        readout = Readout(
            module_from(parts, taken, [result], after),
            tuple(parts.readout.components),
            tuple(input_of(e) for e in parts.readout.edges),
            tuple(own.get(e) for e in parts.readout.edges),
            tuple(result.meta["shape"][1:]),
            any(map(is_random, parts.readout.operations)),
            parts.capture.dtype,
        )
    part = input_part(parts, [*outputs, *taken])
    return Traced(subject, given, packing, parts, part, step, readout, reason, device)


def _check_rows(traced: Traced, device: torch.device) -> None:
    """Check that no row of x or of the state reaches another row.

    Marks (`rows_mix`) prove it, even for values that occur rarely, except through operations
    without a rule. For these the step is run with one row changed; no other row may change.

    Raises:
        TraceError: Rows mix, or a value depends on their number.
    """
    subject, name = traced.subject, traced.subject.name
    if rows_mix(traced.parts, "x_"):
        raise _mixes_x(name, rows_lost_at(traced.capture, "x_"))
    if rows_mix(traced.parts, "state_") or rows_mix(traced.parts, AFTER):
        raise _mixes_state(name, rows_lost_at(traced.capture, "state_"))
    examples = [_random((ROWS[0], *i.shape), i.dtype, device) for i in traced.given]
    tensors = [subject.tensors[n] for n in traced.input_part.names]
    devices = [device] if device.type == "cuda" else []

    def inputs(x: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.random.fork_rng(devices):
            return traced.input_part(tensors, *x)

    with torch.no_grad():
        given, doubled = inputs(examples), inputs([torch.cat([x, x]) for x in examples])
        if not traced.input_part.is_random and not _are_doubled(given, doubled, traced.by_rows):
            raise _counts_rows(name)
        moved = [inputs([_with_other(x, row) for x in examples]) for row in range(ROWS[0])]
        for row, others in enumerate(moved):
            for one, other, by_rows in zip(given, others, traced.by_rows, strict=True):
                if by_rows and not _equal_beside(one, other, row):
                    raise _mixes_x(name)
        wide, count = traced.step.dtype, len(traced.step.inputs)
        size = (ROWS[0], traced.capture.hidden_size)
        state = [_random(size, wide, device) for _ in range(traced.capture.num_components)]
        if traced.step.recurrence is None:
            now = [tuple(in_type(i, wide) for i in every[:count]) for every in (given, *moved)]
            _check_rows_of(traced.step.module, state, now, traced.step.by_rows, name)
        readout = traced.readout
        if readout is not None and not readout.is_random:
            state = [state[i].to(readout.dtype) for i in readout.components]
            now = [every[count:] for every in (given, *moved)]
            _check_rows_of(readout.module, state, now, traced.by_rows[count:], name)


def _check_rows_of(
    module: fx.GraphModule,
    state: Sequence[Tensor],
    inputs: Sequence[Sequence[Tensor]],
    by_rows: Sequence[bool],
    name: str,
) -> None:
    """Check that no row reaches another in a module of the state and inputs.

    Args:
        module: The module.
        state: Its state.
        inputs: Its inputs, and those in which row 0, 1, ... of x is another.
        by_rows: Which of them have rows.
        name: Name of the cell.
    """
    given, *moved = inputs
    new = module(*state, *given)
    twice = module(*(torch.cat([s, s]) for s in state), *_doubled(given, by_rows))
    if not _are_doubled(new, twice, [True] * len(new)):
        raise _counts_rows(name)
    for row in range(ROWS[0]):
        others = module(*(_with_other(s, row) for s in state), *given)
        if not all(_equal_beside(a, b, row) for a, b in zip(new, others, strict=True)):
            raise _mixes_state(name)
        others = module(*state, *moved[row])
        if not all(_equal_beside(a, b, row) for a, b in zip(new, others, strict=True)):
            raise _mixes_x(name)


def _mixes_state(name: str, where: str = "") -> TraceError:
    return TraceError(
        f"{name} mixes the rows of its state{where}; every row must be computed on its own."
    )


def _mixes_x(name: str, where: str = "") -> TraceError:
    return TraceError(
        f"{name} mixes the rows of x{where} (batch normalisation or a statistic over the batch?); "
        "every row must be computed on its own."
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
    rtol = max(1e-3, torch.finfo(a.dtype).eps)
    return torch.allclose(a, b, rtol=rtol, atol=1e-5, equal_nan=True)
