"""Products of matrices with a few vectors, around a generated function that computes a vector.

A step of generation reads every weight once: its time is that of reading them, as long as the
memory is never idle. So a program loads its first weights before it waits for the kernel before it.
No kernel may write weights while others run: a step of generation reads them only, and a CUDA graph
waits for what was launched before it.

Every program computes the whole vectors, in registers, so that no kernel of a few thousand numbers
stands between two products.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    matrices,
    tile,
    rows,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WORD: tl.constexpr,
):
    """Some rows of one of the matrices; nothing after the last tile of the last one.

    Of weights in bfloat16 two are loaded as one integer, of bytes four: a register holds as many on
    their way from one iteration to the next, and otherwise one. `WORD` says how many.
    """
    tiles = tl.cdiv(rows, ROWS)
    at = matrices[0]
    for n in tl.static_range(1, len(matrices)):
        at = tl.where(tile >= n * tiles, matrices[n], at)
    past = tile // (len(matrices) * tiles) * rows
    row = tile % tiles * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK // WORD)[None, :]
    inside = (row + past < rows) & (column < INNER // WORD)
    if WORD > 1:
        at = at.to(tl.pointer_type(tl.int32))
    at += tl.cast(tl.program_id(1) * rows + row, tl.int64) * (INNER // WORD) + column
    return tl.load(at, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def apart(values, WORD: tl.constexpr):
    """The values of every `WORD`-th column, from each of the first."""
    if WORD == 1:
        parts = (values,)
    elif WORD == 2:
        pairs = tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2))
        parts = tl.split(pairs)
    else:
        pairs = tl.reshape(values, (values.shape[0], values.shape[1] // 4, 2, 2))
        even, odd = tl.split(pairs)
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        parts = (first, second, third, fourth)
    return parts


@triton.jit
def numbers(weights, n: tl.constexpr, WORD: tl.constexpr):
    """Weights in float32, every `WORD`-th from the n-th.

    A number in bfloat16 is the upper half of one in float32. A byte and 128 are the last bits of
    2**23 and as much, which needs no unit that converts; there are few of these.
    """
    if WORD == 1:
        result = weights.to(tl.float32)
    elif WORD == 2:
        bits = weights << 16 if n == 0 else weights & (0xFFFF0000 - 2**32)
        result = bits.to(tl.float32, bitcast=True)
    else:
        byte = ((weights ^ (0x80808080 - 2**32)) >> 8 * n) & 0xFF
        result = (byte | 0x4B000000).to(tl.float32, bitcast=True) - (2.0**23 + 128)
    return result


@triton.jit
def sums(totals, ROWS: tl.constexpr):
    """The sums over columns of one or two tensors; the first rows of both first.

    Warps wait for each other in every sum, so both are taken in one.
    """
    joined = totals[0]
    if len(totals) == 2:
        joined = tl.join(totals[0], totals[1])
    columns: tl.constexpr = totals[0].shape[1]
    joined = tl.permute(tl.reshape(joined, (ROWS, columns, len(totals))), (0, 2, 1))
    return tl.sum(tl.reshape(joined, (ROWS * len(totals), columns)), 1)


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
    TEXTS: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WORD: tl.constexpr,
    AHEAD: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply every matrix with the vectors of a head, one of each text.

    Args:
        leaves: What vectors are computed from.
        matrices: Each is (heads, rows, `INNER`).
        products: (matrices, heads, texts, rows).
        stored: What is kept beside the vectors, (texts, heads * `INNER`).
        rows: Of a matrix.
        VECTOR: See `compute`.
        LEAVES: See `compute`.
        TEXTS: Number of texts.
        INNER: Entries of a vector.
        ROWS: Of a tile.
        BLOCK: Columns of a tile.
        WORD: Weights that are loaded as one number, see `load_tile`.
        AHEAD: Tiles that are on their way at a time.
        GROUP: Tiles whose sums are taken together; 1 for several texts.
        PDL: Whether it may start before the kernel before it has ended.
    """
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < INNER
    here = tl.program_id(1) * INNER + column
    weights = ()
    for n in tl.static_range(AHEAD):
        first = tl.program_id(0) + n * tl.num_programs(0)
        weights = weights + (load_tile(matrices, first, rows, INNER, ROWS, BLOCK, WORD),)
    if PDL:  # all but weights may be what the kernel before writes
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    once = column + tl.program_id(0) * INNER < INNER  # one program stores
    vectors = ()
    for text in tl.static_range(TEXTS):
        values = compute(leaves, here, text, inside, VECTOR, LEAVES, INNER)
        vectors = vectors + (apart(tl.where(inside, values[0], 0.0), WORD),)
        for n in tl.static_range(len(stored)):
            kept = stored[n] + text * tl.num_programs(1) * INNER
            tl.store(kept + here, values[1 + n], mask=once)
    tiles = tl.cdiv(rows, ROWS)
    count = len(matrices) * tiles
    for start in range(tl.program_id(0), count, GROUP * tl.num_programs(0)):
        totals = ()
        for ahead in tl.static_range(AHEAD, AHEAD + GROUP):
            after = start + ahead * tl.num_programs(0)
            weights = weights + (load_tile(matrices, after, rows, INNER, ROWS, BLOCK, WORD),)
            for text in tl.static_range(TEXTS):
                total = numbers(weights[0], 0, WORD) * vectors[text][0]
                for n in tl.static_range(1, WORD):
                    total += numbers(weights[0], n, WORD) * vectors[text][n]
                totals = totals + (total,)
                if len(totals) == GROUP:
                    number = tl.arange(0, ROWS * GROUP)
                    tile = start + number % GROUP * tl.num_programs(0)
                    row = tile % tiles * ROWS + number // GROUP
                    at = tile // tiles * tl.num_programs(1) + tl.program_id(1)
                    place = (at * TEXTS + text) * rows + row
                    mask = (row < rows) & (tile < count)
                    tl.store(products + place, sums(totals, ROWS), mask=mask)
                    totals = ()
            weights = weights[1:]
