"""All gradients of a cell whose state is cut into tiles: the backward kernel.

Programs are those of `tile_forward`. Each takes the segments of time from the last to the first,
runs a segment again from the state that was kept, and then goes back through its steps. The
functions of a step and of its adjoint are generated.
"""

import triton
import triton.language as tl

from pararnn.kernels.triton.tile_values import (
    added,
    begins,
    cast,
    components,
    load,
    narrowed,
    parts_of,
    placed,
    restarted,
    rows_of,
    store,
    zeros,
)


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
