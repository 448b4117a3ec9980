"""Products of matrices with a few vectors, around a generated function that computes a vector.

A step of generation reads every weight once: its time is that of reading them, as long as the
memory is never idle. So a program loads its first weights before it waits for the kernel before it.
No kernel may write weights while others run: a step of generation reads them only, and a CUDA graph
waits for what was launched before it.

For one text every program computes the whole vector, in registers, so that no kernel of a few
thousand numbers stands between two products. For several texts that would be as much to read as the
weights: `run_vectors` computes the vectors, while `run_products` already loads weights.
"""

import triton
import triton.language as tl

from pararnn.kernels.triton import functions


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
def compute(leaves, entry, text, inside, VECTOR: tl.constexpr, LEAVES: tl.constexpr, INNER):
    """The vector of a text, and what is stored beside it.

    Args:
        leaves: What vectors are computed from.
        entry: Which entries, of all heads.
        text: Number of the text.
        inside: Which of these entries there are.
        VECTOR: The vector, and what is stored, from the leaves: a generated function.
        LEAVES: Where the entries of the leaves are, see `pararnn.kernels.matvec.Leaf`.
        INNER: Entries of a vector.
    """
    values = ()
    for n in tl.static_range(len(leaves)):
        at = leaves[n] + LEAVES[n][0] + text * LEAVES[n][1]
        if LEAVES[n][2] == 0:
            value = tl.load(at)
        else:
            place = entry
            if LEAVES[n][2] != LEAVES[n][3]:
                place = entry // LEAVES[n][2] * LEAVES[n][3] + entry % LEAVES[n][2]
            value = tl.load(at + place, mask=inside, other=0.0)
        values = values + (value.to(tl.float32),)
    return VECTOR(INNER, values)


@triton.jit
def run(
    leaves,
    matrices,
    products,
    stored,
    rows,
    VECTOR: tl.constexpr,
    LEAVES: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply every matrix with the vector of a head, for one text.

    Args:
        leaves: What vectors are computed from.
        matrices: Each is (heads, rows, `INNER`).
        products: (matrices, heads, 1, rows).
        stored: What is kept beside the vector, (1, heads * `INNER`).
        rows: Of a matrix.
        VECTOR: See `compute`.
        LEAVES: See `compute`.
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
    values = compute(leaves, here, 0, inside, VECTOR, LEAVES, INNER)
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


@triton.jit
def run_vectors(
    leaves,
    vectors,
    stored,
    VECTOR: tl.constexpr,
    LEAVES: tl.constexpr,
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute a part of the vector of a head and a text.

    Args:
        leaves: What vectors are computed from.
        vectors: (texts, heads, `INNER`).
        stored: What is kept beside the vector, (texts, heads * `INNER`).
        VECTOR: See `compute`.
        LEAVES: See `compute`.
        INNER: Entries of a vector.
        BLOCK: Entries of a part; all, where one depends on all.
        PDL: Whether it may start before the kernel before it has ended.
    """
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = column < INNER
    here = tl.program_id(1) * INNER + column
    text = tl.program_id(2)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    values = compute(leaves, here, text, inside, VECTOR, LEAVES, INNER)
    at = text * tl.num_programs(1) * INNER + here
    tl.store(vectors + at, values[0], mask=inside)
    for n in tl.static_range(len(stored)):
        tl.store(stored[n] + at, values[1 + n], mask=inside)


@triton.jit
def load_parts(
    matrices,
    tile,
    chunk,
    rows,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """Some rows of one of the matrices, some columns in parts; nothing after the last tile."""
    tiles = tl.cdiv(rows, ROWS)
    at = matrices[0]
    for n in tl.static_range(1, len(matrices)):
        at = tl.where(tile >= n * tiles, matrices[n], at)
    past = tile // (len(matrices) * tiles) * rows
    row = tile % tiles * ROWS + tl.arange(0, ROWS)[None, :, None]
    part = chunk * PARTS + tl.arange(0, PARTS)[:, None, None]
    column = part * PART + tl.arange(0, PART)[None, None, :]
    inside = (row + past < rows) & (column < INNER)
    at += tl.cast(tl.program_id(1) * rows + row, tl.int64) * INNER + column
    return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_vectors(
    vectors,
    chunk,
    TEXTS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    """The same columns of the vectors of all texts, (`PARTS`, `PART`, `BLOCK`)."""
    part = chunk * PARTS + tl.arange(0, PARTS)[:, None, None]
    column = part * PART + tl.arange(0, PART)[None, :, None]
    text = tl.arange(0, BLOCK)[None, None, :]
    at = (text * tl.num_programs(1) + tl.program_id(1)) * INNER + column
    return tl.load(vectors + at, mask=(text < TEXTS) & (column < INNER), other=0.0)


@triton.jit
def run_products(
    vectors,
    matrices,
    products,
    rows,
    TEXTS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply every matrix with the vectors of a head, for several texts.

    The columns of a tile are cut into parts, whose products warps compute side by side.

    Args:
        vectors: (texts, heads, `INNER`).
        matrices: Each is (heads, rows, `INNER`).
        products: (matrices, heads, texts, rows).
        rows: Of a matrix.
        TEXTS: Number of texts.
        BLOCK: The same with those that fill up a tile.
        INNER: Entries of a vector.
        ROWS: Of a tile.
        PARTS: Of a chunk.
        PART: Columns of a part.
        CHUNKS: Of the columns.
        PDL: Whether it may start before the kernel before it has ended.
    """
    weights = load_parts(matrices, tl.program_id(0), 0, rows, INNER, ROWS, PARTS, PART)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    kind: tl.constexpr = vectors.dtype.element_ty
    x = load_vectors(vectors, 0, TEXTS, BLOCK, INNER, PARTS, PART)
    x = functions.as_factor(x.to(tl.float32), kind)
    text = tl.arange(0, BLOCK)[None, :]
    tiles = tl.cdiv(rows, ROWS)
    for tile in range(tl.program_id(0), len(matrices) * tiles, tl.num_programs(0)):
        total = tl.zeros((PARTS, ROWS, BLOCK), tl.float32)
        for chunk in tl.static_range(CHUNKS):
            after = tile + (chunk + 1) // CHUNKS * tl.num_programs(0)
            following = load_parts(
                matrices, after, (chunk + 1) % CHUNKS, rows, INNER, ROWS, PARTS, PART
            )
            if CHUNKS > 1:
                x = load_vectors(vectors, chunk, TEXTS, BLOCK, INNER, PARTS, PART)
                x = functions.as_factor(x.to(tl.float32), kind)
            factor = functions.as_factor(weights.to(tl.float32), kind)
            total = tl.dot(factor, x, total, input_precision="ieee")
            weights = following
        row = (tile % tiles * ROWS + tl.arange(0, ROWS))[:, None]
        at = tile // tiles * tl.num_programs(1) + tl.program_id(1)
        place = (at * TEXTS + text) * rows + row
        tl.store(products + place, tl.sum(total, 0), mask=(row < rows) & (text < TEXTS))
