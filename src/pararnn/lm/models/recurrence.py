"""The mixer of a cell: two branches, a convolution, the recurrence and a gated norm.

u, gate = W_in x, W_gate x
y       = RNN(silu(conv(u)))
output  = W_out norm(y * silu(gate))

Each branch has its own projection. If the branches were slices of one projection, their gradients
would have to be copied into one tensor.
"""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from pararnn import RNN
from pararnn.lm.catalogue import CELLS
from pararnn.lm.models.boundaries import Boundaries
from pararnn.lm.models.cache import LayerState
from pararnn.lm.models.configuration import ParaRNNConfig
from pararnn.lm.models.convolution import CausalConvolution
from pararnn.lm.models.projection import ResidualProjection


class GatedRMSNorm(nn.RMSNorm):
    """RMSNorm of `y * silu(gate)`."""

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override] # takes the gate
        """Norm of the gated y; both (..., inner_size)."""
        gated = y * F.silu(gate)
        weight = self.weight.to(gated.dtype)
        return F.rms_norm(gated, self.normalized_shape, weight, self.eps)


def initialises_itself(module: nn.Module) -> bool:
    """Whether a module is part of a cell. Cells keep the weights that they were made with."""
    return getattr(module, "_part_of_cell", False)


def keep_own_initialisation(cell: nn.Module) -> None:
    """Keep transformers from initialising a cell, unless it was made on the meta device."""
    for module in cell.modules():
        module._part_of_cell = True  # type: ignore[assignment] # a mark
        if all(not parameter.is_meta for parameter in module.parameters(recurse=False)):
            module._is_hf_initialized = True  # type: ignore[assignment] # transformers' mark


class ParaRNNMixer(nn.Module):
    """Mixes over time: two branches, convolution, recurrence, gated norm.

    Args:
        config: Shape of the model.
        cell: Name of the recurrence in `CELLS`.
    """

    def __init__(self, config: ParaRNNConfig, cell: str) -> None:
        super().__init__()
        size = config.inner_size
        self.in_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.gate_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.conv = CausalConvolution(size, config.conv_kernel)
        recurrence = CELLS[cell](size, size, num_heads=config.num_heads, **config.cell_options)
        keep_own_initialisation(recurrence)
        if not hasattr(recurrence, "input_size"):
            recurrence.input_size = size  # so that it is traced at once
        self.rnn = RNN(recurrence, backend=config.backend)
        self._check_output(cell, size)
        self.norm = GatedRMSNorm(size, eps=config.rms_norm_eps)
        self.out_proj = ResidualProjection(size, config.hidden_size, bias=False)

    def _check_output(self, cell: str, size: int) -> None:
        """Refuse a cell whose outputs do not fill the branch; on the meta device nobody knows."""
        if any(p.is_meta for p in self.rnn.cell.parameters()):
            return
        shape = self.rnn.output_shape
        if math.prod(shape) != size:
            raise ValueError(
                f"cell {cell!r} hands out {shape} for every token, {math.prod(shape)} numbers, but "
                f"the block has {size} channels (inner_size); the factory of a cell is called with "
                "(input_size, hidden_size), and its outputs must have hidden_size numbers."
            )

    def forward(
        self, x: Tensor, boundaries: Boundaries | None, state: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        """Mix x, shape (batch, time, hidden_size); returns the result and the state after it."""
        u, gate = self.in_proj(x), self.gate_proj(x)
        if boundaries is not None and boundaries.real is not None:
            u = u * boundaries.real
        window, recurrent = (None, None) if state is None else (state.window, state.recurrent)
        u, window = self.conv(u, window, boundaries)
        resets = None if boundaries is None else boundaries.resets
        y, recurrent = self.rnn(F.silu(u), recurrent, resets)
        y = y.flatten(2)  # the readout of a memory may hand out heads
        return self.out_proj(self.norm(y, gate)), LayerState(window, recurrent)
