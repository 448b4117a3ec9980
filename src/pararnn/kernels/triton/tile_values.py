"""Tiles of values in memory, for the kernels of tiles: where they lie, reading, writing."""

import triton
import triton.language as tl

from pararnn.kernels.triton.functions import (
    anew,
    magnitude,
    prefetch,
    read,
    times,
    uniform,
    write,
)

# Tuples in these kernels, one entry for each value:
# at: addresses of a row, or of a row at a step
# offsets, inside: of the entries of this program's tile, and which of them there are
# PLACES: see `placed`


@triton.jit
def placed(number, part, PLACES: tl.constexpr, PROGRAMS: tl.constexpr):
    """Offsets of the entries of values, and which of them there are.

    Args:
        number: Number of the program among those of a sequence and part.
        part: Number of the part of the tile.
        PLACES: Each is (stride, size, block and step from part to part of the rows; the same of the
            columns; whether all entries are there; strides of the axes of the programs; where the
            first entry lies; from there to the last one, at most, and 1 more, and the next power
            of 2; whether it lies in panels, see `kept_tile`; whether all rows are the same, so that
            one is enough; whether each thread reads and writes what it has of it, see
            `functions.read`).
        PROGRAMS: Axes of the programs, each (size, programs from one index to the next).
    """
    offsets, inside = (), ()
    for n in tl.static_range(len(PLACES)):
        own = placed_alone(number, part, PLACES, n, PROGRAMS)
        offsets, inside = offsets + (own[0],), inside + (own[1],)
    return offsets, inside


@triton.jit
def kept_tile(number, part, PLACES: tl.constexpr, PROGRAMS: tl.constexpr):
    """The same of states that are kept, which may lie in panels of 8 columns.

    They are read and written in pairs of neighbours, each by the thread that has it in a product
    of matrices: nothing goes through shared memory, and 32 threads have 128 bytes side by side.
    """
    offsets, inside = (), ()
    for n in tl.static_range(len(PLACES)):
        own = placed_alone(number, part, PLACES, n, PROGRAMS)
        if PLACES[n][12 + len(PROGRAMS)]:
            own = in_panels(number, part, PLACES, n, PROGRAMS)
        offsets, inside = offsets + (own[0],), inside + (own[1],)
    return offsets, inside


