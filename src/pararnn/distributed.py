"""One sequence over several devices: every process holds a part of its time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from pararnn.layers.rnn import RNN
from pararnn.layers.stacked import StackedRNN
from pararnn.solvers.ranks import RankError as RankError
from pararnn.solvers.ranks import Ranks as Ranks
from pararnn.tracing.modes import outside_of_graphs

Module = TypeVar("Module", bound=nn.Module)


def sequence_parallel(module: Module, mesh: DeviceMesh | dist.ProcessGroup | None) -> Module:
    """Split the time of every recurrence in a module over processes.

    From now on every process calls the module with its own part of time, and gets the outputs of
    that part: what one process would compute for the whole sequence. Parts follow one another in
    the order of the ranks and need not be of equal length; each has at least one step.

    `state` counts where a sequence begins, and the state that is returned, the one after the last
    step of all, is the same on every rank: pass and get what one process would. `resets` and x
    are those of the own part, `cu_seqlens` those of the whole sequence.

    Gradients are those of the sum of the losses of all ranks, and every rank must go back through
    the outputs of its part, with zeros where it has no loss. A rank gets the gradient of its own
    part of x. What all ranks have alike (parameters, `state`, `reset_state`) gets the part of the
    gradient that its own steps contribute: add these up over the ranks, as
    `DistributedDataParallel` and FSDP do (they take the mean: right for losses that are means).

    Args:
        module: An `RNN`, `ParaGRU`, `ParaLSTM`, what `parallelize` returned, or a module with some
            of these in it, such as a language model of this library. What else mixes times in it
            has to be split by other means.
        mesh: The ranks: one dimension of a device mesh, or a process group. None: no longer split.

    Returns:
        The module itself. A copy of it is split in the same way.

    Raises:
        ValueError: There is no recurrence in it, the mesh has several dimensions, or it is None and
            the module is not split.
        RankError: From a call, on all ranks: they do not do the same, or one of them failed.

    Example:
        >>> mesh = init_device_mesh("cuda", (2,))                           # doctest: +SKIP
        >>> gru = sequence_parallel(ParaGRU(64, 64, batch_first=True), mesh)  # doctest: +SKIP
        >>> y, state = gru(x.chunk(2, 1)[mesh.get_local_rank()])            # doctest: +SKIP
    """
    ranks = None if mesh is None else Ranks(_group(mesh))
    layers = _split_over_time(module)
    if not layers:
        raise ValueError(
            f"{type(module).__name__} is and contains no pararnn.RNN, ParaGRU or ParaLSTM; use "
            "pararnn.parallelize for layers of PyTorch first."
        )
    if ranks is None and all(layer.ranks is None for layer in layers):
        raise ValueError(
            f"mesh is None, but the time of {type(module).__name__} is not split. If None came "
            "from torch.distributed.group.WORLD, call init_process_group before."
        )
    for layer in layers:
        layer.ranks = ranks
    stacks = [m for m in module.modules() if isinstance(m, StackedRNN) and m.bidirectional]
    for stack in stacks:
        for backwards in list(stack.layers)[1::2]:
            assert isinstance(backwards, RNN)
            backwards.ranks = None if ranks is None else ranks.reversed()
    return module


def _split_over_time(module: nn.Module) -> list[Any]:
    """The modules that mix times and know how over ranks."""
    return [m for m in module.modules() if hasattr(m, "ranks")]


@contextmanager
def on_this_rank(module: nn.Module) -> Iterator[None]:
    """Inside, every process has whole sequences of its own."""
    held = [(m, m.ranks) for m in _split_over_time(module)]
    for layer, _ in held:
        layer.ranks = None
    try:
        yield
    finally:
        for layer, ranks in held:
            layer.ranks = ranks


@outside_of_graphs
def exchange(tensor: Tensor, ranks: Ranks) -> Tensor:
    """What every rank passes, (ranks, *shape), in the order of time; without gradients."""
    return ranks.exchange(tensor)


@outside_of_graphs
def hand_on(first: Tensor, own: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Hand something on to the next rank in time; differentiable.

    Args:
        first: What comes before the first rank.
        own: What this rank hands on, of the same shape and type.
        ranks: All call this.

    Returns:
        What comes before this rank, and what the last rank hands on.
    """
    return _HandOn.apply(ranks, first, own)


class _HandOn(Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, first: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        ctx.ranks = ranks
        every = ranks.exchange(own)
        before = every[ranks.position - 1] if ranks.position else first
        return before.clone(), every[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_before: Tensor, grad_last: Tensor) -> Any:
        ranks: Ranks = ctx.ranks
        every = ranks.exchange(torch.stack([grad_before, grad_last]))
        if ranks.position == ranks.count - 1:
            grad_own = every[:, 1].sum(0)
        else:
            grad_own = every[ranks.position + 1, 0]
        grad_first = torch.zeros_like(grad_before) if ranks.position else grad_before
        return None, grad_first, grad_own


def _group(mesh: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh must be one dimension of a device mesh, or a process group that this process is "
            f"in, got {mesh!r}, a {type(mesh).__name__}."
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh has the dimensions {mesh.mesh_dim_names or mesh.ndim}; pass the one that time "
            "is split over: mesh['sequence']."
        )
    return mesh.get_group()
