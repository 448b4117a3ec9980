"""What generated steps of tiles compute, and in which order."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from pararnn import RNN
from pararnn.cells import M2RNNCell
from pararnn.kernels.lowering import lower
from pararnn.kernels.tiled import tiles_of
from pararnn.tracing.expressions import LEAVES, Expression, leaf, make, topological
from pararnn.tracing.tiles import Axis, Place

from .conftest import needs_triton

pytestmark = needs_triton
ROWS, COLUMNS = 4, 3
SHAPES = [(ROWS, COLUMNS), (ROWS, 1), (1, COLUMNS), (1, 1)]


def place(rows, columns):
    return Place((), Axis(columns, rows), Axis(1, columns), is_matrix=False)


TILES = SimpleNamespace(
    state=(place(ROWS, COLUMNS),),
    drive_places=tuple(place(*shape) for shape in SHAPES),
    coefficient_places=(),
    readout=SimpleNamespace(place=place(1, COLUMNS)),
)
AXES = {"total0": 0, "total1": 1, "total": (0, 1)}


def value(root, leaves):
    """What an expression is, on arrays."""
    found = {}
    for node in topological([root]):
        if node.op in LEAVES:
            found[node] = leaves[node]
            continue
        args = [found[a] if isinstance(a, Expression) else a for a in node.args]
        if node.op in AXES:
            found[node] = args[0].sum(AXES[node.op], keepdims=True)
        else:
            operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
            found[node] = {**operation, "neg": np.negative}[node.op](*args)
    return found[root] if isinstance(root, Expression) else root


def shape_of(node):
    return value(
        node, {e: np.ones(SHAPES[int(e.args[0])]) for e in topological([node]) if e.op in LEAVES}
    ).shape


def random_expression(seed):
    """Products, quotients, sums and totals of values with and without rows and columns."""
    draw = random.Random(seed)
    known = [leaf("drive", n) for n in range(len(SHAPES))]
    for _ in range(12):
        a, b = draw.choices(known, k=2)
        op = draw.choice(["mul", "mul", "mul", "div", "add", "sub", "neg", "total"])
        if op == "neg":
            new = make("neg", a)
        elif op != "total":
            new = make(op, a, draw.choice([b, b, b, 2.0]))
        else:
            rows, columns = shape_of(a)
            kinds = [("total0", (ROWS,), rows > 1), ("total1", (COLUMNS,), columns > 1)]
            kinds += [("total", (ROWS, COLUMNS), rows > 1 < columns)]
            fit = [(kind, sizes) for kind, sizes, fits in kinds if fits]
            if not fit:
                continue
            kind, sizes = draw.choice(fit)
            new = make(kind, a, *map(float, sizes))
        known += [new] if isinstance(new, Expression) else []
    return known[-1]


@pytest.mark.parametrize("seed", range(60))
def test_products_in_another_order_are_the_same(seed):
    from pararnn.kernels.triton.tile_steps import _one_total, _small_first

    root = random_expression(seed)
    random_numbers = np.random.default_rng(seed)
    leaves = {
        leaf("drive", n): random_numbers.uniform(1, 2, shape) for n, shape in enumerate(SHAPES)
    }
    expected = value(root, leaves)
    for found in (_one_total(TILES, root), *_small_first(TILES, [root])):
        new = value(found, leaves)
        scale = np.abs(expected).max()
        assert np.broadcast_to(new, expected.shape) == pytest.approx(expected, abs=1e-9 * scale)


def row(n=1):
    return leaf("drive", n)


def test_a_division_for_a_row():
    from pararnn.kernels.triton.tile_steps import _small_first

    tile, rows, number = leaf("state", 0), row(1), row(3)
    (found,) = _small_first(TILES, [tile / rows])
    assert found is tile * make("div", 1.0, rows)
    (found,) = _small_first(TILES, [tile * number * rows / 4.0])
    assert found is tile * (rows * number * 0.25)


def test_what_is_the_same_along_a_sum_is_multiplied_after_it():
    from pararnn.kernels.triton.tile_steps import _small_first

    tile, rows, columns = leaf("state", 0), row(1), row(2)
    (found,) = _small_first(TILES, [make("total1", tile * rows * columns, 3.0)])
    assert found is make("total1", tile * columns, 3.0) * rows
    # a number stays: the product may be used elsewhere
    (found,) = _small_first(TILES, [make("total1", tile * row(3), 3.0)])
    assert found is make("total1", tile * row(3), 3.0)


def test_truth_values_are_no_factors():
    from pararnn.kernels.triton.tile_steps import _small_first

    tile, small = leaf("state", 0), make("lt", row(1), 0.5)
    root = make("mul", make("mul", tile, small), make("lt", row(3), 0.5))
    assert _small_first(TILES, [root]) == [root]


def test_one_total_of_several():
    from pararnn.kernels.triton.tile_steps import _one_total

    a, b, c = leaf("state", 0), leaf("drive", 0), leaf("adjoint", 0)
    total = lambda x: make("total", x, 4.0, 3.0)  # noqa: E731
    assert _one_total(TILES, total(a * b) - total(a * c)) is total(a * (b - c))
    assert _one_total(TILES, make("neg", total(a * c)) + total(b * a)) is total(a * (b - c))
    assert _one_total(TILES, total(a) + total(b)) is total(a + b)
    other = make("total0", a, 4.0) + make("total0", row(1), 4.0)  # of which one has no columns
    assert _one_total(TILES, other) is other
    other = make("total0", a, 4.0) + make("total0", b, 3.0)
    assert _one_total(TILES, other) is other


def test_few_tiles_at_a_time():
    from pararnn.kernels.triton.tile_steps import _axes_of, _in_order

    traced = RNN(M2RNNCell(4, 6, 5, num_heads=2), backend="triton").runner().traced
    tiles = tiles_of(traced.step, traced.readout)
    roots = lower([*tiles.adjoints, *(g.expression for g in tiles.gradients)])
    found, axes, every = _in_order(tiles, [roots]), _axes_of(tiles, [roots]), topological(roots)
    assert {*found} >= {*roots}
    leaves = {e for e in every if e.op in LEAVES}
    kept = {*found, *leaves}

    def most(order):
        """Tiles at once: what is there before a value is computed, and it."""
        counts = []
        for i, node in enumerate(order):
            assert from_what(node, kept) <= {*order[:i], *leaves}
            later = set().union(*(from_what(n, kept) for n in order[i:]), roots)
            held = {e for e in {*order[:i], *leaves} & later if len(axes[e]) == 2}
            counts.append(len(held) + (len(axes[node]) == 2))
        return max(counts)

    assert most([e for e in every if e in {*found}]) == 6  # with state and adjoint
    assert most(found) == 5


def from_what(value, kept):
    """Those that a value is computed from, of some."""
    found, stack = set(), list(value.args)
    while stack:
        e = stack.pop()
        if isinstance(e, Expression):
            if e in kept:
                found.add(e)
            else:
                stack += e.args
    return found
