"""Random steps: cells with states of any shape, written by a small grammar from random choices.

A cell is text, one operation a line, so that one that fails can be read and copied:

    print(random_step(3))
"""

import random

import torch
import torch.nn.functional as F
from torch import nn

SIZES = (2, 1, 3, 5)
FEATURES = 3  # of x, besides those that single drives take
MOST_AXES = 3
AXES = "abcd"

UNARY = ("torch.tanh({})", "torch.sigmoid({})", "{}.abs()", "torch.sin({})", "0.7 * {}")
BINARY = (
    "{} + {}",
    "{} * {}",
    "{} - 0.5 * {}",
    "torch.where({0} > {1}, {1}, {0} * {0})",
    "torch.maximum({}, {})",
)
REDUCTIONS = ("{}.sum({})", "{}.mean({})", "{}.amax({})", "{}.norm(dim={})")
NORMS = (
    "{0} - {0}.mean({1}, keepdim=True)",
    "{0} * {0}.sum({1}, keepdim=True)",
    "{0} - 0.5 * {0}.amax({1}, keepdim=True)",
    "torch.softmax({0}, {1})",
    "{0} / (0.1 + {0}.norm(dim={1}, keepdim=True))",
    "F.normalize({0} + 0.3, dim={1})",
    "F.rms_norm({0}.transpose({1}, -1), {2}, eps=0.1).transpose({1}, -1)",
    "F.rms_norm({0}.transpose({1}, -1), {2}, {3}, eps=0.1).transpose({1}, -1)",
    "F.layer_norm({0}.transpose({1}, -1), {2}, eps=0.1).transpose({1}, -1)",
    "F.layer_norm({0}.transpose({1}, -1), {2}, {3}, {4}, eps=0.1).transpose({1}, -1)",
)


class RandomStep(nn.Module):
    """Base of random cells; `source` of a subclass is its step as text."""

    source = ""

    def __init__(self, shapes, weights, features):
        super().__init__()
        self.num_components, self.input_size = len(shapes), features
        self.state_shape = shapes if len(shapes) > 1 else shapes[0]
        for name, shape in weights.items():
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
            setattr(self, name, nn.Parameter(torch.randn(shape) * scale))

    def extra_repr(self):
        weights = ", ".join(f"{name} {tuple(p.shape)}" for name, p in self.named_parameters())
        return f"x {self.input_size}, state {self.state_shape}, {weights}\n{self.source}"


def random_step(seed, dtype=torch.float64, writer=None):
    """A cell, with its parameters, from a number; `writer` is another class than `Writer`."""
    torch.manual_seed(seed)
    return write(random.Random(seed).choice, writer).to(dtype)


def write(choose, writer=None):
    """A cell from choices.

    Args:
        choose: Takes one of a sequence of options; the first are the simplest.
        writer: A class; `Writer` when None.
    """
    writer = (writer or Writer)(choose)
    shapes = (writer.shape(),)
    if choose((False, True)):
        shapes += (choose((shapes[0], shapes[0][:1], shapes[0][1:] or (1,), writer.shape())),)
    functions = {"forward": writer.step(shapes), "readout": writer.readout(shapes)}
    source = "\n\n".join(
        "\n    ".join([f"def {name}(self, x, state):", *lines])
        for name, lines in functions.items()
        if lines
    )
    body = {"source": source}
    exec(source, {"torch": torch, "F": F}, body)
    return type("Random", (RandomStep,), body)(shapes, writer.weights, writer.features)


def first_axes(value, count):
    """A value with that many axes of size 1 before its own."""
    return f"{value}[:, {', '.join(['None'] * count)}]"


def last_axes(value, count):
    return f"{value}[..., {', '.join(['None'] * count)}]"


