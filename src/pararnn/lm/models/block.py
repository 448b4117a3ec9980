"""The language-model block (Danieli et al. 2025, Figure 9).

x = scale * x + mixer(norm(x))
x = x + W_down (silu(W_gate norm(x)) * (W_up norm(x)))

Dropout, where there is any, is behind the mixer and W_down.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from pararnn.lm.catalogue import ATTENTION, MEMORIES
from pararnn.lm.models.attention import AttentionMixer, AttentionState
from pararnn.lm.models.boundaries import Boundaries
from pararnn.lm.models.cache import LayerState
from pararnn.lm.models.configuration import ParaRNNConfig
from pararnn.lm.models.memory import MemoryMixer
from pararnn.lm.models.projection import ResidualProjection
from pararnn.lm.models.recurrence import ParaRNNMixer


class SwiGLU(nn.Module):
    """`W_down (silu(W_gate x) * (W_up x))`."""

    def __init__(self, config: ParaRNNConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = ResidualProjection(
            config.intermediate_size, config.hidden_size, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform x, shape (..., hidden_size)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def make_mixer(config: ParaRNNConfig, name: str) -> nn.Module:
    """The mixer of one block: attention, a memory with a matrix state, or a cell."""
    if name == ATTENTION:
        return AttentionMixer(config)
    return MemoryMixer(config, name) if name in MEMORIES else ParaRNNMixer(config, name)


class ParaRNNBlock(GradientCheckpointingLayer):
    """Mixer and MLP, each behind a norm and with a residual; the mixer's has a learnable scale.

    Args:
        config: Shape of the model.
        mixer: A name as in `ParaRNNConfig.mixers`.
    """

    def __init__(self, config: ParaRNNConfig, mixer: str) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = make_mixer(config, mixer)
        self.residual_scale = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, boundaries: Boundaries | None, state: LayerState | AttentionState | None
    ) -> tuple[Tensor, LayerState | AttentionState]:
        """Transform x, shape (batch, time, hidden_size); returns it and the state after it."""
        mixed, state = self.mixer(self.mixer_norm(x), boundaries, state)
        x = self.residual_scale * x + self.dropout(mixed)
        return x + self.dropout(self.mlp(self.mlp_norm(x))), state
