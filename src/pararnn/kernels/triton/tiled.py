"""All steps of a cell whose state is cut into tiles, with its readout: two written kernels.

A program has one sequence, one index of the axes along which nothing mixes, and a tile of the state
(`tracing.tiles`), which stays in registers for all steps. Every step loads what the next one reads
while it computes. `forward` writes what the readout makes of a state, and one state per segment;
`backward` takes the segments from the last to the first, runs each again from its state, and then
goes back through its steps. The functions of a step, of its readout and of its adjoint are
generated.
"""

import triton
import triton.language as tl

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
            columns; whether all entries are there; strides of the axes of the programs).
        PROGRAMS: Axes of the programs, each (size, programs from one index to the next).
    """
    offsets, inside = (), ()
    for n in tl.static_range(len(PLACES)):
        first = 0
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
    """Where the components of a row of states begin in a tensor (rows, components, hidden)."""
    found = ()
    for n in tl.static_range(COUNT):
        found = found + (tensor + (tl.cast(row, tl.int64) * COUNT + n) * HIDDEN,)
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
        start = tl.load(starts + tl.cast(b, tl.int64) * time + t)
        if start >= 0:
            first = components(initial, start, HIDDEN, len(STATE))
            s = cast(load(first, offsets, inside, STATE), REAL)
    return s


@triton.jit(do_not_specialize=["batch", "time", "segments", "y_part"])
def forward(
    drives,
    coefficients,
    initial,
    starts,
    owners,
    y,
    kept,
    ends,
    batch,
    time,
    segments,
    y_part,
    STEP: tl.constexpr,
    DRIVES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    STATE: tl.constexpr,
    STORED: tl.constexpr,
    Y: tl.constexpr,
    Y_PARTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SPLIT: tl.constexpr,
    HIDDEN: tl.constexpr,
    SEGMENT: tl.constexpr,
    REAL: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """Run all steps.

    Args:
        drives: Tensors over time.
        coefficients: Tensors.
        initial: States (rows, components, hidden).
        starts: (batch, time): the row of `initial` that a step starts from, or -1; None where row b
            starts at time 0 and nowhere else.
        owners: (batch, time): the row of `ends` that a step belongs to, where `starts` are packed
            sequences; else None.
        y: What is handed out: a tensor over time, partial sums `y_part` elements apart.
        kept: The states before every segment, (batch, segments, components, hidden).
        ends: The states after the last step, (rows, components, hidden).
        batch: Sequences.
        time: Steps.
        segments: Segments of time.
        y_part: See `y`.
        STEP: Generated: new components, and what is handed out.
        DRIVES: Places of the drives.
        COEFFICIENTS: Places of the coefficients.
        STATE: Places of the components.
        STORED: The same in tensors that only these kernels read.
        Y: The place of what is handed out.
        Y_PARTS: Its partial sums.
        PROGRAMS: See `placed`.
        NUMBERS: Programs of a sequence and part.
        SPLIT: Parts of a tile.
        HIDDEN: Channels of a component.
        SEGMENT: Steps of a segment.
        REAL: The type of the arithmetic.
        FACTORS: That of factors of matrix products.
    """
    program = tl.program_id(0)
    part, number = program % SPLIT, program // SPLIT % NUMBERS
    b = program // (SPLIT * NUMBERS)
    once = tl.where(part == 0, 1.0, 0.0).to(REAL)
    count: tl.constexpr = len(STATE)
    drive_offsets, drive_inside = placed(number, part, DRIVES, PROGRAMS)
    fixed_offsets, fixed_inside = placed(number, part, COEFFICIENTS, PROGRAMS)
    offsets, inside = placed(number, part, STATE, PROGRAMS)
    own_offsets, own_inside = placed(number, part, STORED, PROGRAMS)
    y_offsets, y_inside = placed(number, part, Y, PROGRAMS)
    first_y = parts_of(number, part, (y_part,), Y_PARTS, PROGRAMS)
    coefficient = cast(load(coefficients, fixed_offsets, fixed_inside, COEFFICIENTS), REAL)
    start = b
    if starts is not None:
        start = tl.load(starts + tl.cast(b, tl.int64) * time)
    s = cast(load(components(initial, start, HIDDEN, count), offsets, inside, STATE), REAL)
    ahead = load(begins(drives, b, 0), drive_offsets, drive_inside, DRIVES)
    for t in range(0, time):
        drive = cast(ahead, REAL)
        following = tl.minimum(t + 1, time - 1)
        ahead = load(begins(drives, b, following), drive_offsets, drive_inside, DRIVES)
        s = restarted(starts, initial, s, b, t, time, offsets, inside, STATE, HIDDEN, REAL)
        if t % SEGMENT == 0:
            row = tl.cast(b, tl.int64) * segments + t // SEGMENT
            store(components(kept, row, HIDDEN, count), own_offsets, own_inside, s, STORED)
        s, handed = STEP(FACTORS, once, s, drive, coefficient)
        store(added(begins((y,), b, t), first_y), y_offsets, y_inside, handed, Y)
        if owners is not None:
            following = tl.load(starts + tl.cast(b, tl.int64) * time + tl.minimum(t + 1, time - 1))
            if (following >= 0) & (t + 1 < time):
                owner = tl.load(owners + tl.cast(b, tl.int64) * time + t)
                store(components(ends, owner, HIDDEN, count), offsets, inside, s, STATE)
    end = b
    if owners is not None:
        end = tl.load(owners + tl.cast(b, tl.int64) * time + time - 1)
    store(components(ends, end, HIDDEN, count), offsets, inside, s, STATE)


@triton.jit(do_not_specialize=["batch", "time", "segments", "grad_parts", "sum_parts", "sum_rows"])
def backward(
    drives,
    coefficients,
    initial,
    starts,
    owners,
    kept,
    scratch,
    y_grad,
    end_grads,
    grads,
    sums,
    initial_grads,
    batch,
    time,
    segments,
    grad_parts,
    sum_parts,
    sum_rows,
    AGAIN: tl.constexpr,
    ADJOINT: tl.constexpr,
    DRIVES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    STATE: tl.constexpr,
    STORED: tl.constexpr,
    Y: tl.constexpr,
    GRADS: tl.constexpr,
    GRAD_PARTS: tl.constexpr,
    SUMS: tl.constexpr,
    SUM_PARTS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SPLIT: tl.constexpr,
    HIDDEN: tl.constexpr,
    SEGMENT: tl.constexpr,
    REAL: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """Gradients of everything, from those of what is handed out and of the last states.

    Arguments that are not here are those of `forward`.

    Args:
        drives: As above.
        coefficients: As above.
        initial: As above.
        starts: As above.
        owners: As above.
        kept: As above.
        scratch: Room for the states of a segment, (batch, SEGMENT, components, hidden).
        y_grad: The gradient of what is handed out: a tensor over time, or None.
        end_grads: That of the last states, (rows, components, hidden), or None.
        grads: Where gradients of drives go: tensors over time, partial sums `grad_parts` elements
            apart.
        sums: Where those of coefficients go, (partial sums, batch, ...).
        initial_grads: Where those of initial states go, (rows, components, hidden).
        batch: As above.
        time: As above.
        segments: As above.
        grad_parts: See `grads`.
        sum_parts: Elements from one partial sum of a coefficient to the next.
        sum_rows: Elements from one sequence to the next.
        AGAIN: Generated: new components.
        ADJOINT: Generated: adjoints of the components before a step, gradients of drives and
            coefficients.
        DRIVES: As above.
        COEFFICIENTS: As above.
        STATE: As above.
        STORED: As above.
        Y: As above.
        GRADS: Places of the gradients of drives.
        GRAD_PARTS: Their partial sums.
        SUMS: Places of the gradients of coefficients.
        SUM_PARTS: Their partial sums.
        PROGRAMS: As above.
        NUMBERS: As above.
        SPLIT: As above.
        HIDDEN: As above.
        SEGMENT: As above.
        REAL: As above.
        FACTORS: As above.
    """
    program = tl.program_id(0)
    part, number = program % SPLIT, program // SPLIT % NUMBERS
    b = program // (SPLIT * NUMBERS)
    once = tl.where(part == 0, 1.0, 0.0).to(REAL)
    count: tl.constexpr = len(STATE)
    drive_offsets, drive_inside = placed(number, part, DRIVES, PROGRAMS)
    fixed_offsets, fixed_inside = placed(number, part, COEFFICIENTS, PROGRAMS)
    offsets, inside = placed(number, part, STATE, PROGRAMS)
    own_offsets, own_inside = placed(number, part, STORED, PROGRAMS)
    y_offsets, y_inside = placed(number, part, Y, PROGRAMS)
    grad_offsets, grad_inside = placed(number, part, GRADS, PROGRAMS)
    sum_offsets, sum_inside = placed(number, part, SUMS, PROGRAMS)
    of_grads = parts_of(number, part, grad_parts, GRAD_PARTS, PROGRAMS)
    of_sums = parts_of(number, part, sum_parts, SUM_PARTS, PROGRAMS)
    coefficient = cast(load(coefficients, fixed_offsets, fixed_inside, COEFFICIENTS), REAL)
    found = zeros(sum_offsets, REAL)
    again = zeros(offsets, REAL)
    adjoint = zeros(offsets, REAL)
    if end_grads is not None:
        end = b
        if owners is not None:
            end = tl.load(owners + tl.cast(b, tl.int64) * time + time - 1)
        adjoint = cast(
            load(components(end_grads, end, HIDDEN, count), offsets, inside, STATE), REAL
        )
    for back in range(0, segments):
        segment = segments - 1 - back
        begin = segment * SEGMENT
        steps = tl.minimum(SEGMENT, time - begin)
        row = tl.cast(b, tl.int64) * segments + segment
        s = cast(load(components(kept, row, HIDDEN, count), own_offsets, own_inside, STORED), REAL)
        ahead = load(begins(drives, b, begin), drive_offsets, drive_inside, DRIVES)
        for i in range(0, steps):
            drive = cast(ahead, REAL)
            following = begin + tl.minimum(i + 1, steps - 1)
            ahead = load(begins(drives, b, following), drive_offsets, drive_inside, DRIVES)
            t = begin + i
            s = restarted(starts, initial, s, b, t, time, offsets, inside, STATE, HIDDEN, REAL)
            room = tl.cast(b, tl.int64) * SEGMENT + i
            store(components(scratch, room, HIDDEN, count), own_offsets, own_inside, s, STORED)
            s = AGAIN(FACTORS, once, s, drive, coefficient)
        tl.debug_barrier()
        t = begin + steps - 1
        ahead = load(begins(drives, b, t), drive_offsets, drive_inside, DRIVES)
        room = tl.cast(b, tl.int64) * SEGMENT + steps - 1
        before = load(components(scratch, room, HIDDEN, count), own_offsets, own_inside, STORED)
        if y_grad is not None:
            from_y = load(begins((y_grad,), b, t), y_offsets, y_inside, Y)
        else:
            from_y = zeros(y_offsets, REAL)
        for back_i in range(0, steps):
            i = steps - 1 - back_i
            t = begin + i
            drive, s, of_y = cast(ahead, REAL), cast(before, REAL), cast(from_y, REAL)
            following = tl.maximum(i - 1, 0)
            places = begins(drives, b, begin + following)
            ahead = load(places, drive_offsets, drive_inside, DRIVES)
            room = tl.cast(b, tl.int64) * SEGMENT + following
            before = load(components(scratch, room, HIDDEN, count), own_offsets, own_inside, STORED)
            if y_grad is not None:
                place_of_y = begins((y_grad,), b, begin + following)
                from_y = load(place_of_y, y_offsets, y_inside, Y)
            if owners is not None:
                place = tl.cast(b, tl.int64) * time + t
                after = tl.load(starts + place + tl.where(t + 1 < time, 1, 0))
                if (after >= 0) & (t + 1 < time):  # noqa: SIM102
                    if end_grads is not None:
                        of_end = components(end_grads, tl.load(owners + place), HIDDEN, count)
                        adjoint = cast(load(of_end, offsets, inside, STATE), REAL)
            adjoint, of_drives, of_fixed = ADJOINT(
                FACTORS, once, s, drive, coefficient, adjoint + of_y
            )
            found = added(found, narrowed(of_fixed, sum_offsets))
            results = added(begins(grads, b, t), of_grads)
            store(results, grad_offsets, grad_inside, of_drives, GRADS)
            if starts is not None:
                start = tl.load(starts + tl.cast(b, tl.int64) * time + t)
                if start >= 0:
                    if (owners is not None) or (start < batch):
                        fresh = components(initial_grads, start, HIDDEN, count)
                        store(fresh, offsets, inside, adjoint, STATE)
                    else:
                        again = added(again, adjoint)
                    adjoint = zeros(offsets, REAL)
        tl.debug_barrier()
    if starts is None:
        store(components(initial_grads, b, HIDDEN, count), offsets, inside, adjoint, STATE)
    elif owners is None:
        store(components(initial_grads, b + batch, HIDDEN, count), offsets, inside, again, STATE)
    at_sums = added(rows_of(sums, b, sum_rows), of_sums)
    store(at_sums, sum_offsets, sum_inside, found, SUMS)
