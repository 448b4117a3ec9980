"""Tiles of values in memory, for the kernels of tiles: where they lie, reading, writing."""

import triton
import triton.language as tl

from pararnn.kernels.triton.functions import anew, magnitude, uniform

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
            first entry lies).
        PROGRAMS: Axes of the programs, each (size, programs from one index to the next).
    """
    offsets, inside = (), ()
    for n in tl.static_range(len(PLACES)):
        first = PLACES[n][9 + len(PROGRAMS)]
        for a in tl.static_range(len(PROGRAMS)):
            first += number // PROGRAMS[a][1] % PROGRAMS[a][0] * PLACES[n][9 + a]
        r = tl.arange(0, PLACES[n][2])[:, None] + part * PLACES[n][3]
        c = tl.arange(0, PLACES[n][6])[None, :] + part * PLACES[n][7]
        offsets = offsets + (first + r * PLACES[n][0] + c * PLACES[n][4],)
        inside = inside + ((r < PLACES[n][1]) & (c < PLACES[n][5]),)
    return offsets, inside


@triton.jit
def cast(values, REAL: tl.constexpr):
    """Tiles in a type."""
    found = ()
    for n in tl.static_range(len(values)):
        found = found + (values[n].to(REAL),)
    return found


@triton.jit
def load(at, offsets, inside, PLACES: tl.constexpr):
    """The tiles of values."""
    found = ()
    for n in tl.static_range(len(PLACES)):
        if PLACES[n][8]:
            value = tl.load(at[n] + offsets[n])
        else:
            value = tl.load(at[n] + offsets[n], mask=inside[n], other=0)
        found = found + (value,)
    return found


@triton.jit
def narrowed(values, offsets):
    """Tiles with no more rows than `offsets` have: of a value that was loaded in more, any one."""
    found = ()
    for n in tl.static_range(len(values)):
        value = values[n]
        if len(value.shape) == 2:  # else it is a number  # noqa: SIM102
            if value.shape[0] > offsets[n].shape[0]:
                value = tl.max(value, 0)[None, :]
        found = found + (value,)
    return found


@triton.jit
def store(at, offsets, inside, values, PLACES: tl.constexpr):
    """Write the tiles of values."""
    own = narrowed(values, offsets)
    for n in tl.static_range(len(PLACES)):
        value = tl.broadcast_to(own[n], offsets[n].shape)
        if PLACES[n][8]:
            tl.store(at[n] + offsets[n], value)
        else:
            tl.store(at[n] + offsets[n], value, mask=inside[n])


@triton.jit
def begins(tensors, sequence, step):
    """Where a step of a sequence begins in tensors over time (`tuples.Aligned`)."""
    found = ()
    for n in tl.static_range(len(tensors)):
        at = tl.cast(sequence, tl.int64) * tensors[n].batch
        at += tl.cast(step, tl.int64) * tensors[n].time
        found = found + (tensors[n].at + tl.multiple_of(at, tensors[n].align),)
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
    """The largest difference between tiles, infinite for NaN, and the largest entry of `ends`."""
    gap = tl.cast(0.0, ends[0].dtype)
    largest = tl.cast(0.0, ends[0].dtype)
    for n in tl.static_range(len(ends)):
        end, start = tl.where(inside[n], ends[n], 0.0), tl.where(inside[n], starts[n], 0.0)
        gap = tl.maximum(gap, tl.max(magnitude(tl.where(end == start, 0.0, end - start))))
        largest = tl.maximum(largest, tl.max(tl.abs(end)))
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
