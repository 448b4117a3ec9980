"""Long sequences in little memory: states are kept now and then, all else is computed again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pararnn._words import counted
from pararnn.planning.plan import Choice, Plan
from pararnn.solvers.shooting import sequential_report
from pararnn.tracing.modes import transformed

Report = Tensor | int | None
Result = tuple[Tensor, tuple[Tensor, ...], Report]


def check_steps(steps: object) -> None:
    """Refuse what is no number of steps."""
    if steps is None:
        return
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(
            f"checkpoint_every must be a number of steps, or None, got {steps!r}, a "
            f"{type(steps).__name__}."
        )
    if steps < 1:
        raise ValueError(f"checkpoint_every must be at least 1 step, got {steps}.")


def cuts_time() -> bool:
    """Whether calls are cut into segments: not by transforms, nor in programs for any length."""
    return not (transformed() or torch.compiler.is_exporting() or torch._C._get_tracing_state())


def run_segments(
    run: Callable[..., Result],
    steps: int,
    is_random: bool,
    x: Tensor,
    parts: tuple[Tensor, ...],
    fresh: tuple[Tensor, ...],
    resets: Tensor | None,
    cu_seqlens: Tensor | None,
    tensors: Sequence[Tensor],
) -> Result:
    """Run one segment after another; the backward pass runs each again from the state before it.

    Args:
        run: Runs a segment, given x and what follows here.
        steps: Of a segment.
        is_random: Whether a run draws random numbers.
        x: Inputs, (batch, time, ...).
        parts: Components of the state before the first step.
        fresh: Components that resets restart from.
        resets: Boolean (batch, time).
        cu_seqlens: Boundaries of packed sequences.
        tensors: What a run reads besides.
    """
    count, every = len(parts), len(parts) + len(fresh)

    def segment(x: Tensor, resets: Tensor | None, ends: Tensor | None, *given: Tensor) -> Result:
        return run(x, given[:count], given[count:every], resets, ends, given[every:])

    evaluate: Callable[..., Result] = segment
    if torch.is_grad_enabled():
        # tensors are arguments, so that PyTorch notices if one is overwritten meanwhile
        evaluate = functools.partial(
            checkpoint, segment, use_reentrant=False, preserve_rng_state=is_random
        )
    outputs, reports, begin = [], [], 0
    for own in x.split(steps, 1):
        end = begin + own.shape[1]
        now = None if resets is None else resets[:, begin:end]
        # sequences beyond the segment have no steps there, so their states stay as they are
        ends = None if cu_seqlens is None else cu_seqlens.clamp(begin, end) - begin
        y, parts, report = evaluate(own, now, ends, *parts, *fresh, *tensors)
        outputs.append(y)
        reports.append(report)
        begin = end
    return torch.cat(outputs, 1), parts, _worst(reports)


def _worst(reports: Sequence[Report]) -> Report:
    """The report of all segments: for every part the worst values."""
    found = [r for r in reports if isinstance(r, Tensor)]
    if not found:
        return reports[-1]
    found += [sequential_report(r, found[0].device) for r in reports if isinstance(r, int)]
    return torch.stack(found).amax(0)


def with_segments(plan: Plan, time: int, steps: int, kept: int) -> Plan:
    """The plan of a segment as that of a call.

    Args:
        plan: Of a segment.
        time: Steps of the call.
        steps: Of a segment.
        kept: Bytes of a state.
    """
    count = -(-time // steps)
    because = f"of {counted(steps, 'step')}, as asked for; the backward pass runs each again from "
    because += f"one state: {count * kept / 2**20:.3g} MiB are kept"
    return dataclasses.replace(plan, choices=(Choice("segments", count, because), *plan.choices))
