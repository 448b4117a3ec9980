"""Cells whose state fits tiles, beyond what `random_steps` writes; `TILE_CELLS` has them by name.

Each has heads of keys x values, and takes apart x into a query, a key, a value, a second value and
two gates for every head.
"""

import torch
import torch.nn.functional as F
from torch import nn

TILE_CELLS = {}


def cell(kind):
    TILE_CELLS[kind.__name__] = kind
    return kind


def outer(key, value):
    return key[..., :, None] * value[..., None, :]


class Memory(nn.Module):
    """What the cells share; `weights` has parameters, with letters for the sizes of their axes."""

    weights = ""

    def __init__(self, heads=2, keys=5, values=6):
        super().__init__()
        self.heads, self.keys, self.values = heads, keys, values
        self.state_shape = (heads, keys, values)
        self.input_size = heads * (2 * keys + 2 * values + 2)
        sizes = {"h": heads, "k": keys, "v": values, "1": 1, "2": 2, "7": 7, "9": 9}
        sizes["V"] = 2 * values
        for text in self.weights.split():
            name, letters = text.split(":")
            shape = [sizes[letter] for letter in letters]
            setattr(self, name, nn.Parameter(0.7 * torch.randn(shape) * shape[-1] ** -0.5))

    def split(self, x):
        x = x.unflatten(-1, (self.heads, -1))
        return x.split([self.keys, self.keys, self.values, self.values, 2], -1)

    def new(self, x):
        _, key, value, *_ = self.split(x)
        return outer(key, value)

    def readout(self, x, state):
        return torch.einsum("nhk,nhkv->nhv", self.split(x)[0], state)


@cell
class WeightAndItsTranspose(Memory):
    weights = "w:vv"

    def forward(self, x, state):
        return torch.tanh(torch.sin(state @ self.w) @ self.w.T + self.new(x))


@cell
class AntisymmetricWeight(Memory):
    weights = "w:vv"

    def forward(self, x, state):
        return torch.tanh(state @ (self.w - self.w.T) + self.new(x))


@cell
class WeightsOnBothSides(Memory):
    weights = "u:kk w:vv"

    def forward(self, x, state):
        return torch.tanh(self.u @ state @ self.w + self.new(x))


@cell
class WeightPerHead(Memory):
    weights = "w:hvv b:h1v"

    def forward(self, x, state):
        return torch.tanh(state @ self.w + self.b + self.new(x))


@cell
class HeadsMix(Memory):
    weights = "w:hh"

    def forward(self, x, state):
        return torch.tanh(torch.einsum("nhkv,hg->ngkv", state, self.w) + self.new(x))

    def readout(self, x, state):
        return 2 * state


@cell
class OtherInnerSizes(Memory):
    """Products of two weights along values and along keys, with more entries between them."""

    weights = "a:v7 b:7v c:9k d:k9"

    def forward(self, x, state):
        along_keys = self.d @ torch.tanh(self.c @ state)
        return torch.tanh(torch.relu(state @ self.a + 0.1) @ self.b + along_keys + self.new(x))


@cell
class Gram(Memory):
    """Keys times keys, which is not symmetric."""

    weights = "w:vv"

    def forward(self, x, state):
        gram = 0.3 * (state @ self.w) @ state.mT
        return torch.tanh(gram @ state + self.new(x))


@cell
class GramOfTheTranspose(Gram):
    def forward(self, x, state):
        gram = 0.3 * (state @ self.w) @ state.mT
        return torch.tanh(gram.mT @ state + self.new(x))


@cell
class Square(Memory):
    """Its key is a value as well, where there are as many."""

    def __init__(self, heads=2, keys=5):
        super().__init__(heads, keys, keys)

    def forward(self, x, state):
        _, key, value, *_ = self.split(x)
        old = torch.einsum("nhk,nhkv->nhv", F.normalize(key, dim=-1), state)
        return 0.9 * state + outer(key, value - old)


@cell
class KeyAsValue(Square):
    def forward(self, x, state):
        _, key, *_ = self.split(x)
        return torch.tanh(state - state.mean(-1, keepdim=True) + outer(key, key))


@cell
class AddsItsTranspose(Square):
    def forward(self, x, state):
        return torch.tanh(0.5 * state.mT + 0.3 * state + self.new(x))


@cell
class MultipliesItself(Square):
    def forward(self, x, state):
        return torch.tanh(0.5 * state @ state + self.new(x))


