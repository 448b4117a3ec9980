"""The kernels that solve a system of chunks: `sweep`, `correct` and `refine`.

There are two systems, which `KIND` has as functions: of the states (`forward`) and of the adjoints
(`adjoint`), which runs backwards in time. "Before" and "first" are meant in the direction of the
system, and so are steps: a chunk runs from step 0 to step `length`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pararnn.kernels.triton.common import (
    edge,
    first_state,
    group_of,
    identity,
    load_edges,
    load_stored,
    own_chunk,
    place_of,
    program_of,
    save,
    zeros,
    zeros_like,
)
from pararnn.kernels.triton.functions import anew, bounded, magnitude, only
from pararnn.kernels.triton.tuples import Edges


@triton.jit(do_not_specialize=["batch", "time", "chunks", "chunk", "warm"])
def sweep(given, edges, report, batch, time, chunks, chunk, warm, limit, KIND: tl.constexpr):
    """First guesses, and the results where nothing is left of where the warm-up started."""
    p = program_of(given, batch, time, chunks, chunk, KIND)
    if KIND.overlap:  # kernels overlap until one needs what another wrote
        tl.extra.cuda.gdc_launch_dependents()
    own = own_chunk(given, p, KIND)
    if KIND.backward:
        s = zeros(len(given.states), p.channels, KIND.real)
        behind = time - own.first - own.length  # steps before the chunk
    else:
        s, behind = first_state(given, p, KIND), own.first
    lead = tl.minimum(warm, behind) if KIND.many else 0
    ahead = KIND.load_ahead(lead, own, KIND)
    if KIND.many:
        # The warm-up, and if it did not forget its start the chunk without results; not the last
        # chunk, since nobody starts from its end. The bounds are computed from the pass: Triton 3.6
        # loses a bound that is assigned in a branch.
        last = in_order(own.k, chunks, KIND) == chunks - 1
        forgotten, g = 0 * lead, identity(s)
        for phase in range(0, 2):
            g = identity(s)
            begin = tl.where(phase == 0, -lead, 0)
            end = tl.where((phase == 0) | (forgotten > 0) | last, 0, own.length)
            s, g, ahead = KIND.run(s, g, ahead, begin, end, own, KIND)
            if phase == 0:
                save(edges.guess, s, p, own.k, own.d, own.here)
                forgotten = note_forgotten(g, lead == behind, limit, edges.stored, p, own)
        for _ in range(0, forgotten):  # with a branch addresses are computed anew in every round
            s, _ = KIND.run_chunk(s, (), ahead, own, KIND)
            g = zeros_like(g)
        save(edges.ends, s, p, own.k, own.d, own.here)
        save(edges.coupling, g, p, own.k, own.d, own.here)
    else:
        KIND.run_chunk(s, (), ahead, own, KIND)
        if not KIND.backward:
            write_report(report, p, 1, 0.0, 0, 1)


@triton.jit
def note_forgotten(g, exact, limit, stored, p, own):
    """Note whether nothing is left of where the warm-up started, 1 or 0.

    The warm-up is also good where it started from the right state (`exact`).
    """
    forgotten = tl.cast(exact | (largest(g, p) <= limit), tl.int32)
    tl.store(stored + place_of(p, own.k), forgotten)
    return forgotten


@triton.jit(do_not_specialize=["batch", "time", "chunks", "chunk", "iteration"])
def correct(
    given,
    edges,
    corrected,
    batch,
    time,
    chunks,
    chunk,
    iteration,
    tolerance,
    damping,
    KIND: tl.constexpr,
):
    """One more iteration of Newton's method, the `iteration`-th, where chunks do not fit together.

    Which states chunks start from and end in is read from `edges` and written to `corrected`, since
    programs do not wait for each other.
    """
    p = program_of(given, batch, time, chunks, chunk, KIND)
    if KIND.overlap:  # the kernel after waits until this one has ended, and so for those before
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    own = own_chunk(given, p, KIND)
    count: tl.constexpr = len(given.states)
    guess = load_edges(edges.guess, p, own.k, count, own.d, own.here, None)
    end = load_edges(edges.ends, p, own.k, count, own.d, own.here, None)
    strength = 1.0 if KIND.backward else 1.0 - damping
    start, delta = corrected_start(own.k, guess, strength, tolerance, edges, p, KIND)
    again = KIND.moved(start, end, delta, own.k, edges, p, tolerance, KIND)
    again = again | (tl.load(edges.stored + place_of(p, own.k)) == 0)
    residual = residual_at(own.k, edges, p, tolerance, count, KIND)
    if again:
        ahead = KIND.load_ahead(0, own, KIND)
        end, _ = KIND.run_chunk(start, (), ahead, own, KIND)
        guess = start
        residual = tl.full([], float("inf"), KIND.real)
        tl.store(edges.stored + place_of(p, own.k), tl.cast(iteration, tl.int32))
    save(corrected.guess, guess, p, own.k, own.d, own.here)
    save(corrected.ends, end, p, own.k, own.d, own.here)
    tl.store(corrected.residual + place_of(p, own.k), residual)


@triton.jit
def corrected_start(k, guess, strength, tolerance, edges, p, KIND: tl.constexpr):
    """The right start of chunk `k` by the tangents of chunks before, and how far the guess is off.

    Chunks are looked at from the last before on, some at a time, until so little is left of the
    starts of those before that it does not matter. What overflows is left out, so that a start that
    was right stays as it is.
    """
    count: tl.constexpr = len(guess)
    looked_at: tl.constexpr = KIND.looked_at
    place = in_order(k, p.chunks, KIND)
    total = zeros(count, p.channels, KIND.real)
    g = identity(total)
    # A chunk whose results `sweep` wrote has forgotten where it began.
    before = in_order(place - 1, p.chunks, KIND)
    far = load_stored(edges.stored, p, before, place > 0) != 1
    m = place - 1
    while far:
        loaded = ()  # all before any is used: they arrive together
        for i in tl.static_range(looked_at):
            n = in_order(m - i, p.chunks, KIND)
            there = only(p.inside, m - i > 0)
            coupling = load_edges(edges.coupling, p, n, count * count, p.channels, there, 0.0)
            loaded += ((coupling, gaps_at(n, count, edges, p, there, KIND)),)
        for i in tl.static_range(looked_at):
            g, total = further(g, total, loaded[i][0], loaded[i][1], strength, count)
        m -= looked_at
        far = (m > 0) & (largest(g, p) > tolerance / 16)
    start, delta = (), ()
    for i in tl.static_range(count):
        at = edge(edges.ends, p, before, i, count, p.channels)
        end = tl.load(at, mask=only(p.inside, place > 0), other=0.0)
        new = tl.where(place > 0, end + bounded(total[i]), guess[i])
        start += (new,)
        delta += (tl.where(new == guess[i], 0.0, bounded(new - guess[i])),)
    return start, delta


@triton.jit
def further(g, total, coupling, gaps, strength, count: tl.constexpr):
    """What couples to one chunk more, and the sum of the gaps until there that it hands on."""
    coupled, moved = (), ()
    for i in tl.static_range(count):
        more = total[i]
        for j in tl.static_range(count):
            entry = g[i * count] * coupling[j]
            for n in tl.static_range(1, count):
                entry += g[i * count + n] * coupling[n * count + j]
            coupled += (bounded(entry * strength),)
            more += bounded(coupled[i * count + j] * gaps[j])
        moved += (more,)
    return coupled, moved


@triton.jit
def gaps_at(n, count: tl.constexpr, edges, p, mask, KIND: tl.constexpr):
    """By how much chunk `n` starts elsewhere than the one before it ends."""
    found, before = (), n + 1 if KIND.backward else n - 1
    for i in tl.static_range(count):
        end = tl.load(edge(edges.ends, p, before, i, count, p.channels), mask=mask, other=0.0)
        start = tl.load(edge(edges.guess, p, n, i, count, p.channels), mask=mask, other=0.0)
        found += (tl.where(end == start, 0.0, bounded(end - start)),)
    return found


@triton.jit
def residual_at(k, edges, p, tolerance, count: tl.constexpr, KIND: tl.constexpr):
    """The residual of one chunk; infinite if it is too large.

    It counts relative to sizes here alone, which are no larger than those of all chunks.
    """
    gaps, sizes = KIND.unmeasured(count, p, 1, KIND)
    k, d = k + tl.arange(0, 1)[:, None], p.channels[None, :]
    gaps, sizes = measure(gaps, sizes, edges, p, k, d, p.inside[None, :], 0, p.chunks, KIND)
    wrong, residual = KIND.judge(gaps, sizes, tolerance, KIND)
    return tl.where(wrong > 0, float("inf"), residual).to(KIND.real)


@triton.jit
def largest(g, p):
    """The largest sum of magnitudes of what couples chunks."""
    sizes = magnitude(g[0])
    for n in tl.static_range(1, len(g)):
        sizes += magnitude(g[n])
    return tl.max(tl.where(p.inside, sizes, 0.0))


@triton.jit
def in_order(k, chunks, KIND: tl.constexpr):
    """The place of a chunk in the direction of the system, or the chunk at a place."""
    if KIND.backward:
        return chunks - 1 - k
    else:
        return k


@triton.jit
def newton(n, strength, delta, edges, p, KIND: tl.constexpr):
    """The corrected start of chunk `n`, and by how much it is corrected.

    `delta` is by how much the start of the chunk before was, the coupling counts times `strength`.
    What overflows is left out, so that a start that was right stays as it is.
    """
    count: tl.constexpr = len(delta)
    before = n + 1 if KIND.backward else n - 1
    g = load_edges(edges.coupling, p, before, count * count, p.channels, p.inside, None)
    start, moved = (), ()
    for i in tl.static_range(count):
        total = bounded(g[i * count] * strength) * delta[0]
        for j in tl.static_range(1, count):
            total += bounded(g[i * count + j] * strength) * delta[j]
        old = tl.load(edge(edges.guess, p, n, i, count, p.channels), mask=p.inside)
        end = tl.load(edge(edges.ends, p, before, i, count, p.channels), mask=p.inside)
        new = end + bounded(total)
        start = start + (new,)
        moved = moved + (tl.where(new == old, 0.0, bounded(new - old)),)
    return start, moved


@triton.jit(do_not_specialize=["batch", "time", "chunks", "chunk", "most"])
def refine(
    given,
    edges,
    corrected,
    report,
    batch,
    time,
    chunks,
    chunk,
    tolerance,
    damping,
    most,
    KIND: tl.constexpr,
):
    """Newton's method on all chunks of a block of channels, group after group.

    `most` is how many iterations count; more make the result right all the same.
    """
    p = program_of(given, batch, time, chunks, chunk, KIND)
    if KIND.overlap:
        tl.extra.cuda.gdc_wait()
    count: tl.constexpr = len(given.states)
    iterations = tl.full([], 1, tl.int32)
    if KIND.corrected:
        swept = edges
        edges = Edges(corrected.guess, corrected.ends, edges.coupling, edges.stored)
        iterations, residual = of_all(corrected.residual, edges.stored, p, KIND)
        _, sizes = KIND.unmeasured(count, p, KIND.rows, KIND)
        wrong = tl.where(residual < float("inf"), 0, 1)
        if wrong > 0:
            wrong, residual, sizes = any_wrong(edges, p, tolerance, count, False, KIND)
        if KIND.reports and KIND.backward:  # noqa: SIM102  # known when it is compiled
            if most < iterations:  # adjoints are corrected even if that counts no more
                residual = any_wrong(swept, p, tolerance, count, False, KIND)[1]
    else:
        wrong, residual, sizes = any_wrong(edges, p, tolerance, count, True, KIND)
    if wrong > 0:
        if not KIND.backward:  # what groups still to come hold may be anything
            _, sizes = KIND.unmeasured(count, p, KIND.group, KIND)
        iterations = tl.full([], 1, tl.int32)  # that of `sweep`; others are counted below
        before, worst, target = residual, tl.zeros_like(residual), corrected.target
        asked = (tolerance, damping, most)
        until = 1 if KIND.rows <= KIND.group else chunks  # one group
        for m in range(0, until, KIND.group):
            n = (until - 1) // KIND.group * KIND.group - m if KIND.backward else m
            found = refine_group(n, before, sizes, given, edges, target, p, asked, KIND)
            sweeps, seen, sizes = found
            iterations = tl.maximum(iterations, sweeps + 1)
            worst = tl.maximum(worst, seen)
        residual = worst
    if KIND.reports:
        status, residual = KIND.verdict(residual, tolerance, iterations, most)
        write_report(report, p, tl.minimum(iterations, most), residual, status, chunks)


@triton.jit
def of_all(residual, stored, p, KIND: tl.constexpr):
    """Iterations until every chunk was right, and the residual; infinite where some ran again."""
    rows: tl.constexpr = 4 * KIND.rows
    most = tl.full([rows], 1, tl.int32)
    found = tl.zeros([rows], KIND.real)
    for n in range(0, p.chunks, rows):
        k = n + tl.arange(0, rows)
        most = tl.maximum(most, load_stored(stored, p, k, k < p.chunks))
        at = residual + place_of(p, k)
        found = tl.maximum(found, tl.load(at, mask=k < p.chunks, other=0.0))
    return tl.max(most), tl.max(found)


@triton.jit
def any_wrong(edges, p, tolerance, count: tl.constexpr, stored: tl.constexpr, KIND: tl.constexpr):
    """Whether chunks do not fit together, or with `stored` lack results; residual and sizes."""
    rows: tl.constexpr = KIND.rows
    gaps, sizes = KIND.unmeasured(count, p, rows, KIND)
    d, lacking = p.channels[None, :], tl.zeros([rows, 1], tl.int32)
    for n in range(0, p.chunks, rows):
        k = n + tl.arange(0, rows)[:, None]
        mask = (k < p.chunks) & (d < p.hidden)
        gaps, sizes = measure(gaps, sizes, edges, p, k, d, mask, 0, p.chunks, KIND)
        if stored:
            lacking = tl.maximum(lacking, 1 - load_stored(edges.stored, p, k, k < p.chunks))
    wrong, residual = KIND.judge(gaps, sizes, tolerance, KIND)
    return tl.maximum(wrong, tl.max(lacking)), residual, sizes


@triton.jit
def measure(gaps, sizes, edges, p, k, d, mask, low, high, KIND: tl.constexpr):
    """The largest gaps between chunks from `low` to `high`, and sizes of the ends, where larger."""
    if KIND.backward:
        return KIND.measure(gaps, sizes, edges, p, k + 1, k, d, mask & (k + 1 < high), KIND)
    else:
        return KIND.measure(gaps, sizes, edges, p, k - 1, k, d, mask & (k > low), KIND)


@triton.jit
def refine_group(first, residual, sizes, given, edges, target, p, asked, KIND: tl.constexpr):
    """Iterate until the chunks of the group that begins with chunk `first` fit together.

    `residual` is that before, `sizes` are those that gaps count relative to: of ends of groups
    before, or of all adjoints; `asked` the tolerance, the damping, and how many iterations count.
    Returns the sweeps, the residual, and sizes for the group after.
    """
    tolerance, damping, most = asked
    count: tl.constexpr = len(given.states)
    group = group_of(given, p, first, KIND)
    last = tl.minimum(first + KIND.group, p.chunks)
    wrong, seen, after = compare(sizes, edges, p, group, 0, p.chunks, tolerance, count, KIND)
    nearly_right: tl.constexpr = KIND.corrected > 0 and KIND.rows <= KIND.group
    sweeps = tl.full([], KIND.corrected, tl.int32)
    allowed = sweeps + last - first
    if not KIND.corrected:
        wrong = tl.maximum(wrong, tl.max(1 - load_stored(edges.stored, p, group.k, group.exists)))
    elif KIND.reports:
        seen = tl.where(sweeps < most, seen, residual)
    # Addresses are computed anew for every part of a sweep: computed once, they would take
    # registers all the time, and spill.
    while (wrong > 0) & (sweeps < allowed):
        strength = 1.0 if KIND.backward else tl.where(sweeps + 1 < most, 1.0 - damping, 0.0)
        fold(edges, target, anew(first), last, strength, p, count, KIND)
        tl.debug_barrier()
        c = group_of(given, p, anew(first), KIND)
        s = load_edges(target, p, c.k, count, c.d, c.here, 0.0)
        save(edges.guess, s, p, c.k, c.d, c.here)
        ahead = KIND.load_ahead(0, c, KIND)
        # Adjoints are linear, and tangents of states that are nearly right are so too.
        g = () if KIND.backward or nearly_right else identity(s)
        s, g = KIND.run_chunk(s, g, ahead, c, KIND)
        c = group_of(given, p, anew(first), KIND)
        save(edges.coupling, g, p, c.k, c.d, c.here)
        save(edges.ends, s, p, c.k, c.d, c.here)
        tl.debug_barrier()
        wrong, now, after = compare(sizes, edges, p, c, first, last, tolerance, count, KIND)
        sweeps += 1
        if KIND.reports:
            seen = tl.where(sweeps < most, now, seen)
    return sweeps, seen, after


@triton.jit
def compare(sizes, edges, p, c, low, high, tolerance, count: tl.constexpr, KIND: tl.constexpr):
    """Whether gaps between chunks of a group are too large, the residual, and what both count by.

    States count by the sizes of ends until then, adjoints by those of all, which are known.
    """
    none, _ = KIND.unmeasured(count, p, KIND.group, KIND)
    gaps, larger = measure(none, sizes, edges, p, c.k, c.d, c.here, low, high, KIND)
    after = sizes if KIND.backward else larger
    wrong, residual = KIND.judge(gaps, after, tolerance, KIND)
    return wrong, residual, after


@triton.jit
def fold(edges, target, first, last, strength, p, count: tl.constexpr, KIND: tl.constexpr):
    """Into `target`, the starts of a group one after another; the first starts exactly."""
    delta = zeros(count, p.channels, KIND.real)
    for m in range(0, last - first):
        n = last - 1 - m if KIND.backward else first + m
        if n == (p.chunks - 1 if KIND.backward else 0):
            start = load_edges(edges.guess, p, n, count, p.channels, p.inside, None)
        else:
            start, delta = newton(n, tl.where(m > 0, strength, 0.0), delta, edges, p, KIND)
        save(target, start, p, n, p.channels, p.inside)


@triton.jit
def write_report(report, p, iterations, residual, status, chunks):
    """The row of the report that belongs to this block of channels."""
    part = report + (p.b * p.tiles + p.tile) * 4
    tl.store(part + 0, tl.cast(iterations, tl.float64))
    tl.store(part + 1, tl.cast(residual, tl.float64))
    tl.store(part + 2, tl.cast(status, tl.float64))
    tl.store(part + 3, tl.cast(chunks, tl.float64))
