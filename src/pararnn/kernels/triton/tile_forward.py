"""All steps of a cell whose state is cut into tiles, with its readout: the forward kernel.

A program has one sequence, one index of the axes along which nothing mixes, and a tile of the state
(`tracing.tiles`), which stays in registers for all steps. Every step loads what the next one reads
while it computes. The kernel writes what the readout makes of a state, and one state per segment.
The functions of a step and of its readout are generated.
"""

import triton
import triton.language as tl

from pararnn.kernels.triton.tile_values import (
    added,
    begins,
    cast,
    components,
    load,
    parts_of,
    placed,
    restarted,
    store,
)


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
