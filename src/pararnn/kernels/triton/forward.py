"""The kernels that compute states: `sweep`, `correct` and `refine` (see the package).

Residuals are those of `shooting.state_residual`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pararnn.kernels.triton.common import (
    at_step,
    cast,
    chosen,
    edge,
    exists,
    first_state,
    fold,
    group_of,
    identity,
    load_edges,
    load_step,
    load_stored,
    newton,
    note_forgotten,
    own_chunk,
    prefetch_steps,
    product,
    program_of,
    restarted,
    save,
    start_of,
    store_step,
    write_report,
    zeros,
    zeros_like,
)
from pararnn.kernels.triton.functions import magnitude
from pararnn.kernels.triton.tuples import Edges


@triton.jit
def one(s, g, u, step, chunk, couple: tl.constexpr, KIND: tl.constexpr):
    """The state after a step, and with `couple` its tangents."""
    if KIND.starts != "none":
        start = start_of(step, chunk, KIND)
        s = restarted(s, start, step, chunk, KIND)
        if couple:
            g = chosen(start >= 0, zeros_like(g), g)
    there, u = exists(step, chunk, KIND), cast(u, KIND.real)
    if couple:
        new, jacobian = KIND.step_with_jacobian(s, u, chunk.coefficients)
        moved = product(jacobian, g, len(s), KIND)
        g = chosen(there, moved, g) if KIND.wide else moved
    else:
        new = KIND.step(s, u, chunk.coefficients)
    s = chosen(there, new, s) if KIND.wide else new
    return s, g


@triton.jit
def load_ahead(step, chunk, KIND: tl.constexpr):
    """The drives of the steps of the first round."""
    ahead, drives = (), at_step(chunk.drives, step)
    if KIND.distance > 0:
        prefetch_steps(step + KIND.unroll, chunk, KIND.distance, KIND)
    unroll: tl.constexpr = KIND.unroll
    for n in tl.static_range(unroll):
        ahead = ahead + (load_step(drives, n, exists(step + n, chunk, KIND)),)
    return ahead


@triton.jit
def run(
    s, g, ahead, low, high, chunk, couple: tl.constexpr, store: tl.constexpr, KIND: tl.constexpr
):
    """Steps `low` to `high` of a chunk, in rounds of `unroll`.

    With `couple`, tangents `g` move along; with `store`, states are written. `ahead` are the drives
    of the first round: every step loads those of one in the next round while it computes.
    """
    unroll: tl.constexpr = KIND.unroll
    whole = high if KIND.wide else high - (high - low) % unroll
    for i in range(low, whole, unroll):
        later = tl.minimum(i + unroll, chunk.length - unroll)
        if KIND.distance > 0:
            prefetch_steps(later + KIND.distance, chunk, unroll, KIND)
        drives, states = at_step(chunk.drives, later), at_step(chunk.states, i)
        for n in tl.static_range(unroll):
            u = ahead[n]
            loaded = load_step(drives, n, exists(later + n, chunk, KIND))
            ahead = ahead[:n] + (loaded,) + ahead[n + 1 :]
            s, g = one(s, g, u, i + n, chunk, couple, KIND)
            if store:
                store_step(states, n, s, exists(i + n, chunk, KIND))
    if not KIND.wide and unroll > 1:
        for i in range(whole, high):
            u = load_step(at_step(chunk.drives, i), 0, chunk.here)
            s, g = one(s, g, u, i, chunk, couple, KIND)
            if store:
                store_step(at_step(chunk.states, i), 0, s, chunk.here)
    return s, g, ahead


@triton.jit(do_not_specialize=["batch", "time", "chunks", "chunk", "warm"])
def sweep(given, edges, report, batch, time, chunks, chunk, warm, limit, KIND: tl.constexpr):
    """First guesses, and the results where nothing is left of where the warm-up started."""
    p = program_of(given, batch, time, chunks, chunk, KIND)
    if KIND.overlap:  # kernels overlap until one needs what another wrote
        tl.extra.cuda.gdc_launch_dependents()
    own = own_chunk(given, (), p, KIND)
    s = first_state(given, p, KIND)
    lead = tl.minimum(warm, own.first) if KIND.many else 0
    ahead = load_ahead(tl.minimum(-lead, own.length - KIND.unroll), own, KIND)
    if KIND.many:
        # The warm-up, and if it did not forget its start the chunk without results. The bounds
        # are computed from the pass: Triton 3.6 loses a bound that is assigned in a branch.
        again, g = 0 * lead, identity(s)
        for phase in range(0, 2):
            g = identity(s)
            low = tl.where(phase == 0, -lead, 0)
            high = tl.where(phase == 0, 0, again)
            s, g, ahead = run(s, g, ahead, low, high, own, True, False, KIND)
            if phase == 0:
                save(edges.guess, s, p, own.k, own.d, own.here)
                again = note_forgotten(g, lead == own.first, limit, edges.stored, p, own)
        if again == 0:
            s, g, ahead = run(s, g, ahead, 0, own.length, own, False, True, KIND)
            g = zeros_like(g)
        save(edges.ends, s, p, own.k, own.d, own.here)
        save(edges.coupling, g, p, own.k, own.d, own.here)
    else:
        run(s, (), ahead, 0, own.length, own, False, True, KIND)
        write_report(report, p, 1, 0.0, 0, 1)


@triton.jit
def scale(sizes, KIND: tl.constexpr):
    """What residuals below 1 of a channel count relative to."""
    return tl.minimum(tl.maximum(KIND.small * sizes, KIND.tiny), 1.0)


@triton.jit
def larger_of_both(gap, size, other_gap, other_size):
    """The larger gap, and the larger size."""
    return tl.maximum(gap, other_gap), tl.maximum(size, other_size)


@triton.jit
def measure(gaps, sizes, edges, p, k, d, mask):
    """For every component, the largest gaps at starts of chunks, and sizes of the ends before."""
    more, larger = (), ()
    for i in tl.static_range(len(gaps)):
        e = tl.load(edge(edges.ends, p, k - 1, i, len(gaps), d), mask=mask, other=0.0)
        s = tl.load(edge(edges.guess, p, k, i, len(gaps), d), mask=mask, other=0.0)
        apart = magnitude(magnitude(e - s) / tl.maximum(tl.abs(e), 1.0))
        both = tl.where(e == s, 0.0, apart), tl.where(e == e, tl.abs(e), 0.0)
        gap, size = tl.reduce(both, 0, larger_of_both)  # at once: programs wait for all warps less
        more = more + (tl.maximum(gaps[i], gap),)
        larger = larger + (tl.maximum(sizes[i], size),)
    return more, larger


@triton.jit
def residual_of(gaps, sizes, KIND: tl.constexpr):
    """The largest gap of all channels, relative to their sizes."""
    most = gaps[0] / scale(sizes[0], KIND)
    for i in tl.static_range(1, len(gaps)):
        most = tl.maximum(most, gaps[i] / scale(sizes[i], KIND))
    return tl.max(most)


@triton.jit
def any_wrong(edges, p, tolerance, count: tl.constexpr, stored: tl.constexpr, KIND: tl.constexpr):
    """Whether chunks do not fit together, or with `stored` lack results; and the residual."""
    gaps = zeros(count, p.channels, KIND.real)
    sizes, d = gaps, p.channels[None, :]
    rows: tl.constexpr = KIND.rows
    lacking = tl.zeros([rows, 1], tl.int32)
    for g in range(0, p.chunks, rows):
        k = g + tl.arange(0, rows)[:, None]
        mask = (k < p.chunks) & (d < p.hidden) & (k > 0)
        gaps, sizes = measure(gaps, sizes, edges, p, k, d, mask)
        if stored:
            lacking = tl.maximum(lacking, 1 - load_stored(edges.stored, p, k, k < p.chunks))
    residual = residual_of(gaps, sizes, KIND)
    wrong = tl.where(residual <= tolerance, 0, 1)
    return tl.maximum(wrong, tl.max(lacking)), residual


@triton.jit(do_not_specialize=["batch", "time", "chunks", "chunk"])
def correct(
    given, edges, corrected, batch, time, chunks, chunk, tolerance, damping, KIND: tl.constexpr
):
    """One iteration of Newton's method, where chunks do not fit together."""
    p = program_of(given, batch, time, chunks, chunk, KIND)
    if KIND.overlap:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    own = own_chunk(given, (), p, KIND)
    count: tl.constexpr = len(given.states)
    guess = load_edges(edges.guess, p, own.k, count, own.d, own.here, None)
    end = load_edges(edges.ends, p, own.k, count, own.d, own.here, None)
    start, delta = guess, zeros(count, p.channels, KIND.real)
    every = tl.arange(0, KIND.group)
    before = (every < chunks) & (every <= own.k)
    wrong = tl.max(1 - load_stored(edges.stored, p, every, before))
    low = tl.where(wrong > 0, 1, own.k)  # else only the chunk before matters
    for n in range(tl.maximum(low, 1), own.k + 1):
        start, delta = newton(n, 1.0 - damping, delta, edges, p, KIND)
    far = tl.zeros(p.channels.shape, tl.float32)
    ended = (every[:, None] + 1 < chunks) & p.inside[None, :]
    ends = load_edges(edges.ends, p, every[:, None], count, p.channels[None, :], ended, 0.0)
    for i in tl.static_range(count):
        sizes = tl.max(tl.where(ends[i] == ends[i], tl.abs(ends[i]), 0.0), axis=0)
        size = tl.maximum(tl.abs(start[i]), scale(sizes, KIND))
        apart = tl.where(delta[i] == 0.0, 0.0, magnitude(delta[i] / size))
        far = tl.maximum(far, apart.to(tl.float32))
    kept = tl.load(edges.stored + (p.b * chunks + own.k) * p.tiles + p.tile)
    moved = tl.max(tl.where(p.inside, far, 0.0)) > tolerance
    if moved | (kept == 0):
        ahead = load_ahead(tl.minimum(0, own.length - KIND.unroll), own, KIND)
        end, _, _ = run(start, (), ahead, 0, own.length, own, False, True, KIND)
        guess = start
    save(corrected.guess, guess, p, own.k, own.d, own.here)
    save(corrected.ends, end, p, own.k, own.d, own.here)


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
    """Newton's method on all chunks of a block of channels, group after group."""
    p = program_of(given, batch, time, chunks, chunk, KIND)
    if KIND.overlap:
        tl.extra.cuda.gdc_wait()
    count: tl.constexpr = len(given.states)
    iterations = tl.full([], 1, tl.int32)
    status = tl.full([], 1, tl.int32)
    wrong, residual = any_wrong(edges, p, tolerance, count, True, KIND)
    if KIND.corrected:
        edges = Edges(corrected.guess, corrected.ends, edges.coupling, edges.stored)
        if wrong > 0:
            iterations += 1
            wrong, residual = any_wrong(edges, p, tolerance, count, False, KIND)
    if wrong > 0:
        residual = tl.full([], 0.0, KIND.real)
        earlier = zeros(count, p.channels, KIND.real)  # sizes of ends before the group
        for g in range(0, chunks, KIND.group):
            found = (earlier, iterations, status)
            target, asked = corrected.target, (tolerance, damping, most)
            seen, found = refine_group(g, found, given, edges, target, p, asked, KIND)
            earlier, iterations, status = found
            residual = tl.maximum(residual, seen)
    write_report(report, p, iterations, residual, status, chunks)


