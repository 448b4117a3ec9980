"""Read a step whose channels mix by products with weights and by reductions, as expressions.

The expressions are those of a group of channels. Values are vectors with a channel in each lane, as
many as the group has, or fewer. Three kinds of operations are added to those on each element:

- `dot(vector, weight)` multiplies a vector with a block of a weight;
- `sum_all(vector, lanes)` is the sum over so many lanes, the same in all lanes of the result;
  likewise `max_all` and `min_all`;
- `sum_part(vector, lanes, results, parts)` are the sums of so many parts of the lanes, the result
  in so many lanes for each; likewise `max_part` and `min_part`.

A step is read entry by entry (`entries`). Here these are laid side by side: those of the new state
in the order of its channels, and from there what they are computed from, as each operation needs
it. A product of values (N, a * H) with a weight (a * H, b * H) becomes a * b dots. The rows and
columns of its blocks are in the order in which its results and factors lie, so a gate or a head is
a block of its own, wherever it is in the weight. Offsets and strides are read as well, so a
transposed weight only has other strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from pararnn.tracing.capture import record_rows
from pararnn.tracing.elementwise import NotElementwise
from pararnn.tracing.entries import (
    Elementwise,
    Entries,
    Given,
    Number,
    Product,
    Reduced,
    State,
    entries_of,
)
from pararnn.tracing.expressions import (
    Expression,
    Operand,
    intern,
    is_boolean,
    leaf,
    make,
    topological,
)
from pararnn.tracing.operations import UnknownOperation, operation_name
from pararnn.tracing.recorder import TraceError, record
from pararnn.tracing.step import Input, recording

_SUBJECT = "the step"
WHOLE = ("sum_all", "max_all", "min_all")
PARTLY = ("sum_part", "max_part", "min_part")


class NotExpressed(Exception):
    """The step has an operation that is not known here, or entries that lie in no vectors."""


@dataclass(frozen=True)
class Place:
    """The place of a vector in an input's memory, or of a block in a weight's. Units: elements.

    The lanes of a vector, or the results and factors of a block, may be `parts` equal parts: those
    of a vector lie apart in memory, and a block is zero but for the parts on its diagonal.

    Attributes:
        input: Index of the input of the step.
        offset: From the start of the input, or of its row, to the first lane of the first group.
        group: Stride from group to group.
        channel: Stride from lane to lane; of a block, along the multiplied lanes.
        lanes: Lanes of a part; of a block, multiplied ones.
        result: Of a block, stride along the lanes of the product.
        results: Of a block, lanes of the product in a part.
        parts: Parts.
        part: Stride from part to part.
    """

    input: int
    offset: int
    group: int
    channel: int
    lanes: int
    result: int = 0
    results: int = 0
    parts: int = 1
    part: int = 0

    @property
    def width(self) -> int:
        """All lanes."""
        return self.parts * self.lanes

    def of(self, tensor: Tensor, groups: int) -> Tensor:
        """A block in an input: a view (groups, parts, results, lanes)."""
        sizes = groups, self.parts, self.results, self.lanes
        strides = self.group, self.part, self.result, self.channel
        first = self.offset + sum(min(0, (n - 1) * s) for n, s in zip(sizes, strides, strict=True))
        forwards = [abs(s) for s in strides]  # PyTorch has no negative strides
        found = tensor.as_strided(sizes, forwards, tensor.storage_offset() + first)
        return found.flip([a for a, s in enumerate(strides) if s < 0])


@dataclass(frozen=True)
class Products:
    """The step of one group of channels.

    Attributes:
        step: Expressions of the new components; the leaves are `state`, `drive`, `coefficient` and
            `weight`.
        drives: Place of each drive in a row.
        coefficients: Place of each coefficient.
        weights: Place of each block.
        size: Channels of a group.
        groups: Number of groups.
    """

    step: tuple[Operand, ...]
    drives: tuple[Place, ...]
    coefficients: tuple[Place, ...]
    weights: tuple[Place, ...]
    size: int
    groups: int

    @property
    def is_plain(self) -> bool:
        """Whether channels mix by products alone, and all vectors and blocks are of one size."""
        whole = (1, self.size)
        vectors = (*self.drives, *self.coefficients, *self.weights)
        reduces = any(e.op in WHOLE + PARTLY for e in topological(self.step))
        return not reduces and all(
            (p.parts, p.lanes) == whole and p.results in (0, self.size) for p in vectors
        )


def products(
    module: fx.GraphModule,
    inputs: Sequence[Input],
    strides: Sequence[Sequence[int]],
    components: int,
    hidden: int,
    group: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Products:
    """Read a step.

    Args:
        module: The step, see `Step.module`.
        inputs: Its inputs besides the state.
        strides: Strides of each input, in elements, without that of the rows.
        components: Tensors in the state.
        hidden: Channels of each component.
        group: Channels that reach each other.
        dtype: Type of the state.
        device: Device that the module runs on.

    Raises:
        NotExpressed: The step has another operation; the message names it.
    """
    kinds = {f"attribute_{i}": kind for i, kind in enumerate(inputs) if not kind.by_rows}
    moving = [i for i, kind in enumerate(inputs) if kind.by_rows]
    kinds |= {f"x_{n}": inputs[i] for n, i in enumerate(moving)}
    kinds |= {f"state_{n}": Input((hidden,), dtype, True) for n in range(components)}
    names = [
        f"x_{moving.index(i)}" if kind.by_rows else f"attribute_{i}"
        for i, kind in enumerate(inputs)
    ]
    if not moving:
        raise NotExpressed("no input besides the state has rows")

    plain = unfused(module)

    def run(*flat: Tensor) -> Sequence[Tensor]:
        given = dict(zip(kinds, flat, strict=True))
        return plain(*flat[len(inputs) :], *(given[name] for name in names))

    def at(rows: int) -> tuple[fx.Graph, list[Tensor]]:
        examples = {name: kind.example(rows, device) for name, kind in kinds.items()}
        return record(run, examples, _SUBJECT)

    try:
        with recording(device):
            graph, constants = record_rows(at, _SUBJECT)
        if constants:
            raise NotExpressed("it uses tensors that are not its inputs")
        placeholders = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
        calls = [n for n in graph.nodes if n.op == "call_function" and not n.meta.get("is_count")]
        (results,) = next(n for n in graph.nodes if n.op == "output").args
        with torch.device("cpu"):  # where entries are counted
            entries = Entries(calls, hidden, dtype)
            for n in range(components):
                entries.state(placeholders[f"state_{n}"], n)
            for number, (name, own) in enumerate(zip(names, strides, strict=True)):
                entries.given(placeholders[name], number, own)
            entries.read()
            return _Vectors(entries, group).products(results)
    except (NotElementwise, UnknownOperation, TraceError) as error:
        raise NotExpressed(str(error)) from error


def _gates(
    count: int, x: Tensor, h: Tensor, x_bias: Tensor | None, h_bias: Tensor | None
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    x = x if x_bias is None else x + x_bias
    return x.chunk(count, 1), (h if h_bias is None else h + h_bias).chunk(count, 1)


def _gru_cell(
    x: Tensor,
    h: Tensor,
    state: Tensor,
    x_bias: Tensor | None = None,
    h_bias: Tensor | None = None,
) -> tuple[Tensor, None]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = _gates(3, x, h, x_bias, h_bias)
    new = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return new + torch.sigmoid(x_z + h_z) * (state - new), None


def _lstm_cell(
    x: Tensor,
    h: Tensor,
    cell: Tensor,
    x_bias: Tensor | None = None,
    h_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, None]:
    pairs = zip(*_gates(4, x, h, x_bias, h_bias), strict=True)
    i, f, g, o = (a + b for a, b in pairs)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell, None


def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    axes = list(range(-len(shape), 0))
    least = torch.finfo(x.dtype).eps if eps is None else eps
    scale = torch.rsqrt((x * x).mean(axes, keepdim=True) + least)
    return x * scale if weight is None else x * scale * weight, scale


def _rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    shape: Sequence[int],
    scale: Tensor,
    weight: Tensor | None,
    mask: Sequence[bool],
) -> tuple[Tensor, Tensor | None]:
    axes, normal = list(range(-len(shape), 0)), x * scale
    inner = grad if weight is None else grad * weight
    found = scale * (inner - normal * (inner * normal).mean(axes, keepdim=True))
    rows = list(range(x.dim() - len(shape)))
    return found, (grad * normal).sum(rows) if mask[1] else None


_PLAIN: dict[str, Callable[..., Any]] = {
    "_thnn_fused_gru_cell": _gru_cell,
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_fused_rms_norm": _rms_norm,
    "_fused_rms_norm_backward": _rms_norm_backward,
}


def unfused(module: fx.GraphModule) -> fx.GraphModule:
    """Replace PyTorch's fused GRU and LSTM cells and RMSNorm, which only GPUs have, by others."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function":
            target: Any = node.target
            name = operation_name(target) if hasattr(target, "_schema") else target.__name__
            node.target = _PLAIN.get(name, target)
    return fx.GraphModule(torch.nn.Module(), graph)


