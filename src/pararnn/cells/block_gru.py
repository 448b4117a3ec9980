r"""Block GRU of DreamerV3 (Hafner et al. 2023, arXiv 2301.04104; `RSSM._core` of its release).

    e       = silu(rms(W h + b_e))              the state in brief, read by all blocks
    u       = silu(rms(R h + V e + B x + b_u))
    r, c, z = G u + b_g                         for each gate
    c       = tanh(sigmoid(r) * c)
    z       = sigmoid(z - 1)
    h'      = (1 - z) * h + z * c

`R` and each gate's `G` have one full block per group of channels; `W`, `V` and `B` are full. `rms`
is RMSNorm over all channels, with a learned scale. `W h` has as many channels as one block, as in
all published sizes, so that every weight on the state has hidden_size^2 / num_blocks entries.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pararnn._whole import check_whole
from pararnn.cells._input import project

_GATES = 3
_EPS = 1e-4  # as published


class BlockGRUCell(nn.Module):
    """One step of DreamerV3's sequence model, a GRU with a normed layer before its gates.

    `x` is what the world model embeds outside of the recurrence: the stochastic state and the
    action, side by side. All channels mix: the blocks through `e` and the norms.

    Args:
        input_size: Size of `x`.
        hidden_size: Size of the state.
        num_blocks: Blocks of the recurrent weights; must divide `hidden_size`.
        device: Where to make the parameters.
        dtype: Their type.

    Shapes: `x` (N, input_size); the state, and the result like it, (N, hidden_size).

    Raises:
        TypeError: A size is no whole number.
        ValueError: A size is not positive, or the blocks do not divide `hidden_size`.
    """

    num_components = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_blocks: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole(input_size=input_size, hidden_size=hidden_size, num_blocks=num_blocks)
        if input_size < 1:
            raise ValueError(f"input_size is {input_size}; it must be at least 1.")
        if hidden_size < 1 or num_blocks < 1 or hidden_size % num_blocks:
            raise ValueError(
                f"hidden_size {hidden_size} cannot be split into {num_blocks} blocks; choose "
                "num_blocks >= 1 that divides hidden_size."
            )
        self.input_size, self.hidden_size, self.num_blocks = input_size, hidden_size, num_blocks
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        size = hidden_size // num_blocks
        self.brief = nn.Linear(hidden_size, size, **options)
        self.brief_norm = nn.RMSNorm(size, eps=_EPS, **options)
        self.input = nn.Linear(input_size, hidden_size, **options)
        self.spread = nn.Linear(size, hidden_size, bias=False, **options)
        self.recurrent = nn.Parameter(torch.empty(num_blocks, 1, size, size, **options))
        self.norm = nn.RMSNorm(hidden_size, eps=_EPS, **options)
        self.gates = nn.Parameter(torch.empty(num_blocks, _GATES, size, size, **options))
        self.bias = nn.Parameter(torch.empty(_GATES, hidden_size, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / (terms of the sum that they enter), biases 0, scales 1.

        `R h`, `V e` and `B x` add up to one sum and count as one, so that no part drowns another.
        """
        size = self.hidden_size // self.num_blocks
        nn.init.normal_(self.brief.weight, std=1 / math.sqrt(self.hidden_size))
        for weight in (self.recurrent, self.spread.weight, self.input.weight):
            nn.init.normal_(weight, std=1 / math.sqrt(2 * size + self.input_size))
        nn.init.normal_(self.gates, std=1 / math.sqrt(size))
        for bias in (self.brief.bias, self.input.bias, self.bias):
            nn.init.zeros_(bias)
        self.brief_norm.reset_parameters()
        self.norm.reset_parameters()

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        h = state
        e = F.silu(self.brief_norm(self.brief(h)))
        (r_h,) = project(h, self.recurrent, None)
        u = F.silu(self.norm(self.input(x) + r_h + self.spread(e)))
        r, c, z = project(u, self.gates, self.bias)
        c = torch.tanh(torch.sigmoid(r) * c)
        z = torch.sigmoid(z - 1)
        return (1 - z) * h + z * c

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.input_size}, {self.hidden_size}, num_blocks={self.num_blocks}"
