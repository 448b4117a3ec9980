"""All steps of a cell whose state is cut into tiles, with its readout: the forward kernels.

A program has one sequence, one index of the axes along which nothing mixes, and a tile of the state
(`tracing.tiles`), which stays in registers for all steps. Every step loads what the next one reads
while it computes. The kernels write what the readout makes of a state, and one state per segment.
The functions of a step and of its readout are generated.

`forward` runs all steps. Where time is cut into chunks, `sweep` runs all chunks side by side, each
from a state that a warm-up makes of the steps before it; `mend` compares these states with those
that chunks end in, and runs a chunk again where they do not fit.
"""

import triton
import triton.language as tl

from pararnn.kernels.triton.functions import anew, uniform
from pararnn.kernels.triton.tile_values import (
    added,
    apart,
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
    selected,
    shifted,
    store,
    store_edge,
)


@triton.jit
def run(
    s,
    low,
    high,
    writes,
    b,
    number,
    part,
    first_y,
    coefficient,
    once,
    drive_tile,
    tile,
    own_tile,
    y_tile,
    drives,
    initial,
    starts,
    owners,
    y,
    kept,
    ends,
    time,
    segments,
    STEP: tl.constexpr,
    DRIVES: tl.constexpr,
    STATE: tl.constexpr,
    STORED: tl.constexpr,
    Y: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HIDDEN: tl.constexpr,
    SEGMENT: tl.constexpr,
    REAL: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """Run steps `low` to `high` of sequence `b` from state `s`; returns the one after them.

    Results are written if `writes`. Those arguments that are not of `forward` are the offsets of
    what `placed` says of drives, states, states that are kept, and results; see there.
    """
    count: tl.constexpr = len(STATE)
    ahead = load(begins(drives, b, tl.minimum(low, time - 1)), drive_tile[0], drive_tile[1], DRIVES)
    for t in range(low, high):
        drive = cast(ahead, REAL)
        following = tl.minimum(t + 1, high - 1)
        ahead = load(begins(drives, b, following), drive_tile[0], drive_tile[1], DRIVES)
        s = restarted(starts, initial, s, b, t, time, tile[0], tile[1], STATE, HIDDEN, REAL)
        if t % SEGMENT == 0:
            fetch(drives, b, t + SEGMENT, low, high - 1, number, part, DRIVES, PROGRAMS, SEGMENT)
            if writes:
                row = tl.cast(b, tl.int64) * segments + t // SEGMENT
                store(components(kept, row, HIDDEN, count), own_tile[0], own_tile[1], s, STORED)
        new, handed = STEP(FACTORS, once, s, drive, coefficient)
        s = narrowed(new, tile[0])
        if writes:
            store(added(begins((y,), b, t), first_y), y_tile[0], y_tile[1], handed, Y)
            if owners is not None:
                place = tl.cast(b, tl.int64) * time + t
                after = uniform(tl.load(starts + place + tl.where(t + 1 < time, 1, 0)))
                if (after >= 0) & (t + 1 < time):
                    owner = tl.load(owners + place)
                    store(components(ends, owner, HIDDEN, count), tile[0], tile[1], s, STATE)
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
        HIDDEN: Entries of a state.
        SEGMENT: Steps of a segment.
        REAL: The type of the arithmetic.
        FACTORS: That of factors of matrix products.
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
    first_y = parts_of(number, part, (y_part,), Y_PARTS, PROGRAMS)
    coefficient = cast(load(coefficients, fixed_tile[0], fixed_tile[1], COEFFICIENTS), REAL)
    s = beginning(b, tile, initial, starts, time, STATE, HIDDEN, REAL)
    s = run(
        s,
        0,
        time,
        True,
        b,
        number,
        part,
        first_y,
        coefficient,
        once,
        drive_tile,
        tile,
        own_tile,
        y_tile,
        drives,
        initial,
        starts,
        owners,
        y,
        kept,
        ends,
        time,
        segments,
        STEP,
        DRIVES,
        STATE,
        STORED,
        Y,
        PROGRAMS,
        HIDDEN,
        SEGMENT,
        REAL,
        FACTORS,
    )
    finish(s, b, tile, owners, ends, time, STATE, HIDDEN)


@triton.jit
def beginning(
    b, tile, initial, starts, time, STATE: tl.constexpr, HIDDEN: tl.constexpr, REAL: tl.constexpr
):
    """The state before time 0 of sequence `b`."""
    start = b
    if starts is not None:
        start = tl.load(starts + tl.cast(b, tl.int64) * time)
    return cast(load(components(initial, start, HIDDEN, len(STATE)), tile[0], tile[1], STATE), REAL)


@triton.jit
def finish(s, b, tile, owners, ends, time, STATE: tl.constexpr, HIDDEN: tl.constexpr):
    """Write the state after the last step of sequence `b`."""
    end = b
    if owners is not None:
        end = tl.load(owners + tl.cast(b, tl.int64) * time + time - 1)
    store(components(ends, end, HIDDEN, len(STATE)), tile[0], tile[1], s, STATE)


@triton.jit(
    do_not_specialize=[
        "batch",
        "time",
        "segments",
        "y_part",
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
    y,
    kept,
    ends,
    guess,
    reached,
    verdict,
    batch,
    time,
    segments,
    y_part,
    chunks,
    chunk,
    warm,
    within,
    probes,
    tolerance,
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
    """Run all chunks side by side, each from what a warm-up makes of the initial state.

    Before that, with `probes`, find out whether that will do, at one chunk for all. Part of its
    warm-up runs twice, once from the initial state, which shows by how much the cell forgets a
    difference. If something would be left of it after `within` steps, the chunks are left out.
    Arguments that are not here are those of `forward`.

    Args:
        drives: As above.
        coefficients: As above.
        initial: As above.
        starts: As above.
        owners: As above.
        y: As above.
        kept: As above.
        ends: As above.
        guess: Where the states before chunks go, (batch * chunks, components, hidden); NaN if a
            chunk was left out.
        reached: Where those after chunks go, likewise.
        verdict: What was found, (batch, `NUMBERS` * `SPLIT`): 1 if chunks are run, else 0.
        batch: As above.
        time: As above.
        segments: As above.
        y_part: As above.
        chunks: Chunks of time.
        chunk: Steps of a chunk, whole segments.
        warm: Steps of the warm-up.
        within: See above.
        probes: 1 or 0, see above.
        tolerance: The largest gap between chunks.
        STEP: As above.
        DRIVES: As above.
        COEFFICIENTS: As above.
        STATE: As above.
        STORED: As above.
        Y: As above.
        Y_PARTS: As above.
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
    row, at_verdict = program // (SPLIT * NUMBERS), verdict + program % (SPLIT * NUMBERS)
    b = tl.where(probes > 0, row, row // chunks)
    k = tl.where(probes > 0, chunks // 2, row % chunks)
    own, begin, at_verdict = b * chunks + k, k * chunk, at_verdict + b * (SPLIT * NUMBERS)
    once = tl.where(part == 0, 1.0, 0.0).to(REAL)
    drive_tile = placed(number, part, DRIVES, PROGRAMS)
    fixed_tile = placed(number, part, COEFFICIENTS, PROGRAMS)
    tile = placed(number, part, STATE, PROGRAMS)
    own_tile = kept_tile(number, part, STORED, PROGRAMS)
    y_tile = placed(number, part, Y, PROGRAMS)
    first_y = parts_of(number, part, (y_part,), Y_PARTS, PROGRAMS)
    coefficient = cast(load(coefficients, fixed_tile[0], fixed_tile[1], COEFFICIENTS), REAL)
    lead, moved = tl.minimum(warm, begin), tl.cast(0.0, REAL)
    runs = tl.where((probes > 0) | (k == 0), 1, tl.load(at_verdict))
    s = beginning(b, tile, initial, starts, time, STATE, HIDDEN, REAL)
    s = shifted(s, tl.where(runs > 0, 0.0, float("nan")).to(REAL))
    size = lead // 4
    probed = begin - lead + size
    # a part of the warm-up, another one, that once more; the warm-up, the chunk
    for phase in range(tl.where(probes > 0, 0, 3), tl.where(probes > 0, 3, 5)):
        if phase == 2:
            s = beginning(b, tile, initial, starts, time, STATE, HIDDEN, REAL)
        known = is_known(s, placed(anew(number), part, STORED, PROGRAMS)[1])
        known = tl.maximum(known, tl.where(k == 0, 1, 0))  # the first chunk starts right
        rest = tl.where(phase == 3, lead, tl.minimum(chunk, time - begin))
        steps = tl.where(phase < 3, size, rest * known)
        low = tl.where((phase == 1) | (phase == 2), probed, begin - lead)
        low = tl.where(phase == 4, begin, low)
        s = run(
            s,
            low,
            low + steps,
            phase == 4,
            b,
            number,
            part,
            first_y,
            coefficient,
            once,
            drive_tile,
            tile,
            own_tile,
            y_tile,
            drives,
            initial,
            starts,
            owners,
            y,
            kept,
            ends,
            time,
            segments,
            STEP,
            DRIVES,
            STATE,
            STORED,
            Y,
            PROGRAMS,
            HIDDEN,
            SEGMENT,
            REAL,
            FACTORS,
        )
        inside = placed(anew(number), part, STORED, PROGRAMS)[1]
        if phase == 0:
            fresh = beginning(b, tile, initial, starts, time, STATE, HIDDEN, REAL)
            moved, _ = difference(s, fresh, inside)
        elif phase == 1:
            store_edge(guess, own, s, number, part, STORED, PROGRAMS, HIDDEN)
            tl.debug_barrier()
        elif phase == 2:
            whole = load_edge(guess, own, number, part, STORED, PROGRAMS, HIDDEN)
            left, _ = difference(whole, s, inside)
            times = (within / size).to(REAL)
            good = (begin <= warm) | forgets(moved, left, times, tolerance)
            tl.store(at_verdict, tl.where(good, 1, 0))
        elif phase == 3:
            store_edge(guess, own, s, number, part, STORED, PROGRAMS, HIDDEN)
    if probes == 0:
        store_edge(reached, own, s, number, part, STORED, PROGRAMS, HIDDEN)


@triton.jit(
    do_not_specialize=[
        "batch",
        "time",
        "segments",
        "y_part",
        "chunks",
        "chunk",
        "passes",
        "reports",
        "own_report",
    ]
)
def mend(
    drives,
    coefficients,
    initial,
    starts,
    owners,
    y,
    kept,
    ends,
    guess,
    reached,
    verdict,
    composed,
    new_guess,
    new_reached,
    report,
    reports,
    own_report,
    batch,
    time,
    segments,
    y_part,
    chunks,
    chunk,
    each,
    passes,
    tolerance,
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
    SMALL: tl.constexpr,
    TINY: tl.constexpr,
    CONVERGED: tl.constexpr,
    COMPLETED: tl.constexpr,
):
    """Run chunks again that did not start where the one before them ended.

    A program looks at `each` chunks one after another. With one, all look at what was left by the
    launch before, and the result may still not fit; with all, it does. Chunks that `sweep` left out
    start from `composed`.

    Arguments that are not here are those of `sweep`.

    Args:
        drives: As above.
        coefficients: As above.
        initial: As above.
        starts: As above.
        owners: As above.
        y: As above.
        kept: As above.
        ends: As above.
        guess: As above.
        reached: As above.
        verdict: As above.
        composed: States before chunks as `tile_tangents.compose` found them, or None.
        new_guess: As `guess`, when this is done.
        new_reached: As `reached`.
        report: Rows of the report, (batch, `reports`, `NUMBERS` * `SPLIT`, 4); the largest
            numbers of a sequence count.
        reports: See `report`.
        own_report: The first of them of this launch, which has one for each program of a sequence.
        batch: As above.
        time: As above.
        segments: As above.
        y_part: As above.
        chunks: As above.
        chunk: As above.
        each: See above.
        passes: What a report says if chunks were run again.
        tolerance: As above.
        STEP: As above.
        DRIVES: As above.
        COEFFICIENTS: As above.
        STATE: As above.
        STORED: As above.
        Y: As above.
        Y_PARTS: As above.
        PROGRAMS: As above.
        NUMBERS: As above.
        SPLIT: As above.
        HIDDEN: As above.
        SEGMENT: As above.
        REAL: As above.
        FACTORS: As above.
        SMALL: See `apart`.
        TINY: See `apart`.
        CONVERGED: What a report says.
        COMPLETED: What it says if chunks were run again in order.
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
    first_y = parts_of(number, part, (y_part,), Y_PARTS, PROGRAMS)
    coefficient = cast(load(coefficients, fixed_tile[0], fixed_tile[1], COEFFICIENTS), REAL)
    first = tl.cast(b, tl.int64) * chunks
    largest, again = tl.cast(0.0, REAL), 0
    before = first + tl.maximum(low - 1, 0)
    s = load_edge(reached, before, number, part, STORED, PROGRAMS, HIDDEN)
    if low == 0:  # the first chunk started right
        store_edge(new_reached, first, s, number, part, STORED, PROGRAMS, HIDDEN)
    if composed is not None:
        own = load_edge(composed, first + low, number, part, STORED, PROGRAMS, HIDDEN)
        remembers = tl.load(verdict + b * (SPLIT * NUMBERS) + program % (SPLIT * NUMBERS)) == 0
        s = selected(remembers, own, s)
    for k in range(tl.maximum(low, 1), high):
        guessed = load_edge(guess, first + k, number, part, STORED, PROGRAMS, HIDDEN)
        inside = placed(anew(number), part, STORED, PROGRAMS)[1]
        gap = apart(s, guessed, inside, SMALL, TINY)
        largest = tl.maximum(largest, gap)
        waits = (each == 1) & (is_known(s, inside) == 0)
        stays = uniform(tl.where((gap <= tolerance) | waits, 1, 0)) > 0
        steps = tl.where(stays, 0, tl.minimum(chunk, time - k * chunk))
        begun = selected(stays, guessed, s)
        store_edge(new_guess, first + k, begun, number, part, STORED, PROGRAMS, HIDDEN)
        s = run(
            s,
            k * chunk,
            k * chunk + steps,
            True,
            b,
            number,
            part,
            first_y,
            coefficient,
            once,
            drive_tile,
            tile,
            own_tile,
            y_tile,
            drives,
            initial,
            starts,
            owners,
            y,
            kept,
            ends,
            time,
            segments,
            STEP,
            DRIVES,
            STATE,
            STORED,
            Y,
            PROGRAMS,
            HIDDEN,
            SEGMENT,
            REAL,
            FACTORS,
        )
        if stays:
            s = load_edge(reached, first + k, number, part, STORED, PROGRAMS, HIDDEN)
        again += tl.where(stays, 0, 1)
        store_edge(new_reached, first + k, s, number, part, STORED, PROGRAMS, HIDDEN)
    if high == chunks:
        finish(s, b, placed(anew(number), part, STATE, PROGRAMS), owners, ends, time, STATE, HIDDEN)
    in_order = (each > 1) & (again > 0)
    place = tl.cast(b, tl.int64) * reports + own_report + row % shares
    at_report = report + (place * (SPLIT * NUMBERS) + program % (SPLIT * NUMBERS)) * 4
    tl.store(at_report, tl.where(again > 0, passes, 1).to(tl.float64))
    tl.store(at_report + 1, tl.where(each > 1, largest, 0.0).to(tl.float64))
    tl.store(at_report + 2, tl.where(in_order, COMPLETED, CONVERGED).to(tl.float64))
    tl.store(at_report + 3, tl.cast(chunks, tl.float64))
