"""The kernels that compute gradients: `sweep`, `correct` and `refine`, backwards in time.

A chunk starts from the adjoint after its last step and ends in the one before its first. What
couples chunks are products of transposed Jacobians. As this is linear, one correction is exact.
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
    fold,
    group_of,
    identity,
    initial_at,
    load_edges,
    load_step,
    load_stored,
    newton,
    note_forgotten,
    own_chunk,
    plus,
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
from pararnn.kernels.triton.functions import bounded, magnitude, only
from pararnn.kernels.triton.tuples import Edges


@triton.jit
def inputs_at(chunk, step):
    """Where a step's drives, the states before it and gradients of those after it are."""
    before = at_step(chunk.states, tl.cast(step, tl.int64) - 1)
    return at_step(chunk.drives, step), before, at_step(chunk.gradients, step)


@triton.jit
def load(inputs, step, number: tl.constexpr, chunk, KIND: tl.constexpr):
    """What the step reads that is `number` steps after `step`, which `inputs` are of."""
    drives, states, gradients = inputs
    mask = exists(step + number, chunk, KIND)
    before = mask
    if number == 0:  # before the first step of all there is no state
        before = only(mask, chunk.first + step > 0)
    u, h = load_step(drives, number, mask), load_step(states, number, before)
    return u, h, load_step(gradients, number, mask)


@triton.jit
def one(
    carried,
    loaded,
    results,
    step,
    number: tl.constexpr,
    chunk,
    couple: tl.constexpr,
    store: tl.constexpr,
    KIND: tl.constexpr,
):
    """A step backwards, the `number`-th of its round in time.

    `carried` are the adjoint after the step, with `couple` the products, with `store` gradients of
    coefficients in this round, and with resets those of second initial states; returned are those
    before the step. With `store`, gradients of drives are written to `results`.
    """
    s, g, few, restarts = carried
    h, u, q = cast(loaded[1], KIND.real), cast(loaded[0], KIND.real), loaded[2]
    there = exists(step, chunk, KIND)
    if KIND.starts != "none":
        start = start_of(step, chunk, KIND)
        h = restarted(h, start, step, chunk, KIND)
    elif number == 0:
        h = chosen(chunk.first + step > 0, h, chunk.before)
    adjoint = ()
    for i in tl.static_range(len(s)):
        if KIND.gradients[i] >= 0:
            adjoint = adjoint + (s[i] + q[KIND.gradients[i]].to(KIND.real),)
        else:
            adjoint = adjoint + (s[i],)
    if couple:
        before, jacobian = KIND.step_with_jacobian(h, u, chunk.coefficients, adjoint)
        moved = product(jacobian, g, len(s), KIND)
        g = chosen(there, moved, g) if KIND.wide else moved
    else:
        before, drives, terms = KIND.step(h, u, chunk.coefficients, adjoint)
        if store:
            store_step(results, number, drives, there)
            few = plus(few, chosen(there, terms, zeros_like(terms)) if KIND.wide else terms)
    if KIND.starts != "none":
        # An adjoint goes to the initial state that its sequence started from, and no further; that
        # to the first state of a row is left to `run_chunk`.
        fresh, none = start >= chunk.batch, zeros_like(before)
        if store:
            if KIND.starts == "resets":
                restarts = plus(restarts, chosen(only(there, fresh), before, none))
            else:
                for i in tl.static_range(len(s)):
                    at = chunk.grad_initial + initial_at(start, i, chunk, len(s))
                    tl.store(at, before[i], mask=only(there, fresh))
        before = chosen(fresh, none, before)
        if couple:
            g = chosen(fresh, zeros_like(g), g)
    return chosen(there, before, s) if KIND.wide else before, g, few, restarts


@triton.jit
def load_ahead(step, chunk, KIND: tl.constexpr):
    """What the steps of the first round read."""
    ahead, inputs = (), inputs_at(chunk, step)
    if KIND.distance > 0:
        prefetch_steps(step - KIND.distance, chunk, KIND.distance, KIND)
    unroll: tl.constexpr = KIND.unroll
    for n in tl.static_range(unroll):
        ahead = ahead + (load(inputs, step, n, chunk, KIND),)
    return ahead