@cell
class OneWeightOnBothSides(Square):
    weights = "w:vv"

    def forward(self, x, state):
        return torch.tanh(self.w @ state + state @ self.w + self.new(x))


@cell
class ReadsAlongBoth(Square):
    def readout(self, x, state):
        _, _, _, other, _ = self.split(x)
        along_values = torch.einsum("nhkv,nhv->nhk", state, other)
        return super().readout(x, state) + along_values


@cell
class Norms(Memory):
    weights = "a:v b:v c:k"

    def forward(self, x, state):
        state = F.layer_norm(state, (self.values,), self.a, self.b, eps=0.1)
        state = state + F.rms_norm(state.mT, (self.keys,), self.c, eps=0.1).mT
        return 0.5 * F.layer_norm(state, state.shape[-2:], eps=0.1) + self.new(x)


@cell
class SumsAlongKeysAndValues(Memory):
    def forward(self, x, state):
        state = state - state.amax(-2, keepdim=True) + state.amin(-1, keepdim=True)
        state = state / (0.5 + state.norm(dim=-1, keepdim=True)) + F.normalize(state + 3, dim=-2)
        state = state - 0.1 * state.mean((-1, -2), keepdim=True)
        return torch.softmax(state, -1) + torch.softmax(state, -2) + 0.1 * self.new(x)


@cell
class GatesOfAllKinds(Memory):
    def forward(self, x, state):
        key, _, _, value, gates = (torch.sigmoid(part) for part in self.split(x))
        return gates[..., :1, None] * key[..., None] * value[..., None, :] * state + self.new(x)


@cell
class ParametersOfAllKinds(Memory):
    weights = "a:h11 b:k1 c:v d:vkh e:1 f:hk1"

    def forward(self, x, state):
        gate = self.a + self.b + self.c + self.d.permute(2, 1, 0) + self.e + self.f
        return torch.sigmoid(gate) * state + self.new(x) * torch.exp(self.a)

    def readout(self, x, state):
        return super().readout(x, state) * self.c + x[:, :1, None]


@cell
class DriveTwice(Memory):
    """In the step and in the readout, on its own and in products."""

    def forward(self, x, state):
        _, key, value, *_ = self.split(x)
        return torch.tanh(state * key[..., None] + outer(key, value) + value[..., None, :])

    def readout(self, x, state):
        _, key, value, *_ = self.split(x)
        return torch.einsum("nhk,nhkv->nhv", key, state) * value + value


@cell
class Masks(Memory):
    def forward(self, x, state):
        query, key, value, _, gates = self.split(x)
        state = torch.where(gates[..., :1, None] > 0, 0.5 * state, torch.tanh(state + self.new(x)))
        state = state.masked_fill(key[..., None] + value[..., None, :] > 1, 0.1)
        return state.masked_fill((query > 1)[..., None], 0.3)

    def readout(self, x, state):
        return super().readout(x, state).masked_fill(self.split(x)[3] > 0, 0.1)


@cell
class DrivesWithoutGradient(Memory):
    def forward(self, x, state):
        _, key, value, _, gates = self.split(x)
        return torch.sigmoid(gates[..., :1, None].detach()) * state + outer(key.detach(), value)

    def readout(self, x, state):
        return super().readout(x.detach(), state)


@cell
class ReadoutWithoutGradient(Memory):
    weights = "w:vv"

    def forward(self, x, state):
        return torch.tanh(state @ self.w + self.new(x))

    def readout(self, x, state):
        return super().readout(x, state).detach()


@cell
class ReadsNumbers(Memory):
    """One for each head, from both axes of the tile."""

    def forward(self, x, state):
        return torch.tanh(0.9 * state - 0.1 * state.mean(-1, keepdim=True) + self.new(x))

    def readout(self, x, state):
        query, _, _, other, _ = self.split(x)
        return torch.einsum("nhk,nhkv,nhv->nh", query, state, other)


@cell
class ReadsAllMoved(Memory):
    weights = "w:vv"

    def forward(self, x, state):
        return torch.tanh(state @ self.w + self.new(x))

    def readout(self, x, state):
        return 2 * state.permute(0, 3, 1, 2)


@cell
class ReadsScaledByASum(Memory):
    """The sum goes along an axis that the result has."""

    weights = "w:kk"

    def forward(self, x, state):
        return torch.tanh(self.w @ state + self.new(x))

    def readout(self, x, state):
        found = super().readout(x, state)
        return found * state.mean((-1, -2))[..., None] + found * found.sum(-1, keepdim=True)