@triton.jit
def in_panels(number, part, PLACES: tl.constexpr, N: tl.constexpr, PROGRAMS: tl.constexpr):
    """The offsets of a tile's entries in panels (rows, panels, 8), and which of them there are.

    Told that more than a pair is contiguous, the compiler would have a thread take more. Rows and
    columns are numbered in one go, so that it sees the constants by which offsets differ.
    """
    size: tl.constexpr = PLACES[N][1] * 8
    step_r: tl.constexpr = PLACES[N][3]
    step_c: tl.constexpr = PLACES[N][7]
    first = first_entry(number, 0, PLACES, N, PROGRAMS) + part * (step_r * 8 + step_c // 8 * size)
    r = tl.arange(0, PLACES[N][2])[:, None, None]
    panel = tl.arange(0, PLACES[N][6] // 8)[None, :, None]
    c = tl.arange(0, 8)[None, None, :]
    entry = tl.reshape(tl.arange(0, PLACES[N][2] * 8), [PLACES[N][2], 1, 8])
    offsets = entry + panel * size + tl.cast(first, tl.int64)
    offsets = tl.multiple_of(tl.max_contiguous(offsets, [1, 1, 2]), [1, 1, 2])
    inside_r = r < PLACES[N][1] - part * step_r
    return offsets, inside_r & (panel * 8 + c < PLACES[N][5] - part * step_c)


@triton.jit
def placed_alone(number, part, PLACES: tl.constexpr, N: tl.constexpr, PROGRAMS: tl.constexpr):
    """What `placed` says of value `N`."""
    # what all entries share is added last, in 64 bits: then the compiler sees that the rest
    # differs by constants, which instructions have room for
    r, c = tl.arange(0, PLACES[N][2])[:, None], tl.arange(0, PLACES[N][6])[None, :]
    first = tl.cast(first_entry(number, part, PLACES, N, PROGRAMS), tl.int64)
    offsets = r * PLACES[N][0] + c * PLACES[N][4] + first
    below_r, below_c = PLACES[N][1] - part * PLACES[N][3], PLACES[N][5] - part * PLACES[N][7]
    return offsets, (r < below_r) & (c < below_c)


@triton.jit
def first_entry(number, part, PLACES: tl.constexpr, N: tl.constexpr, PROGRAMS: tl.constexpr):
    """The offset of the first entry of a program's tile of value `N`; see `placed`."""
    step: tl.constexpr = PLACES[N][3] * PLACES[N][0] + PLACES[N][7] * PLACES[N][4]
    first = PLACES[N][9 + len(PROGRAMS)] + part * step
    for a in tl.static_range(len(PROGRAMS)):
        first += number // PROGRAMS[a][1] % PROGRAMS[a][0] * PLACES[N][9 + a]
    return first


@triton.jit
def fetch(
    tensors,
    sequence,
    step,
    low,
    high,
    number,
    part,
    PLACES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Bring values of some steps from `step` on into the L2 cache, of those from `low` to `high`.

    Then a step waits for that cache and not for memory, although it loads but one step ahead.
    """
    for n in tl.static_range(len(PLACES)):
        if PLACES[n][11 + len(PROGRAMS)] <= 4096:
            fetch_value(
                tensors[n],
                tl.cast(sequence, tl.int64) * tensors[n].batch,
                step,
                low,
                high,
                first_entry(anew(number), part, PLACES, n, PROGRAMS),
                PLACES[n][10 + len(PROGRAMS)],
                PLACES[n][11 + len(PROGRAMS)],
                STEPS,
            )


@triton.jit
def fetch_value(
    tensor, at, step, low, high, first, SPAN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr
):
    """Bring one of them."""
    size: tl.constexpr = tensor.at.dtype.element_ty.primitive_bitwidth // 8
    begin = tensor.at.to(tl.pointer_type(tl.uint8)) + at + tl.cast(first, tl.int64) * size
    prefetch(begin, tensor.time, step, low, high, SPAN * size, STEPS, BLOCK * size)


@triton.jit
def cast(values, REAL: tl.constexpr):
    """Tiles in a type."""
    found = ()
    for n in tl.static_range(len(values)):
        found = found + (values[n].to(REAL),)
    return found


@triton.jit
def first_of(a, b):
    """The first of two."""
    return a


@triton.jit
def load(at, offsets, inside, PLACES: tl.constexpr):
    """The tiles of values."""
    found = ()
    for n in tl.static_range(len(PLACES)):
        if PLACES[n][-1] and PLACES[n][2] * PLACES[n][6] >= 32:
            value = read(at[n] + offsets[n], inside[n], PLACES[n][8])
        elif PLACES[n][8]:
            value = tl.load(at[n] + offsets[n])
        else:
            value = tl.load(at[n] + offsets[n], mask=inside[n], other=0)
        if len(offsets[n].shape) == 3:
            value = tl.reshape(value, [value.shape[0], value.shape[1] * 8])
        if PLACES[n][-2]:
            value = tl.reduce(value, 0, first_of)[None, :]
        found = found + (value,)
    return found


@triton.jit
def narrowed(values, offsets):
    """Tiles with no more rows than `offsets` have: of a value that was loaded in more, any one."""
    found = ()
    for n in tl.static_range(len(values)):
        value = values[n]
        if len(value.shape) == 2 and len(offsets[n].shape) == 2:  # not a number  # noqa: SIM102
            if value.shape[0] > offsets[n].shape[0]:
                value = tl.max(value, 0)[None, :]
        found = found + (value,)
    return found


@triton.jit
def store(at, offsets, inside, values, PLACES: tl.constexpr):
    """Write the tiles of values."""
    own = narrowed(values, offsets)
    for n in tl.static_range(len(PLACES)):
        store_one(at[n], offsets[n], inside[n], own[n], PLACES[n][8], PLACES[n][-1])


@triton.jit
def store_one(at, offsets, inside, value, WHOLE: tl.constexpr, DIRECT: tl.constexpr):
    """Write one of them; see `placed`."""
    if len(offsets.shape) == 3:
        value = tl.broadcast_to(value, [offsets.shape[0], offsets.shape[1] * 8])
        store_or_mask(at + offsets, tl.reshape(value, offsets.shape), inside, WHOLE)
    else:
        value = tl.broadcast_to(value, offsets.shape)
        if DIRECT and offsets.shape[0] >= 32:
            write(at + offsets, value, inside, WHOLE)
        else:
            store_or_mask(at + offsets, value, inside, WHOLE)


@triton.jit
def store_or_mask(at, value, inside, WHOLE: tl.constexpr):
    """Write a tile, of which all entries may be there."""
    if WHOLE:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=inside)


@triton.jit
def begins(tensors, sequence, step):
    """Where a step of a sequence begins in tensors over time (`tuples.Aligned`)."""
    found = ()
    for n in tl.static_range(len(tensors)):
        at = tl.cast(sequence, tl.int64) * tensors[n].batch + times(step, tensors[n].time)
        begin = tensors[n].at.to(tl.pointer_type(tl.uint8)) + tl.multiple_of(at, tensors[n].align)
        found = found + (begin.to(tensors[n].at.dtype),)
    return found


@triton.jit
def components(tensor, row, HIDDEN: tl.constexpr, COUNT: tl.constexpr):
    """Where a row of states begins in a tensor (rows, components, channels), for each of its tiles.

    Args:
        tensor: The tensor.
        row: The row.
        HIDDEN: Entries of a row. Offsets (`placed`) count from its first.
        COUNT: Tiles of a state.
    """
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tensor + tl.cast(row, tl.int64) * HIDDEN,)
    return found


@triton.jit
def parts_of(number, part, strides, PARTS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Where this program's partial sums of results lie, from the first on, in elements.

    Args:
        number: As for `placed`.
        part: As for `placed`.
        strides: From one partial sum to the next, for each result.
        PARTS: Each is (partial sums from one part of the tile to the next, and from one index to
            the next of every axis of the programs); 0 where they do not differ.
        PROGRAMS: As for `placed`.
    """
    found = ()
    for n in tl.static_range(len(PARTS)):
        own = part * PARTS[n][0]
        for a in tl.static_range(len(PROGRAMS)):
            own += number // PROGRAMS[a][1] % PROGRAMS[a][0] * PARTS[n][1 + a]
        found = found + (tl.cast(own, tl.int64) * strides[n],)
    return found


@triton.jit
def rows_of(tensors, row, strides):
    """Where a row of some tensors begins."""
    found = ()
    for n in tl.static_range(len(tensors)):
        found = found + (tensors[n] + tl.cast(row, tl.int64) * strides[n],)
    return found


@triton.jit
def zeros(offsets, REAL: tl.constexpr):
    """Tiles of zeros."""
    found = ()
    for n in tl.static_range(len(offsets)):
        found = found + (tl.zeros(offsets[n].shape, REAL),)
    return found


@triton.jit
def added(sums, values):
    """Sums of tiles."""
    found = ()
    for n in tl.static_range(len(sums)):
        found = found + (sums[n] + values[n],)
    return found


@triton.jit
def shifted(values, number):
    """Tiles with a number added to all entries."""
    found = ()
    for n in tl.static_range(len(values)):
        found = found + (values[n] + number,)
    return found


@triton.jit
def load_edge(
    tensor,
    row,
    number,
    part,
    STORED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """The tiles of a row of states that only these kernels read; offsets are not kept for it."""
    offsets, inside = placed(anew(number), part, STORED, PROGRAMS)
    return load(components(tensor, row, HIDDEN, len(STORED)), offsets, inside, STORED)


@triton.jit
def store_edge(
    tensor,
    row,
    values,
    number,
    part,
    STORED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Write such tiles."""
    offsets, inside = placed(anew(number), part, STORED, PROGRAMS)
    store(components(tensor, row, HIDDEN, len(STORED)), offsets, inside, values, STORED)


@triton.jit
def selected(condition, values, others):
    """Tiles, or other tiles unless a condition holds."""
    found = ()
    for n in tl.static_range(len(values)):
        found = found + (tl.where(condition, values[n], others[n]),)
    return found


@triton.jit
def difference(ends, starts, inside):
    """The largest difference between tiles, infinite for NaN, and the largest number in `ends`.

    Infinity is no number to compare with: beside it every difference would be small.
    """
    gap = tl.cast(0.0, ends[0].dtype)
    largest = tl.cast(0.0, ends[0].dtype)
    for n in tl.static_range(len(ends)):
        end, start = tl.where(inside[n], ends[n], 0.0), tl.where(inside[n], starts[n], 0.0)
        gap = tl.maximum(gap, tl.max(magnitude(tl.where(end == start, 0.0, end - start))))
        size = tl.abs(end)
        largest = tl.maximum(largest, tl.max(tl.where(size < float("inf"), size, 0.0)))
    return gap, largest


@triton.jit
def apart(ends, starts, inside, SMALL: tl.constexpr, TINY: tl.constexpr):
    """The largest gap between states of a tile, see `shooting.state_residual`; infinite for NaN."""
    gap = tl.cast(0.0, ends[0].dtype)
    for n in tl.static_range(len(ends)):
        end, start = tl.where(inside[n], ends[n], 0.0), tl.where(inside[n], starts[n], 0.0)
        sizes = magnitude(end)
        gaps = magnitude(tl.where(end == start, 0.0, end - start) / tl.maximum(sizes, 1.0))
        scale = tl.minimum(tl.maximum(SMALL * tl.max(sizes), TINY), 1.0)
        gap = tl.maximum(gap, tl.max(gaps) / scale)
    return gap


@triton.jit
def forgets(before, after, runs, tolerance):
    """Whether so many runs may leave less than the tolerance of a difference.

    Short runs tell little, so up to twice as many count as possible: chunks in vain cost less than
    steps in a row that were not needed.

    Args:
        before: The difference before one run.
        after: That after it.
        runs: How many.
        tolerance: The tolerance.
    """
    factor = tl.where(before > 0, after / before, 0.0)
    left = tl.exp(runs * tl.log(factor))
    return left * left <= 4 * tolerance


@triton.jit
def is_known(values, inside):
    """Whether no entry of tiles is NaN, as 1 or 0.

    What a loop ends with has to be computed from tensors like this: Triton 3.6 loses numbers that
    are assigned in a branch.
    """
    return uniform(tl.where(difference(values, values, inside)[0] > 0, 0, 1))


@triton.jit
def restarted(
    starts,
    initial,
    s,
    b,
    t,
    time,
    offsets,
    inside,
    STATE: tl.constexpr,
    HIDDEN: tl.constexpr,
    REAL: tl.constexpr,
):
    """The state before step `t` of sequence `b`, where another one may start."""
    if starts is not None:
        start = uniform(tl.load(starts + tl.cast(b, tl.int64) * time + t))
        if start >= 0:
            first = components(initial, start, HIDDEN, len(STATE))
            s = cast(load(first, offsets, inside, STATE), REAL)
    return s