class Writer:
    """Writes a step line by line; a value is a variable (N, *shape).

    Attributes:
        weights: Shapes of the parameters that the lines use, by name.
        features: Size of x.

    Args:
        choose: See `write`.
    """

    def __init__(self, choose):
        self.choose = choose
        self.weights, self.features = {}, FEATURES
        self.lines, self.state = [], {}

    def step(self, shapes):
        self.begin(shapes)
        new = []
        for name, shape in self.state.items():
            drive = self.drive(self.thin(shape))
            found = f"torch.tanh({self.value(shape, 3)} + {drive})"
            if self.choose((False, True)):
                gate = self.line(f"torch.sigmoid({drive})")
                found = f"{gate} * {name} + (1 - {gate}) * {found}"
            new.append(self.line(found))
        return [*self.lines, f"return {', '.join(new)}"]

    def readout(self, shapes):
        """Nothing, any value, or what a query finds along one axis."""
        kind = self.choose(("none", "any", "query"))
        if kind == "none":
            return []
        self.begin(shapes)
        if kind == "any":
            found = self.value(self.shape(), 2)
            return [*self.lines, f"return {found}"]
        axis = self.choose(range(len(shapes[0])))
        names = AXES[: len(shapes[0])]
        query = self.drive(shapes[0][axis : axis + 1])
        left = names.replace(names[axis], "")
        found = f'torch.einsum("n{names},n{names[axis]}->n{left}", h0, {query})'
        return [*self.lines, f"return {found}"]

    def begin(self, shapes):
        self.state = {f"h{i}": shape for i, shape in enumerate(shapes)}
        self.lines = [f"{', '.join(self.state)} = state"]

    def line(self, text):
        self.lines.append(f"v{len(self.lines)} = {text}")
        return f"v{len(self.lines) - 1}"

    def shape(self):
        return tuple(self.choose(SIZES) for _ in range(self.choose(range(1, MOST_AXES + 1))))

    def thin(self, shape):
        """A shape that broadcasts to another."""
        return tuple(self.choose((n, 1)) for n in shape)

    def weight(self, *shape):
        name = f"w{len(self.weights)}"
        self.weights[name] = shape
        return f"self.{name}"

    def drive(self, shape):
        """A value of x alone: features of its own, or a product of those that all share."""
        size = torch.Size(shape).numel()
        if self.choose((True, False)):
            found = f"x[:, {self.features}:{self.features + size}]"
            self.features += size
        else:
            found = f"(x[:, :{FEATURES}] @ {self.weight(FEATURES, size)})"
        return self.line(f"{found}.unflatten(-1, {shape})")

    def value(self, shape, depth):
        """A value that depends on the state, with that many operations in a row at most."""
        kinds = [self.of_state]
        if depth:
            kinds += [self.unary, self.binary, self.gated, self.weighted, self.normed]
            kinds += [self.reduced, self.queried] if len(shape) < MOST_AXES else []
            kinds += [self.outer, self.transposed] if len(shape) > 1 else []
        return self.choose(kinds)(shape, depth - 1)

    def of_state(self, shape, _depth):
        """A tensor of the state, in this shape."""
        alike = [name for name, own in self.state.items() if own == shape]
        if alike:
            return self.choose(alike)
        name = self.choose(list(self.state))
        own = self.state[name]
        few, many = len(shape), len(own)
        if shape[-many:] == own:
            return self.line(f"{first_axes(name, few - many)}.expand(-1, *{shape})")
        if shape[:many] == own:
            return self.line(f"{last_axes(name, few - many)}.expand(-1, *{shape})")
        if own[-few:] == shape:
            return self.line(f"{name}.mean({tuple(range(1, 1 + many - few))})")
        if own[:few] == shape:
            return self.line(f"{name}.amax({tuple(range(-1, few - many - 1, -1))})")
        weight = self.weight(torch.Size(own).numel(), torch.Size(shape).numel())
        return self.line(f"({name}.flatten(1) @ {weight}).unflatten(-1, {shape})")

    def unary(self, shape, depth):
        return self.line(self.choose(UNARY).format(self.value(shape, depth)))

    def binary(self, shape, depth):
        first = self.value(shape, depth)
        thin = self.thin(shape)
        kind = self.choose(("drive", "value", "coefficient"))
        if kind == "drive":
            second = self.drive(thin)
        else:
            second = self.value(thin, depth) if kind == "value" else self.weight(*thin)
        return self.line(self.choose(BINARY).format(first, second))

    def gated(self, shape, depth):
        """One gate for each entry of some axes."""
        gate = self.drive(self.thin(shape))
        return self.line(f"torch.sigmoid({gate}) * {self.value(shape, depth)}")

    def weighted(self, shape, depth):
        """Product with a weight along one axis, maybe one for every entry of others."""
        axis = self.choose(range(len(shape)))
        size, result = self.choose(SIZES), shape[axis]
        a = self.value((*shape[:axis], size, *shape[axis + 1 :]), depth)
        ways = ["einsum"]
        ways += ["matmul", "linear", "linear with bias"] if axis == len(shape) - 1 else []
        ways += ["left"] if axis == len(shape) - 2 else []
        ways += ["matmul of heads"] if axis == len(shape) - 1 == 2 else []
        way = self.choose(ways)
        if way == "matmul":
            return self.line(f"{a} @ {self.weight(size, result)}")
        if way == "matmul of heads":
            return self.line(f"{a} @ {self.weight(shape[0], size, result)}")
        if way == "left":
            return self.line(f"{self.weight(result, size)} @ {a}")
        if way.startswith("linear"):
            weight = self.weight(result, size)
            bias = f", {self.weight(result)}" if way == "linear with bias" else ""
            return self.line(f"F.linear({a}, {weight}{bias})")
        names = AXES[: len(shape)]
        own = [i for i in range(len(shape)) if i != axis and self.choose((False, True))]
        weight = self.weight(*(shape[i] for i in own), size, result)
        subscripts = "".join(names[i] for i in own) + names[axis] + "z"
        to = names.replace(names[axis], "z")
        return self.line(f'torch.einsum("n{names},{subscripts}->n{to}", {a}, {weight})')

    def normed(self, shape, depth):
        axis = self.choose(range(len(shape)))
        text, a = self.choose(NORMS), self.value(shape, depth)
        size = shape[axis]
        weights = [self.weight(size) for n in (3, 4) if f"{{{n}}}" in text]
        return self.line(text.format(a, axis + 1, f"({size},)", *weights))

    def with_axis(self, shape):
        """A shape with one more axis, and which."""
        axis = self.choose(range(len(shape) + 1))
        return (*shape[:axis], self.choose(SIZES), *shape[axis:]), axis

    def reduced(self, shape, depth):
        larger, axis = self.with_axis(shape)
        return self.line(self.choose(REDUCTIONS).format(self.value(larger, depth), axis + 1))

    def queried(self, shape, depth):
        """Product with a drive along one axis."""
        larger, axis = self.with_axis(shape)
        a, names = self.value(larger, depth), AXES[: len(larger)]
        if self.choose((True, False)):
            own = [i for i in range(len(larger)) if i == axis or self.choose((False, True))]
            b = self.drive(tuple(larger[i] for i in own))
            subscripts = "".join(names[i] for i in own)
            to = names.replace(names[axis], "")
            return self.line(f'torch.einsum("n{names},n{subscripts}->n{to}", {a}, {b})')
        thin = [*self.thin(larger)]
        thin[axis] = larger[axis]
        return self.line(f"({a} * {self.drive(tuple(thin))}).sum({axis + 1})")

    def outer(self, shape, depth):
        """Outer product of drives plus a value, or of a value and a drive."""
        cut = self.choose(range(1, len(shape)))
        b = self.drive(shape[cut:])
        names = AXES[: len(shape)]
        subscripts = f"n{names[:cut]},n{names[cut:]}->n{names}"
        if self.choose((True, False)):
            a, more = self.drive(shape[:cut]), f" + {self.value(shape, depth)}"
        else:
            a, more = self.value(shape[:cut], depth), ""
        if self.choose((True, False)):
            return self.line(f'torch.einsum("{subscripts}", {a}, {b}){more}')
        a, b = last_axes(a, len(shape) - cut), first_axes(b, cut)
        return self.line(f"{a} * {b}{more}")

    def transposed(self, shape, depth):
        i = self.choose(range(len(shape)))
        j = self.choose([j for j in range(len(shape)) if j != i])
        swapped = list(shape)
        swapped[i], swapped[j] = swapped[j], swapped[i]
        return self.line(f"{self.value(tuple(swapped), depth)}.transpose({i + 1}, {j + 1})")