@dataclass
class _Wanted:
    """A vector that somebody asks for.

    Attributes:
        made: What makes its entries, by its number.
        entries: (groups, lanes); -1 for a lane in which nobody looks.
        operands: The vectors that it is computed from.
        more: What the operation needs besides.
        expression: The result.
    """

    made: int
    entries: Tensor
    operands: list[_Wanted] = field(default_factory=list)
    more: Any = None
    expression: Operand = None


class _Vectors:
    """Lays entries side by side.

    Args:
        entries: What was read.
        size: Channels of a group.
    """

    def __init__(self, entries: Entries, size: int) -> None:
        self.entries, self.size = entries, size
        self.groups = entries.hidden // size
        self.firsts = torch.tensor([m.first for m in entries.made])
        self.wanted: list[dict[bytes, _Wanted]] = [{} for _ in entries.made]
        self.drives: dict[Place, int] = {}
        self.coefficients: dict[Place, int] = {}
        self.weights: dict[Place, int] = {}

    def products(self, results: Sequence[fx.Node]) -> Products:
        """The step of a group."""
        shape = self.groups, self.size
        roots = [self.want(entries_of(self.entries.of(r)).view(shape)) for r in results]
        for made, wanted in zip(reversed(self.entries.made), reversed(self.wanted), strict=True):
            for vector in wanted.values():
                self.prepare(made, vector)
        for made, wanted in zip(self.entries.made, self.wanted, strict=True):
            for vector in sorted(wanted.values(), key=lambda w: int(w.entries.max())):
                vector.expression = self.expression(made, vector)
        step = tuple(_as_float(r.expression) for r in roots)
        if not any(e.op in ("dot", *WHOLE, *PARTLY) for e in topological(step)):
            raise NotElementwise("it has no product with a weight and no sum over channels")
        places = tuple(self.drives), tuple(self.coefficients), tuple(self.weights)
        return Products(step, *places, self.size, self.groups)

    def want(self, entries: Tensor) -> _Wanted:
        """Ask for a vector (groups, lanes)."""
        there = entries[entries >= 0]
        made = torch.searchsorted(self.firsts, there, right=True) - 1
        if not bool((made == made[0]).all()):
            raise NotElementwise("a vector consists of values that are computed in different ways")
        number = int(made[0])
        key = entries.numpy().tobytes() + bytes(str(tuple(entries.shape)), "ascii")
        return self.wanted[number].setdefault(key, _Wanted(number, entries))

    # What a vector is computed from

    def prepare(self, made: Any, vector: _Wanted) -> None:
        """Ask for that."""
        if isinstance(made, Elementwise):
            self.operands(made, vector)
        elif isinstance(made, Product):
            self.factors(made, vector)
        elif isinstance(made, Reduced):
            self.terms(made, vector)

    def operands(self, made: Elementwise, vector: _Wanted) -> None:
        """An operation on each element."""
        inside = vector.entries >= 0
        local = (vector.entries - made.first).clamp_min(0)
        for operand in made.operands:
            vector.operands.append(self.want(torch.where(inside, operand[local], -1)))

    def factors(self, made: Product, vector: _Wanted) -> None:
        """A product: the vectors that are multiplied, and the blocks of the weight for each."""
        count = made.positions[0].shape[1]
        names: dict[bytes, int] = {}
        same = [names.setdefault(f.numpy().tobytes(), n) for n, f in enumerate(made.factors)]
        local = vector.entries - made.first
        every, matrices = [], []
        for own in local:  # of a group
            numbers = [same[int(n) // count] if n >= 0 else None for n in own]
            order = [n for n in dict.fromkeys(numbers) if n is not None]
            lengths = [len(made.factors[n]) for n in order]
            begins = {n: sum(lengths[:i]) for i, n in enumerate(order)}
            matrix = torch.full((len(own), sum(lengths)), -1)
            for lane, n in enumerate(numbers):
                if n is not None:
                    real, column = divmod(int(own[lane]), count)
                    begin = begins[n]
                    matrix[lane, begin : begin + len(made.factors[n])] = made.positions[real][
                        :, column
                    ]
            every.append(torch.cat([made.factors[n] for n in order]))
            matrices.append(matrix)
        if len({len(e) for e in every}) > 1:
            raise NotElementwise("groups of channels are multiplied differently")
        factors, matrix = torch.stack(every), torch.stack(matrices)
        vector.more = []
        for which, lanes, width in self.arranged(factors):
            entries = torch.full((self.groups, width), -1)
            entries[:, lanes] = factors[:, which]
            block = torch.full((*matrix.shape[:2], width), -1)
            block[:, :, lanes] = matrix[:, :, which]
            vector.operands.append(self.want(entries))
            vector.more.append(_fitted_block(made.input, block))

    def arranged(self, entries: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Vectors for entries (groups, n): which of them, in which lanes, of how many.

        Those that are computed alike, in the order in which they are given; in the lanes of the
        channels that they belong to, if they belong to any.
        """
        kinds, homes = self.entries.kind_of(entries[0]), self.entries.home_of(entries[0])
        for kind in dict.fromkeys(kinds.tolist()):
            which = (kinds == kind).nonzero().flatten()
            if int(homes[which].min()) >= 0:
                lanes = homes[which] % self.size
                if len(lanes.unique()) < len(lanes):
                    raise NotElementwise("entries of one channel lie apart")
                yield which, lanes, self.size
                continue
            for begin in range(0, len(which), self.size):
                own = which[begin : begin + self.size]
                yield own, torch.arange(len(own)), len(own)

    def terms(self, made: Reduced, vector: _Wanted) -> None:
        """A reduction: the vectors that it goes over."""
        lanes = vector.entries.shape[1]
        runs = []
        for own in vector.entries:
            if not bool((own >= 0).all()):
                own = torch.where(own >= 0, own, own.max())
            found, lengths = own.unique_consecutive(return_counts=True)
            if not bool((lengths == lengths[0]).all()):
                raise NotElementwise("parts of a vector that is reduced have different sizes")
            runs.append(found)
        if len({len(r) for r in runs}) > 1:
            raise NotElementwise("groups of channels are reduced differently")
        operands = made.operands[torch.stack(runs) - made.first]  # [GROUPS, PARTS, ENTRIES]
        parts = operands.shape[1]
        vector.more = parts, lanes // parts
        if parts == 1:
            for which, own, width in self.arranged(operands[:, 0]):
                if len(own) < width:
                    raise NotElementwise("it reduces some of the channels")
                entries = torch.full((self.groups, width), -1)
                entries[:, own] = operands[:, 0, which]
                vector.operands.append(self.want(entries))
            return
        kinds, most = self.entries.kind_of(operands[0, 0]), self.size // parts
        for kind in dict.fromkeys(kinds.tolist()):
            which = (kinds == kind).nonzero().flatten()
            for begin in range(0, len(which), most):
                own = operands[:, :, which[begin : begin + most]]
                vector.operands.append(self.want(own.flatten(1)))

    # Expressions

    def expression(self, made: Any, vector: _Wanted) -> Operand:
        """The expression of a vector whose operands have theirs."""
        operands = [o.expression for o in vector.operands]
        if isinstance(made, Elementwise):
            return made.function(*operands)
        if isinstance(made, Number):
            return made.value
        if isinstance(made, State):
            if vector.entries.shape[1] != self.size:
                raise NotElementwise("channels are mixed")
            channels = made.first + torch.arange(self.entries.hidden).view(self.groups, self.size)
            if not bool(((vector.entries == channels) | (vector.entries < 0)).all()):
                raise NotElementwise("channels are mixed")
            return leaf("state", made.component)
        if isinstance(made, Given):
            return self.given(made, vector)
        if isinstance(made, Product):
            total: Operand = 0.0
            for operand, place in zip(operands, vector.more, strict=True):
                weight = leaf("weight", self.weights.setdefault(place, len(self.weights)))
                total = make("add", total, make("dot", _as_float(operand), weight))
            return total
        return self.reduced(made, vector, operands)

    def given(self, made: Given, vector: _Wanted) -> Operand:
        """A drive or coefficient."""
        known, kind = (self.drives, "drive") if made.by_rows else (self.coefficients, "coefficient")
        positions = made.positions[(vector.entries - made.first).clamp_min(0)]
        place = _fitted(made.input, positions, vector.entries >= 0)
        found = leaf(kind, known.setdefault(place, len(known)))
        return make("ne", found, 0.0) if made.is_bool else found

    def reduced(self, made: Reduced, vector: _Wanted, operands: Sequence[Operand]) -> Operand:
        """A reduction of some vectors."""
        parts, results = vector.more
        join: Callable[..., Operand] = lambda a, b: make(_JOINED[made.op], a, b)  # noqa: E731
        by_width: dict[int, Operand] = {}
        for operand, of in zip(operands, vector.operands, strict=True):
            operand, width = _as_float(operand), of.entries.shape[1] // parts
            by_width[width] = join(by_width[width], operand) if width in by_width else operand
        found: list[Operand] = []
        for width, operand in by_width.items():
            if not isinstance(operand, Expression):
                found.append(make("mul", operand, float(width)) if made.op == "sum" else operand)
            elif parts == 1:
                found.append(intern(f"{made.op}_all", (operand, float(width))))
            else:
                sizes = float(width), float(results), float(parts)
                found.append(intern(f"{made.op}_part", (operand, *sizes)))
        total = found[0]
        for more in found[1:]:
            total = join(total, more)
        return total


_JOINED = {"sum": "add", "max": "maximum", "min": "minimum"}


def _as_float(operand: Operand) -> Operand:
    return make("to_float", operand) if is_boolean(operand) else operand


def _fitted(number: int, positions: Tensor, inside: Tensor) -> Place:
    """Express memory positions (groups, lanes) as an offset and strides.

    Raises:
        NotElementwise: No strides give these positions.
    """
    groups, lanes = positions.shape
    width = int(inside[0].sum())
    if not bool((inside == (torch.arange(lanes) < width)).all()):
        raise NotElementwise("it takes some of the channels")
    positions = positions[:, :width]
    steps = positions[0].diff()
    part = 1 + int((steps != steps[0]).nonzero()[0]) if bool((steps != steps[:1]).any()) else width
    parts = width // part
    axes = (groups, parts, part)
    if parts * part == width:
        found = positions.view(axes)
        strides = _strides(found)
        if strides is not None:
            return Place(number, strides[0], strides[1], strides[3], part, 0, 0, parts, strides[2])
    raise NotElementwise("its channels have no constant stride in memory")


def _fitted_block(number: int, positions: Tensor) -> Place:
    """Express memory positions (groups, results, factors) likewise; -1 where a block is zero."""
    groups, results, factors = positions.shape
    inside = positions[0] >= 0
    own = int(inside[0].sum())
    parts = factors // max(own, 1)
    rows = results // parts
    if own * parts == factors and rows * parts == results:
        expected = torch.block_diag(*[torch.ones(rows, own, dtype=torch.bool)] * parts)
        if bool(((positions >= 0) == expected).all()):
            found = positions[:, expected].view(groups, parts, rows, own)
            strides = _strides(found)
            if strides is not None:
                offset, group, part, result, channel = strides
                return Place(number, offset, group, channel, own, result, rows, parts, part)
    raise NotElementwise("a weight has no constant strides in memory")


def _strides(positions: Tensor) -> list[int] | None:
    """The first of some positions, and their strides; None if there are none."""
    offset = int(positions.flatten()[0])
    expected, strides = torch.tensor(offset), []
    for axis, size in enumerate(positions.shape):
        first = [0] * positions.dim()
        first[axis] = min(1, size - 1)
        stride = int(positions[tuple(first)]) - offset
        along = [1] * positions.dim()
        along[axis] = size
        expected = expected + (torch.arange(size) * stride).view(along)
        strides.append(stride)
    return [offset, *strides] if torch.equal(expected, positions) else None
