"""What the written kernels of both directions share.

A program of `sweep` and `correct` has one chunk of time and a block of channels; its values have
the shape [BLOCK]. A program of `refine` has a group of chunks: then numbers and first times of
chunks are columns, and values have the shape [GROUP, BLOCK]. States, drives and coefficients are
tuples of tensors, and so are matrices of components, row by row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pararnn.kernels.triton.functions import bounded, magnitude, only, prefetch
from pararnn.kernels.triton.tuples import Chunk, Program, Stream


@triton.jit
def program_of(given, batch, time, chunks, chunk, KIND: tl.constexpr):
    """What this program has. Coefficients are parameters: no kernel before writes them."""
    tiles = tl.cdiv(KIND.hidden, KIND.block)
    tile = tl.program_id(0) % tiles
    b = tl.cast(tl.program_id(0) // tiles % batch, tl.int64)
    channels = tile * KIND.block + tl.arange(0, KIND.block)
    inside = channels < KIND.hidden
    coefficients = ()
    for n in tl.static_range(len(given.coefficients)):
        c = tl.load(given.coefficients[n] + channels, mask=inside).to(KIND.real)
        coefficients = coefficients + (c[None, :] if KIND.wide else c,)
    hidden = KIND.hidden
    return Program(
        b, tile, tiles, channels, inside, coefficients, batch, time, hidden, chunks, chunk
    )


@triton.jit
def own_chunk(given, grads, p, KIND: tl.constexpr):
    """The chunk of a program that has one."""
    k = tl.program_id(0) // (p.tiles * p.batch)
    first = k * p.chunk
    length = tl.minimum(p.chunk, p.time - first)
    return chunk_of(given, grads, p, k, first, length, True, p.inside, p.channels, KIND)


@triton.jit
def group_of(given, grads, p, g, KIND: tl.constexpr):
    """The group of chunks that begins with chunk `g`."""
    k = g + tl.arange(0, KIND.group)[:, None]
    exists = k < tl.minimum(g + KIND.group, p.chunks)
    here, d = exists & p.inside[None, :], p.channels[None, :]
    return chunk_of(given, grads, p, k, k * p.chunk, p.chunk, exists, here, d, KIND)


@triton.jit
def chunk_of(given, grads, p, k, first, length, exists, here, d, KIND: tl.constexpr):
    """A chunk, or a group, with where it is in all tensors over time."""
    origin, starts, results, before, grad_initial = tl.cast(first, tl.int64), (), (), (), ()
    for n in tl.static_range(len(given.starts)):
        starts = starts + (given.starts[n] + p.b * p.time + origin,)
    if KIND.backward:
        results, grad_initial = in_heads(grads.drives, p, origin, d, KIND), grads.initial
        if KIND.starts == "none":
            before = first_state(given, p, KIND)
    inputs = streams_of(given, grads, p, origin, d, KIND)
    lines = streams_of(given, grads, p, origin, p.tile * KIND.block, KIND)
    return Chunk(
        p.b,
        k,
        first,
        length,
        exists,
        here,
        d,
        p.time,
        p.hidden,
        p.chunks,
        p.batch,
        inputs[0],
        inputs[1],
        inputs[2],
        lines,
        p.coefficients,
        given.initial,
        starts,
        results,
        grad_initial,
        before,
    )


@triton.jit
def streams_of(given, grads, p, origin, d, KIND: tl.constexpr):
    """Streams of drives, states, and gradients of states."""
    states, gradients = (), ()
    for i in tl.static_range(len(given.states)):
        at = given.states[i] + (p.b * p.time + origin) * p.hidden + d
        states = states + (Stream(at, p.hidden, p.hidden - d),)
    if KIND.backward:
        for n in tl.static_range(len(grads.states)):
            of = grads.states[n]
            at = of.at + p.b * of.batch + origin * of.time + d
            gradients = gradients + (Stream(at, of.time, p.hidden - d),)
    return in_heads(given.drives, p, origin, d, KIND), states, gradients


@triton.jit
def in_heads(tensors, p, origin, d, KIND: tl.constexpr):
    """Streams of tensors whose heads may lie apart."""
    found = ()
    for m in tl.static_range(len(tensors)):
        of = tensors[m]
        at, rest = of.at + p.b * of.batch + origin * of.time, of.size - d % of.size
        if tensors[m].size < KIND.hidden:
            at = at + tl.cast(d // of.size, tl.int64) * of.head
            found = found + (Stream(at + d % of.size, of.time, rest),)
        else:
            found = found + (Stream(at + d, of.time, rest),)
    return found


@triton.jit
def first_state(given, p, KIND: tl.constexpr):
    """The state before time 0 of this row."""
    row, found, count = p.b, (), len(given.states)
    if KIND.starts != "none":
        row = tl.cast(tl.load(given.starts[0] + p.b * p.time), tl.int64)
    for i in tl.static_range(len(given.states)):
        at = given.initial + (row * count + i) * p.hidden + p.channels
        s = tl.load(at, mask=p.inside).to(KIND.real)
        found = found + (s[None, :] if KIND.wide else s,)
    return found


# Tensors over time


@triton.jit
def prefetch_steps(step, chunk, STEPS: tl.constexpr, KIND: tl.constexpr):
    """Bring the inputs of the steps from `step` on into the L2 cache, where they exist."""
    origin, lines = tl.cast(chunk.first, tl.int64), chunk.lines[0]
    if KIND.backward:
        lines = lines + chunk.lines[1] + chunk.lines[2]
    for n in tl.static_range(len(lines)):
        at, stride, rest = lines[n]
        last = chunk.time - 1 - origin
        prefetch(at, stride, step, -origin, last, rest, STEPS, KIND.block)


@triton.jit
def at_step(streams, step):
    """Where a step is."""
    found, offset = (), tl.cast(step, tl.int64)
    for m in tl.static_range(len(streams)):
        at, stride, rest = streams[m]  # Triton 3.6 loses names of members in sums of tuples
        found = found + (Stream(at + offset * stride, stride, rest),)
    return found


@triton.jit
def load_step(streams, number: tl.constexpr, mask):
    """What is `number` steps later."""
    found = ()
    for m in tl.static_range(len(streams)):
        at, stride, _ = streams[m]
        found = found + (tl.load(at + number * stride, mask=mask),)
    return found


@triton.jit
def store_step(streams, number: tl.constexpr, values, mask):
    """Write what is `number` steps later."""
    for m in tl.static_range(len(streams)):
        at, stride, _ = streams[m]
        at += number * stride
        tl.store(at, values[m].to(at.dtype.scalar.element_ty), mask=mask)


@triton.jit
def exists(step, chunk, KIND: tl.constexpr):
    """Which entries of the values there are at a step of the chunk."""
    if KIND.wide:
        return chunk.here & (chunk.first + step < chunk.time)
    else:
        return chunk.here


@triton.jit
def start_of(step, chunk, KIND: tl.constexpr):
    """The row of the initial states that a sequence starts from at a step, -1 if none does."""
    at = chunk.starts[0] + step
    if KIND.wide:
        start = tl.load(at, mask=chunk.exists & (chunk.first + step < chunk.time), other=-1)
    else:
        start = tl.load(at)
    return tl.cast(start, tl.int64)


@triton.jit
def initial_at(start, i, chunk, count: tl.constexpr):
    """Where a component of that row is."""
    return tl.maximum(start, 0) * count * chunk.hidden + chunk.d + i * chunk.hidden


@triton.jit
def restarted(s, start, step, chunk, KIND: tl.constexpr):
    """States, replaced by initial ones where a sequence starts."""
    found, fresh = (), start >= 0
    for i in tl.static_range(len(s)):
        at = chunk.initial + initial_at(start, i, chunk, len(s))
        loaded = tl.load(at, mask=only(exists(step, chunk, KIND), fresh)).to(KIND.real)
        found = found + (tl.where(fresh, loaded, s[i]),)
    return found


# Tuples of tensors


@triton.jit
def cast(values, kind: tl.constexpr):
    """Tensors in another type."""
    found = ()
    for m in tl.static_range(len(values)):
        found = found + (values[m].to(kind),)
    return found


@triton.jit
def chosen(condition, yes, no):
    """`tl.where` for each."""
    found = ()
    for m in tl.static_range(len(yes)):
        found = found + (tl.where(condition, yes[m], no[m]),)
    return found


@triton.jit
def plus(a, b):
    """Sums."""
    found = ()
    for m in tl.static_range(len(a)):
        found = found + (a[m] + b[m],)
    return found


@triton.jit
def zeros(count: tl.constexpr, like, kind: tl.constexpr):
    """So many tensors of zeros, of the shape of another one."""
    found = ()
    for _ in tl.static_range(count):
        found = found + (tl.zeros(like.shape, kind),)
    return found


@triton.jit
def zeros_like(values):
    """Zeros for each."""
    found = ()
    for m in tl.static_range(len(values)):
        found = found + (tl.zeros_like(values[m]),)
    return found


@triton.jit
def identity(s):
    """What couples the ends of no step at all."""
    found = ()
    for i in tl.static_range(len(s)):
        for j in tl.static_range(len(s)):
            found = found + (tl.full(s[0].shape, 1.0 if i == j else 0.0, s[0].dtype),)
    return found


@triton.jit
def product(jacobian, g, count: tl.constexpr, KIND: tl.constexpr):
    """The Jacobian of a step, as `KIND.entries` has it, times `g`."""
    found = ()
    for i in tl.static_range(count):
        for j in tl.static_range(count):
            total = None
            for m in tl.static_range(count):
                if KIND.entries[i * count + m] >= 0:
                    term = jacobian[KIND.entries[i * count + m]] * g[m * count + j]
                    total = term if total is None else total + term
            found = found + (tl.zeros_like(g[0]) if total is None else total,)
    return found


# What is known of every chunk


@triton.jit
def edge(of, p, k, part: tl.constexpr, parts: tl.constexpr, d):
    """Where a part of what belongs to a chunk is."""
    return of + ((p.b * p.chunks + k) * parts + part) * p.hidden + d


@triton.jit
def load_edges(of, p, k, count: tl.constexpr, d, mask, other: tl.constexpr):
    """What belongs to a chunk."""
    found = ()
    for i in tl.static_range(count):
        found = found + (tl.load(edge(of, p, k, i, count, d), mask=mask, other=other),)
    return found


@triton.jit
def save(of, values, p, k, d, mask):
    """Write what belongs to a chunk."""
    for i in tl.static_range(len(values)):
        tl.store(edge(of, p, k, i, len(values), d), values[i], mask=mask)


@triton.jit
def load_stored(stored, p, k, mask):
    """Whether results of chunks were written; those that are not there count as written."""
    return tl.load(stored + (p.b * p.chunks + k) * p.tiles + p.tile, mask=mask, other=1)


@triton.jit
def note_forgotten(g, exact, limit, stored, p, own):
    """Note whether nothing is left of where the warm-up started; else how many steps to run again.

    The warm-up is also good where it started from the right state (`exact`).
    """
    sizes = magnitude(g[0])
    for n in tl.static_range(1, len(g)):
        sizes += magnitude(g[n])
    forgotten = exact | (tl.max(tl.where(p.inside, sizes, 0.0)) <= limit)
    at = stored + (p.b * p.chunks + own.k) * p.tiles + p.tile
    tl.store(at, tl.cast(forgotten, tl.int32))
    return tl.where(forgotten, 0, own.length)


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


@triton.jit
def fold(edges, target, g, last, coupling, p, count: tl.constexpr, KIND: tl.constexpr):
    """Into `target`, the starts of a group one after another; the first starts exactly."""
    delta = zeros(count, p.channels, KIND.real)
    for m in range(0, last - g):
        n = last - 1 - m if KIND.backward else g + m
        if n == (p.chunks - 1 if KIND.backward else 0):
            start = load_edges(edges.guess, p, n, count, p.channels, p.inside, None)
        else:
            start, delta = newton(n, tl.where(m > 0, coupling, 0.0), delta, edges, p, KIND)
        save(target, start, p, n, p.channels, p.inside)


@triton.jit
def write_report(report, p, iterations, residual, status, chunks):
    """The row of the report that belongs to this block of channels."""
    part = report + (p.b * p.tiles + p.tile) * 4
    tl.store(part + 0, tl.cast(iterations, tl.float64))
    tl.store(part + 1, tl.cast(residual, tl.float64))
    tl.store(part + 2, tl.cast(status, tl.float64))
    tl.store(part + 3, tl.cast(chunks, tl.float64))
