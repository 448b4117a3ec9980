"""`scan`: the functional form of a recurrence."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pararnn.layers.arguments import State, check_real
from pararnn.layers.runner import Runner
from pararnn.planning.settings import Solver
from pararnn.tracing.capture import Subject
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
    solver: Solver | None = None,
    backend: str = "auto",
) -> tuple[State, State]:
    """Evaluate `state = step(state, *drives_t, *coefficients)` over time.

    The first call with each set of shapes traces the step, so define the function once, outside the
    loop that calls `scan`. If something that it reads from outside changes, it is traced again.

    Args:
        step: Function of tensors with rows first: the state (N, hidden) or a tuple of them, one
            tensor (N, ...) per drive, and the coefficients unchanged. Returns the new state.
        state: State before the first step, (batch, hidden), or a tuple of them.
        drives: Tensors that change over time, each (batch, time, ...).
        coefficients: Tensors that stay the same, of any shape.
        solver: See `RNN`.
        backend: See `RNN`.

    Returns:
        The states at all times, (batch, time, hidden) or a tuple of them, and the last state.

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
        tuple((d.shape[2:], d.dtype) for d in drives),
        tuple((c.shape, c.dtype) for c in coefficients),
        (len(parts), isinstance(state, tuple), parts[0].shape[1], parts[0].dtype, parts[0].device),
        (solver, backend),
    )
    kept = _known.get(key, [])
    looks = (k for look in (_Known.is_current, _Known.holds) for k in kept if look(k, coefficients))
    known = next(looks, None) or _Known(
        step, parts, isinstance(state, tuple), drives, coefficients, solver, backend
    )
    _known[key] = [known, *(k for k in kept if k is not known)][:_MOST_KEPT]
    _known.move_to_end(key)  # the latest used come last
    if len(_known) > _MOST_KNOWN:
        _known.popitem(last=False)
    runner = known.runner
    names = [int(n.removeprefix("coefficient_")) for n in runner.input_part.names]
    used = [coefficients[i] for i in names]
    states, _ = runner.run(used, drives, torch.stack(parts, 1), None)
    last = tuple(s[:, -1].clone() for s in states)
    return (tuple(states), last) if isinstance(state, tuple) else (states[0], last[0])


class _Known:
    """A step traced for one key of `_known`."""

    def __init__(
        self,
        step: Callable[..., State],
        parts: tuple[Tensor, ...],
        is_tuple: bool,
        drives: tuple[Tensor, ...],
        coefficients: tuple[Tensor, ...],
        solver: Solver | None,
        backend: str,
    ) -> None:
        call = lambda own, inputs, state: step(state, *inputs, *own.values())  # noqa: E731
        own = {f"coefficient_{i}": c for i, c in enumerate(coefficients)}
        subject = Subject(call, step, own, getattr(step, "__name__", "step"), 0)
        first, inputs = parts[0], [(tuple(d.shape[2:]), d.dtype) for d in drives]
        sizes = first.shape[1], len(parts), is_tuple
        traced = trace(subject, inputs, *sizes, first.dtype, first.device)
        traced.subject = replace(subject, step=_unknown, source=_unknown, tensors={})
        self.runner = Runner(traced, backend, solver, own.__getitem__)
        if not self.runner.is_ready:
            self.runner.get_ready()
        self._watched = Watched(step, traced.capture.ran, lambda _: own)
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
        if part.dim() != 2 or part.shape[0] != batch or part.shape != parts[0].shape:
            raise ValueError(
                f"state component {i} has shape {tuple(part.shape)} but the drives have batch "
                f"{batch}; pass ({batch}, hidden_size), the same for all components."
            )
