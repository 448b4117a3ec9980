"""Cells with weights and norms over channels that nobody has written before, for tests."""

import torch
import torch.nn.functional as F
from torch import nn

from pararnn.cells import BlockGRUCell, LayerNormLSTMCell

INPUT = 6


class GatedLayer(nn.Module):
    """A gated hidden layer of another size inside the step, between two RMSNorms."""

    input_size, num_components = INPUT, 1

    def __init__(self, hidden_size=10, inner=7):
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(INPUT, hidden_size)
        self.up = nn.Linear(hidden_size, 2 * inner)
        self.down = nn.Linear(inner, hidden_size, bias=False)
        self.before, self.after = nn.RMSNorm(hidden_size, eps=0.1), nn.RMSNorm(inner, eps=0.1)

    def forward(self, x, h):
        a, b = self.up(self.before(h)).chunk(2, -1)
        return 0.5 * h + torch.tanh(self.input(x) + self.down(self.after(a * torch.sigmoid(b))))


class Attending(nn.Module):
    """A softmax over channels, and one over the channels of each head."""

    input_size, hidden_size, num_components = INPUT, 12, 2

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, 12)
        self.mix = nn.Linear(12, 12, bias=False)

    def forward(self, x, state):
        h, c = state
        weights = torch.softmax(self.mix(h) + self.input(x), -1)
        heads = torch.softmax(h.unflatten(-1, (3, 4)), -1).flatten(1)
        return torch.tanh(weights * 4 + c), torch.sin(heads + 0.3 * c + self.mix(h * weights))


class NormedHeads(nn.Module):
    """Heads that reach only themselves, each with a LayerNorm."""

    input_size, hidden_size, num_components = INPUT, 15, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, 15)
        self.blocks = nn.Parameter(torch.randn(3, 5, 5) * 0.5)
        self.norm = nn.LayerNorm(5, eps=0.1)

    def forward(self, x, h):
        mixed = torch.einsum("nhi,hij->nhj", h.unflatten(1, (3, 5)), self.blocks)
        return torch.tanh(self.input(x) + self.norm(mixed).flatten(1))


class MixedHeads(nn.Module):
    """A LayerNorm per head and then one of all channels, between dense weights."""

    input_size, hidden_size, num_components = INPUT, 15, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, 15)
        self.first, self.second = (nn.Linear(15, 15, bias=False) for _ in range(2))
        self.heads, self.norm = nn.LayerNorm(5, eps=0.1), nn.LayerNorm(15, eps=0.1)

    def forward(self, x, h):
        heads = self.heads(self.first(h).unflatten(1, (3, 5))).flatten(1)
        return torch.tanh(self.input(x) + self.second(self.norm(heads + h)))


class Extremes(nn.Module):
    """Extremes, norms and variances of parts and of all, without a weight but one of one row."""

    input_size, hidden_size, num_components = INPUT, 8, 1

    def __init__(self):
        super().__init__()
        self.input = nn.Linear(INPUT, 8)
        self.score = nn.Linear(8, 1)

    def forward(self, x, h):
        low, high = h.amin(-1, keepdim=True), h.unflatten(1, (2, 4)).amax(-1)
        spread = F.normalize(h, dim=-1) * h.std(-1, keepdim=True) + self.score(h).sigmoid()
        return torch.tanh(self.input(x) - low * h + high.repeat_interleave(4, 1) + spread)


NORMED = {
    "block_gru": lambda: BlockGRUCell(INPUT, 24, num_blocks=4),
    "layer_norm_lstm": lambda: LayerNormLSTMCell(INPUT, 9),
    "gated_layer": GatedLayer,
    "attending": Attending,
    "normed_heads": NormedHeads,
    "mixed_heads": MixedHeads,
    "extremes": Extremes,
}
