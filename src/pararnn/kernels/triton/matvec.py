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
    """The sums over columns of one, two or four tensors; the first rows of all first.

    Warps wait for each other in every sum, so all are taken in one.
    """
    columns: tl.constexpr = totals[0].shape[1]
    joined = totals[0]
    if len(totals) == 2:
        joined = tl.join(totals[0], totals[1])
    elif len(totals) == 4:
        even = tl.join(totals[0], totals[2])
        joined = tl.join(even, tl.join(totals[1], totals[3]))
    joined = tl.permute(tl.reshape(joined, (ROWS, columns, len(totals))), (0, 2, 1))
    return tl.sum(tl.reshape(joined, (ROWS * len(totals), columns)), 1)


@triton.jit
def read(leaves, entry, text, inside, LEAVES: tl.constexpr):
    """What the vector of a text is computed from.

    Args:
        leaves: What vectors are computed from, and numbers of rows.
        entry: Which entries, of all heads.
        text: Number of the text.
        inside: Which of these entries there are.
        LEAVES: Where the entries of the leaves are, see `pararnn.kernels.matvec.Leaf`.
    """
    values = ()
    for n in tl.static_range(len(LEAVES)):
        which = text
        if LEAVES[n][4] >= 0:
            which = tl.load(leaves[len(LEAVES) + LEAVES[n][4]] + text)
        at = leaves[n] + LEAVES[n][0] + which * LEAVES[n][1]
        if LEAVES[n][2] == 0:
            value = tl.load(at)
        else:
            place = entry
            if LEAVES[n][2] != LEAVES[n][3]:
                place = entry // LEAVES[n][2] * LEAVES[n][3] + entry % LEAVES[n][2]
            value = tl.load(at + place, mask=inside, other=0.0)
        values = values + (value,)
    return values


@triton.jit
def single(values):
    """Numbers in single precision."""
    found = ()
    for n in tl.static_range(len(values)):
        found = found + (values[n].to(tl.float32),)
    return found


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
    TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Multiply every matrix with the vectors of a head, one of each text.

    Args:
        leaves: What vectors are computed from.
        matrices: Each is (heads, rows, `INNER`).
        products: (matrices, heads, texts, rows).
        stored: What is kept beside the vectors, (texts, heads * `INNER`).
        rows: Of a matrix.
        VECTOR: A vector, and what is stored, from the leaves: a generated function.
        LEAVES: See `read`.
        TEXTS: Number of texts.
        INNER: Entries of a vector.
        ROWS: Of a tile.
        BLOCK: Columns of a tile.
        WORD: Weights that are loaded as one number, see `load_tile`.
        AHEAD: Tiles that are on their way at a time.
        GROUP: Tiles whose sums are taken together, of all texts.
        TILES: Of a program, at most: what no program has is not loaded, and takes no registers.
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
    values = ()
    for text in tl.static_range(TEXTS):  # all at once: a mean waits for what it needs
        values = values + (read(leaves, here, text, inside, LEAVES),)
    vectors = ()
    for text in tl.static_range(TEXTS):
        found = VECTOR(INNER, single(values[text]))
        vectors = vectors + (apart(tl.where(inside, found[0], 0.0), WORD),)
        for n in tl.static_range(len(stored)):
            kept = stored[n] + text * tl.num_programs(1) * INNER
            tl.store(kept + here, found[1 + n], mask=once)
    tiles = tl.cdiv(rows, ROWS)
    count = len(matrices) * tiles
    for start in range(tl.program_id(0), count, GROUP * tl.num_programs(0)):
        totals = ()
        for ahead in tl.static_range(AHEAD, AHEAD + GROUP):
            after = start + ahead * tl.num_programs(0)
            if ahead < TILES or ahead == 1:  # one stays: by it the compiler lays out tiles
                weights = weights + (load_tile(matrices, after, rows, INNER, ROWS, BLOCK, WORD),)
            else:
                weights = weights + (tl.zeros_like(weights[0]),)
            tile_weights = weights[ahead - AHEAD]
            for text in tl.static_range(TEXTS):
                total = numbers(tile_weights, 0, WORD) * vectors[text][0]
                for n in tl.static_range(1, WORD):
                    total += numbers(tile_weights, n, WORD) * vectors[text][n]
                totals = totals + (total,)
        number = tl.arange(0, ROWS * GROUP * TEXTS)
        tile = start + number % (GROUP * TEXTS) // TEXTS * tl.num_programs(0)
        row = tile % tiles * ROWS + number // (GROUP * TEXTS)
        at = tile // tiles * tl.num_programs(1) + tl.program_id(1)
        place = (at * TEXTS + number % TEXTS) * rows + row
        mask = (row < rows) & (tile < count)
        tl.store(products + place, sums(totals, ROWS), mask=mask)
        weights = weights[GROUP:]
