"""What the ready-made cells share: the input projection in heads, and its initialisation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pararnn._whole import check_whole


def check_sizes(input_size: int, hidden_size: int, num_heads: int) -> None:
    """Raise ValueError unless both sizes are positive multiples of the number of heads."""
    check_whole(input_size=input_size, hidden_size=hidden_size, num_heads=num_heads)
    for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
        if size < 1 or num_heads < 1 or size % num_heads:
            raise ValueError(
                f"{name} {size} cannot be split into {num_heads} heads; choose num_heads >= 1 "
                f"that divides input_size {input_size} and hidden_size {hidden_size}."
            )


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Apply one block of `weight` per head and gate.

    Args:
        x: Inputs, shape (N, input_size).
        weight: Shape (heads, gates, hidden_size / heads, input_size / heads).
        bias: Shape (gates, hidden_size), or None.

    Returns:
        One tensor (N, hidden_size) per gate; slices of a single GEMM output, heads beside heads.
    """
    heads, gates, head_size, head_inputs = weight.shape
    if heads == 1:
        flat_bias = None if bias is None else bias.flatten()
        out = F.linear(x, weight.reshape(gates * head_size, head_inputs), flat_bias)
        return out.unflatten(-1, (gates, head_size)).unbind(-2)
    x_heads = x.unflatten(-1, (heads, head_inputs)).transpose(0, 1)
    blocks = torch.bmm(x_heads, weight.flatten(1, 2).mT).unflatten(-1, (gates, head_size))
    outs = [gate.flatten(-2) for gate in blocks.permute(1, 2, 0, 3).unbind(1)]
    if bias is None:
        return tuple(outs)
    return tuple(out + b for out, b in zip(outs, bias, strict=True))


def init_projection_(weight: Tensor, bias: Tensor | None) -> None:
    """Kaiming uniform for every head's block, zero bias (Danieli et al. 2025, C.1)."""
    bound = math.sqrt(6.0 / weight.shape[-1])
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.zeros_(bias)


@torch.no_grad()
def init_timescales_(bias: Tensor, sign: int, longest: float, num_heads: int) -> None:
    """Biases of a gate that keeps `1 - 1 / timescale` of the state: from 2 steps to the longest.

    Evenly in the logarithm, over the whole range in every head, as state space models choose their
    time steps (Gu et al. 2022, arXiv 2206.12037); uniform times (Tallec and Ollivier 2018,
    arXiv 1804.11188) leave few short ones.

    Args:
        bias: Shape (hidden_size,).
        sign: 1 when the open gate keeps the state, -1 when the shut one does.
        longest: In steps, at least 2.
        num_heads: Heads, whose channels stand side by side.
    """
    share = torch.linspace(0, 1, len(bias), device=bias.device).reshape(-1, num_heads).T.flatten()
    timescale = 2 * (longest / 2) ** share
    bias.copy_(sign * torch.log(timescale - 1))


def init_diagonal_(weight: Tensor) -> None:
    """Xavier Gaussian: the entries of a square matrix of which this is the diagonal."""
    nn.init.normal_(weight, std=1.0 / math.sqrt(weight.shape[-1]))