@cell
class ReadsByAWeight(Memory):
    """Along an axis along which the step does not mix."""

    weights = "w:kk o:vv"

    def forward(self, x, state):
        return torch.tanh(self.w @ state + self.new(x))

    def readout(self, x, state):
        return torch.tanh(state @ self.o).sum(-2)


@cell
class WithNormaliser(Memory):
    """Two tensors of one shape."""

    num_components = 2

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.state_shape = (self.state_shape, self.state_shape)

    def forward(self, x, state):
        memory, weight = state
        new = self.new(x)
        memory = torch.tanh(memory - memory.mean(-1, keepdim=True) * weight + new)
        return memory, 0.5 * weight + 0.1 * new

    def readout(self, x, state):
        memory, weight = state
        found = super().readout(x, memory)
        return found / (1 + super().readout(x, weight).abs())


@cell
class Reflections(Memory):
    """Two products of Householder's, one along keys and one along values."""

    def forward(self, x, state):
        _, key, value, other, _ = self.split(x)
        key, value = F.normalize(key, dim=-1), F.normalize(value, dim=-1)
        state = state - 1.5 * outer(key, torch.einsum("nhk,nhkv->nhv", key, state))
        state = state - outer(torch.einsum("nhkv,nhv->nhk", state, value), value)
        return 0.9 * state + outer(key, other)


@cell
class Slots(Memory):
    """Attention of a query to slots, which it writes to."""

    def forward(self, x, state):
        _, _, value, query, _ = self.split(x)
        found = torch.softmax(torch.einsum("nhkv,nhv->nhk", state, query), -1)
        return state + found[..., None] * (value[..., None, :] - state)


@cell
class FourAxes(nn.Module):
    state_shape, input_size = (2, 3, 4, 5), 120

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(0.4 * torch.randn(5, 5))
        self.u = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x, state):
        mixed = torch.einsum("nabcd,de->nabce", state, self.w) + state.mean(2, keepdim=True)
        return torch.tanh(mixed + x.view(-1, 2, 3, 4, 5) * self.u)

    def readout(self, x, state):
        return state.amax(4)


# States of tensors that lie side by side


class WithVector(Memory):
    """A memory, and a vector of its keys: the sum of the keys, say."""

    num_components = 2

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.state_shape = (self.state_shape, (self.heads, self.keys))

    def readout(self, x, state):
        """What linear attention reads, with its denominator."""
        memory, total = state
        query = self.split(x)[0]
        scale = 1 + (query * total).sum(-1, keepdim=True).abs()
        return super().readout(x, memory) / scale


@cell
class LinearAttention(WithVector):
    def forward(self, x, state):
        memory, total = state
        _, key, _, _, gates = self.split(x)
        keep = torch.sigmoid(gates[..., :1])
        return keep[..., None] * memory + self.new(x), keep * total + key


@cell
class MatrixLSTM(WithVector):
    """With the logarithm of the scale as a third tensor, one number for each head (mLSTM)."""

    num_components = 3

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.state_shape = (*self.state_shape, (self.heads,))

    def forward(self, x, state):
        memory, total, scale = state
        _, key, _, _, gates = self.split(x)
        log_input, log_forget = gates[..., 0], F.logsigmoid(gates[..., 1])
        new = torch.maximum(log_forget + scale, log_input)
        forget = torch.exp(log_forget + scale - new)[..., None]
        write = torch.exp(log_input - new)[..., None]
        memory = forget[..., None] * memory + write[..., None] * self.new(x)
        return memory, forget * total + write * key, new

    def readout(self, x, state):
        memory, total, scale = state
        query = self.split(x)[0]
        least = torch.exp(-scale)[..., None]
        size = (query * total).sum(-1, keepdim=True).abs()
        return Memory.readout(self, x, memory) / torch.maximum(size, least)


@cell
class MixesWithADenominator(WithVector):
    weights = "w:vv"

    def forward(self, x, state):
        memory, total = state
        _, key, _, _, gates = self.split(x)
        keep = torch.sigmoid(gates[..., :1])
        found = torch.tanh(memory @ self.w + self.new(x))
        return keep[..., None] * memory + (1 - keep[..., None]) * found, keep * total + key


