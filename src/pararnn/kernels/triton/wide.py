"""Many steps of a cell whose channels mix in ways for which no program can have them all.

Some rows, each one chunk of one sequence, go through time together, and the channels of one group
are shared out among programs: each has some blocks of them. Every step reads the weights of a block
from the L2 cache for all rows at once. A step is taken apart where its channels mix
(`stages.Stages`). On every level, programs compute the vectors that are multiplied, and their parts
of the sums that are needed, each those of its channels; wait for each other; add up the parts, each
program all of them and in the same order; and compute the products, with the last of them the new
state. Where few channels are multiplied, those who multiply compute the vector, once they know the
sums that it is normed by, and no round more is needed. What programs hand to each other is in
global memory, that is, in the cache: `scratch`. It is there twice and written in turn, so that no
program writes what another still reads: to have reached a place where all wait, that one must have
ended the step before.
"""

import triton
import triton.language as tl

from pararnn.kernels.triton.common import cast
from pararnn.kernels.triton.functions import maximum, minimum
from pararnn.kernels.triton.mixing import begins, directed, load, load_places, moved, store

# Kinds of reductions, as tables have them
SUM: tl.constexpr = tl.constexpr(0)
MAX: tl.constexpr = tl.constexpr(1)
MIN: tl.constexpr = tl.constexpr(2)


@triton.jit
def together(counter, target, PARTS: tl.constexpr):
    """Wait until the counter, of as many programs as have to come here, reaches a number."""
    tl.debug_barrier()
    if PARTS > 1:
        tl.atomic_add(counter, 1, sem="release", scope="gpu")
        while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
            pass
        tl.debug_barrier()


@triton.jit
def load_vectors(at, SLOT: tl.constexpr, COUNT: tl.constexpr):
    """Vectors of all rows that are next to each other in the scratch memory."""
    found = ()
    for n in tl.static_range(COUNT):
        found = found + (tl.load(at + n * SLOT, cache_modifier=".cg"),)
    return found


@triton.jit
def neutral(KIND: tl.constexpr):
    """What changes no sum or extreme."""
    if KIND == MAX:
        found: tl.constexpr = float("-inf")
    elif KIND == MIN:
        found: tl.constexpr = float("inf")
    else:
        found: tl.constexpr = 0.0
    return found


@triton.jit
def along(values, KIND: tl.constexpr):
    """The sum or extreme of each row."""
    if KIND == MAX:
        found = tl.reduce(values, 1, maximum)
    elif KIND == MIN:
        found = tl.reduce(values, 1, minimum)
    else:
        found = tl.sum(values, axis=1)
    return found[:, None]


@triton.jit
def joined(a, b, KIND: tl.constexpr):
    """The sum or extreme of two."""
    if KIND == MAX:
        found = maximum(a, b)
    elif KIND == MIN:
        found = minimum(a, b)
    else:
        found = a + b
    return found


@triton.jit
def no_totals(line, REAL: tl.constexpr, LEVEL: tl.constexpr, TOTALS: tl.constexpr):
    """Those of a level over no channels, for all rows."""
    found = ()
    for n in tl.static_range(len(TOTALS[LEVEL])):
        found = found + (tl.full(line.shape, neutral(TOTALS[LEVEL][n]), REAL),)
    return found


@triton.jit
def with_block(
    totals,
    values,
    d,
    LEVEL: tl.constexpr,
    TOTALS: tl.constexpr,
    LANES: tl.constexpr,
    STORED: tl.constexpr,
):
    """Totals with a block of channels added.

    Args:
        totals: So far.
        values: The vectors that they are of, behind those that are stored.
        d: The channels.
        LEVEL: The level.
        TOTALS: Of every level, the kinds of its totals.
        LANES: Likewise, how many lanes each goes over.
        STORED: Of every level, the lanes of the vectors that are stored.
    """
    found = ()
    for n in tl.static_range(len(TOTALS[LEVEL])):
        value = tl.where(
            d < LANES[LEVEL][n], values[len(STORED[LEVEL]) + n], neutral(TOTALS[LEVEL][n])
        )
        found = found + (joined(totals[n], along(value, TOTALS[LEVEL][n]), TOTALS[LEVEL][n]),)
    return found


