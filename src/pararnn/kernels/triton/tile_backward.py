"""All gradients of a cell whose state is cut into tiles: the backward kernels.

Programs are those of `tile_forward`. Each takes the segments of time from the last to the first,
runs a segment again from the state that was kept, and then goes back through its steps. The
functions of a step and of its adjoint are generated. `backward`, `sweep` and `mend` divide the work
as `forward` and those of the same names there do, with time reversed: a chunk starts from the
adjoint of the state after it.
"""

import triton
import triton.language as tl

from pararnn.kernels.triton.functions import anew, uniform
from pararnn.kernels.triton.tile_values import (
    added,
    begins,
    cast,
    components,
    difference,
    fetch,
    forgets,
    is_known,
    kept_tile,
    load,
    load_edge,
    narrowed,
    parts_of,
    placed,
    restarted,
    rows_of,
    selected,
    shifted,
    store,
    store_edge,
    zeros,
)


@triton.jit
def run(
    adjoint,
    low,
    high,
    writes,
    b,
    number,
    part,
    room,
    of_grads,
    coefficient,
    once,
    drive_tile,
    tile,
    own_tile,
    y_tile,
    grad_tile,
    sum_tile,
    drives,
    initial,
    starts,
    owners,
    kept,
    scratch,
    y_grad,
    end_grads,
    grads,
    initial_grads,
    batch,
    time,
    segments,
    AGAIN: tl.constexpr,
    ADJOINT: tl.constexpr,
    DRIVES: tl.constexpr,
    STATE: tl.constexpr,
    STORED: tl.constexpr,
    Y: tl.constexpr,
    GRADS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SEGMENT: tl.constexpr,
    REAL: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """Go back through segments `high` to `low` of sequence `b`, from the adjoint after them.

    Gradients of drives and initial states are written if `writes`. Those arguments that are not of
    `backward` are what `placed` says of drives and so on; and `room`, the row of `scratch`.

    Returns:
        The adjoint of the state before, and the gradients of coefficients and of the state that
        resets start from.
    """
    count: tl.constexpr = len(STATE)
    found = zeros(sum_tile[0], REAL)
    again = zeros(tile[0], REAL)
    states = components(scratch, tl.cast(room, tl.int64) * SEGMENT, HIDDEN, count)
    for back in range(0, high - low):
        segment = high - 1 - back
        begin = segment * SEGMENT
        steps = tl.minimum(SEGMENT, time - begin)
        before, least = begin - SEGMENT, low * SEGMENT
        fetch(drives, b, before, least, begin, number, part, DRIVES, PROGRAMS, SEGMENT)
        if y_grad is not None:
            fetch((y_grad,), b, before, least, begin, number, part, Y, PROGRAMS, SEGMENT)
        row = tl.cast(b, tl.int64) * segments + segment
        s = cast(load(components(kept, row, HIDDEN, count), own_tile[0], own_tile[1], STORED), REAL)
        ahead = load(begins(drives, b, begin), drive_tile[0], drive_tile[1], DRIVES)
        for i in range(0, steps):
            drive = cast(ahead, REAL)
            following = begin + tl.minimum(i + 1, steps - 1)
            ahead = load(begins(drives, b, following), drive_tile[0], drive_tile[1], DRIVES)
            t = begin + i
            s = restarted(starts, initial, s, b, t, time, tile[0], tile[1], STATE, HIDDEN, REAL)
            store(shifted(states, i * HIDDEN), own_tile[0], own_tile[1], s, STORED)
            s = narrowed(AGAIN(FACTORS, once, s, drive, coefficient), tile[0])
        tl.debug_barrier()
        t = begin + steps - 1
        ahead = load(begins(drives, b, t), drive_tile[0], drive_tile[1], DRIVES)
        last = shifted(states, (steps - 1) * HIDDEN)
        before = load(last, own_tile[0], own_tile[1], STORED)
        if y_grad is not None:
            from_y = load(begins((y_grad,), b, t), y_tile[0], y_tile[1], Y)
        else:
            from_y = zeros(y_tile[0], REAL)
        for back_i in range(0, steps):
            i = steps - 1 - back_i
            t = begin + i
            drive, s, of_y = cast(ahead, REAL), cast(before, REAL), cast(from_y, REAL)
            following = tl.maximum(i - 1, 0)
            places = begins(drives, b, begin + following)
            ahead = load(places, drive_tile[0], drive_tile[1], DRIVES)
            earlier = shifted(states, following * HIDDEN)
            before = load(earlier, own_tile[0], own_tile[1], STORED)
            if y_grad is not None:
                place_of_y = begins((y_grad,), b, begin + following)
                from_y = load(place_of_y, y_tile[0], y_tile[1], Y)
            if owners is not None:
                here = tl.cast(b, tl.int64) * time + t
                after = uniform(tl.load(starts + here + tl.where(t + 1 < time, 1, 0)))
                if (after >= 0) & (t + 1 < time):  # noqa: SIM102
                    if end_grads is not None:
                        of_end = components(end_grads, tl.load(owners + here), HIDDEN, count)
                        adjoint = cast(load(of_end, tile[0], tile[1], STATE), REAL)
            new, of_drives, of_fixed = ADJOINT(FACTORS, once, s, drive, coefficient, adjoint + of_y)
            adjoint = narrowed(new, tile[0])
            found = added(found, narrowed(of_fixed, sum_tile[0]))
            if writes:
                results = added(begins(grads, b, t), of_grads)
                store(results, grad_tile[0], grad_tile[1], of_drives, GRADS)
            if starts is not None:
                start = uniform(tl.load(starts + tl.cast(b, tl.int64) * time + t))
                if start >= 0:
                    if (owners is not None) or (start < batch):
                        if writes:
                            fresh = components(initial_grads, start, HIDDEN, count)
                            store(fresh, tile[0], tile[1], adjoint, STATE)
                    else:
                        again = added(again, adjoint)
                    adjoint = zeros(tile[0], REAL)
        tl.debug_barrier()
    return adjoint, found, again


@triton.jit
def after_all(
    b, tile, end_grads, owners, time, STATE: tl.constexpr, HIDDEN: tl.constexpr, REAL: tl.constexpr
):
    """The adjoint of the state after the last step of sequence `b`."""
    adjoint = zeros(tile[0], REAL)
    if end_grads is not None:
        end = b
        if owners is not None:
            end = tl.load(owners + tl.cast(b, tl.int64) * time + time - 1)
        of_end = components(end_grads, end, HIDDEN, len(STATE))
        adjoint = cast(load(of_end, tile[0], tile[1], STATE), REAL)
    return adjoint


@triton.jit
def finish(adjoint, b, tile, starts, initial_grads, STATE: tl.constexpr, HIDDEN: tl.constexpr):
    """Write the gradient of the state before time 0, unless a sequence started there."""
    if starts is None:
        store(components(initial_grads, b, HIDDEN, len(STATE)), tile[0], tile[1], adjoint, STATE)


@triton.jit
def write_sums(
    found,
    again,
    row,
    sum_tile,
    tile,
    of_sums,
    sum_rows,
    sums,
    starts,
    owners,
    initial_grads,
    batch,
    SUMS: tl.constexpr,
    STATE: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Write the gradients of coefficients, and of the state that resets start from, of a chunk."""
    at_sums = added(rows_of(sums, row, sum_rows), of_sums)
    store(at_sums, sum_tile[0], sum_tile[1], found, SUMS)
    if starts is not None:  # noqa: SIM102
        if owners is None:
            of_again = components(initial_grads, row + batch, HIDDEN, len(STATE))
            store(of_again, tile[0], tile[1], again, STATE)


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
    drive_tile = placed(number, part, DRIVES, PROGRAMS)
    fixed_tile = placed(number, part, COEFFICIENTS, PROGRAMS)
    tile = placed(number, part, STATE, PROGRAMS)
    own_tile = kept_tile(number, part, STORED, PROGRAMS)
    y_tile = placed(number, part, Y, PROGRAMS)
    grad_tile = placed(number, part, GRADS, PROGRAMS)
    sum_tile = placed(number, part, SUMS, PROGRAMS)
    of_grads = parts_of(number, part, grad_parts, GRAD_PARTS, PROGRAMS)
    of_sums = parts_of(number, part, sum_parts, SUM_PARTS, PROGRAMS)
    coefficient = cast(load(coefficients, fixed_tile[0], fixed_tile[1], COEFFICIENTS), REAL)
    adjoint = after_all(b, tile, end_grads, owners, time, STATE, HIDDEN, REAL)
    adjoint, found, again = run(
        adjoint,
        0,
        segments,
        True,
        b,
        number,
        part,
        b,
        of_grads,
        coefficient,
        once,
        drive_tile,
        tile,
        own_tile,
        y_tile,
        grad_tile,
        sum_tile,
        drives,
        initial,
        starts,
        owners,
        kept,
        scratch,
        y_grad,
        end_grads,
        grads,
        initial_grads,
        batch,
        time,
        segments,
        AGAIN,
        ADJOINT,
        DRIVES,
        STATE,
        STORED,
        Y,
        GRADS,
        PROGRAMS,
        HIDDEN,
        SEGMENT,
        REAL,
        FACTORS,
    )
    finish(adjoint, b, tile, starts, initial_grads, STATE, HIDDEN)
    write_sums(
        found,
        again,
        b,
        sum_tile,
        tile,
        of_sums,
        sum_rows,
        sums,
        starts,
        owners,
        initial_grads,
        batch,
        SUMS,
        STATE,
        HIDDEN,
    )


@triton.jit(
    do_not_specialize=[
        "batch",
        "time",
        "segments",
        "grad_parts",
        "sum_parts",
        "sum_rows",
        "chunks",
        "chunk",
        "warm",
        "within",
        "probes",
    ]
)
def sweep(
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
    guess,
    reached,
    verdict,
    batch,
    time,
    segments,
    grad_parts,
    sum_parts,
    sum_rows,
    chunks,
    chunk,
    warm,
    within,
    probes,
    tolerance,
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
    """Go back through all chunks side by side, each from what a warm-up makes of zeros.

    See `tile_forward.sweep`. Arguments that are not there are those of `backward`; `chunk`, `warm`
    and `within` are segments.
    """
    program = tl.program_id(0)
    part, number = program % SPLIT, program // SPLIT % NUMBERS
    row, at_verdict = program // (SPLIT * NUMBERS), verdict + program % (SPLIT * NUMBERS)
    b = tl.where(probes > 0, row, row // chunks)
    k = tl.where(probes > 0, (chunks - 1) // 2, row % chunks)
    own, begin, at_verdict = b * chunks + k, k * chunk, at_verdict + b * (SPLIT * NUMBERS)
    once = tl.where(part == 0, 1.0, 0.0).to(REAL)
    drive_tile = placed(number, part, DRIVES, PROGRAMS)
    fixed_tile = placed(number, part, COEFFICIENTS, PROGRAMS)
    tile = placed(number, part, STATE, PROGRAMS)
    own_tile = kept_tile(number, part, STORED, PROGRAMS)
    y_tile = placed(number, part, Y, PROGRAMS)
    grad_tile = placed(number, part, GRADS, PROGRAMS)
    sum_tile = placed(number, part, SUMS, PROGRAMS)
    of_grads = parts_of(number, part, grad_parts, GRAD_PARTS, PROGRAMS)
    of_sums = parts_of(number, part, sum_parts, SUM_PARTS, PROGRAMS)
    coefficient = cast(load(coefficients, fixed_tile[0], fixed_tile[1], COEFFICIENTS), REAL)
    end = tl.minimum(begin + chunk, segments)
    lead, moved = tl.minimum(warm, segments - end), tl.cast(0.0, REAL)
    runs = tl.where((probes > 0) | (k == chunks - 1), 1, tl.load(at_verdict))
    adjoint = zeros(tile[0], REAL)
    if end + lead == segments:
        adjoint = after_all(b, tile, end_grads, owners, time, STATE, HIDDEN, REAL)
    adjoint = shifted(adjoint, tl.where(runs > 0, 0.0, float("nan")).to(REAL))
    size = lead // 4
    probed = end + lead - size
    # a part of the warm-up, another one, that once more; the warm-up, the chunk
    for phase in range(tl.where(probes > 0, 0, 3), tl.where(probes > 0, 3, 5)):
        if phase == 2:
            adjoint = zeros(tile[0], REAL)
        known = is_known(adjoint, placed(anew(number), part, STORED, PROGRAMS)[1])
        known = tl.maximum(known, tl.where(k == chunks - 1, 1, 0))  # the last one starts right
        rest = tl.where(phase == 3, lead, end - begin)
        count = tl.where(phase < 3, size, rest * known)
        high = tl.where((phase == 1) | (phase == 2), probed, end + lead)
        high = tl.where(phase == 4, end, high)
        adjoint, found, again = run(
            adjoint,
            high - count,
            high,
            phase == 4,
            b,
            number,
            part,
            own,
            of_grads,
            coefficient,
            once,
            drive_tile,
            tile,
            own_tile,
            y_tile,
            grad_tile,
            sum_tile,
            drives,
            initial,
            starts,
            owners,
            kept,
            scratch,
            y_grad,
            end_grads,
            grads,
            initial_grads,
            batch,
            time,
            segments,
            AGAIN,
            ADJOINT,
            DRIVES,
            STATE,
            STORED,
            Y,
            GRADS,
            PROGRAMS,
            HIDDEN,
            SEGMENT,
            REAL,
            FACTORS,
        )
        inside = placed(anew(number), part, STORED, PROGRAMS)[1]
        if phase == 0:
            _, moved = difference(adjoint, adjoint, inside)
        elif phase == 1:
            store_edge(guess, own, adjoint, number, part, STORED, PROGRAMS, HIDDEN)
            tl.debug_barrier()
        elif phase == 2:
            whole = load_edge(guess, own, number, part, STORED, PROGRAMS, HIDDEN)
            left, _ = difference(whole, adjoint, inside)
            times = (within / size).to(REAL)
            good = (end + warm >= segments) | forgets(moved, left, times, tolerance)
            tl.store(at_verdict, tl.where(good, 1, 0))
        elif phase == 3:
            store_edge(guess, own, adjoint, number, part, STORED, PROGRAMS, HIDDEN)
        else:
            write_sums(
                found,
                again,
                own,
                placed(anew(number), part, SUMS, PROGRAMS),
                placed(anew(number), part, STATE, PROGRAMS),
                of_sums,
                sum_rows,
                sums,
                starts,
                owners,
                initial_grads,
                batch,
                SUMS,
                STATE,
                HIDDEN,
            )
    if probes == 0:
        store_edge(reached, own, adjoint, number, part, STORED, PROGRAMS, HIDDEN)
    if (probes == 0) & (k == 0):
        finish(
            adjoint,
            b,
            placed(anew(number), part, STATE, PROGRAMS),
            starts,
            initial_grads,
            STATE,
            HIDDEN,
        )


@triton.jit(
    do_not_specialize=[
        "batch",
        "time",
        "segments",
        "grad_parts",
        "sum_parts",
        "sum_rows",
        "chunks",
        "chunk",
    ]
)
def mend(
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
    guess,
    reached,
    verdict,
    composed,
    new_guess,
    new_reached,
    batch,
    time,
    segments,
    grad_parts,
    sum_parts,
    sum_rows,
    chunks,
    chunk,
    each,
    tolerance,
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
    """Go back again through chunks that did not start where the one after them ended.

    See `tile_forward.mend`. Gaps count relative to the largest adjoint between chunks so far.
    Arguments are those of `sweep`.
    """
    program = tl.program_id(0)
    part, number = program % SPLIT, program // SPLIT % NUMBERS
    row = program // (SPLIT * NUMBERS)
    shares = tl.cdiv(chunks, each)
    b, low = row // shares, row % shares * each
    high = tl.minimum(low + each, chunks)
    once = tl.where(part == 0, 1.0, 0.0).to(REAL)
    drive_tile = placed(number, part, DRIVES, PROGRAMS)
    fixed_tile = placed(number, part, COEFFICIENTS, PROGRAMS)
    tile = placed(number, part, STATE, PROGRAMS)
    own_tile = kept_tile(number, part, STORED, PROGRAMS)
    y_tile = placed(number, part, Y, PROGRAMS)
    grad_tile = placed(number, part, GRADS, PROGRAMS)
    sum_tile = placed(number, part, SUMS, PROGRAMS)
    of_grads = parts_of(number, part, grad_parts, GRAD_PARTS, PROGRAMS)
    of_sums = parts_of(number, part, sum_parts, SUM_PARTS, PROGRAMS)
    coefficient = cast(load(coefficients, fixed_tile[0], fixed_tile[1], COEFFICIENTS), REAL)
    first = tl.cast(b, tl.int64) * chunks
    after = first + tl.minimum(high, chunks - 1)
    adjoint = load_edge(reached, after, number, part, STORED, PROGRAMS, HIDDEN)
    if high == chunks:  # the last chunk started right
        store_edge(new_reached, after, adjoint, number, part, STORED, PROGRAMS, HIDDEN)
    if composed is not None:
        own = load_edge(composed, first + high - 1, number, part, STORED, PROGRAMS, HIDDEN)
        remembers = tl.load(verdict + b * (SPLIT * NUMBERS) + program % (SPLIT * NUMBERS)) == 0
        adjoint = selected(remembers, own, adjoint)
    largest = tl.cast(0.0, REAL)
    top = tl.minimum(high, chunks - 1)
    for back in range(0, top - low):
        k = top - 1 - back
        guessed = load_edge(guess, first + k, number, part, STORED, PROGRAMS, HIDDEN)
        inside = placed(anew(number), part, STORED, PROGRAMS)[1]
        gap, size = difference(adjoint, guessed, inside)
        largest = tl.maximum(largest, size)
        stays = (gap <= tolerance * largest) & (gap < float("inf"))
        waits = (each == 1) & (is_known(adjoint, inside) == 0)
        stays = uniform(tl.where(stays | waits, 1, 0)) > 0
        begun = selected(stays, guessed, adjoint)
        store_edge(new_guess, first + k, begun, number, part, STORED, PROGRAMS, HIDDEN)
        adjoint, found, again = run(
            adjoint,
            k * chunk,
            tl.where(stays, k * chunk, tl.minimum(k * chunk + chunk, segments)),
            True,
            b,
            number,
            part,
            first + k,
            of_grads,
            coefficient,
            once,
            drive_tile,
            tile,
            own_tile,
            y_tile,
            grad_tile,
            sum_tile,
            drives,
            initial,
            starts,
            owners,
            kept,
            scratch,
            y_grad,
            end_grads,
            grads,
            initial_grads,
            batch,
            time,
            segments,
            AGAIN,
            ADJOINT,
            DRIVES,
            STATE,
            STORED,
            Y,
            GRADS,
            PROGRAMS,
            HIDDEN,
            SEGMENT,
            REAL,
            FACTORS,
        )
        if stays:
            adjoint = load_edge(reached, first + k, number, part, STORED, PROGRAMS, HIDDEN)
        else:
            write_sums(
                found,
                again,
                first + k,
                placed(anew(number), part, SUMS, PROGRAMS),
                placed(anew(number), part, STATE, PROGRAMS),
                of_sums,
                sum_rows,
                sums,
                starts,
                owners,
                initial_grads,
                batch,
                SUMS,
                STATE,
                HIDDEN,
            )
        store_edge(new_reached, first + k, adjoint, number, part, STORED, PROGRAMS, HIDDEN)
    if low == 0:
        finish(
            adjoint,
            b,
            placed(anew(number), part, STATE, PROGRAMS),
            starts,
            initial_grads,
            STATE,
            HIDDEN,
        )
