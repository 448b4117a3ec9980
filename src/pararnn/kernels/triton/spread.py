"""Many steps of a cell whose channels mix, for few rows: programs share channels and keep weights.

A program has some rows and a block of channels of one group. It keeps in registers, for all steps,
the state of its channels and the part of each weight that it multiplies. Programs with the same
rows exchange sums and nothing else. Each multiplies a weight with its own channels alone, which
gives its part of every result of the product. It writes this part to global memory, which the L2
cache holds, waits for the others, and adds up the parts of all for the channels that it has. Sums,
means and norms over channels are exchanged in the same way. All add in the same order, so that the
result does not depend on which program was first.

Two kinds of sums need no exchange (`kernels.spread` finds them): products with blocks of a weight
that lie within the channels of one program; and whatever is computed from exchanged sums alone and
is small, such as a narrow layer with its norm, which every program computes for itself.

A step is a sequence of stages. A stage that needs sums of others begins by waiting for them. Memory
for sums is there twice, and steps use the two in turn: a program that is already in the next step
does not overwrite what a slower one still reads.
"""

import triton
import triton.language as tl

from pararnn.kernels.triton.common import cast
from pararnn.kernels.triton.mixing import begins, directed, load, load_places, moved, store
from pararnn.kernels.triton.wide import along, neutral

# Who computes a sum, see `kernels.spread`
OWN: tl.constexpr = tl.constexpr(0)
REPEATED: tl.constexpr = tl.constexpr(1)
SENT: tl.constexpr = tl.constexpr(2)


@triton.jit
def picked(values, WHICH: tl.constexpr):
    """Values by their numbers; a zero that nobody reads where a number is negative."""
    found = ()
    for n in tl.static_range(len(WHICH)):
        if WHICH[n] >= 0:  # noqa: SIM108
            found = found + (values[WHICH[n]],)
        else:
            found = found + (0.0,)
    return found