@cell
class DeltaWithADenominator(WithVector):
    def forward(self, x, state):
        memory, total = state
        _, key, value, _, gates = self.split(x)
        keep = torch.sigmoid(gates[..., :1])
        old = torch.einsum("nhk,nhkv->nhv", key, memory)
        old = old / (1 + (key * total).sum(-1, keepdim=True).abs())
        new = torch.tanh(keep[..., None] * memory + outer(key, value - old))
        return new, keep * total + key


@cell
class ControlledByAVector(Memory):
    """A memory, and a vector of its values that mixes by a weight and reads from it."""

    num_components, weights = 2, "w:vv"

    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.state_shape = (self.state_shape, (self.heads, self.values))

    def forward(self, x, state):
        memory, hidden = state
        query, key, _, other, gates = self.split(x)
        found = torch.einsum("nhk,nhkv->nhv", query, memory)
        hidden = torch.tanh(hidden @ self.w + found + other)
        return torch.sigmoid(gates[..., :1, None]) * memory + outer(key, hidden), hidden

    def readout(self, x, state):
        return state[1] * self.split(x)[2]


# Gates that are parts of one product


@cell
class ChunksOfAProduct(Memory):
    weights = "w:vV"

    def forward(self, x, state):
        forget, write = (state @ self.w).chunk(2, -1)
        return torch.sigmoid(forget) * state + torch.tanh(write) * self.new(x)


@cell
class SlicesOfAProduct(Memory):
    weights = "w:vV b:V"

    def forward(self, x, state):
        gates = state @ self.w + self.b
        forget, write = gates[..., : self.values], gates[..., self.values :]
        return torch.sigmoid(forget) * state + torch.tanh(write) * self.new(x)


@cell
class InterleavedGates(Memory):
    weights = "w:vV"

    def forward(self, x, state):
        gates = (state @ self.w).unflatten(-1, (self.values, 2))
        return torch.sigmoid(gates[..., 0]) * state + torch.tanh(gates[..., 1]) * self.new(x)


@cell
class GatesOfARow(Memory):
    weights = "w:v2"

    def forward(self, x, state):
        gates = torch.sigmoid(state @ self.w)
        return gates[..., 0, None] * state + gates[..., 1, None] * self.new(x)


@cell
class HalvesOfTheState(Memory):
    """Which are read together."""

    def __init__(self, heads=2, keys=5, values=6):
        super().__init__(heads, keys, 2 * (values // 2))

    def forward(self, x, state):
        first, second = state.chunk(2, -1)
        gate = torch.sigmoid(self.split(x)[4][..., :1, None])
        turned = torch.cat([gate * first - second, first + gate * second], -1)
        return 0.5 * torch.tanh(turned) + self.new(x)

    def readout(self, x, state):
        return state.sum(-1)


# What a query finds, times a weight


@cell
class FoundTimesAWeight(Memory):
    weights = "w:vv"

    def forward(self, x, state):
        _, key, value, *_ = self.split(x)
        old = torch.einsum("nhk,nhkv->nhv", F.normalize(key, dim=-1), state)
        return torch.tanh(0.9 * state + outer(key, value - old @ self.w))


@cell
class FoundTimesAWeightOfItsHead(Memory):
    weights = "w:hvv"

    def forward(self, x, state):
        _, key, value, *_ = self.split(x)
        old = torch.einsum("nhk,nhkv->nhv", F.normalize(key, dim=-1), state)
        old = torch.einsum("nhv,hvw->nhw", old, self.w)
        return torch.tanh(0.9 * state + outer(key, value - old))


@cell
class FoundThroughANetwork(Memory):
    """With more channels inside, and from values to keys."""

    weights = "a:v7 b:7v c:vk"

    def forward(self, x, state):
        _, key, value, *_ = self.split(x)
        old = torch.einsum("nhk,nhkv->nhv", F.normalize(key, dim=-1), state)
        value = value - torch.tanh(old @ self.a) @ self.b
        return torch.tanh(0.9 * state + outer(key + torch.tanh(old @ self.c), value))

    def readout(self, x, state):
        return torch.tanh(super().readout(x, state) @ self.a)


@cell
class Logarithms(Memory):
    def forward(self, x, state):
        state = state - 0.5 * torch.logsumexp(state, -1, keepdim=True)
        state = state + 0.1 * torch.log_softmax(state, -2)
        return 0.5 * state / (1 + state.std(-1, keepdim=True)) + self.new(x)