@triton.jit
def of_all_programs(
    at,
    LEVEL: tl.constexpr,
    TOTALS: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """The totals of a level, from those of each program: (program, row) in memory."""
    share = tl.arange(0, SHARES)[None, :]
    found = ()
    for n in tl.static_range(len(TOTALS[LEVEL])):
        place = at + (n * PARTS + share) * ROWS
        none = neutral(TOTALS[LEVEL][n])
        parts = tl.load(place, mask=share < PARTS, other=none, cache_modifier=".cg")
        found = found + (along(parts, TOTALS[LEVEL][n]),)
    return found


@triton.jit
def of_parts(
    vectors,
    c,
    like,
    LEVEL: tl.constexpr,
    REDUCED: tl.constexpr,
    SLOT: tl.constexpr,
):
    """Reductions of parts of vectors, for a block of channels.

    Args:
        vectors: The first channel of the vectors, (rows, 1).
        c: The first channel of the block.
        like: Numbers for the block, (rows, channels).
        LEVEL: The level.
        REDUCED: Of every level, for every reduction: the place of the vector, the kind, lanes of a
            part, lanes of its result, how many parts there are, and the next power of two of the
            lanes of a part.
        SLOT: From vector to vector.
    """
    BLOCK: tl.constexpr = like.shape[1]
    lane = c + tl.arange(0, BLOCK)[None, :]
    found = ()
    for n in tl.static_range(len(REDUCED[LEVEL]) // 6):
        inner = tl.arange(0, REDUCED[LEVEL][6 * n + 5])[None, :]
        own = lane // REDUCED[LEVEL][6 * n + 3]
        first = c // REDUCED[LEVEL][6 * n + 3]
        behind = (c + BLOCK - 1) // REDUCED[LEVEL][6 * n + 3] + 1
        result = tl.zeros_like(like)
        for part in range(first, tl.minimum(behind, REDUCED[LEVEL][6 * n + 4])):
            values = tl.load(
                vectors + REDUCED[LEVEL][6 * n] * SLOT + part * REDUCED[LEVEL][6 * n + 2] + inner,
                mask=inner < REDUCED[LEVEL][6 * n + 2],
                other=neutral(REDUCED[LEVEL][6 * n + 1]),
                cache_modifier=".cg",
            )
            result = tl.where(own == part, along(values, REDUCED[LEVEL][6 * n + 1]), result)
        found = found + (result,)
    return found


@triton.jit
def store_vectors(at, SLOT: tl.constexpr, values, inside):
    """Write vectors of all rows; zeros beyond their channels, for weights are zero there too."""
    for n in tl.static_range(len(values)):
        tl.store(at + n * SLOT, tl.where(inside, values[n], 0.0))


@triton.jit
def store_factors(at, SLOT: tl.constexpr, values, d, LEVEL: tl.constexpr, LANES: tl.constexpr):
    """Likewise the vectors of a level, which have so many lanes."""
    for n in tl.static_range(len(LANES[LEVEL])):
        tl.store(at + n * SLOT, tl.where(d < LANES[LEVEL][n], values[n], 0.0))


@triton.jit
def results(at, SLOT: tl.constexpr, PRODUCTS: tl.constexpr, sums):
    """All products; those that are not known yet, which nobody asks for, as anything.

    Args:
        at: Where those of lower levels are.
        SLOT: From one to the next.
        PRODUCTS: The place of each among them, or its number in `sums`, negative less 1.
        sums: Those of the last level, or none.
    """
    found = ()
    for n in tl.static_range(len(PRODUCTS)):
        if PRODUCTS[n] >= 0:
            found = found + (tl.load(at + PRODUCTS[n] * SLOT, cache_modifier=".cg"),)
        elif len(sums) > 0:
            found = found + (sums[-1 - PRODUCTS[n]],)
        else:
            found = found + (0.0,)
    return found


@triton.jit
def multiplied(c, LEVEL: tl.constexpr, BLOCKED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS, INNER):
    """Blocks of multiplied channels in which a weight is not zero, for a block of results.

    Args:
        c: The first of these.
        LEVEL: The level.
        BLOCKED: Of every level, for every weight: results of a part, multiplied channels of it, and
            how many parts there are.
        BLOCK: Channels of the block.
        BLOCKS: All blocks of multiplied channels.
        INNER: Channels of one.
    """
    first, last = BLOCKS + 0 * c, 0 * c
    for n in tl.static_range(len(BLOCKED[LEVEL]) // 3):
        part = c // BLOCKED[LEVEL][3 * n]
        behind = (c + BLOCK - 1) // BLOCKED[LEVEL][3 * n] + 1
        behind = tl.minimum(behind, BLOCKED[LEVEL][3 * n + 2])
        low = part * BLOCKED[LEVEL][3 * n + 1] // INNER
        high = (behind * BLOCKED[LEVEL][3 * n + 1] + INNER - 1) // INNER
        first = tl.where(part < behind, tl.minimum(first, low), first)
        last = tl.where(part < behind, tl.maximum(last, high), last)
    return first, last


@triton.jit
def multiply(
    vectors,
    weights,
    c,
    LEVEL: tl.constexpr,
    FACTORS: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCKED: tl.constexpr,
    LATE: tl.constexpr,
    LATE_LANES: tl.constexpr,
    drives,
    drive_steps,
    step,
    coefficients,
    totals,
    group,
    exists,
    COMPONENTS: tl.constexpr,
    DRIVES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    SIZE: tl.constexpr,
    SLOT: tl.constexpr,
    MATRIX: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    BLOCKS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The products of one level, for a block of their channels.

    Args:
        vectors: The first channel of the vectors, (rows, 1).
        weights: Those of the block in the first weight, (`INNER`, `BLOCK`).
        c: The first channel of the block.
        LEVEL: The level.
        FACTORS: Of every level, places of the vectors that are multiplied. Those that are computed
            here have none, and follow.
        MULTIPLIED: Of every level, for every product the number of its vector.
        WEIGHTS: Likewise, its weight.
        BLOCKED: See `multiplied`; empty for a level whose weights are full.
        LATE: Of every level, a generated function of the vectors that are computed here.
        LATE_LANES: Of every level, how many lanes each of these has.
        drives: What they are computed from: where rows of drives begin.
        drive_steps: The strides of these from step to step.
        step: The step.
        coefficients: See `run`.
        totals: Those of this level and of all before.
        group: The group.
        exists: Which rows there are.
        COMPONENTS: Of the state.
        DRIVES: See `run`.
        COEFFICIENTS: See `run`.
        PRODUCTS: See `run`.
        SIZE: See `run`.
        SLOT: From vector to vector.
        MATRIX: From weight to weight.
        ROWS: Rows.
        BLOCK: Channels of the result.
        INNER: Channels that are multiplied at a time.
        BLOCKS: How often, where weights are full.
        STAGES: Blocks that are on their way at a time.
        PRECISION: Of the tensor cores.
    """
    real: tl.constexpr = weights.dtype.element_ty
    COUNT: tl.constexpr = len(WEIGHTS[LEVEL])
    inner = tl.arange(0, INNER)[None, :]
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([ROWS, BLOCK], real),)
    if COUNT == 0:
        first, last = 0, 0
    elif len(BLOCKED[LEVEL]) > 0:
        first, last = multiplied(c, LEVEL, BLOCKED, BLOCK, BLOCKS, INNER)
    else:
        first, last = 0, BLOCKS
    for k in tl.range(first, last, num_stages=STAGES):
        d = k * INNER + inner
        factors = ()
        for n in tl.static_range(len(FACTORS[LEVEL])):
            at = vectors + FACTORS[LEVEL][n] * SLOT + d
            factors = factors + (tl.load(at, cache_modifier=".cg"),)
        if len(LATE_LANES[LEVEL]) > 0:
            mask = exists & (d < SIZE)
            s = load_vectors(vectors + d, SLOT, COMPONENTS)
            drive = load_places(drives, drive_steps, step, DRIVES, group, d, mask)
            coefficient = load_places(coefficients, (), 0, COEFFICIENTS, group, d, d < SIZE)
            product = results(vectors + d, SLOT, PRODUCTS, ())
            late = LATE[LEVEL](s, cast(drive, real), cast(coefficient, real), product, totals)
            for n in tl.static_range(len(LATE_LANES[LEVEL])):
                factors = factors + (tl.where(d < LATE_LANES[LEVEL][n], late[n], 0.0),)
        added = ()
        for n in tl.static_range(COUNT):
            weight = tl.load(weights + WEIGHTS[LEVEL][n] * MATRIX + k * INNER)
            factor = factors[MULTIPLIED[LEVEL][n]]
            added = added + (
                tl.dot(factor, weight, sums[n], input_precision=PRECISION, out_dtype=real),
            )
        sums = added
    return sums


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
    COMPUTE: tl.constexpr,
    LATE: tl.constexpr,
    NEW_STATE: tl.constexpr,
    COMPUTED: tl.constexpr,
    LANES: tl.constexpr,
    FACTORS: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    LATE_LANES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BLOCKED: tl.constexpr,
    REDUCED: tl.constexpr,
    RESULTS: tl.constexpr,
    TOTALS: tl.constexpr,
    TOTAL_LANES: tl.constexpr,
    FIRST_TOTAL: tl.constexpr,
    PRODUCTS: tl.constexpr,
    DRIVES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    SHARES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
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
        scratch: Memory for 2 * `SLOTS` vectors of every row of all programs, and for what each
            program adds to as many totals.
        counters: Zeros, one for all programs that share the channels of some rows.
        rows: Chunks of all sequences.
        total: Rows that are run; if there are more than `rows`, they read the same once more.
        batch: Sequences.
        time: Steps of each.
        chunk: Steps of a chunk.
        first: Steps left out, of every chunk the first.
        reverse: 1 if the last step of a chunk comes first, else 0.
        COMPUTE: Of every level, a generated function of the vectors that are stored, and then of
            those whose totals are taken.
        LATE: See `multiply`.
        NEW_STATE: New states from states, drives, coefficients, products and totals: a generated
            function.
        COMPUTED: Of every level, the place of the first vector that is stored. The state has the
            first places.
        LANES: Of every level, how many lanes each of these has.
        FACTORS: See `multiply`, as for the next four.
        MULTIPLIED: See there.
        LATE_LANES: See there.
        WEIGHTS: See there.
        BLOCKED: See there.
        REDUCED: See `of_parts`.
        RESULTS: Of every level, the place of its first product.
        TOTALS: See `with_block`, as for the next.
        TOTAL_LANES: `LANES` there.
        FIRST_TOTAL: Of every level, the number of its first total.
        PRODUCTS: See `results`.
        DRIVES: Their places in `drives`, see `mixing.load_places`.
        COEFFICIENTS: Their places in `coefficients`.
        SLOTS: Places: states, products of all levels but the last, vectors that are stored.
        GROUPS: Their number.
        SIZE: Channels of a group.
        WIDTH: Those in `weights` and `scratch`, whole blocks.
        PARTS: Programs that share them. All run at the same time.
        SHARES: The next power of two.
        ROWS: Rows of a program.
        BLOCK: Channels that are computed at a time.
        INNER: See `multiply`.
        STAGES: See `multiply`.
        PRECISION: See `multiply`.
    """
    real: tl.constexpr = initial[0].dtype.element_ty
    COMPONENTS: tl.constexpr = len(initial)
    SLOT: tl.constexpr = ROWS * WIDTH
    MATRIX: tl.constexpr = GROUPS * WIDTH * WIDTH
    VECTORS: tl.constexpr = SLOTS * SLOT
    HALF: tl.constexpr = VECTORS + (FIRST_TOTAL[-1] + len(TOTALS[-1])) * PARTS * ROWS
    own, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line, lane = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)
    inner = tl.arange(0, INNER)
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
    parts_at, scratch = scratch + VECTORS + line, scratch + line * WIDTH
    weights += tl.cast(group, tl.int64) * (WIDTH * WIDTH)
    for c in range(part * BLOCK, WIDTH, PARTS * BLOCK):
        d = c + lane[None, :]
        s = cast(load(initial, row, group * SIZE + d, exists & (d < SIZE)), real)
        store_vectors(scratch + d, SLOT, s, d < SIZE)
    reset = load(resets_at, 0, 0, exists)
    tl.debug_barrier()
    for i in range(0, longest):
        active, step = i < steps, tl.cast(tl.minimum(i, last), tl.int64)
        here, there = scratch + i % 2 * HALF, scratch + (1 - i % 2) * HALF
        totals = ()
        for n in tl.static_range(len(resets)):  # of one, or none
            replaced = (reset[n] != 0) & active
            if tl.max(tl.max(replaced.to(tl.int32), axis=1), axis=0) > 0:
                fresh_now = moved(fresh_at, fresh_steps, step)
                for c in range(part * BLOCK, WIDTH, PARTS * BLOCK):
                    d = c + lane[None, :]
                    mask = replaced & (d < SIZE)
                    fresh = cast(load(fresh_now, 0, group * SIZE + d, mask), real)
                    for m in tl.static_range(COMPONENTS):
                        tl.store(here + d + m * SLOT, fresh[m], mask=mask)
                tl.debug_barrier()
            following = tl.cast(tl.minimum(i + 1, last), tl.int64)
            reset = load(moved(resets_at, reset_steps, following), 0, 0, exists)
        for level in tl.static_range(len(COMPUTE)):
            added = no_totals(line, real, level, TOTALS)
            for c in range(part * BLOCK, WIDTH, PARTS * BLOCK):
                d = c + lane[None, :]
                s = load_vectors(here + d, SLOT, COMPONENTS)
                drive = load_places(
                    drives_at, drive_steps, step, DRIVES, group, d, exists & (d < SIZE)
                )
                coefficient = load_places(coefficients, (), 0, COEFFICIENTS, group, d, d < SIZE)
                product = results(here + d, SLOT, PRODUCTS, ())
                vectors = COMPUTE[level](
                    s, cast(drive, real), cast(coefficient, real), product, totals
                )
                store_factors(here + COMPUTED[level] * SLOT + d, SLOT, vectors, d, level, LANES)
                added = with_block(added, vectors, d, level, TOTALS, TOTAL_LANES, LANES)
            of_level = parts_at + i % 2 * HALF + FIRST_TOTAL[level] * (PARTS * ROWS)
            for n in tl.static_range(len(TOTALS[level])):
                tl.store(of_level + (n * PARTS + part) * ROWS, added[n])
            target += PARTS
            together(counter, target, PARTS)
            totals = totals + of_all_programs(of_level, level, TOTALS, ROWS, PARTS, SHARES)
            for c in range(part * BLOCK, WIDTH, PARTS * BLOCK):
                d = c + lane[None, :]
                mask = exists & (d < SIZE)
                drive = load_places(drives_at, drive_steps, step, DRIVES, group, d, mask)
                coefficient = load_places(coefficients, (), 0, COEFFICIENTS, group, d, d < SIZE)
                s = load_vectors(here + d, SLOT, COMPONENTS)
                sums = multiply(
                    here,
                    weights + (c + lane)[None, :] * WIDTH + inner[:, None],
                    c,
                    level,
                    FACTORS,
                    MULTIPLIED,
                    WEIGHTS,
                    BLOCKED,
                    LATE,
                    LATE_LANES,
                    drives_at,
                    drive_steps,
                    step,
                    coefficients,
                    totals,
                    group,
                    exists,
                    COMPONENTS,
                    DRIVES,
                    COEFFICIENTS,
                    PRODUCTS,
                    SIZE,
                    SLOT,
                    MATRIX,
                    ROWS,
                    BLOCK,
                    INNER,
                    WIDTH // INNER,
                    STAGES,
                    PRECISION,
                )
                sums = sums + of_parts(here, c, s[0], level, REDUCED, SLOT)
                if level + 1 < len(COMPUTE):
                    store_vectors(here + RESULTS[level] * SLOT + d, SLOT, sums, d < SIZE)
                else:
                    product = results(here + d, SLOT, PRODUCTS, sums)
                    new = NEW_STATE(s, cast(drive, real), cast(coefficient, real), product, totals)
                    for m in tl.static_range(COMPONENTS):
                        kept = tl.where(active & (d < SIZE), new[m], s[m])
                        tl.store(there + d + m * SLOT, kept)
                    store(states_at, 0, group * SIZE + d, new, mask & active)
            tl.debug_barrier()
        states_at = moved(states_at, state_steps, 1)
    for c in range(part * BLOCK, WIDTH, PARTS * BLOCK):
        d = c + lane[None, :]
        s = load_vectors(scratch + longest % 2 * HALF + d, SLOT, COMPONENTS)
        store(ends, row, group * SIZE + d, s, exists & (d < SIZE))