@triton.jit
def unknown(COUNT: tl.constexpr):
    """Zeros in place of sums that are not known yet."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (0.0,)
    return found


@triton.jit
def put(values, NUMBER: tl.constexpr, value):
    """A tuple with one value replaced."""
    found = ()
    for n in tl.static_range(len(values)):
        if n == NUMBER:  # noqa: SIM108
            found = found + (value,)
        else:
            found = found + (values[n],)
    return found


@triton.jit
def chosen(which, a, b):
    """`tl.where` of two tuples."""
    found = ()
    for n in tl.static_range(len(a)):
        found = found + (tl.where(which, a[n], b[n]),)
    return found


@triton.jit
def load_tiles(
    weights, first, PRODUCTS: tl.constexpr, MATRIX, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """The part of the weight of every product that a program multiplies.

    Axes of a part: results, multiplied channels // TILE, multiplied channels % TILE.

    Args:
        weights: Those of the group, each `WIDTH` x `WIDTH`.
        first: The first channel of the program.
        PRODUCTS: See `run`.
        MATRIX: Elements from one weight to the next.
        WIDTH: See `run`.
        TILE: See `functions.dot`.
    """
    found = ()
    for n in tl.static_range(len(PRODUCTS)):
        result = tl.arange(0, PRODUCTS[n][2])[:, None, None]
        factor = tl.arange(0, PRODUCTS[n][3] // TILE)[None, :, None] * TILE
        factor += tl.arange(0, TILE)[None, None, :]
        if PRODUCTS[n][1] == SENT:
            factor += first
        else:
            result += first
        if PRODUCTS[n][1] == OWN:
            factor += first
        at = weights + PRODUCTS[n][0] * MATRIX + result * WIDTH + factor
        found = found + (tl.load(at, mask=(result < WIDTH) & (factor < WIDTH), other=0.0),)
    return found


@triton.jit
def times(tile, x, line, ROWS: tl.constexpr):
    """The products of all rows of a vector with a part of a weight, row by row."""
    found = tl.zeros([ROWS, tile.shape[0]], tile.dtype)
    for row in tl.static_range(ROWS):
        own = tl.sum(tl.where(line == row, x, 0.0), axis=0)
        terms = tl.reshape(own, (tile.shape[1], tile.shape[2]))[None, :, :] * tile
        result = tl.sum(tl.sum(terms, axis=1), axis=1)
        found = tl.where(line == row, result[None, :], found)
    return found


@triton.jit
def arrive(counter, PARTS: tl.constexpr):
    """Tell the others that this program has written its parts of all sums of a round."""
    tl.debug_barrier()
    if PARTS > 1:
        tl.atomic_add(counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter, target, PARTS: tl.constexpr):
    """Wait until programs have arrived so many times."""
    if PARTS > 1:
        while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
            pass
        tl.debug_barrier()


@triton.jit
def send(
    here,
    vectors,
    tile,
    d,
    part,
    line,
    STAGE: tl.constexpr,
    SENT_PRODUCTS: tl.constexpr,
    SENT_TOTALS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    TOTALS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write this program's parts of the sums that are exchanged: (program, row, result)."""
    for n in tl.static_range(len(SENT_PRODUCTS[STAGE]) // 2):
        lanes = PRODUCTS[SENT_PRODUCTS[STAGE][2 * n]][4]
        x = tl.where(d < lanes, vectors[SENT_PRODUCTS[STAGE][2 * n + 1]], 0.0)
        part_of = times(tile[SENT_PRODUCTS[STAGE][2 * n]], x, line, ROWS)
        at = here + PRODUCTS[SENT_PRODUCTS[STAGE][2 * n]][6] * (PARTS * ROWS)
        at += (part * ROWS + line) * PRODUCTS[SENT_PRODUCTS[STAGE][2 * n]][2]
        tl.store(at + tl.arange(0, PRODUCTS[SENT_PRODUCTS[STAGE][2 * n]][2])[None, :], part_of)
    for n in tl.static_range(len(SENT_TOTALS[STAGE]) // 2):
        at = here + TOTALS[SENT_TOTALS[STAGE][2 * n]][3] * (PARTS * ROWS) + part * ROWS + line
        x = vectors[SENT_TOTALS[STAGE][2 * n + 1]]
        tl.store(at, total_of(x, d, SENT_TOTALS[STAGE][2 * n], TOTALS))


@triton.jit
def received(
    product,
    here,
    lanes,
    line,
    STAGE: tl.constexpr,
    RECEIVED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Products, with those that arrive: in some lanes, the parts of all programs added up."""
    for n in tl.static_range(len(RECEIVED[STAGE])):
        inside = (lanes < PRODUCTS[RECEIVED[STAGE][n]][5]) & (line >= 0)
        at = here + PRODUCTS[RECEIVED[STAGE][n]][6] * (PARTS * ROWS) + lanes
        at += line * PRODUCTS[RECEIVED[STAGE][n]][2]
        found = tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
        for part in tl.static_range(1, PARTS):
            more = at + part * (ROWS * PRODUCTS[RECEIVED[STAGE][n]][2])
            found += tl.load(more, mask=inside, other=0.0, cache_modifier=".cg")
        product = put(product, RECEIVED[STAGE][n], found)
    return product


@triton.jit
def collected(
    totals,
    here,
    STAGE: tl.constexpr,
    COLLECTED: tl.constexpr,
    TOTALS: tl.constexpr,
    PARTS: tl.constexpr,
    SHARES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Totals, with those that arrive, see `received`."""
    share, row = tl.arange(0, SHARES)[None, :], tl.arange(0, ROWS)[:, None]
    inside = (share < PARTS) & (row >= 0)
    for n in tl.static_range(len(COLLECTED[STAGE])):
        none = neutral(TOTALS[COLLECTED[STAGE][n]][0])
        at = here + TOTALS[COLLECTED[STAGE][n]][3] * (PARTS * ROWS) + share * ROWS + row
        parts = tl.load(at, mask=inside, other=none, cache_modifier=".cg")
        totals = put(totals, COLLECTED[STAGE][n], along(parts, TOTALS[COLLECTED[STAGE][n]][0]))
    return totals


@triton.jit
def multiplied(
    product,
    vectors,
    repeated,
    tile,
    d,
    b,
    line,
    STAGE: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    PRODUCTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Products, with those of a stage that need no exchange."""
    for n in tl.static_range(len(MULTIPLIED[STAGE]) // 2):
        lanes = PRODUCTS[MULTIPLIED[STAGE][2 * n]][4]
        if PRODUCTS[MULTIPLIED[STAGE][2 * n]][1] == REPEATED:
            x = tl.where(b < lanes, repeated[MULTIPLIED[STAGE][2 * n + 1]], 0.0)
        else:
            x = tl.where(d < lanes, vectors[MULTIPLIED[STAGE][2 * n + 1]], 0.0)
        result = times(tile[MULTIPLIED[STAGE][2 * n]], x, line, ROWS)
        product = put(product, MULTIPLIED[STAGE][2 * n], result)
    return product


@triton.jit
def summed(
    totals,
    vectors,
    repeated,
    d,
    b,
    STAGE: tl.constexpr,
    SUMMED: tl.constexpr,
    TOTALS: tl.constexpr,
):
    """Totals, with those of a stage that need no exchange."""
    for n in tl.static_range(len(SUMMED[STAGE]) // 2):
        if TOTALS[SUMMED[STAGE][2 * n]][1] == REPEATED:
            found = total_of(repeated[SUMMED[STAGE][2 * n + 1]], b, SUMMED[STAGE][2 * n], TOTALS)
        else:
            found = total_of(vectors[SUMMED[STAGE][2 * n + 1]], d, SUMMED[STAGE][2 * n], TOTALS)
        totals = put(totals, SUMMED[STAGE][2 * n], found)
    return totals


@triton.jit
def total_of(x, lanes, NUMBER: tl.constexpr, TOTALS: tl.constexpr):
    """A total of some lanes of a vector."""
    none = neutral(TOTALS[NUMBER][0])
    return along(tl.where(lanes < TOTALS[NUMBER][2], x, none), TOTALS[NUMBER][0])


@triton.jit(do_not_specialize=["rows", "total", "batch", "time", "chunk", "first", "reverse"])
def run(
    drives,
    coefficients,
    weights,
    resets,
    reset_states,
    initial,
    states,
    ends,
    settled,
    scratch,
    counters,
    rows,
    total,
    batch,
    time,
    chunk,
    first,
    reverse,
    VECTORS: tl.constexpr,
    REPEATED_VECTORS: tl.constexpr,
    NEW_STATE: tl.constexpr,
    WAITS: tl.constexpr,
    ARRIVES: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SENT_PRODUCTS: tl.constexpr,
    RECEIVED: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    TOTALS: tl.constexpr,
    SENT_TOTALS: tl.constexpr,
    COLLECTED: tl.constexpr,
    SUMMED: tl.constexpr,
    DRIVES: tl.constexpr,
    DRIVE: tl.constexpr,
    REPEATED_DRIVES: tl.constexpr,
    REPEATED_DRIVE: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    COEFFICIENT: tl.constexpr,
    REPEATED_COEFFICIENTS: tl.constexpr,
    REPEATED_COEFFICIENT: tl.constexpr,
    SUMS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    SHARES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REPEATED_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Run steps of chunks.

    Args:
        drives: Tensors over time.
        coefficients: Tensors.
        weights: Blocks (weights, `GROUPS`, `WIDTH`, `WIDTH`), zero beyond `SIZE`.
        resets: Whether the state before a step is replaced: one tensor over time, or none.
        reset_states: By what: tensors over time, one per component, or none.
        initial: The states before the first step of rows, components (rows, hidden).
        states: Those after all steps: tensors over time, one per component, or none.
        ends: Those after the last step of rows, components (rows, hidden).
        settled: Which sequences are left as they are, (batch,), or None.
        scratch: Memory for 2 * `SUMS` numbers of every row of all programs.
        counters: Zeros, one for the programs that share the channels of some rows: how often they
            have arrived.
        rows: Chunks of all sequences.
        total: Rows that are run; if there are more than `rows`, they read the same once more.
        batch: Sequences.
        time: Steps of each.
        chunk: Steps of a chunk.
        first: Steps left out, of every chunk the first.
        reverse: 1 if the last step of a chunk comes first, else 0.
        VECTORS: Of every stage, a generated function that computes what is multiplied or summed, in
            the channels of the program.
        REPEATED_VECTORS: Likewise, of vectors that every program computes as a whole.
        NEW_STATE: New states from states, drives, coefficients, products and totals: a generated
            function.
        WAITS: Of every stage, whether it begins by waiting.
        ARRIVES: Of every stage, whether it writes the last sums before the next wait.
        PRODUCTS: Of every product (0) its weight, (1) who computes it, (2) results and (3)
            multiplied channels of the part of the weight that a program has, (4) lanes of the
            vector, (5) lanes of the result, (6) its place in `scratch`.
        SENT_PRODUCTS: Of every stage, pairs of numbers, flat: a product of which the program writes
            its part, and the vector that is multiplied.
        RECEIVED: Of every stage, the numbers of products that arrive.
        MULTIPLIED: Like `SENT_PRODUCTS`, of products that need no exchange.
        TOTALS: Of every sum or extreme of a vector (0) its kind, (1) who computes it, (2) lanes of
            the vector, (3) its place in `scratch`.
        SENT_TOTALS: Like `SENT_PRODUCTS`.
        COLLECTED: Like `RECEIVED`.
        SUMMED: Like `MULTIPLIED`.
        DRIVES: Places in `drives` of those that are read in the channels of a program, see
            `mixing.load_places`.
        DRIVE: Of every drive of the step, its number among these, negative for none.
        REPEATED_DRIVES: Like `DRIVES`, of those that `REPEATED_VECTORS` read, as a whole.
        REPEATED_DRIVE: Like `DRIVE`.
        COEFFICIENTS: These four are of coefficients what the last four are of drives.
        COEFFICIENT: See there.
        REPEATED_COEFFICIENTS: See there.
        REPEATED_COEFFICIENT: See there.
        SUMS: Numbers that a program writes for a row in a step.
        GROUPS: Their number.
        SIZE: Channels of a group.
        WIDTH: Rows and columns of a weight in `weights`.
        PARTS: Programs that share these. All must run at the same time.
        SHARES: `PARTS`, or the next power of two.
        ROWS: Rows of a program.
        BLOCK: Channels of a program.
        REPEATED_BLOCK: Channels of a vector that every program computes as a whole.
        TILE: See `functions.dot`.
    """
    real: tl.constexpr = initial[0].dtype.element_ty
    HALF: tl.constexpr = SUMS * PARTS * ROWS
    own, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line = tl.arange(0, ROWS)[:, None]
    d = part * BLOCK + tl.arange(0, BLOCK)[None, :]
    b = tl.arange(0, REPEATED_BLOCK)[None, :]
    number = own * ROWS + line
    exists, row = number < total, number % rows
    begin = row // batch * chunk
    count = tl.minimum(chunk, time - begin)
    first = tl.where(reverse > 0, count - 1, tl.minimum(first, count - 1))
    steps = tl.where(exists, tl.where(reverse > 0, count, count - first), 0)
    if settled is not None:
        steps = tl.where(tl.load(settled + row % batch) != 0, 0, steps)
    longest = tl.max(tl.max(steps, axis=1), axis=0)
    last = tl.maximum(steps - 1, 0)
    direction = tl.cast(1 - 2 * reverse, tl.int64)
    position = tl.cast(begin + first, tl.int64)
    sequence = tl.cast(row % batch, tl.int64)
    row = tl.cast(number, tl.int64) * (GROUPS * SIZE)
    drives_at, drive_steps = begins(drives, sequence, position), directed(drives, direction)
    resets_at, reset_steps = begins(resets, sequence, position), directed(resets, direction)
    fresh_at = begins(reset_states, sequence, position)
    fresh_steps = directed(reset_states, direction)
    states_at, state_steps = begins(states, sequence, position), directed(states, direction)

    shared = tl.cast(own, tl.int64) * GROUPS + group
    counter, target = counters + shared, 0
    scratch += shared * (2 * HALF)
    weights += tl.cast(group, tl.int64) * (WIDTH * WIDTH)
    tile = load_tiles(weights, part * BLOCK, PRODUCTS, GROUPS * WIDTH * WIDTH, WIDTH, TILE)
    inside, repeated_inside = exists & (d < SIZE), exists & (b < SIZE)
    coefficient = picked(
        cast(load_places(coefficients, (), 0, COEFFICIENTS, group, d, d < SIZE), real), COEFFICIENT
    )
    repeated_coefficient = picked(
        cast(load_places(coefficients, (), 0, REPEATED_COEFFICIENTS, group, b, b < SIZE), real),
        REPEATED_COEFFICIENT,
    )
    s = cast(load(initial, row, group * SIZE + d, inside), real)
    ahead = load_places(drives_at, drive_steps, 0, DRIVES, group, d, inside)
    repeated_ahead = load_places(
        drives_at, drive_steps, 0, REPEATED_DRIVES, group, b, repeated_inside
    )
    reset = load(resets_at, 0, 0, exists)
    for i in range(0, longest):
        active = i < steps
        following = tl.cast(tl.minimum(i + 1, last), tl.int64)
        drive = picked(cast(ahead, real), DRIVE)
        repeated_drive = picked(cast(repeated_ahead, real), REPEATED_DRIVE)
        ahead = load_places(drives_at, drive_steps, following, DRIVES, group, d, inside)
        repeated_ahead = load_places(
            drives_at, drive_steps, following, REPEATED_DRIVES, group, b, repeated_inside
        )
        before = s
        for n in tl.static_range(len(resets)):  # of one, or none
            replaced = (reset[n] != 0) & active
            if tl.max(tl.max(replaced.to(tl.int32), axis=1), axis=0) > 0:
                step = tl.cast(tl.minimum(i, last), tl.int64)
                fresh_now = moved(fresh_at, fresh_steps, step)
                fresh = cast(load(fresh_now, 0, group * SIZE + d, replaced & inside), real)
                before = chosen(replaced, fresh, before)
            reset = load(moved(resets_at, reset_steps, following), 0, 0, exists)
        here = scratch + i % 2 * HALF
        product, repeated_product = unknown(len(PRODUCTS)), unknown(len(PRODUCTS))
        totals = unknown(len(TOTALS))
        for stage in tl.static_range(len(WAITS)):
            if WAITS[stage]:
                target += PARTS
                wait(counter, target, PARTS)
            product = received(product, here, d, line, stage, RECEIVED, PRODUCTS, PARTS, ROWS)
            repeated_product = received(
                repeated_product, here, b, line, stage, RECEIVED, PRODUCTS, PARTS, ROWS
            )
            totals = collected(totals, here, stage, COLLECTED, TOTALS, PARTS, SHARES, ROWS)
            vectors = VECTORS[stage](before, drive, coefficient, product, totals)
            repeated = REPEATED_VECTORS[stage](
                (), repeated_drive, repeated_coefficient, repeated_product, totals
            )
            send(
                here,
                vectors,
                tile,
                d,
                part,
                line,
                stage,
                SENT_PRODUCTS,
                SENT_TOTALS,
                PRODUCTS,
                TOTALS,
                PARTS,
                ROWS,
            )
            if ARRIVES[stage]:
                arrive(counter, PARTS)
            product = multiplied(
                product, vectors, repeated, tile, d, b, line, stage, MULTIPLIED, PRODUCTS, ROWS
            )
            totals = summed(totals, vectors, repeated, d, b, stage, SUMMED, TOTALS)
        new = NEW_STATE(before, drive, coefficient, product, totals)
        store(states_at, 0, group * SIZE + d, new, inside & active)
        states_at = moved(states_at, state_steps, 1)
        s = chosen(active, new, before)
    store(ends, row, group * SIZE + d, s, inside)