@triton.jit
def run(
    carried,
    ahead,
    low,
    high,
    chunk,
    couple: tl.constexpr,
    store: tl.constexpr,
    KIND: tl.constexpr,
):
    """Steps `high` - 1 down to `low` of a chunk, in rounds of `unroll`; see `one`.

    Gradients of coefficients are added up in float64 after every round. `ahead` is what the first
    round reads: every step loads for one in the next round while it computes.
    """
    s, g, sums, restarts = carried
    unroll: tl.constexpr = KIND.unroll
    if not KIND.wide and unroll > 1:
        for n in range(0, (high - low) % unroll):
            i = high - 1 - n
            results, few = at_step(chunk.results, i), zeros(len(sums), s[0], KIND.real)
            loaded = load(inputs_at(chunk, i), i, 0, chunk, KIND)
            now = (s, g, few, restarts)
            s, g, few, restarts = one(now, loaded, results, i, 0, chunk, couple, store, KIND)
            sums = plus(sums, cast(few, tl.float64))
    rounds = (high - low) // unroll
    for n in range(0, rounds):
        i = low + (rounds - 1 - n) * unroll
        later = tl.maximum(i - unroll, 0)
        if KIND.distance > 0:
            prefetch_steps(later - KIND.distance, chunk, unroll, KIND)
        results, few = at_step(chunk.results, i), zeros(len(sums), s[0], KIND.real)
        inputs, now = inputs_at(chunk, later), (s, g, few, restarts)
        for m in tl.static_range(unroll - 1, -1, -1):
            loaded, coming = ahead[m], load(inputs, later, m, chunk, KIND)
            ahead = ahead[:m] + (coming,) + ahead[m + 1 :]
            now = one(now, loaded, results, i + m, m, chunk, couple, store, KIND)
        s, g, few, restarts = now
        sums = plus(sums, cast(few, tl.float64))
    return s, g, sums, restarts, ahead


@triton.jit
def run_chunk(s, ahead, high, chunk, sums_at, p, KIND: tl.constexpr):
    """The chunk with all its results, from step `high` - 1 on; returns the adjoint before it."""
    count: tl.constexpr = len(s)
    sums = zeros(len(chunk.coefficients), s[0], tl.float64)
    restarts = zeros(count if KIND.starts == "resets" else 0, s[0], KIND.real)
    carried = (s, (), sums, restarts)
    s, _, sums, restarts, _ = run(carried, ahead, 0, high, chunk, False, True, KIND)
    save(sums_at, sums, p, chunk.k, chunk.d, chunk.here)
    row = chunk.b + 0 * chunk.k if KIND.wide else chunk.b  # of the shape of a group
    for i in tl.static_range(count):
        at = chunk.grad_initial + (row * count + i) * chunk.hidden + chunk.d
        tl.store(at, s[i], mask=only(chunk.here, chunk.first == 0))
    save(chunk.grad_initial, restarts, p, chunk.k + chunk.batch, chunk.d, chunk.here)
    return s


@triton.jit(do_not_specialize=["batch", "time", "chunks", "chunk", "warm"])
def sweep(given, grads, edges, batch, time, chunks, chunk, warm, limit, KIND: tl.constexpr):
    """First guesses, and the results where nothing is left of where the warm-up started."""
    p = program_of(given, batch, time, chunks, chunk, KIND)
    if KIND.overlap:  # kernels overlap until one needs what another wrote
        tl.extra.cuda.gdc_launch_dependents()
    own = own_chunk(given, grads, p, KIND)
    s, unroll = zeros(len(given.states), p.channels, KIND.real), KIND.unroll
    lead = tl.minimum(warm, time - own.first - own.length) if KIND.many else 0
    begin = own.length // unroll * unroll + lead // unroll * unroll - unroll
    ahead = load_ahead(tl.maximum(begin, -own.first), own, KIND)
    if KIND.many:
        # The warm-up, and if it did not forget its start the chunk without results; see `forward`.
        again, g = 0 * lead, identity(s)
        for phase in range(0, 2):
            g = identity(s)
            low = tl.where(phase == 0, own.length, own.length - again)
            high = tl.where(phase == 0, own.length + lead, own.length)
            s, g, _, _, ahead = run((s, g, (), ()), ahead, low, high, own, True, False, KIND)
            if phase == 0:
                save(edges.guess, s, p, own.k, own.d, own.here)
                exact = own.first + own.length + lead == time
                again = note_forgotten(g, exact, limit, edges.stored, p, own)
        if again == 0:
            s = run_chunk(s, ahead, own.length, own, grads.sums, p, KIND)
            g = zeros_like(g)
        save(edges.ends, s, p, own.k, own.d, own.here)
        save(edges.coupling, g, p, own.k, own.d, own.here)
    else:
        run_chunk(s, ahead, own.length, own, grads.sums, p, KIND)


