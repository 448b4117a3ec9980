"""Tensors that move on by one entry with every step of generation, those of a type together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pararnn.kernels.triton.build import interpreted, missing
from pararnn.kernels.triton.device import on_device
from pararnn.planning.costs import COSTS


def move_on(held: Sequence[Tensor], newest: Sequence[Tensor]) -> None:
    """Drop the first entry of every tensor and append a new one, in place.

    Args:
        held: Each (texts, entries, ...), contiguous, of any sizes and types.
        newest: Each (texts, 1, ...).
    """
    alike: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
    for tensor, new in zip(held, newest, strict=True):
        alike.setdefault(tensor.dtype, []).append((tensor, new.to(tensor.dtype)))
    for pairs in alike.values():
        if _has_kernel(pairs[0][0]):
            _in_one_kernel(pairs)
            continue
        for tensor, _ in pairs:
            if tensor.shape[1] > 1:
                tensor[:, :-1] = tensor[:, 1:].clone()
        torch._foreach_copy_([tensor[:, -1:] for tensor, _ in pairs], [new for _, new in pairs])


def _has_kernel(tensor: Tensor) -> bool:
    there = (tensor.is_cuda or interpreted()) and missing("cuda") is None
    return there and not tensor.is_complex()


def _in_one_kernel(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    from pararnn.kernels.triton import moving  # needs Triton, which this module does not

    held = tuple(tensor for tensor, _ in pairs)
    newest = tuple(new.contiguous() for _, new in pairs)
    block, entries = COSTS.moved_entries, [tensor.shape[1] for tensor in held]
    programs = max(-(-tensor.numel() // block) for tensor in newest)
    with on_device(held[0]):
        moving.move_on[programs, len(held)](
            held,
            newest,
            tuple(len(tensor) for tensor in newest),
            tuple(entries),
            tuple(tensor[0].numel() for tensor in newest),
            MOST=1 << (max(entries) - 1).bit_length(),
            BLOCK=block,
        )
