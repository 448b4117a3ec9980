"""Products of matrices with one vector, around a generated function that computes the vector.

A step of generation reads every weight once, for one vector: its time is that of reading them, as
long as the memory is never idle. So a program loads its first rows of weights before it waits for
the kernel before it; and every program computes the whole vector, in registers, so that no kernel
of a few thousand numbers stands between two products. No kernel may write weights while others run:
a step of generation reads them only, and a CUDA graph waits for what was launched before it.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(matrices, tile, rows, INNER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Some rows of one of the matrices; nothing after the last tile of the last one."""
    tiles = tl.cdiv(rows, ROWS)
    at = matrices[0]
    for n in tl.static_range(1, len(matrices)):
        at = tl.where(tile >= n * tiles, matrices[n], at)
    past = tile // (len(matrices) * tiles) * rows
    row = tile % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row + past < rows) & (column < INNER)
    at += tl.cast(tl.program_id(1) * rows + row, tl.int64) * INNER + column
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def run(
    leaves,
    matrices,
    products,
    stored,
    rows,
    VECTOR: tl.constexpr,
    IS_VECTOR: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply every matrix with the vector of a head.

    Args:
        leaves: What vectors are computed from: (heads * `INNER`,), or one number.
        matrices: Each is (heads, rows, `INNER`).
        products: (matrices, heads, rows).
        stored: What is kept beside the vector, (heads * `INNER`,).
        rows: Of a matrix.
        VECTOR: The vector, and what is stored, from the leaves: a generated function.
        IS_VECTOR: Which leaves are vectors, and not one number.
        INNER: Entries of a vector.
        ROWS: Of a tile.
        BLOCK: Columns of a tile.
        PDL: Whether it may start before the kernel before it has ended.
    """
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < INNER
    here = tl.program_id(1) * INNER + column
    weights = load_tile(matrices, tl.program_id(0), rows, INNER, ROWS, BLOCK)
    if PDL:  # all but weights may be what the kernel before writes
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    values = ()
    for n in tl.static_range(len(leaves)):
        if IS_VECTOR[n]:
            value = tl.load(leaves[n] + here, mask=inside, other=0.0)
        else:
            value = tl.load(leaves[n])
        values = values + (value.to(tl.float32),)
    values = VECTOR(INNER, values)
    vector = tl.where(inside, values[0], 0.0)
    once = column + tl.program_id(0) * INNER < INNER  # one program stores
    for n in tl.static_range(len(stored)):
        tl.store(stored[n] + here, values[1 + n], mask=once)
    tiles = tl.cdiv(rows, ROWS)
    for tile in range(tl.program_id(0), len(matrices) * tiles, tl.num_programs(0)):
        following = load_tile(matrices, tile + tl.num_programs(0), rows, INNER, ROWS, BLOCK)
        total = tl.sum(weights.to(tl.float32) * vector, 1)
        row = tile % tiles * ROWS + tl.arange(0, ROWS)
        at = tile // tiles * tl.num_programs(1) + tl.program_id(1)
        tl.store(products + at * rows + row, total, mask=row < rows)
        weights = following
