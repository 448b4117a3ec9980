"""How a model is laid out before training: recomputation, compilation, shards over processes."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pararnn.models.causal_loss import CausalLoss
from pararnn.training.config import ExecutionConfig
from pararnn.training.parallel import Processes


def lay_out(loss: CausalLoss, execution: ExecutionConfig, processes: Processes) -> None:
    """Bring a model that is whole and on the CPU to where and how it trains.

    Several processes hold a part of every parameter and of its optimiser state each (FSDP2): a
    block's parameters are gathered when it runs, and its gradients are averaged in float32. In
    bfloat16 the matrix products run under autocast, as in a single process, rather than by the
    policy of FSDP: so a result does not depend on the number of processes by more than rounding.
    The price is that parameters are gathered in float32.

    The order matters: what is recomputed lies inside what is compiled, and that inside the hooks of
    a shard, which are not compiled and gather its parameters once for both.
    """
    loss.compiled = execution.compile
    for block in blocks(loss.model):
        if execution.activation_checkpointing:
            block.forward = _recomputed(block.forward)
        if execution.compile:
            block.forward = torch.compile(block.forward)
    if processes.count == 1:
        loss.to(processes.device)
        return
    # A block's last state may be a view of its output; nobody writes into either.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for block in blocks(loss.model):
        fully_shard(block, mesh=mesh)
    fully_shard(loss, mesh=mesh)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own and no `partial`, for the compiler sees only into functions."""

    def run(*inputs: Any, **options: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return run


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The repeated parts of a model, which transformers keeps on one device each."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def gather_on_first(tensors: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Whole copies on the CPU of the first process; empty on the others, which must call it too."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.is_first:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole
