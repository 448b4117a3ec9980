"""Cells that only the tests know, each with something that the ready-made ones do not have."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import pararnn

INPUT, HIDDEN = 5, 7


class Cell(nn.Module):
    input_size, hidden_size, num_components = INPUT, HIDDEN, 1

    def __init__(self, gates):
        super().__init__()
        self.input = nn.Linear(INPUT, gates * HIDDEN)
        self.diagonal = nn.Parameter(torch.randn(gates, HIDDEN) * 0.5)


class SlowGates(Cell):
    """Forgets over about 150 steps, so that no warm-up reaches back far enough."""

    def __init__(self):
        super().__init__(2)
        nn.init.constant_(self.input.bias[:HIDDEN], -5.0)

    def forward(self, x, h):
        u, v = self.input(x).chunk(2, -1)
        z = torch.sigmoid(u + self.diagonal[0] * h)
        return (1 - z) * h + z * torch.tanh(v + self.diagonal[1] * h)


class Exponential(Cell):
    """sLSTM: exponential gates with a stabiliser; state (h, c, n, m)."""

    num_components = 4

    def __init__(self):
        super().__init__(4)

    def forward(self, x, state):
        h, c, n, m = state
        i, f, z, o = (self.input(x).unflatten(-1, (4, HIDDEN)) + self.diagonal * h[:, None]).unbind(
            1
        )
        log_forget = F.logsigmoid(f)
        new_m = torch.maximum(log_forget + m, i)
        forget, add = torch.exp(log_forget + m - new_m), torch.exp(i - new_m)
        c = forget * c + add * torch.tanh(z)
        n = forget * n.abs() + add
        return torch.sigmoid(o) * c / n.clamp_min(1e-2), c, n, new_m


class Unusual(Cell):
    """Operations that gates are not made of; state (h, phase, power)."""

    num_components = 3

    def __init__(self):
        super().__init__(3)

    def forward(self, x, state):
        h, phase, power = state
        a, b, c = self.input(x).split(HIDDEN, -1)
        phase = torch.remainder(phase + 0.3 * F.softplus(a), 2.0)
        power = torch.sqrt(0.9 * power * power + 0.1 * b.square() + 1e-3)
        new = torch.sin(phase * self.diagonal[0]) * torch.atan(c + self.diagonal[1] * h)
        return torch.where(h > 0.2, new, torch.lerp(new, h / (1 + power), 0.4)), phase, power


class WeightNorm(Cell):
    """Weights that are computed by parametrisations."""

    def __init__(self):
        super().__init__(2)
        parametrizations.weight_norm(self.input)
        parametrizations.weight_norm(self, "diagonal", dim=1)

    def forward(self, x, h):
        u, v = self.input(x).chunk(2, -1)
        z = torch.sigmoid(u + self.diagonal[0] * h)
        return torch.lerp(h, torch.tanh(v + self.diagonal[1] * h), z)


class LoRALinear(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + F.linear(F.linear(x, self.down), self.up) * 0.5


def lora():
    """ParaGRU-like cell whose projection is frozen and adapted."""
    cell = WeightNorm()
    nn.utils.parametrize.remove_parametrizations(cell.input, "weight")
    cell.input = LoRALinear(cell.input)
    return cell


class Heads(Cell):
    """Views into heads, concatenated gates; state (h, c)."""

    hidden_size, num_components = 6, 2

    def __init__(self):
        super().__init__(1)
        self.input = nn.Linear(INPUT, 18, bias=False)
        self.diagonal = nn.Parameter(torch.randn(12) * 0.5)
        self.scale = nn.Parameter(torch.randn(3, 2))

    def forward(self, x, state):
        h, c = state
        x_z, x_f, x_o = self.input(x).view(-1, 3, 6).unbind(1)
        gates = torch.cat([x_f, x_o], -1) + self.diagonal * torch.cat([h, c], -1)
        f, o = torch.sigmoid(gates).chunk(2, dim=-1)
        c_heads = f.unflatten(-1, (3, 2)) * c.view(-1, 3, 2) + x_z.view(-1, 3, 2) * self.scale
        c = torch.tanh(c_heads).flatten(1)
        return o * c, c


class Surroundings(Cell):
    """Buffers, plain tensor attributes, constants, in-place operations, no_grad and detach."""

    def __init__(self):
        super().__init__(2)
        self.register_buffer("decay", torch.linspace(0.1, 0.9, HIDDEN))
        self.offset = torch.linspace(-1, 1, HIDDEN)

    def forward(self, x, h):
        u, v = self.input(x).chunk(2, -1)
        z = u + self.diagonal[0] * h
        z.mul_(self.decay.to(z.dtype)).sigmoid_()
        with torch.no_grad():
            limit = 1.0 + h.abs()
        new = torch.tanh(v + self.diagonal[1] * h) + self.offset.to(z.dtype)
        new += 0.1 * h.detach() / limit
        return h + z * (new - h)


class Masked(Cell):
    """A mask computed from x switches the update off; the state is clamped softly."""

    def __init__(self):
        super().__init__(2)

    def forward(self, x, h):
        u, v = self.input(x).chunk(2, -1)
        update = x[:, :1] > -0.7
        new = torch.clamp(F.silu(u) * h * self.diagonal[0] + F.gelu(v), -1.5, 1.5)
        return torch.where(update, new, h) * torch.exp(-(self.diagonal[1] ** 2))


class Chaotic(Cell):
    """Large weights: neighbouring states part quickly, and Newton from afar overshoots."""

    def __init__(self):
        super().__init__(2)
        nn.init.uniform_(self.diagonal, -3.0, 3.0)

    def forward(self, x, h):
        u, v = self.input(x).chunk(2, -1)
        return torch.tanh(u + self.diagonal[0] * h) + 0.3 * torch.sin(v + self.diagonal[1] * h)


def paragru():
    return pararnn.cells.ParaGRUCell(INPUT, HIDDEN)


def paralstm():
    return pararnn.cells.ParaLSTMCell(INPUT, HIDDEN)


def projected_heads():
    """Its drives lie in memory head by head."""
    return pararnn.cells.ParaGRUCell(6, 9, num_heads=3)


CELLS = {
    "paragru": paragru,
    "paralstm": paralstm,
    "projected_heads": projected_heads,
    "slow_gates": SlowGates,
    "exponential": Exponential,
    "unusual": Unusual,
    "weight_norm": WeightNorm,
    "lora": lora,
    "heads": Heads,
    "surroundings": Surroundings,
    "masked": Masked,
}

MATRICES = {  # as states, with readouts
    "outer_memory": lambda: pararnn.cells.OuterMemoryCell(INPUT, 3, 2, num_heads=2),
    "m2rnn": lambda: pararnn.cells.M2RNNCell(INPUT, 3, 2, num_heads=2),
    "delta_memory": lambda: pararnn.cells.DeltaMemoryCell(INPUT, 3, 2, num_heads=2),
}
NORMS = {  # inside steps whose channels all reach each other
    "block_gru": lambda: pararnn.cells.BlockGRUCell(INPUT, 6, num_blocks=2),
    "layer_norm_lstm": lambda: pararnn.cells.LayerNormLSTMCell(INPUT, 6),
}


def make_cell(name, dtype=torch.float64):
    """A cell with no parameter left at a trivial value."""
    torch.manual_seed(3)
    cell = (CELLS | MATRICES | NORMS)[name]()
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return cell.to(dtype)
