"""Causal depthwise convolution over time that respects document boundaries."""

import math

import torch
from torch import Tensor, nn

from pararnn._words import counted
from pararnn.distributed import Ranks, hand_on
from pararnn.lm.models.boundaries import Boundaries


class CausalConvolution(nn.Module):
    """Filters each channel separately over the last `kernel_size` steps.

    Written as a sum of shifted inputs: it needs no transposition to channels first, and a
    boundary is a mask on a shift.

    Args:
        channels: Number of channels.
        kernel_size: Number of steps, with the current one.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel_size, channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.ranks: Ranks | None = None  # among which time is split
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(kernel_size), as in `nn.Conv1d`; zero bias."""
        bound = 1 / math.sqrt(self.weight.shape[0])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(
        self, u: Tensor, window: Tensor | None, boundaries: Boundaries | None
    ) -> tuple[Tensor, Tensor]:
        """Filter u, shape (batch, time, channels).

        `window` holds the last kernel_size - 1 inputs before u (None for zeros). Returns the
        result, shaped and typed as u, and the window after u.
        """
        batch, _, channels = u.shape
        history = self.weight.shape[0] - 1
        if window is None:
            window = u.new_zeros(batch, history, channels)
        if self.ranks is not None:
            return self._on_ranks(self.ranks, u, window, boundaries)
        return self._filter(u, window, boundaries)

    def _on_ranks(
        self, ranks: Ranks, u: Tensor, window: Tensor, boundaries: Boundaries | None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`: the window comes from the rank before, and the last one goes to all."""
        history = self.weight.shape[0] - 1
        if u.shape[1] < history:
            raise ValueError(
                f"a rank has {counted(u.shape[1], 'step')}, but a convolution looks back "
                f"{history}; split the "
                "sequence over fewer ranks."
            )
        last = u[:, u.shape[1] - history :]
        if boundaries is not None:
            document = boundaries.document[:, u.shape[1] - history :]
            last = last * (document == boundaries.document[:, -1:]).unsqueeze(-1)
        before, after = hand_on(window.to(u.dtype), last, ranks)
        return self._filter(u, before, boundaries)[0], after

    def _filter(
        self, u: Tensor, window: Tensor, boundaries: Boundaries | None
    ) -> tuple[Tensor, Tensor]:
        batch, time, _ = u.shape
        history = self.weight.shape[0] - 1
        inputs = torch.cat([window.to(u.dtype), u], dim=1)
        weight, bias = self.weight.to(u.dtype), self.bias.to(u.dtype)
        if boundaries is None:
            taps = [inputs[:, k : k + time] for k in range(history + 1)]
            return _weigh(taps, weight, bias), inputs[:, time:]
        document = boundaries.document
        past = torch.cat([document.new_zeros(batch, history), document], dim=1).unsqueeze(-1)
        now = document.unsqueeze(-1)
        taps = [
            inputs[:, k : k + time] * (past[:, k : k + time] == now) for k in range(history + 1)
        ]
        return _weigh(taps, weight, bias), inputs[:, time:] * (past[:, time:] == now[:, -1:])

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.weight.shape[1]}, kernel_size={self.weight.shape[0]}"


def _weigh(taps: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    total = torch.addcmul(bias, taps[0], weight[0])
    for tap, row in zip(taps[1:], weight[1:], strict=True):
        total = torch.addcmul(total, tap, row)
    return total
