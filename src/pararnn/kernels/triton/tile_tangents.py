"""Where the chunks of a memory start whose entries do not reach each other: Newton's method.

Each entry of a state after a chunk depends on the same entry before it. So the tangent of a chunk
is one number for each entry, the product of those of its steps (with several tensors in a state, a
small matrix). `tangents` runs all chunks of heads that remember longer than a warm-up side by side,
and keeps this product. `compose` goes through the chunks: the state before a chunk is what the one
before it ends in, plus its tangent times the difference of starts. `tile_forward.mend` then runs
the chunks from there. For steps that are affine in the state, this is exact.

Adjoints are always so. `gather` finds in one run forwards, without states of segments, the adjoint
before a chunk as it is if that after it is zero, and the tangent.
"""

import triton
import triton.language as tl

from pararnn.kernels.triton.functions import anew, bounded, uniform
from pararnn.kernels.triton.tile_forward import beginning
from pararnn.kernels.triton.tile_values import (
    added,
    apart,
    begins,
    cast,
    components,
    fetch,
    kept_tile,
    load,
    load_edge,
    narrowed,
    placed,
    restarted,
    selected,
    store_edge,
    zeros,
)

# Matrices of tiles are tuples, column by column. One column beside several tensors is a diagonal.


@triton.jit
def identity(offsets, COLUMNS: tl.constexpr, REAL: tl.constexpr):
    """The tangent of no steps."""
    found = ()
    for j in tl.static_range(COLUMNS):
        for i in tl.static_range(len(offsets)):
            if COLUMNS == 1 or i == j:
                found = found + (tl.full(offsets[i].shape, 1.0, REAL),)
            else:
                found = found + (tl.zeros(offsets[i].shape, REAL),)
    return found


