"""What the kernels in `solve` and both systems share.

A program of `sweep` and `correct` has one chunk of time and a block of channels; its values have
the shape [BLOCK]. A program of `refine` has a group of chunks: then numbers and first times of
chunks are columns, and values have the shape [GROUP, BLOCK]. States, drives and coefficients are
tuples of tensors, and so are matrices of components, row by row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pararnn.kernels.triton.functions import only, prefetch
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
def own_chunk(given, p, KIND: tl.constexpr):
    """The chunk of a program that has one."""
    k = tl.program_id(0) // (p.tiles * p.batch)
    first = k * p.chunk
    length = tl.minimum(p.chunk, p.time - first)
    return chunk_of(given, p, k, first, length, True, p.inside, p.channels, KIND)


@triton.jit
def group_of(given, p, g, KIND: tl.constexpr):
    """The group of chunks that begins with chunk `g`."""
    k = g + tl.arange(0, KIND.group)[:, None]
    exists = k < tl.minimum(g + KIND.group, p.chunks)
    here, d = exists & p.inside[None, :], p.channels[None, :]
    return chunk_of(given, p, k, k * p.chunk, p.chunk, exists, here, d, KIND)


@triton.jit
def chunk_of(given, p, k, first, length, exists, here, d, KIND: tl.constexpr):
    """A chunk, or a group, with where it is in all tensors over time."""
    origin, starts, results, before = tl.cast(first, tl.int64), (), (), ()
    for n in tl.static_range(len(given.starts)):
        starts = starts + (given.starts[n] + p.b * p.time + origin,)
    if KIND.backward:
        results = in_heads(given.grads.drives, p, origin, d, KIND)
        if KIND.starts == "none":
            before = first_state(given, p, KIND)
    drives, states, gradients = streams_of(given, p, origin, d, KIND)
    lines, read_here = streams_of(given, p, origin, p.tile * KIND.block, KIND), here
    if KIND.paired is not None:
        pairs = p.tile * KIND.block + 2 * tl.arange(0, KIND.block // 2)
        read_here, read = pairs < KIND.hidden, streams_of(given, p, origin, pairs, KIND)
        drives = in_pairs(read[0])
        if KIND.backward:
            states, gradients = in_pairs(read[1]), in_pairs(read[2])
    place, read = (k, first, length, exists, here, d), (drives, states, gradients, lines)
    return Chunk(p, given, *place, read_here, *read, starts, results, before)


@triton.jit
def streams_of(given, p, origin, d, KIND: tl.constexpr):
    """Streams of drives, states, and gradients of states."""
    states, gradients = (), ()
    for i in tl.static_range(len(given.states)):
        at = given.states[i] + (p.b * p.time + origin) * p.hidden + d
        states = states + (Stream(at, p.hidden, p.hidden - d),)
    if KIND.backward:
        for n in tl.static_range(len(given.grads.states)):
            of = given.grads.states[n]
            at = of.at + p.b * of.batch + origin * of.time + d
            gradients = gradients + (Stream(at, of.time, p.hidden - d),)
    return in_heads(given.drives, p, origin, d, KIND), states, gradients


@triton.jit
def in_pairs(streams):
    """The same streams as numbers of 32 bits, which are two neighbours of 16 each."""
    found = ()
    for m in tl.static_range(len(streams)):
        at, stride, rest = streams[m]
        at = at.to(tl.pointer_type(tl.int32), bitcast=True)
        found = found + (Stream(at, stride // 2, rest),)
    return found


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
        last = chunk.p.time - 1 - origin
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
        return chunk.here & (chunk.first + step < chunk.p.time)
    else:
        return chunk.here


@triton.jit
def readable(step, chunk, KIND: tl.constexpr):
    """The same of what is loaded, which may be pairs."""
    if KIND.wide:
        return exists(step, chunk, KIND)
    else:
        return chunk.read_here


@triton.jit
def numbers(loaded, KIND: tl.constexpr):
    """What was loaded, in the type of the arithmetic.

    Pairs are taken apart where they are used. Where they are loaded, that would wait for them, and
    until then the numbers would take twice as many registers.
    """
    found = ()
    for m in tl.static_range(len(loaded)):
        x = loaded[m]
        if KIND.paired is None:
            found = found + (x.to(KIND.real),)
        else:
            if KIND.paired == tl.bfloat16:
                low = (x << 16).to(tl.float32, bitcast=True)
                high = (x & -65536).to(tl.float32, bitcast=True)
            else:
                low = x.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
                high = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            found = found + (tl.interleave(low, high).to(KIND.real),)
    return found


@triton.jit
def in_time(step, chunk):
    """Whether a step is within time: all are, but the compiler does not know that.

    It keeps what was loaded before a branch before it. Without one it moves the loads for the next
    round to the end of a round, to save registers, and the next round waits for memory.
    """
    return step < chunk.p.time


@triton.jit
def start_of(step, chunk, KIND: tl.constexpr):
    """The row of the initial states that a sequence starts from at a step, -1 if none does."""
    at = chunk.starts[0] + step
    if KIND.wide:
        start = tl.load(at, mask=chunk.exists & (chunk.first + step < chunk.p.time), other=-1)
    else:
        start = tl.load(at)
    return tl.cast(start, tl.int64)


@triton.jit
def initial_at(start, i, chunk, count: tl.constexpr):
    """Where a component of that row is."""
    return tl.maximum(start, 0) * count * chunk.p.hidden + chunk.d + i * chunk.p.hidden


@triton.jit
def restarted(s, start, step, chunk, KIND: tl.constexpr):
    """States, replaced by initial ones where a sequence starts."""
    found, fresh = (), start >= 0
    for i in tl.static_range(len(s)):
        at = chunk.given.initial + initial_at(start, i, chunk, len(s))
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
def place_of(p, k):
    """Where a number is that belongs to a chunk and the channels of a program."""
    return (p.b * p.chunks + k) * p.tiles + p.tile


@triton.jit
def load_stored(stored, p, k, mask):
    """In which iteration results of chunks were written, 0 if in none; 1 for those not there."""
    return tl.load(stored + place_of(p, k), mask=mask, other=1)
