"""Many steps of a cell whose channels mix by products: one kernel, written for all such cells.

A program has one row, that is one chunk of one sequence, and the channels of one group (a head, or
all channels). It loads the blocks of the weights that belong to the group into registers once and
keeps states there too; every step loads what the next one reads while it computes, and writes its
states. Rows are independent of each other, so programs are too, and several on one multiprocessor
hide each other's latencies.
"""

import triton
import triton.language as tl

from pararnn.kernels.triton.common import cast


@triton.jit
def begins(tensors, sequence, step):
    """Where a step of a sequence begins in tensors over time (`tuples.OverTime`)."""
    found = ()
    for n in tl.static_range(len(tensors)):
        at = tensors[n].at + sequence * tensors[n].batch + step * tensors[n].time
        found = found + (at,)
    return found


@triton.jit
def directed(tensors, direction):
    """Their strides from step to step, forwards (1) or backwards (-1)."""
    found = ()
    for n in tl.static_range(len(tensors)):
        found = found + (direction * tensors[n].time,)
    return found


@triton.jit
def moved(at, strides, count):
    """Addresses `count` strides further on."""
    found = ()
    for n in tl.static_range(len(at)):
        found = found + (at[n] + count * strides[n],)
    return found


@triton.jit
def load(at, row, channel, inside):
    """Channels of a row of some tensors."""
    found = ()
    for n in tl.static_range(len(at)):
        found = found + (tl.load(at[n] + row + channel, mask=inside, other=0),)
    return found


@triton.jit
def load_places(at, strides, count, PLACES: tl.constexpr, group, lane, inside):
    """The channels of a group, from tensors, or from rows of them at a step.

    Args:
        at: Where they begin.
        strides: From step to step; none for tensors that are the same at all times.
        count: How many of these further on.
        PLACES: Each is (which of them, offset, stride from group to group, channel to channel). And
            where there are fewer channels, or parts of them that lie apart, (channels of a part,
            stride from part to part, all channels).
        group: The group.
        lane: Its channels.
        inside: Which of these there are.
    """
    found = ()
    for n in tl.static_range(len(PLACES)):
        first = at[PLACES[n][0]]
        if len(strides) > 0:
            first += count * strides[PLACES[n][0]]
        if len(PLACES[n]) > 4:
            part, rest = lane // PLACES[n][4], lane % PLACES[n][4]
            first += part * PLACES[n][5]
            channel = first + group * PLACES[n][2] + rest * PLACES[n][3] + PLACES[n][1]
            mask = inside & (lane < PLACES[n][6])
        else:
            channel = first + group * PLACES[n][2] + lane * PLACES[n][3] + PLACES[n][1]
            mask = inside
        found = found + (tl.load(channel, mask=mask, other=0),)
    return found


@triton.jit
def store(at, row, channel, values, inside):
    """Write channels of a row of some tensors."""
    for n in tl.static_range(len(at)):
        tl.store(at[n] + row + channel, values[n], mask=inside)


@triton.jit
def load_weights(blocks, COUNT: tl.constexpr, groups, group, lane, TILE: tl.constexpr):
    """Those of a group, each (result, factor // TILE, factor % TILE): see `functions.dot`."""
    width: tl.constexpr = lane.shape[0]
    factor = tl.arange(0, width // TILE)[None, :, None] * TILE
    factor += tl.arange(0, TILE)[None, None, :]
    at = blocks + group * width * width + lane[:, None, None] * width + factor
    found = ()
    for n in tl.static_range(COUNT):
        found = found + (tl.load(at + n * groups * width * width),)
    return found


@triton.jit(do_not_specialize=["rows", "batch", "time", "chunk", "first", "reverse"])
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
    rows,
    batch,
    time,
    chunk,
    first,
    reverse,
    STEP: tl.constexpr,
    DRIVES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Run steps of chunks.

    Args:
        drives: Tensors over time.
        coefficients: Tensors.
        weights: Blocks (`WEIGHTS`, `GROUPS`, `WIDTH`, `WIDTH`), zero beyond `SIZE`.
        resets: Whether the state before a step is replaced: one tensor over time, or none.
        reset_states: By what: tensors over time, one per component, or none.
        initial: The states before the first step of rows, components (rows, hidden).
        states: Those after all steps: tensors over time, one per component, or none.
        ends: Those after the last step of rows, components (rows, hidden).
        settled: Which sequences are left as they are, (batch,), or None.
        rows: Chunks of all sequences. If there are more programs, they read the same once more.
        batch: Sequences.
        time: Steps of each.
        chunk: Steps of a chunk.
        first: Steps left out, of every chunk the first.
        reverse: 1 if the last step of a chunk comes first, else 0.
        STEP: New states from states, drives, coefficients and weights: a generated function.
        DRIVES: Their places in `drives`, see `load_places`.
        COEFFICIENTS: Their places in `coefficients`.
        WEIGHTS: How many the step takes.
        GROUPS: Their number.
        SIZE: Channels of a group.
        WIDTH: The next power of two, at least `TILE`.
        TILE: See `functions.dot`.
    """
    real: tl.constexpr = initial[0].dtype.element_ty
    row, group = tl.program_id(0), tl.program_id(1)
    begin = (row % rows) // batch * chunk
    count = tl.minimum(chunk, time - begin)
    first = tl.where(reverse > 0, count - 1, tl.minimum(first, count - 1))
    steps = tl.where(reverse > 0, count, count - first)
    if settled is not None:
        steps = tl.where(tl.load(settled + row % rows % batch) != 0, 0, steps)
    last = tl.maximum(steps - 1, 0)
    direction = tl.cast(1 - 2 * reverse, tl.int64)
    position = tl.cast(begin + first, tl.int64)
    sequence = tl.cast(row % rows % batch, tl.int64)
    row = tl.cast(row, tl.int64) * (GROUPS * SIZE)

    lane = tl.arange(0, WIDTH)
    inside = lane < SIZE
    channel = group * SIZE + lane
    weight = cast(load_weights(weights, WEIGHTS, GROUPS, group, lane, TILE), real)
    coefficient = cast(load_places(coefficients, (), 0, COEFFICIENTS, group, lane, inside), real)
    drives_at, drive_steps = begins(drives, sequence, position), directed(drives, direction)
    resets_at, reset_steps = begins(resets, sequence, position), directed(resets, direction)
    fresh_at = begins(reset_states, sequence, position)
    fresh_steps = directed(reset_states, direction)
    states_at, state_steps = begins(states, sequence, position), directed(states, direction)

    s = cast(load(initial, row, channel, inside), real)
    ahead = load_places(drives_at, drive_steps, 0, DRIVES, group, lane, inside)
    reset = load(resets_at, 0, 0, True)
    for i in range(0, steps):
        drive = cast(ahead, real)
        for n in tl.static_range(len(resets)):  # of one, or none
            if reset[n] != 0:
                at = moved(fresh_at, fresh_steps, tl.cast(i, tl.int64))
                s = cast(load(at, 0, channel, inside), real)
        following = tl.cast(tl.minimum(i + 1, last), tl.int64)
        ahead = load_places(drives_at, drive_steps, following, DRIVES, group, lane, inside)
        reset = load(moved(resets_at, reset_steps, following), 0, 0, True)
        s = STEP(SIZE, s, drive, coefficient, weight)
        store(states_at, 0, channel, s, inside)
        states_at = moved(states_at, state_steps, 1)
    store(ends, row, channel, s, inside)
