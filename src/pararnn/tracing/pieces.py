"""Run a step whose tensors are in pieces along an axis, so that none is ever joined or cut.

What a cell cuts (packed gates, a state of tensors that lie side by side) comes in pieces, and every
operation works on each piece. What is recorded then has neither `cat` nor `split`, in neither
direction: autograd sees the same operations. What needs the pieces joined joins them, and the
reader of the recording says that it does not know that.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pararnn.tracing.operations import IDENTITIES, is_pointwise, named_arguments, operation_name
from pararnn.tracing.partition import operation


@dataclass(frozen=True)
class Cut:
    """Where an axis of a tensor is cut: it is taken as (before, sum of sizes, after).

    Attributes:
        axis: The axis.
        before: See above.
        sizes: Of the pieces.
        after: See above.
    """

    axis: int
    before: int
    sizes: tuple[int, ...]
    after: int

    @property
    def length(self) -> int:
        """Entries of the axis."""
        return self.before * sum(self.sizes) * self.after

    def divided(self, tensor: Tensor) -> list[Tensor]:
        """The pieces of a tensor, each of as many axes."""
        if len(self.sizes) == 1:
            return [tensor]
        at = self.axis
        apart = tensor.unflatten(at, (self.before, sum(self.sizes), self.after))
        return [p.flatten(at, at + 2) for p in apart.split(list(self.sizes), at + 1)]

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """The tensor of some pieces."""
        if len(pieces) == 1:
            return pieces[0]
        at = self.axis
        pairs = zip(pieces, self.sizes, strict=True)
        apart = [p.unflatten(at, (self.before, size, self.after)) for p, size in pairs]
        return torch.cat(apart, at + 1).flatten(at, at + 2)


@dataclass(frozen=True)
class Pieces:
    """A tensor in pieces.

    Attributes:
        tensors: The pieces.
        cut: Where it is cut.
    """

    tensors: tuple[Tensor, ...]
    cut: Cut

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        shape = list(self.tensors[0].shape)
        shape[self.cut.axis] = self.cut.length
        return tuple(shape)

    @property
    def whole(self) -> Tensor:
        """The tensor."""
        return self.cut.joined(self.tensors)

    def each(self, function: Callable[..., Tensor], cut: Cut | None = None) -> Pieces:
        """The same operation on every piece."""
        return Pieces(tuple(map(function, self.tensors)), cut or self.cut)


Value = Tensor | Pieces


def whole(value: Any) -> Any:
    """A value in one piece."""
    return value.whole if isinstance(value, Pieces) else value


def in_pieces(value: Value, cut: Cut | None) -> list[Tensor]:
    """A value in pieces as a cut has them."""
    if cut is None:
        return [whole(value)]
    if isinstance(value, Pieces) and value.cut == cut:
        return list(value.tensors)
    return cut.divided(whole(value))


class _Apart(Exception):
    """An operation does not work on each piece."""


class Evaluation(fx.Interpreter):
    """Runs a graph on values in pieces."""

    def run_node(self, n: fx.Node) -> Any:  # noqa: D102
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        flat, _ = tree_flatten((args, kwargs))
        func: Any = operation(n)
        if func is torch.Tensor.size and isinstance(args[0], Pieces):
            return args[0].shape[args[1]]
        if func is operator.getitem:
            return func(*args)
        if not hasattr(func, "_schema"):  # a cell or norm that PyTorch has as one operation
            return func(*tree_map(whole, args), **tree_map(whole, kwargs))
        name = operation_name(func)
        if name in ("cat", "stack") or any(isinstance(a, Pieces) for a in flat):
            try:
                return _applied(func, name, args, kwargs)
            except _Apart:
                args, kwargs = tree_map(whole, (args, kwargs))
        return n.target(*args, **kwargs)  # type: ignore[operator]


def evaluate(module: fx.GraphModule, *given: Value) -> list[Value]:
    """What a module returns, in pieces or not."""
    return list(Evaluation(module).run(*given))


def _applied(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    rule = _RULES.get(name)
    if rule is not None:
        return rule(func, named_arguments(func, args, kwargs))
    if name in IDENTITIES:
        return args[0].each(functools.partial(func, **kwargs))
    if is_pointwise(func):
        return _pointwise(func, args, kwargs)
    raise _Apart


def _pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    given = [v for v in flat if isinstance(v, Pieces)]
    rank = max(len(v.shape) for v in flat if isinstance(v, (Tensor, Pieces)))
    cuts = {replace(v.cut, axis=v.cut.axis - len(v.shape)) for v in given}
    if len(cuts) > 1:
        raise _Apart
    (cut,) = cuts
    results = []
    for i in range(len(cut.sizes)):
        now = [_piece(v, cut, i) if isinstance(v, (Tensor, Pieces)) else v for v in flat]
        own, more = tree_unflatten(now, spec)
        results.append(func(*own, **more))
    return Pieces(tuple(results), replace(cut, axis=cut.axis + rank))


def _piece(value: Value, cut: Cut, number: int) -> Tensor:
    """What meets a piece of another value, with the axis counted from the last."""
    if isinstance(value, Pieces):
        return value.tensors[number]
    if value.dim() < -cut.axis or value.shape[cut.axis] == 1:
        return value
    return replace(cut, axis=cut.axis + value.dim()).divided(value)[number]


# Products and sums


def _two(left: Value, right: Value) -> Value:
    """A product of matrices, or of batches of them."""
    ranks = [len(v.shape) for v in (left, right)]
    multiply = torch.bmm if ranks[0] == 3 else torch.mm
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return multiply(left, right)
    a, b = (v.cut if isinstance(v, Pieces) else None for v in (left, right))
    inner = [c for c, axis in ((a, ranks[0] - 1), (b, ranks[1] - 2)) if c and c.axis == axis]
    if inner:
        alike = len({replace(c, axis=0) for c in inner}) == 1
        if not alike or any(c and c not in inner for c in (a, b)):
            raise _Apart
        pairs = zip(
            _divided(left, inner[0], ranks[0] - 1), _divided(right, inner[0], ranks[1] - 2),
            strict=True,
        )  # fmt: skip
        return functools.reduce(torch.add, [multiply(x, y) for x, y in pairs])
    if a and b:
        if a.axis != 0 or b != a or ranks != [3, 3]:
            raise _Apart
        pairs = zip(_divided(left, a, 0), _divided(right, a, 0), strict=True)
        return Pieces(tuple(multiply(x, y) for x, y in pairs), a)
    cut = a or b
    assert cut is not None
    if cut.axis == 0 and ranks[0] == 3:
        pairs = zip(_divided(left, cut, 0), _divided(right, cut, 0), strict=True)
        return Pieces(tuple(multiply(x, y) for x, y in pairs), cut)
    if isinstance(left, Pieces):
        return left.each(functools.partial(multiply, mat2=right))
    assert isinstance(right, Pieces)
    return right.each(functools.partial(multiply, left))


def _divided(value: Value, cut: Cut, axis: int) -> Sequence[Tensor]:
    if isinstance(value, Pieces):
        return value.tensors
    return replace(cut, axis=axis).divided(value)


def _product(func: Any, given: dict[str, Any]) -> Value:
    left = given["mat1"] if "mat1" in given else given.get("batch1", given.get("self"))
    right = given.get("mat2", given.get("batch2"))
    if left is None or right is None:
        raise _Apart
    if "beta" not in given:
        return _two(left, right)
    if (given["alpha"], given["beta"]) != (1, 1):
        raise _Apart
    first: Value = given["self"]
    second = _two(left, right)
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first + second
    return cast(Value, _pointwise(torch.ops.aten.add.Tensor, (first, second), {}))


_REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "amax": torch.amax,
    "amin": torch.amin,
}


def _reduced(func: Any, given: dict[str, Any]) -> Value:
    value, dim, keep = given["self"], given.get("dim"), bool(given.get("keepdim"))
    rank, name, cut = len(value.shape), operation_name(func), value.cut
    if given.get("dtype") is not None:
        raise _Apart
    gone = sorted(a % rank for a in ([dim] if isinstance(dim, int) else dim or range(rank)))
    if cut.axis not in gone:
        axis = cut.axis if keep else cut.axis - sum(a < cut.axis for a in gone)
        own = functools.partial(_REDUCTIONS[name], dim=gone, keepdim=keep)
        return value.each(own, replace(cut, axis=axis))
    if name not in ("sum", "mean"):  # equal entries of several pieces share the gradient
        raise _Apart
    sums = [torch.sum(v, gone, keepdim=keep) for v in value.tensors]
    found = functools.reduce(torch.add, sums)
    return found / math.prod(value.shape[a] for a in gone) if name == "mean" else found


# Moves


def _view(func: Any, given: dict[str, Any]) -> Pieces:
    value, count = given["self"], math.prod(given["self"].shape)
    shape = list(given.get("size") or given.get("shape") or ())
    if -1 in shape:
        shape[shape.index(-1)] = count // -math.prod(shape)
    return _seen_as(value, tuple(shape))


def _seen_as(value: Pieces, shape: tuple[int, ...]) -> Pieces:
    """A view."""
    cut, total = value.cut, sum(value.cut.sizes)
    before = math.prod(value.shape[: cut.axis]) * cut.before
    after = cut.after * math.prod(value.shape[cut.axis + 1 :])
    found = []
    for axis, size in enumerate(shape):
        first, last = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        if before % first == 0 and after % last == 0:
            new = Cut(axis, before // first, cut.sizes, after // last)
            if new.before * total * new.after == size:
                found.append(new)
    if not found:
        raise _Apart
    new = min(found, key=lambda c: c.before * c.after)

    def move(piece: Tensor, size: int) -> Tensor:
        own = new.before * size * new.after
        return piece.reshape(*shape[: new.axis], own, *shape[new.axis + 1 :])

    pairs = zip(value.tensors, cut.sizes, strict=True)
    return Pieces(tuple(move(p, size) for p, size in pairs), new)


def _squeeze(func: Any, given: dict[str, Any]) -> Pieces:
    value, dim = given["self"], given.get("dim")
    rank = len(value.shape)
    axes = range(rank) if dim is None else [dim] if isinstance(dim, int) else dim
    axes = {a % rank for a in axes}
    return _seen_as(value, tuple(s for a, s in enumerate(value.shape) if a not in axes or s != 1))


def _unsqueeze(func: Any, given: dict[str, Any]) -> Pieces:
    value = given["self"]
    at = given["dim"] % (len(value.shape) + 1)
    cut = replace(value.cut, axis=value.cut.axis + (at <= value.cut.axis))
    return value.each(lambda v: v.unsqueeze(at), cut)


def _permute(func: Any, given: dict[str, Any]) -> Pieces:
    value = given["self"]
    rank = len(value.shape)
    if "dims" in given:
        dims = [d % rank for d in given["dims"]]
    else:
        a, b = given.get("dim0", 0), given.get("dim1", 1)
        dims = list(range(rank))
        dims[a % rank], dims[b % rank] = dims[b % rank], dims[a % rank]
    cut = replace(value.cut, axis=dims.index(value.cut.axis))
    return value.each(lambda v: v.permute(dims), cut)


def _expand(func: Any, given: dict[str, Any]) -> Pieces:
    value, size = given["self"], list(given["size"])
    more = len(size) - len(value.shape)
    axis = value.cut.axis + more
    size[axis] = -1
    return value.each(lambda v: v.expand(size), replace(value.cut, axis=axis))


def _slices(value: Pieces, axis: int, first: int, last: int) -> Value:
    """Some entries along an axis."""
    cut = value.cut
    if axis != cut.axis:
        return value.each(lambda v: v.narrow(axis, first, last - first))
    if cut.before != 1 or first % cut.after or last % cut.after:
        raise _Apart
    first, last = first // cut.after, last // cut.after
    ends = [0, *itertools.accumulate(cut.sizes)]
    chosen: list[Tensor] = []
    for tensor, start, end in zip(value.tensors, ends, ends[1:], strict=False):
        low, high = max(first, start), min(last, end)
        if low < high:
            whole_piece = (low, high) == (start, end)
            at, length = (low - start) * cut.after, (high - low) * cut.after
            chosen.append(tensor if whole_piece else tensor.narrow(axis, at, length))
    if not chosen:
        raise _Apart
    if len(chosen) == 1:
        return chosen[0]
    sizes = tuple(c.shape[axis] // cut.after for c in chosen)
    return Pieces(tuple(chosen), replace(cut, sizes=sizes))


def _slice(func: Any, given: dict[str, Any]) -> Value:
    value = given["self"]
    axis = given["dim"] % len(value.shape)
    size = value.shape[axis]
    if given.get("step", 1) != 1:
        raise _Apart
    first, last, _ = slice(given["start"], given["end"]).indices(size)
    return _slices(value, axis, first, max(first, last))


def _select(func: Any, given: dict[str, Any]) -> Value:
    value = given["self"]
    axis = given["dim"] % len(value.shape)
    index = given["index"] % value.shape[axis]
    found = _slices(value, axis, index, index + 1)
    if isinstance(found, Tensor):
        return found.squeeze(axis)
    return found.each(
        lambda v: v.squeeze(axis), replace(found.cut, axis=found.cut.axis - (axis < found.cut.axis))
    )


def _split(func: Any, given: dict[str, Any]) -> list[Value]:
    value = given["self"]
    axis = given["dim"] % len(value.shape)
    size: Any = given.get("split_sizes", given.get("split_size"))
    total = value.shape[axis]
    sizes = (
        [size] * (total // size) + [total % size] * (total % size > 0)
        if (isinstance(size, int))
        else list(size)
    )
    ends = [0, *itertools.accumulate(sizes)]
    return [_slices(value, axis, a, b) for a, b in itertools.pairwise(ends)]


def _unbind(func: Any, given: dict[str, Any]) -> list[Value]:
    count = given["self"].shape[given["dim"] % len(given["self"].shape)]
    return [_select(func, {**given, "index": i}) for i in range(count)]


def _cat(func: Any, given: dict[str, Any]) -> Value:
    tensors = [t for t in given["tensors"] if t.shape != (0,)]
    axis = given["dim"] % len(tensors[0].shape)
    found: list[Tensor] = []
    sizes: list[int] = []
    for t in tensors:
        if isinstance(t, Pieces) and (t.cut.axis != axis or t.cut.before * t.cut.after != 1):
            raise _Apart
        own = t.tensors if isinstance(t, Pieces) else (t,)
        found += own
        sizes += [v.shape[axis] for v in own]
    return found[0] if len(found) == 1 else Pieces(tuple(found), Cut(axis, 1, tuple(sizes), 1))


def _stack(func: Any, given: dict[str, Any]) -> Value:
    tensors = given["tensors"]
    at = given["dim"] % (len(tensors[0].shape) + 1)
    return _cat(func, {"tensors": [whole(t).unsqueeze(at) for t in tensors], "dim": at})


_RULES: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _product),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _view),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
}