@triton.jit
def measure(gaps, sizes, edges, p, k, d, mask, count: tl.constexpr):
    """The largest gaps at starts of chunks, and sizes of the ends before, of all components."""
    for i in tl.static_range(count):
        e = tl.load(edge(edges.ends, p, k + 1, i, count, d), mask=mask, other=0.0)
        s = tl.load(edge(edges.guess, p, k, i, count, d), mask=mask, other=0.0)
        gaps = tl.maximum(gaps, tl.where(e == s, 0.0, magnitude(e - s)))
        sizes = tl.maximum(sizes, tl.abs(bounded(e)))
    return gaps, sizes


@triton.jit
def excess(gaps, allowed):
    """A residual for a report, in tolerances; 0 where it is within them."""
    return tl.max(tl.where(gaps <= allowed, 0.0, gaps / allowed))


@triton.jit
def any_wrong(edges, p, tolerance, count: tl.constexpr, stored: tl.constexpr, KIND: tl.constexpr):
    """Whether chunks do not fit together, or with `stored` lack results.

    Returns also the gaps that are allowed, and the residual. Adjoints have no natural scale: each
    channel's is its largest one at the end of any chunk.
    """
    rows: tl.constexpr = KIND.rows
    block: tl.constexpr = KIND.block
    gaps = tl.zeros([rows, block], KIND.real)
    sizes, d = gaps, p.channels[None, :]
    lacking = tl.zeros([rows, 1], tl.int32)
    for g in range(0, p.chunks, rows):
        k = g + tl.arange(0, rows)[:, None]
        mask = (k < p.chunks) & (d < p.hidden) & (k + 1 < p.chunks)
        gaps, sizes = measure(gaps, sizes, edges, p, k, d, mask, count)
        if stored:
            lacking = tl.maximum(lacking, 1 - load_stored(edges.stored, p, k, k < p.chunks))
    allowed = tolerance * tl.max(sizes, axis=0)[None, :]
    wrong = tl.max(tl.where(gaps <= allowed, 0, 1))
    residual = excess(gaps, allowed) if KIND.reports else 0.0
    return tl.maximum(wrong, tl.max(lacking)), allowed, residual


@triton.jit(do_not_specialize=["batch", "time", "chunks", "chunk"])
def correct(
    given, grads, edges, corrected, batch, time, chunks, chunk, tolerance, KIND: tl.constexpr
):
    """The right starts through the products of all chunks after, where chunks do not fit."""
    p = program_of(given, batch, time, chunks, chunk, KIND)
    if KIND.overlap:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    own = own_chunk(given, grads, p, KIND)
    count: tl.constexpr = len(given.states)
    guess = load_edges(edges.guess, p, own.k, count, own.d, own.here, None)
    end = load_edges(edges.ends, p, own.k, count, own.d, own.here, None)
    start, delta = guess, zeros(count, p.channels, KIND.real)
    every = tl.arange(0, KIND.group)
    after = (every < chunks) & (every >= own.k)
    wrong = tl.max(1 - load_stored(edges.stored, p, every, after))
    high = tl.where(wrong > 0, chunks - 2, own.k)  # else only the chunk after matters
    high = tl.minimum(high, chunks - 2)
    for m in range(0, high - own.k + 1):
        start, delta = newton(high - m, 1.0, delta, edges, p, KIND)
    far = tl.zeros(p.channels.shape, tl.int32)
    for i in tl.static_range(count):
        size = tl.maximum(tl.abs(bounded(start[i])), tl.abs(bounded(end[i])))
        near = tl.abs(delta[i]) <= tolerance * size
        far = tl.maximum(far, tl.where(near, 0, 1))
    kept = tl.load(edges.stored + (p.b * chunks + own.k) * p.tiles + p.tile)
    moved = tl.max(tl.where(p.inside, far, 0)) > 0
    if moved | (kept == 0):
        begin = own.length // KIND.unroll * KIND.unroll - KIND.unroll
        ahead = load_ahead(tl.maximum(begin, -own.first), own, KIND)
        end = run_chunk(start, ahead, own.length, own, grads.sums, p, KIND)
        guess = start
    save(corrected.guess, guess, p, own.k, own.d, own.here)
    save(corrected.ends, end, p, own.k, own.d, own.here)


