"""`scan`: the functional form of a recurrence."""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pararnn.layers.arguments import State, check_real
from pararnn.layers.mistakes import ends_at_the_cell
from pararnn.layers.runner import Runner
from pararnn.planning.settings import Solver
from pararnn.tracing.capture import StepFunction, Subject
from pararnn.tracing.structure import trace
from pararnn.tracing.watch import Watched

_MOST_KNOWN = 64  # keys: a step with its shapes and settings
_MOST_KEPT = 4  # traces of one key: what a step reads from outside may alternate
_known: OrderedDict[Any, list[_Known]] = OrderedDict()


def scan(
    step: Callable[..., State],
    state: State,
    drives: Tensor | Sequence[Tensor],
    coefficients: Tensor | Sequence[Tensor] = (),
    *,
    readout: Callable[..., Tensor] | None = None,
    solver: Solver | None = None,
    backend: str = "auto",
) -> tuple[State, State]:
    """Evaluate `state = step(state, *drives_t, *coefficients)` over time.

    The first call with each set of shapes traces the step, so define the function once, outside the
    loop that calls `scan`. If something that it reads from outside changes, it is traced again.

    Args:
        step: Function of tensors with rows first: the state (N, ...) or a tuple of them, one
            tensor (N, ...) per drive, and the coefficients unchanged. Returns the new state.
        state: State before the first step, (batch, ...), or a tuple of them.
        drives: Tensors that change over time, each (batch, time, ...).
        coefficients: Tensors that stay the same, of any shape.
        readout: Function of the same tensors as `step`, with the state after the step. Returns what
            is handed out, (N, ...).
        solver: See `RNN`.
        backend: See `RNN`.

    Returns:
        The states at all times, (batch, time, ...) or a tuple of them; with `readout` what it
        returns at all times, (batch, time, ...). And the last state.

    Gradients: exact at the solution; they reach the state, the drives and the coefficients.

    Raises:
        TraceError: The step cannot be evaluated for all times at once.
        TypeError: The state or the drives are not tensors, or the state is not of real numbers.
        ValueError: Shapes do not fit, or the backend cannot run the step.
    """
    drives = (drives,) if isinstance(drives, Tensor) else tuple(drives)
    coefficients = (coefficients,) if isinstance(coefficients, Tensor) else tuple(coefficients)
    parts = state if isinstance(state, tuple) else (state,)
    _check(parts, drives)
    key = (
        step,
        readout,
        tuple((d.shape[2:], d.dtype) for d in drives),
        tuple((c.shape, c.dtype) for c in coefficients),
        (isinstance(state, tuple), *(p.shape[1:] for p in parts), parts[0].dtype, parts[0].device),
        (solver, backend),
    )
    kept = _known.get(key, [])
    looks = (k for look in (_Known.is_current, _Known.holds) for k in kept if look(k, coefficients))
    known = next(looks, None) or _Known(
        step, readout, parts, isinstance(state, tuple), drives, coefficients, solver, backend
    )
    _known[key] = [known, *(k for k in kept if k is not known)][:_MOST_KEPT]
    _known.move_to_end(key)  # the latest used come last
    if len(_known) > _MOST_KNOWN:
        _known.popitem(last=False)
    runner = known.runner
    names = [int(n.removeprefix("coefficient_")) for n in runner.input_part.names]
    used = [coefficients[i] for i in names]
    packing = runner.traced.packing
    y, states, _, ends = runner.run(used, drives, packing.join(parts), None)
    if ends is None:
        final = [s[:, -1].clone() for s in states]
    else:  # the type that states which are written have
        kinds = [d.dtype for d in drives if d.is_floating_point()]
        wide = functools.reduce(torch.promote_types, kinds, (states[0] if y is None else y).dtype)
        states, y = [s.to(wide) for s in states], None if y is None else y.to(wide)
        final = [e.to(wide) for e in ends.unbind(1)]
    last = tuple(s.contiguous() for s in packing.split(final))
    if y is not None:
        return y, last if isinstance(state, tuple) else last[0]
    everything = packing.split(states)
    return (everything, last) if isinstance(state, tuple) else (everything[0], last[0])


class _Known:
    """A step traced for one key of `_known`."""

    @ends_at_the_cell
    def __init__(
        self,
        step: Callable[..., State],
        readout: Callable[..., Tensor] | None,
        parts: tuple[Tensor, ...],
        is_tuple: bool,
        drives: tuple[Tensor, ...],
        coefficients: tuple[Tensor, ...],
        solver: Solver | None,
        backend: str,
    ) -> None:
        def taking(function: Callable[..., Any]) -> StepFunction:
            return lambda own, inputs, state: function(state, *inputs, *own.values())

        read = None if readout is None else taking(readout)
        own = {f"coefficient_{i}": c for i, c in enumerate(coefficients)}
        subject = Subject(taking(step), step, own, getattr(step, "__name__", "step"), 0, read)
        first, inputs = parts[0], [(tuple(d.shape[2:]), d.dtype) for d in drives]
        shapes = tuple(tuple(p.shape[1:]) for p in parts)
        traced = trace(subject, inputs, shapes, is_tuple, first.dtype, first.device)
        read = None if read is None else _unknown
        traced.subject = replace(subject, step=_unknown, source=_unknown, readout=read, tensors={})
        all_states = is_tuple and readout is None
        self.runner = Runner(traced, backend, solver, own.__getitem__, all_states=all_states)
        if not self.runner.is_ready:
            self.runner.get_ready()
        both = step if readout is None else (step, readout)
        self._watched = Watched(both, traced.capture.ran, lambda _: own)
        self._coefficients: tuple[Tensor, ...] = ()
        if self._watched.tied:
            self._coefficients = coefficients
        else:  # do not keep the caller's tensors alive
            own = {}

    def is_current(self, coefficients: tuple[Tensor, ...]) -> bool:
        """A quick `holds`; False may be wrong."""
        return self._has(coefficients) and self._watched.is_current(self._watched.step)

    def holds(self, coefficients: tuple[Tensor, ...]) -> bool:
        """Whether the trace is still valid for the step and these coefficients."""
        return self._has(coefficients) and self._watched.change(self._watched.step) is None

    def _has(self, coefficients: tuple[Tensor, ...]) -> bool:
        return all(map(operator.is_, coefficients, self._coefficients))


def _unknown(*_: Any) -> Any:
    raise AssertionError("the step is not kept")


def _check(parts: tuple[Tensor, ...], drives: tuple[Tensor, ...]) -> None:
    for name, values in (("state", parts), ("drives", drives)):
        for value in values:
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{name} must be a tensor or a tuple of tensors, got a {type(value).__name__}."
                )
    if not drives:
        raise ValueError("drives is empty; pass at least one tensor (batch, time, ...).")
    batch, time = drives[0].shape[:2] if drives[0].dim() >= 2 else (0, 0)
    for i, drive in enumerate(drives):
        if drive.dim() < 2 or drive.shape[:2] != (batch, time) or time == 0:
            raise ValueError(
                f"drive {i} has shape {tuple(drive.shape)}; all drives must be (batch, time, ...) "
                "with the same batch and time, time at least 1."
            )
    for i, part in enumerate(parts):
        check_real(f"state component {i}", part)
        if not part.is_floating_point():
            raise TypeError(f"state component {i} is of {part.dtype}; pass floating-point numbers.")
        if not part.dim() or part.shape[0] != batch or 0 in part.shape[1:]:
            raise ValueError(
                f"state component {i} has shape {tuple(part.shape)} but the drives have batch "
                f"{batch}; pass ({batch}, ...), no axis empty."
            )
