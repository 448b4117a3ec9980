"""Many steps of a cell whose channels mix by products with weights that no program can keep.

Some rows, each one chunk of one sequence, go through time together, and the channels of one group
are shared out among programs: each has some blocks of them. Every step reads the weights of a block
from the L2 cache for all rows at once. A step is taken apart at its products (`stages.Stages`): on
every level, programs compute the vectors that are multiplied, each those of its channels; wait for
each other; and compute the products, with the last of them the new state. What they hand to each
other is in global memory, that is, in the cache: `scratch`. It is there twice and written in turn,
so that no program writes what another still reads: to have reached a place where all wait, that one
must have ended the step before.
"""

import triton
import triton.language as tl

from pararnn.kernels.triton.common import cast
from pararnn.kernels.triton.mixing import begins, directed, load, load_places, moved, store


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
def store_vectors(at, SLOT: tl.constexpr, values, inside):
    """Write vectors of all rows; zeros beyond their channels, for weights are zero there too."""
    for n in tl.static_range(len(values)):
        tl.store(at + n * SLOT, tl.where(inside, values[n], 0.0))


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
def multiply(
    vectors,
    weights,
    LEVEL: tl.constexpr,
    FACTORS: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    WEIGHTS: tl.constexpr,
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
        vectors: The first channels of the vectors, (rows, `INNER`).
        weights: Those of the block in the first weight, (`INNER`, `BLOCK`).
        LEVEL: The level.
        FACTORS: Of every level, places of the vectors that are multiplied.
        MULTIPLIED: Of every level, for every product the number of its vector.
        WEIGHTS: Likewise, its weight.
        SLOT: From vector to vector.
        MATRIX: From weight to weight.
        ROWS: Rows.
        BLOCK: Channels of the result.
        INNER: Channels that are multiplied at a time.
        BLOCKS: How often.
        STAGES: Blocks that are on their way at a time.
        PRECISION: Of the tensor cores.
    """
    real: tl.constexpr = weights.dtype.element_ty
    sums = ()
    for _ in tl.static_range(len(WEIGHTS[LEVEL])):
        sums = sums + (tl.zeros([ROWS, BLOCK], real),)
    for k in tl.range(0, BLOCKS, num_stages=STAGES):
        factors = ()
        for n in tl.static_range(len(FACTORS[LEVEL])):
            at = vectors + FACTORS[LEVEL][n] * SLOT + k * INNER
            factors = factors + (tl.load(at, cache_modifier=".cg"),)
        added = ()
        for n in tl.static_range(len(WEIGHTS[LEVEL])):
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
    NEW_STATE: tl.constexpr,
    COMPUTED: tl.constexpr,
    FACTORS: tl.constexpr,
    MULTIPLIED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    RESULTS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    DRIVES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
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
        scratch: Memory for 2 * `SLOTS` vectors of every row of all programs.
        counters: Zeros, one for all programs that share the channels of some rows.
        rows: Chunks of all sequences.
        total: Rows that are run; if there are more than `rows`, they read the same once more.
        batch: Sequences.
        time: Steps of each.
        chunk: Steps of a chunk.
        first: Steps left out, of every chunk the first.
        reverse: 1 if the last step of a chunk comes first, else 0.
        COMPUTE: Of every level, a generated function of the vectors that are multiplied, as far as
            these are no states.
        NEW_STATE: New states from states, drives, coefficients and products: a generated function.
        COMPUTED: Of every level, the place of the first of these. The state has the first places.
        FACTORS: See `multiply`, as for the next two.
        MULTIPLIED: See there.
        WEIGHTS: See there.
        RESULTS: Of every level, the place of its first product.
        PRODUCTS: See `results`.
        DRIVES: Their places in `drives`, see `mixing.load_places`.
        COEFFICIENTS: Their places in `coefficients`.
        SLOTS: Places: states, products of all levels but the last, vectors that are multiplied.
        GROUPS: Their number.
        SIZE: Channels of a group.
        WIDTH: Those in `weights` and `scratch`, whole blocks.
        PARTS: Programs that share them. All run at the same time.
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
    own, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    line, lane, inner = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK), tl.arange(0, INNER)
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
    scratch += shared * (2 * SLOTS * SLOT) + line * WIDTH
    weights += tl.cast(group, tl.int64) * (WIDTH * WIDTH)
    for c in range(part * BLOCK, WIDTH, PARTS * BLOCK):
        d = c + lane[None, :]
        s = cast(load(initial, row, group * SIZE + d, exists & (d < SIZE)), real)
        store_vectors(scratch + d, SLOT, s, d < SIZE)
    reset = load(resets_at, 0, 0, exists)
    tl.debug_barrier()
    for i in range(0, longest):
        active, step = i < steps, tl.cast(tl.minimum(i, last), tl.int64)
        here = scratch + i % 2 * (SLOTS * SLOT)
        there = scratch + (1 - i % 2) * (SLOTS * SLOT)
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
            for c in range(part * BLOCK, WIDTH, PARTS * BLOCK):
                d = c + lane[None, :]
                s = load_vectors(here + d, SLOT, COMPONENTS)
                drive = load_places(
                    drives_at, drive_steps, step, DRIVES, group, d, exists & (d < SIZE)
                )
                coefficient = load_places(coefficients, (), 0, COEFFICIENTS, group, d, d < SIZE)
                product = results(here + d, SLOT, PRODUCTS, ())
                factors = COMPUTE[level](s, cast(drive, real), cast(coefficient, real), product)
                store_vectors(here + COMPUTED[level] * SLOT + d, SLOT, factors, d < SIZE)
            target += PARTS
            together(counter, target, PARTS)
            for c in range(part * BLOCK, WIDTH, PARTS * BLOCK):
                d = c + lane[None, :]
                mask = exists & (d < SIZE)
                drive = load_places(drives_at, drive_steps, step, DRIVES, group, d, mask)
                coefficient = load_places(coefficients, (), 0, COEFFICIENTS, group, d, d < SIZE)
                s = load_vectors(here + d, SLOT, COMPONENTS)
                sums = multiply(
                    here + inner[None, :],
                    weights + (c + lane)[None, :] * WIDTH + inner[:, None],
                    level,
                    FACTORS,
                    MULTIPLIED,
                    WEIGHTS,
                    SLOT,
                    MATRIX,
                    ROWS,
                    BLOCK,
                    INNER,
                    WIDTH // INNER,
                    STAGES,
                    PRECISION,
                )
                if level + 1 < len(COMPUTE):
                    store_vectors(here + RESULTS[level] * SLOT + d, SLOT, sums, d < SIZE)
                else:
                    product = results(here + d, SLOT, PRODUCTS, sums)
                    new = NEW_STATE(s, cast(drive, real), cast(coefficient, real), product)
                    for m in tl.static_range(COMPONENTS):
                        kept = tl.where(active & (d < SIZE), new[m], s[m])
                        tl.store(there + d + m * SLOT, kept)
                    store(states_at, 0, group * SIZE + d, new, mask & active)
            tl.debug_barrier()
        states_at = moved(states_at, state_steps, 1)
    for c in range(part * BLOCK, WIDTH, PARTS * BLOCK):
        d = c + lane[None, :]
        s = load_vectors(scratch + longest % 2 * (SLOTS * SLOT) + d, SLOT, COMPONENTS)
        store(ends, row, group * SIZE + d, s, exists & (d < SIZE))
