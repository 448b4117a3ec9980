"""Prepares a model for training: recomputation, compilation, shards over processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from pararnn.distributed import on_this_rank, sequence_parallel
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.training.config import ExecutionConfig
from pararnn.lm.training.initial import around, blocks, is_empty, start_around, start_block
from pararnn.lm.training.parallel import Processes


def lay_out(
    loss: CausalLoss, execution: ExecutionConfig, processes: Processes, seed: int = 0
) -> None:
    """Prepare a model for training, block after block.

    A model without values gets its initial ones here; no process holds more of it at a time than
    one block, what is around the blocks, and its own parts.

    Several processes hold a part of every parameter and of its optimiser state each (FSDP2): a
    block's parameters are gathered when it runs, and its gradients are averaged in float32. In
    bfloat16 the matrix products run under autocast, as in a single process, rather than by the
    policy of FSDP: so a result does not depend on the number of processes by more than rounding.
    The price is that parameters are gathered in float32. Processes that share a sequence have such
    parts too: gradients are averaged over all processes, each of which has as many tokens.

    A block is brought to the device whole, so that its recurrence is traced there before anything
    is compiled. What is recomputed lies inside what is compiled, and that inside the hooks of a
    shard, which are not compiled and gather its parameters once for both.

    Args:
        loss: Whole in every process, or an `outline`.
        execution: Recomputation and compilation.
        processes: That train together.
        seed: Of the initial values of an `outline`.
    """
    model, device = loss.model, processes.device
    loss.compiled = execution.compile
    mesh = init_device_mesh(device.type, (processes.count,)) if processes.count > 1 else None
    parts = blocks(model)
    for index, block in enumerate(parts):
        if is_empty(block):
            block = parts[index] = start_block(model, index, seed)
        block.to(device)
        _dress(block, execution, recomputes=recomputes(execution, processes))
        if mesh is not None:
            fully_shard(block, mesh=mesh)
    if model.get_input_embeddings().weight.is_meta:
        start_around(model, parts, seed)
    for module in around(loss, parts):
        module._apply(lambda tensor: tensor.to(device), recurse=False)
    if mesh is not None:
        fully_shard(loss, mesh=mesh)
    if execution.sequence_parallel > 1:
        mesh = mesh_of(processes, execution.sequence_parallel)
        sequence_parallel(loss, mesh["sequence"])


def mesh_of(processes: Processes, parts: int) -> DeviceMesh:
    """All processes by the sequences, and by the parts of time of a sequence, that they have."""
    shape = (processes.count // parts, parts)
    return init_device_mesh(processes.device.type, shape, mesh_dim_names=("data", "sequence"))


def start_compilers(execution: ExecutionConfig, device: torch.device) -> None:
    """Start the processes that compile kernels side by side, while data and model are made.

    PyTorch starts them for the first kernel, and compiles one after another until they run.
    """
    if not execution.compile or device.type != "cuda":
        return
    from torch._inductor.async_compile import AsyncCompile, maybe_warm_pool

    maybe_warm_pool()
    AsyncCompile.use_process_pool()


def may_recompute(execution: ExecutionConfig) -> bool:
    """Whether activations may be computed again where they need not."""
    return execution.activation_checkpointing != "off"


def recomputes(execution: ExecutionConfig, processes: Processes) -> bool:
    """Whether training begins with activations computed again in the backward pass.

    With "auto" a single process tries without. Several cannot: while one of them is out of memory,
    the others wait for it.
    """
    asked = execution.activation_checkpointing
    return asked == "on" or (asked == "auto" and processes.count > 1)


def recompute(loss: CausalLoss, execution: ExecutionConfig) -> None:
    """Compute activations again from now on, in a model that `lay_out` left for one process."""
    for block in blocks(loss.model):
        _dress(block, execution, recomputes=True)


def _dress(block: nn.Module, execution: ExecutionConfig, *, recomputes: bool) -> None:
    """Give a block the forward pass that it trains with."""
    forward = type(block).forward.__get__(block)
    if recomputes:
        forward = _recomputed(forward)
    block.forward = torch.compile(forward) if execution.compile else forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function and no `partial`, since the compiler cannot trace into a `partial`."""

    def run(*inputs: Any, **options: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    return run


@contextmanager
def looking(loss: CausalLoss) -> Iterator[None]:
    """Run a model between train steps: in evaluation mode, without gradients, on whole sequences.

    Blocks run as they are written, or they would be compiled for this as well. What is around the
    blocks is in parts again at the end: only a backward pass would see to that.
    """
    was_training = loss.model.training
    loss.model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), on_this_rank(loss):
            yield
    finally:
        loss.model.train(was_training)
        if isinstance(loss, FSDPModule):
            loss.reshard()


def gather_on_first(tensors: dict[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Whole copies on the CPU of the first process; empty on the others, which must call it too."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.is_first:
            whole[name] = full.detach().to("cpu", copy=True)
    return whole
