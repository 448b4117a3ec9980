"""The mixer of a memory with a matrix state: one definition for all memories.

q, k, v = silu(conv(W_qkv x))               q and k of each head, or one for all heads
y       = memory(q, k, v, W_a x) + D v
x       = scale * x + W_out norm(y * silu(W_gate x))

This is the block of M2RNN (Mishra et al. 2026, arXiv 2603.14360) and, but for where the norm is, of
Gated DeltaNet (arXiv 2412.06464) and Mamba2 (arXiv 2405.21060).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pararnn import RNN
from pararnn.cells import MatrixMemoryCell
from pararnn.lm import linear
from pararnn.lm.catalogue import LINEAR, MEMORIES
from pararnn.lm.models.boundaries import Boundaries
from pararnn.lm.models.cache import LayerState, State
from pararnn.lm.models.configuration import ParaRNNConfig, options_of_memory
from pararnn.lm.models.convolution import CausalConvolution
from pararnn.lm.models.projection import ResidualProjection
from pararnn.lm.models.recurrence import GatedRMSNorm, keep_own_initialisation


class MemoryMixer(nn.Module):
    """Mixes over time by a memory: projections, convolution, memory, gated norm.

    Args:
        config: Shape of the model.
        name: Of the memory in `pararnn.lm.models.MEMORIES`.

    Raises:
        ValueError: The memory does not take `config.memory_options`.
    """

    def __init__(self, config: ParaRNNConfig, name: str) -> None:
        super().__init__()
        size = config.inner_size
        cell = _make(name, size, options_of_memory(name, config.memory_options, size))
        keep_own_initialisation(cell)
        convolved, gates = sum(cell.widths[:3]), sum(cell.widths[3:])
        self.in_proj = nn.Linear(config.hidden_size, convolved, bias=False)
        self.rate_proj = nn.Linear(config.hidden_size, gates, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.conv = CausalConvolution(convolved, config.conv_kernel)
        self.rnn = RNN(cell, backend=config.backend)
        self._check_output(name, size)
        self.operator = LINEAR.get(name)
        self.all_at_once = linear.choose(self.operator, cell, config.backend)
        self.skip = nn.Parameter(torch.ones(size))
        self.norm = GatedRMSNorm(size, eps=config.rms_norm_eps)
        self.out_proj = ResidualProjection(size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, boundaries: Boundaries | None, state: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        """Mix x, shape (batch, time, hidden_size); returns the result and the state after it."""
        u, gate = self.in_proj(x), self.gate_proj(x)
        if boundaries is not None and boundaries.real is not None:
            u = u * boundaries.real
        window, recurrent = (None, None) if state is None else (state.window, state.recurrent)
        u, window = self.conv(u, window, boundaries)
        u = F.silu(u)
        given = torch.cat([u, self.rate_proj(x)], -1)
        y, recurrent = self._remember(given, recurrent, boundaries)
        y = y + self.skip.to(y.dtype) * u[..., -y.shape[-1] :]
        return self.out_proj(self.norm(y, gate)), LayerState(window, recurrent)

    def _check_output(self, name: str, size: int) -> None:
        """Refuse a memory whose readout is not that of a block; on the meta device nobody knows."""
        if any(p.is_meta for p in self.rnn.cell.parameters()):
            return
        shape = self.rnn.output_shape
        if shape != (size,):
            raise ValueError(
                f"memory {name!r} hands out {shape} for every token, but its block takes "
                f"{(size,)}, the values of all heads side by side; write a `readout` that returns "
                "them so."
            )

    def _remember(
        self, given: Tensor, state: State | None, boundaries: Boundaries | None
    ) -> tuple[Tensor, State]:
        """What the memory reads out, (batch, time, inner_size), and its last state."""
        resets = None if boundaries is None else boundaries.resets
        cell: Any = self.rnn.cell
        whole = self.rnn.ranks is None
        if whole and self.all_at_once is not None and linear.fits(cell, given):
            assert not isinstance(state, tuple)  # a memory's is one tensor
            return linear.evaluate(self.all_at_once, self.operator, cell, given, state, resets)
        return self.rnn(given, state, resets)


def _make(name: str, size: int, options: dict[str, Any]) -> MatrixMemoryCell:
    others = {n: v for n, v in options.items() if n not in ("key_size", "value_size")}
    keys, values = options["key_size"], options["value_size"]
    try:
        cell = MEMORIES[name](None, keys, values, num_heads=size // values, **others)
    except TypeError as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"memory {name!r} does not take memory_options {options}: {reason}. They are key_size, "
            "value_size, shared_keys, and what else the memory takes by name, such as nonlinearity."
        ) from error
    if not isinstance(cell, MatrixMemoryCell):
        raise ValueError(
            f"memory {name!r} is a {type(cell).__name__}; give register_memory a factory that "
            "returns a MatrixMemoryCell, or register_cell one of any other cell."
        )
    return cell