@triton.jit
def product(a, b, offsets):
    """The product of two matrices, with the shapes of the state's tiles."""
    count: tl.constexpr = len(offsets)
    found = ()
    for j in tl.static_range(len(b) // count):
        own = ()
        for i in tl.static_range(count):
            if len(b) == count:
                total = a[i] * b[i]
            else:
                total = a[i] * b[j * count]
                for m in tl.static_range(1, count):
                    total += a[m * count + i] * b[j * count + m]
            own = own + (total,)
        found = found + narrowed(own, offsets)
    return found


@triton.jit
def applied(matrix, values):
    """The product of a matrix and a vector of tiles."""
    count: tl.constexpr = len(values)
    found = ()
    for i in tl.static_range(count):
        total = matrix[i] * values[i if len(matrix) == count else 0]
        if len(matrix) > count:
            for j in tl.static_range(1, count):
                total += matrix[j * count + i] * values[j]
        found = found + (total,)
    return found


@triton.jit
def cleared(matrix, start):
    """A matrix of zeros where another sequence starts (`start` >= 0), else the matrix."""
    found = ()
    for n in tl.static_range(len(matrix)):
        found = found + (tl.where(start >= 0, 0.0, matrix[n]),)
    return found


@triton.jit
def finite(values):
    """Tiles with zeros in place of what is not finite, or close to it."""
    found = ()
    for n in tl.static_range(len(values)):
        found = found + (bounded(values[n]),)
    return found


@triton.jit
def less(values, others):
    """Differences of tiles."""
    found = ()
    for n in tl.static_range(len(values)):
        found = found + (values[n] - others[n],)
    return found


@triton.jit
def store_matrix(
    tensor,
    row,
    matrix,
    number,
    part,
    STORED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """Write a matrix: a row of states for each column."""
    count: tl.constexpr = len(STORED)
    columns: tl.constexpr = len(matrix) // count
    for j in tl.static_range(columns):
        own = ()
        for i in tl.static_range(count):
            own = own + (matrix[j * count + i],)
        store_edge(tensor, row * columns + j, own, number, part, STORED, PROGRAMS, HIDDEN)


@triton.jit
def load_matrix(
    tensor,
    row,
    number,
    part,
    STORED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Read what `store_matrix` wrote."""
    found = ()
    for j in tl.static_range(COLUMNS):
        at = row * COLUMNS + j
        found = found + load_edge(tensor, at, number, part, STORED, PROGRAMS, HIDDEN)
    return found


@triton.jit(do_not_specialize=["time", "chunks", "chunk", "warm", "begun"])
def tangents(
    drives,
    coefficients,
    initial,
    starts,
    base,
    ended,
    matrices,
    verdict,
    time,
    chunks,
    chunk,
    warm,
    begun,
    TANGENT: tl.constexpr,
    DRIVES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    STATE: tl.constexpr,
    STORED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SPLIT: tl.constexpr,
    HIDDEN: tl.constexpr,
    SEGMENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    REAL: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """Run the chunks that `tile_forward.sweep` left out, for the states and tangents at their ends.

    Nothing else is written. Arguments that are not here are those of `sweep`.

    Args:
        drives: As above.
        coefficients: As above.
        initial: As above.
        starts: As above.
        base: The states before chunks, or where they go.
        ended: Where those after chunks go.
        matrices: Where tangents go, see `store_matrix`.
        verdict: As above.
        time: As above.
        chunks: As above.
        chunk: As above.
        warm: As above.
        begun: 1 where `base` has the states before chunks, 0 where a warm-up makes them.
        TANGENT: Generated: new components, and the Jacobian.
        DRIVES: As above.
        COEFFICIENTS: As above.
        STATE: As above.
        STORED: As above.
        PROGRAMS: As above.
        NUMBERS: As above.
        SPLIT: As above.
        HIDDEN: As above.
        SEGMENT: As above.
        COLUMNS: Of a tangent.
        REAL: As above.
        FACTORS: As above.
    """
    program = tl.program_id(0)
    part, number = program % SPLIT, program // SPLIT % NUMBERS
    row = program // (SPLIT * NUMBERS)
    b, k = row // chunks, row % chunks
    own, begin = tl.cast(row, tl.int64), k * chunk
    good = tl.load(verdict + b * (SPLIT * NUMBERS) + program % (SPLIT * NUMBERS))
    needed = uniform(tl.where((good == 0) & (k > 0) & (k < chunks - 1), 1, 0))
    once = tl.where(part == 0, 1.0, 0.0).to(REAL)
    drive_tile = placed(number, part, DRIVES, PROGRAMS)
    fixed_tile = placed(number, part, COEFFICIENTS, PROGRAMS)
    tile = placed(number, part, STATE, PROGRAMS)
    coefficient = cast(load(coefficients, fixed_tile[0], fixed_tile[1], COEFFICIENTS), REAL)
    s = beginning(b, tile, initial, starts, time, STATE, HIDDEN, REAL)
    known = load_edge(base, own, number, part, STORED, PROGRAMS, HIDDEN)
    s = selected(begun > 0, known, s)
    for phase in range(begun, 2 * needed):  # the warm-up, the chunk
        low = tl.where(phase == 0, begin - tl.minimum(warm, begin), begin)
        high = tl.where(phase == 0, begin, begin + chunk)
        matrix = identity(tile[0], COLUMNS, REAL)
        ahead = load(begins(drives, b, low), drive_tile[0], drive_tile[1], DRIVES)
        for t in range(low, high):
            if t % SEGMENT == 0:
                most = high - 1
                fetch(drives, b, t + SEGMENT, low, most, number, part, DRIVES, PROGRAMS, SEGMENT)
            drive = cast(ahead, REAL)
            following = tl.minimum(t + 1, high - 1)
            ahead = load(begins(drives, b, following), drive_tile[0], drive_tile[1], DRIVES)
            if starts is not None:
                start = uniform(tl.load(starts + tl.cast(b, tl.int64) * time + t))
                matrix = cleared(matrix, start)
            s = restarted(starts, initial, s, b, t, time, tile[0], tile[1], STATE, HIDDEN, REAL)
            new, jac = TANGENT(FACTORS, once, s, drive, coefficient)
            s, matrix = narrowed(new, tile[0]), product(jac, matrix, tile[0])
        if phase == 0:
            store_edge(base, own, s, number, part, STORED, PROGRAMS, HIDDEN)
        else:
            store_edge(ended, own, s, number, part, STORED, PROGRAMS, HIDDEN)
            store_matrix(matrices, own, matrix, number, part, STORED, PROGRAMS, HIDDEN)


@triton.jit(do_not_specialize=["time", "segments", "chunks", "chunk"])
def gather(
    drives,
    coefficients,
    initial,
    starts,
    owners,
    kept,
    y_grad,
    end_grads,
    ended,
    matrices,
    verdict,
    time,
    segments,
    chunks,
    chunk,
    GATHER: tl.constexpr,
    DRIVES: tl.constexpr,
    COEFFICIENTS: tl.constexpr,
    STATE: tl.constexpr,
    STORED: tl.constexpr,
    Y: tl.constexpr,
    PROGRAMS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SPLIT: tl.constexpr,
    HIDDEN: tl.constexpr,
    SEGMENT: tl.constexpr,
    COLUMNS: tl.constexpr,
    REAL: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """Run the chunks that `tile_backward.sweep` left out, for adjoints and tangents.

    Of each chunk, the adjoint before it if that after it is zero. A step adds the product of the
    tangents before it and of what it hands back, so that this can be done forwards. Arguments that
    are not here are those of `sweep` there.

    Args:
        drives: As above.
        coefficients: As above.
        initial: As above.
        starts: As above.
        owners: As above.
        kept: As above.
        y_grad: As above.
        end_grads: As above.
        ended: Where these adjoints go.
        matrices: Where tangents go, see `store_matrix`.
        verdict: As above.
        time: As above.
        segments: As above.
        chunks: As above.
        chunk: As above.
        GATHER: Generated: new components, adjoints before the step, and the transposed Jacobian.
        DRIVES: As above.
        COEFFICIENTS: As above.
        STATE: As above.
        STORED: As above.
        Y: As above.
        PROGRAMS: As above.
        NUMBERS: As above.
        SPLIT: As above.
        HIDDEN: As above.
        SEGMENT: As above.
        COLUMNS: Of a tangent.
        REAL: As above.
        FACTORS: As above.
    """
    count: tl.constexpr = len(STATE)
    program = tl.program_id(0)
    part, number = program % SPLIT, program // SPLIT % NUMBERS
    row = program // (SPLIT * NUMBERS)
    b, k = row // chunks, row % chunks
    own = tl.cast(row, tl.int64)
    good = tl.load(verdict + b * (SPLIT * NUMBERS) + program % (SPLIT * NUMBERS))
    needed = uniform(tl.where((good == 0) & (k > 0) & (k < chunks - 1), 1, 0))
    once = tl.where(part == 0, 1.0, 0.0).to(REAL)
    drive_tile = placed(number, part, DRIVES, PROGRAMS)
    fixed_tile = placed(number, part, COEFFICIENTS, PROGRAMS)
    tile = placed(number, part, STATE, PROGRAMS)
    own_tile = kept_tile(number, part, STORED, PROGRAMS)
    y_tile = placed(number, part, Y, PROGRAMS)
    coefficient = cast(load(coefficients, fixed_tile[0], fixed_tile[1], COEFFICIENTS), REAL)
    found = zeros(tile[0], REAL)
    matrix = identity(tile[0], COLUMNS, REAL)
    most = (k * chunk + chunk) * SEGMENT - 1
    for segment in range(k * chunk, k * chunk + chunk * needed):
        begin = segment * SEGMENT
        after = begin + SEGMENT
        fetch(drives, b, after, begin, most, number, part, DRIVES, PROGRAMS, SEGMENT)
        if y_grad is not None:
            fetch((y_grad,), b, after, begin, most, number, part, Y, PROGRAMS, SEGMENT)
        at = tl.cast(b, tl.int64) * segments + segment
        s = cast(load(components(kept, at, HIDDEN, count), own_tile[0], own_tile[1], STORED), REAL)
        ahead = load(begins(drives, b, begin), drive_tile[0], drive_tile[1], DRIVES)
        if y_grad is not None:
            from_y = load(begins((y_grad,), b, begin), y_tile[0], y_tile[1], Y)
        else:
            from_y = zeros(y_tile[0], REAL)
        for i in range(0, SEGMENT):
            t = begin + i
            drive, of_y = cast(ahead, REAL), cast(from_y, REAL)
            following = begin + tl.minimum(i + 1, SEGMENT - 1)
            ahead = load(begins(drives, b, following), drive_tile[0], drive_tile[1], DRIVES)
            if y_grad is not None:
                from_y = load(begins((y_grad,), b, following), y_tile[0], y_tile[1], Y)
            adjoint = zeros(tile[0], REAL)
            if starts is not None:
                start = uniform(tl.load(starts + tl.cast(b, tl.int64) * time + t))
                matrix = cleared(matrix, start)
            if (owners is not None) and (end_grads is not None):
                here = tl.cast(b, tl.int64) * time + t
                if uniform(tl.load(starts + here + 1)) >= 0:  # the chunk is not the last
                    of_end = components(end_grads, tl.load(owners + here), HIDDEN, count)
                    adjoint = cast(load(of_end, tile[0], tile[1], STATE), REAL)
            s = restarted(starts, initial, s, b, t, time, tile[0], tile[1], STATE, HIDDEN, REAL)
            new, handed, jac = GATHER(FACTORS, once, s, drive, coefficient, adjoint + of_y)
            found = added(found, narrowed(applied(matrix, handed), tile[0]))
            s, matrix = narrowed(new, tile[0]), product(matrix, jac, tile[0])
    if needed > 0:
        store_edge(ended, own, found, number, part, STORED, PROGRAMS, HIDDEN)
        store_matrix(matrices, own, matrix, number, part, STORED, PROGRAMS, HIDDEN)


@triton.jit(do_not_specialize=["chunks", "step"])
def compose(
    reached,
    base,
    ended,
    matrices,
    verdict,
    new_verdict,
    composed,
    chunks,
    step,
    tolerance,
    STORED: tl.constexpr,
    PROGRAMS: tl.constexpr,
    NUMBERS: tl.constexpr,
    SPLIT: tl.constexpr,
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    REAL: tl.constexpr,
    SMALL: tl.constexpr,
    TINY: tl.constexpr,
):
    """Find the states or adjoints that the chunks start from which a sweep left out.

    What overflows is left out, so that a start that was right stays as it is.

    Args:
        reached: What the first chunk in the direction of the run ended in, (batch * chunks, ...).
        base: What chunks started from, likewise; zeros when None.
        ended: What they ended in.
        matrices: Their tangents.
        verdict: See `tile_forward.sweep`.
        new_verdict: The same, but 1 where all chunks fit that had been run; or None.
        composed: Where the result goes, as `reached`.
        chunks: Chunks of time.
        step: 1 where time runs forwards, -1 where it runs backwards.
        tolerance: The largest gap between chunks that fit.
        STORED: See `tile_forward.forward`.
        PROGRAMS: See there.
        NUMBERS: See there.
        SPLIT: See there.
        HIDDEN: See there.
        COLUMNS: Of a tangent.
        REAL: See there.
        SMALL: See `apart`.
        TINY: See `apart`.
    """
    program = tl.program_id(0)
    part, number = program % SPLIT, program // SPLIT % NUMBERS
    first = tl.cast(program // (SPLIT * NUMBERS), tl.int64) * chunks
    at = first + tl.where(step > 0, 0, chunks - 1)
    s = load_edge(reached, at, number, part, STORED, PROGRAMS, HIDDEN)
    end, gap = s, tl.cast(0.0, REAL)
    for n in range(1, uniform(tl.where(tl.load(verdict + program) > 0, 0, chunks - 1)) + 1):
        own = at + n * step
        number = anew(number)
        store_edge(composed, own, s, number, part, STORED, PROGRAMS, HIDDEN)
        moved = s
        if base is not None:
            start = load_edge(base, own, number, part, STORED, PROGRAMS, HIDDEN)
            moved = less(s, start)
            if new_verdict is not None:
                inside = placed(number, part, STORED, PROGRAMS)[1]
                gap = tl.maximum(gap, apart(end, start, inside, SMALL, TINY))
        # of the last chunk this is not used, and it may not be known
        matrix = load_matrix(matrices, own, number, part, STORED, PROGRAMS, HIDDEN, COLUMNS)
        end = load_edge(ended, own, number, part, STORED, PROGRAMS, HIDDEN)
        s = added(end, finite(applied(finite(matrix), moved)))
    if new_verdict is not None:
        tl.store(new_verdict + program, tl.where(gap <= tolerance, 1, 0))