@triton.jit
def refine_group(g, found, given, edges, target, p, asked, KIND: tl.constexpr):
    """Iterate until the chunks of a group fit together.

    `found` are sizes of ends before the group, iterations and status so far; `asked` the tolerance,
    the damping, and how many iterations count. Returns the residual, and what is `found` then.
    """
    earlier, iterations, status = found
    tolerance, damping, most = asked
    count: tl.constexpr = len(given.states)
    c = group_of(given, (), p, g, KIND)
    last = tl.minimum(g + KIND.group, p.chunks)
    none = zeros(count, p.channels, KIND.real)
    gaps, sizes = measure(none, earlier, edges, p, c.k, c.d, c.here & (c.k > 0))
    now = residual_of(gaps, sizes, KIND)
    lacking = tl.max(1 - load_stored(edges.stored, p, c.k, c.exists))
    unwritten = lacking * (0 if KIND.corrected else 1)
    seen = now
    sweeps = tl.full([], 1 if KIND.corrected else 0, tl.int32)
    allowed = sweeps + last - g
    while ((now > tolerance) | (unwritten > 0)) & (sweeps < allowed):
        coupling = tl.where(sweeps + 1 < most, 1.0 - damping, 0.0)
        fold(edges, target, g, last, coupling, p, count, KIND)
        tl.debug_barrier()
        s = load_edges(target, p, c.k, count, c.d, c.here, 0.0)
        save(edges.guess, s, p, c.k, c.d, c.here)
        ahead = load_ahead(tl.full([], 0, tl.int32), c, KIND)
        if KIND.corrected:  # nearly right: the tangents are too
            s, _, _ = run(s, (), ahead, 0, p.chunk, c, False, True, KIND)
        else:
            s, tangents, _ = run(s, identity(s), ahead, 0, p.chunk, c, True, True, KIND)
            save(edges.coupling, tangents, p, c.k, c.d, c.here)
        save(edges.ends, s, p, c.k, c.d, c.here)
        tl.debug_barrier()
        gaps, sizes = measure(none, earlier, edges, p, c.k, c.d, c.here & (c.k > g))
        now = residual_of(gaps, sizes, KIND)
        unwritten = unwritten * 0
        sweeps += 1
        iterations = tl.maximum(iterations, tl.minimum(sweeps + 1, most))
        seen = tl.where(sweeps < most, now, seen)
        ended = (sweeps < most) | (seen <= tolerance)
        status = tl.where(ended, status, 2)
    return seen, (sizes, iterations, status)
