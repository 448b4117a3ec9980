"""Calls of a layer whose time is split over ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from pararnn.layers.shard import Given, Layer, Parts, Shard, autocast_of
from pararnn.solvers.ranks import Ranks
from pararnn.tracing.capture import snapshot
from pararnn.tracing.modes import outside_of_graphs, transformed

Result = tuple[Given, Tensor, Parts, Tensor | int | None]


@outside_of_graphs
def evaluate(layer: Layer, ranks: Ranks, *arguments: Any) -> Result:
    """Evaluate a layer on this rank's part of time.

    Args:
        layer: The layer.
        ranks: That share the sequence; all of them call this.
        arguments: Of its `laid_out`.

    Returns:
        What the layer was given, the outputs of this part of time, the state after the last step
        of all, and the values of the report, whose chunks are the ranks.

    Raises:
        RankError: The ranks do not do the same, or another one failed.
    """
    cell = snapshot(layer.cell)
    given, failure, what, tracked, time = None, None, {}, False, 0
    device = cell.device
    try:
        given = layer.laid_out(*arguments)
        tensors = [t for t in cell.tensors.values() if t.requires_grad]
        device, time = given.x.device, given.x.shape[1]
        what = _description(layer, given)
        every = [given.x, *given.parts, *given.fresh, *tensors]
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in every)
    except Exception as error:  # told to the others, then raised
        failure = error
    numbers = ranks.agree(what, [time, tracked], device, failure)
    assert given is not None
    if not len(given.x):  # no rows: nothing to hand on
        return given, *layer.at_all_times(*given[:-1])
    shard = Shard(layer, ranks, given, [n[0] for n in numbers], records=any(n[1] for n in numbers))
    if not shard.records:
        return given, *shard.solve(), shard.report
    token = torch.empty(0, device=device, requires_grad=True)  # so that all ranks go back
    y, *final = _Across.apply(shard, token, given.x, *given.parts, *given.fresh, *tensors)
    return given, y, tuple(final), shard.report


def _description(layer: Layer, given: Given) -> dict[str, object]:
    """What must be the same on all ranks, by name."""
    runner, x = given.runner, given.x
    if transformed():
        raise TypeError("transforms of torch.func do not reach across ranks.")
    if runner.input_part.is_random or getattr(runner.traced.readout, "is_random", False):
        raise TypeError(
            f"{type(layer.cell).__name__} draws random numbers, but a rank may run its steps more "
            "than once; draw them outside of the cell."
        )
    ends = None if given.cu_seqlens is None else given.cu_seqlens.tolist()
    shapes = {n: (tuple(t.shape), t.dtype) for n, t in snapshot(layer.cell).tensors.items()}
    return {
        "the cell": type(layer.cell).__name__,
        "its tensors": shapes,
        "the shape of x without time": (x.shape[0], *x.shape[2:]),
        "the type of x": x.dtype,
        "the type of the device": x.device.type,
        "the type of the state": [p.dtype for p in given.parts],
        "the use of resets": given.resets is not None,
        "cu_seqlens": ends,
        "the solver": (layer.solver, layer.backend),
        "the recording of gradients": torch.is_grad_enabled(),
        "autocast": autocast_of(x.device.type)[1:],
    }


class _Across(torch.autograd.Function):
    """`(shard, token, x, *state, *reset state, *tensors of the cell) -> (y, *last state)`."""

    @staticmethod
    def forward(ctx: Any, shard: Shard, token: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        ctx.shard, checkpoints = shard, _are_saved_elsewhere()
        with _KEPT if checkpoints else nullcontext():
            y, final = shard.solve()
        if checkpoints:  # as in activation checkpointing: keep little, run the steps again
            ctx.save_for_backward(shard.start, shard.x, *shard.parts, *shard.fresh)
            shard.release()
        return (y, *final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *grad_final: Tensor) -> Any:
        shard: Shard = ctx.shard
        saved = ctx.saved_tensors  # to be looked at once
        if saved:
            shard.restore(saved)
        with _as_before(shard.autocast):
            shard.adjoint(grad_y, grad_final)
        found, shard.gradients = shard.gradients, []
        return None, None, *found


def _as_before(autocast: tuple[str, torch.dtype, bool]) -> AbstractContextManager[Any]:
    device, dtype, enabled = autocast
    return torch.autocast(device, dtype, enabled)


_KEPT = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
"""Inside, hooks from outside do not see what is saved: a rank goes back through it several times.
"""


def _are_saved_elsewhere() -> bool:
    """Whether hooks take the tensors that are saved for a backward pass."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