@triton.jit(do_not_specialize=["batch", "time", "chunks", "chunk", "most"])
def refine(
    given,
    grads,
    edges,
    corrected,
    report,
    batch,
    time,
    chunks,
    chunk,
    tolerance,
    most,
    KIND: tl.constexpr,
):
    """All chunks of a block of channels, group after group; `most`: iterations that count."""
    p = program_of(given, batch, time, chunks, chunk, KIND)
    if KIND.overlap:
        tl.extra.cuda.gdc_wait()
    count: tl.constexpr = len(given.states)
    iterations = tl.full([], 1, tl.int32)
    wrong, allowed, unsettled = any_wrong(edges, p, tolerance, count, True, KIND)
    if KIND.corrected:
        edges = Edges(corrected.guess, corrected.ends, edges.coupling, edges.stored)
        if wrong > 0:
            wrong, allowed, residual = any_wrong(edges, p, tolerance, count, False, KIND)
            if KIND.reports:
                iterations += 1
                unsettled = tl.where(most > 1, residual, unsettled)
    needed = iterations
    if wrong > 0:
        groups = tl.cdiv(chunks, KIND.group)
        if KIND.reports:
            unsettled = tl.where(iterations <= most, unsettled * 0.0, unsettled)
        for n in range(0, groups):
            g, counted = (groups - 1 - n) * KIND.group, (iterations, needed, most)
            target = corrected.target
            seen, needed = refine_group(g, counted, given, grads, edges, target, p, allowed, KIND)
            if KIND.reports:
                worse = tl.maximum(unsettled, seen)
                unsettled = tl.where(iterations <= most, worse, unsettled)
    if KIND.reports:
        status = tl.where(unsettled > 0.0, 2, 1)
        write_report(report, p, tl.minimum(needed, most), unsettled * tolerance, status, chunks)


@triton.jit
def refine_group(g, counted, given, grads, edges, target, p, allowed, KIND: tl.constexpr):
    """Iterate until the chunks of a group fit together.

    `counted` are iterations before `refine`, those that the groups after needed, and how many
    count. Returns the residual, and how many are needed with this group.
    """
    iterations, needed, most = counted
    count: tl.constexpr = len(given.states)
    c = group_of(given, grads, p, g, KIND)
    last = tl.minimum(g + KIND.group, p.chunks)
    none = tl.zeros(c.here.shape, KIND.real)
    inner = c.here & (c.k + 1 < p.chunks)
    gaps, _ = measure(none, none, edges, p, c.k, c.d, inner, count)
    lacking = tl.max(1 - load_stored(edges.stored, p, c.k, c.exists))
    unwritten = lacking * (0 if KIND.corrected else 1)
    now = tl.maximum(tl.max(tl.where(gaps <= allowed, 0, 1)), unwritten)
    seen = excess(gaps, allowed) if KIND.reports else 0.0
    sweeps = tl.full([], 0, tl.int32)
    while (now > 0) & (sweeps < last - g):
        fold(edges, target, g, last, 1.0, p, count, KIND)
        tl.debug_barrier()
        s = load_edges(target, p, c.k, count, c.d, c.here, 0.0)
        save(edges.guess, s, p, c.k, c.d, c.here)
        ahead = load_ahead(p.chunk - KIND.unroll, c, KIND)
        s = run_chunk(s, ahead, p.chunk, c, grads.sums, p, KIND)
        save(edges.ends, s, p, c.k, c.d, c.here)
        tl.debug_barrier()
        gaps, _ = measure(none, none, edges, p, c.k, c.d, inner & (c.k + 1 < last), count)
        now = tl.max(tl.where(gaps <= allowed, 0, 1))
        sweeps += 1
        if KIND.reports:
            counts = iterations + sweeps <= most
            seen = tl.where(counts, excess(gaps, allowed), seen)
            needed = tl.maximum(needed, iterations + sweeps)
    return seen, needed