class PartsWriter(Writer):
    """Also takes values in parts, and puts parts together."""

    def value(self, shape, depth):
        if depth and self.choose((False, True, True)):
            kinds = [self.packed, self.interleaved, self.found]
            kinds += [self.halves] if shape[-1] > 1 else []
            return self.choose(kinds)(shape, depth - 1)
        return super().value(shape, depth)

    def packed(self, shape, depth):
        """Two gates of one product along the last axis."""
        size = self.choose(SIZES)
        a = self.value((*shape[:-1], size), depth)
        gates = self.line(f"{a} @ {self.weight(size, 2 * shape[-1])}")
        one, two = self.line(f"{gates}[..., :{shape[-1]}]"), self.line(f"{gates}.chunk(2, -1)[1]")
        return self.line(f"torch.sigmoid({one}) * torch.tanh({two})")

    def interleaved(self, shape, depth):
        size = self.choose(SIZES)
        a = self.value((*shape[:-1], size), depth)
        gates = self.line(
            f"({a} @ {self.weight(size, 2 * shape[-1])}).unflatten(-1, ({shape[-1]}, 2))"
        )
        return self.line(f"torch.sigmoid({gates}[..., 0]) * {gates}[..., 1]")

    def found(self, shape, depth):
        """What a query finds in a larger value, times a weight."""
        size = self.choose(SIZES)
        larger = self.value((*shape[:-1], 3, size), depth) if len(shape) < MOST_AXES else None
        if larger is None:
            return self.of_state(shape, depth)
        query = self.drive((3,))
        names = AXES[: len(shape) + 1]
        rest = names[: len(shape) - 1] + names[-1]
        found = f'torch.einsum("n{names},n{names[-2]}->n{rest}", {larger}, {query})'
        return self.line(f"{found} @ {self.weight(size, shape[-1])}")

    def halves(self, shape, depth):
        """Some entries of the last axis, and the others, each changed in its own way."""
        at = shape[-1] // 2
        a = self.value(shape, depth)
        one, two = self.line(f"{a}[..., :{at}]"), self.line(f"{a}[..., {at}:]")
        return self.line(f"torch.cat([torch.sin({one}), 0.5 * {two}], -1)")
