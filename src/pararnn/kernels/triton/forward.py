"""The system of the states: how a chunk runs, and how far starts of chunks are from ends before.

Residuals are those of `shooting.state_residual`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pararnn.kernels.triton.common import (
    at_step,
    chosen,
    edge,
    exists,
    in_time,
    load_edges,
    load_step,
    numbers,
    prefetch_steps,
    product,
    readable,
    restarted,
    start_of,
    store_step,
    zeros,
    zeros_like,
)
from pararnn.kernels.triton.functions import magnitude


@triton.jit
def one(s, g, u, step, chunk, KIND: tl.constexpr):
    """The state after a step, and its tangents if there are any before it."""
    couple: tl.constexpr = len(g) > 0
    if KIND.starts != "none":
        start = start_of(step, chunk, KIND)
        s = restarted(s, start, step, chunk, KIND)
        if couple:
            g = chosen(start >= 0, zeros_like(g), g)
    there = exists(step, chunk, KIND)
    if couple:
        new, jacobian = KIND.step_with_jacobian(s, u, chunk.p.coefficients)
        moved = product(jacobian, g, len(s), KIND)
        g = chosen(there, moved, g) if KIND.wide else moved
    else:
        new = KIND.step(s, u, chunk.p.coefficients)
    s = chosen(there, new, s) if KIND.wide else new
    return s, g


@triton.jit
def load_ahead(lead, chunk, KIND: tl.constexpr):
    """The drives of the first round, which begins `lead` steps before the chunk."""
    step = tl.full([], 0, tl.int32)
    if not KIND.wide:
        step = tl.minimum(-lead, chunk.length - KIND.unroll)
    ahead, drives = (), at_step(chunk.drives, step)
    if KIND.distance > 0:
        prefetch_steps(step + KIND.unroll, chunk, KIND.distance, KIND)
    unroll: tl.constexpr = KIND.unroll
    for n in tl.static_range(unroll):
        ahead = ahead + (load_step(drives, n, readable(step + n, chunk, KIND)),)
    return ahead


@triton.jit
def run_steps(s, g, ahead, low, high, chunk, store: tl.constexpr, KIND: tl.constexpr):
    """Steps `low` to `high` of a chunk, in rounds of `unroll`.

    Tangents `g`, if there are any, move along; with `store`, states are written. `ahead` are the
    drives of the first round. Those of the next one are loaded before the steps of a round; but
    what is not in pairs, which takes more registers, one step at a time.
    """
    unroll: tl.constexpr = KIND.unroll
    whole = high if KIND.wide else high - (high - low) % unroll
    for i in range(low, whole, unroll):
        later = tl.minimum(i + unroll, chunk.length - unroll)
        if KIND.distance > 0:
            prefetch_steps(later + KIND.distance, chunk, unroll, KIND)
        drives, states, coming = at_step(chunk.drives, later), at_step(chunk.states, i), ()
        if KIND.paired is None:
            for n in tl.static_range(unroll):
                coming = coming + (load_step(drives, n, exists(later + n, chunk, KIND)),)
                s, g = one(s, g, numbers(ahead[n], KIND), i + n, chunk, KIND)
                if store:
                    store_step(states, n, s, exists(i + n, chunk, KIND))
        else:
            for n in tl.static_range(unroll):
                coming = coming + (load_step(drives, n, chunk.read_here),)
            if in_time(i, chunk):
                for n in tl.static_range(unroll):
                    s, g = one(s, g, numbers(ahead[n], KIND), i + n, chunk, KIND)
                    if store:
                        store_step(states, n, s, chunk.here)
        ahead = coming
    if not KIND.wide and unroll > 1:
        for i in range(whole, high):
            u = numbers(load_step(at_step(chunk.drives, i), 0, chunk.read_here), KIND)
            s, g = one(s, g, u, i, chunk, KIND)
            if store:
                store_step(at_step(chunk.states, i), 0, s, chunk.here)
    return s, g, ahead


@triton.jit
def run(s, g, ahead, begin, end, chunk, KIND: tl.constexpr):
    """Steps without results."""
    return run_steps(s, g, ahead, begin, end, chunk, False, KIND)


@triton.jit
def run_chunk(s, g, ahead, chunk, KIND: tl.constexpr):
    """The chunk with its results."""
    s, g, _ = run_steps(s, g, ahead, 0, chunk.length, chunk, True, KIND)
    return s, g


@triton.jit
def unmeasured(count: tl.constexpr, p, rows: tl.constexpr, KIND: tl.constexpr):
    """Gaps and sizes, for every component, that `measure` begins with."""
    none = zeros(count, p.channels, KIND.real)
    return none, none


@triton.jit
def measure(gaps, sizes, edges, p, before, k, d, mask, KIND: tl.constexpr):
    """The largest gaps at starts of chunks `k`, and sizes of the ends of those `before`."""
    more, larger = (), ()
    for i in tl.static_range(len(gaps)):
        e = tl.load(edge(edges.ends, p, before, i, len(gaps), d), mask=mask, other=0.0)
        s = tl.load(edge(edges.guess, p, k, i, len(gaps), d), mask=mask, other=0.0)
        apart = magnitude(magnitude(e - s) / tl.maximum(tl.abs(e), 1.0))
        both = tl.where(e == s, 0.0, apart), tl.where(e == e, tl.abs(e), 0.0)
        gap, size = tl.reduce(both, 0, larger_of_both)  # at once: programs wait for all warps less
        more = more + (tl.maximum(gaps[i], gap),)
        larger = larger + (tl.maximum(sizes[i], size),)
    return more, larger


@triton.jit
def larger_of_both(gap, size, other_gap, other_size):
    """The larger gap, and the larger size."""
    return tl.maximum(gap, other_gap), tl.maximum(size, other_size)


@triton.jit
def scale(sizes, KIND: tl.constexpr):
    """What residuals below 1 of a channel count relative to."""
    return tl.minimum(tl.maximum(KIND.small * sizes, KIND.tiny), 1.0)


@triton.jit
def judge(gaps, sizes, tolerance, KIND: tl.constexpr):
    """Whether gaps are too large, and the residual: the largest of all channels."""
    most = gaps[0] / scale(sizes[0], KIND)
    for i in tl.static_range(1, len(gaps)):
        most = tl.maximum(most, gaps[i] / scale(sizes[i], KIND))
    residual = tl.max(most)
    return tl.where(residual <= tolerance, 0, 1), residual


@triton.jit
def moved(start, end, delta, k, edges, p, tolerance, KIND: tl.constexpr):
    """Whether a correction matters to chunk `k`, by sizes of states at ends of chunks around it."""
    count: tl.constexpr = len(start)
    first = tl.maximum(tl.minimum(k - KIND.group // 2, p.chunks - KIND.group), 0)
    every = first + tl.arange(0, KIND.group)[:, None]
    ended, d = (every + 1 < p.chunks) & p.inside[None, :], p.channels[None, :]
    ends = load_edges(edges.ends, p, every, count, d, ended, 0.0)
    far = tl.zeros(p.channels.shape, tl.float32)
    for i in tl.static_range(count):
        sizes = tl.max(tl.where(ends[i] == ends[i], tl.abs(ends[i]), 0.0), axis=0)
        size = tl.maximum(tl.abs(start[i]), scale(sizes, KIND))
        apart = tl.where(delta[i] == 0.0, 0.0, magnitude(delta[i] / size))
        far = tl.maximum(far, apart.to(tl.float32))
    return tl.max(tl.where(p.inside, far, 0.0)) > tolerance


@triton.jit
def verdict(residual, tolerance, iterations, most):
    """The status and the residual of a report; when every chunk is exact, states may be NaN."""
    return tl.where((residual > tolerance) & (iterations > most), 2, 1), residual
