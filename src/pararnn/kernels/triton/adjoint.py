"""The system of the adjoints, which is linear and runs backwards in time (see `forward`).

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
    in_time,
    initial_at,
    load_step,
    numbers,
    plus,
    prefetch_steps,
    product,
    readable,
    restarted,
    save,
    start_of,
    store_step,
    zeros,
    zeros_like,
)
from pararnn.kernels.triton.functions import bounded, magnitude, only


@triton.jit
def inputs_at(chunk, step):
    """Where a step's drives, the states before it and gradients of those after it are."""
    before = at_step(chunk.states, tl.cast(step, tl.int64) - 1)
    return at_step(chunk.drives, step), before, at_step(chunk.gradients, step)


@triton.jit
def load(inputs, step, number: tl.constexpr, chunk, KIND: tl.constexpr):
    """What the step reads that is `number` steps after `step`, which `inputs` are of."""
    drives, states, gradients = inputs
    mask = readable(step + number, chunk, KIND)
    before = mask
    if number == 0:  # before the first step of all there is no state
        before = only(mask, chunk.first + step > 0)
    u, h = load_step(drives, number, mask), load_step(states, number, before)
    return u, h, load_step(gradients, number, mask)


@triton.jit
def as_numbers(loaded, KIND: tl.constexpr):
    """`numbers` of all that a step reads."""
    return numbers(loaded[0], KIND), numbers(loaded[1], KIND), numbers(loaded[2], KIND)


@triton.jit
def one(
    carried,
    loaded,
    results,
    step,
    number: tl.constexpr,
    chunk,
    couple: tl.constexpr,
    KIND: tl.constexpr,
):
    """A step backwards, the `number`-th of its round in time.

    `carried` are the adjoint after the step, and to `couple` chunks the products, else gradients
    of coefficients in this round and with resets those of second initial states; returned are those
    before the step. Without products, gradients of drives are written to `results`.
    """
    # `couple` is an argument since Triton 3.6 knows functions by the values in their arguments, not
    # by how these lie in tuples: `(s, g, (), ())` and `(s, (), few, ())` were the same to it.
    s, g, few, restarts = carried
    u, h, q = loaded
    there = exists(step, chunk, KIND)
    if KIND.starts != "none":
        start = start_of(step, chunk, KIND)
        h = restarted(h, start, step, chunk, KIND)
    elif number == 0:
        h = chosen(chunk.first + step > 0, h, chunk.before)
    adjoint = ()
    for i in tl.static_range(len(s)):
        if KIND.gradients[i] >= 0:
            adjoint = adjoint + (s[i] + q[KIND.gradients[i]],)
        else:
            adjoint = adjoint + (s[i],)
    if couple:
        before, jacobian = KIND.step_with_jacobian(h, u, chunk.p.coefficients, adjoint)
        moved = product(jacobian, g, len(s), KIND)
        g = chosen(there, moved, g) if KIND.wide else moved
    else:
        before, drives, terms = KIND.step(h, u, chunk.p.coefficients, adjoint)
        store_step(results, number, drives, there)
        few = plus(few, chosen(there, terms, zeros_like(terms)) if KIND.wide else terms)
    if KIND.starts != "none":
        # An adjoint goes to the initial state that its sequence started from, and no further; that
        # to the first state of a row is left to `run_chunk`.
        fresh, none = start >= chunk.p.batch, zeros_like(before)
        if couple:
            g = chosen(fresh, zeros_like(g), g)
        elif KIND.starts == "resets":
            restarts = plus(restarts, chosen(only(there, fresh), before, none))
        else:
            for i in tl.static_range(len(s)):
                at = chunk.given.grads.initial + initial_at(start, i, chunk, len(s))
                tl.store(at, before[i], mask=only(there, fresh))
        before = chosen(fresh, none, before)
    return chosen(there, before, s) if KIND.wide else before, g, few, restarts


@triton.jit
def load_ahead(lead, chunk, KIND: tl.constexpr):
    """What the first round reads, which begins `lead` steps before the chunk."""
    unroll: tl.constexpr = KIND.unroll
    if KIND.wide:
        step = chunk.length - unroll
    else:
        whole = chunk.length // unroll * unroll + lead // unroll * unroll
        step = tl.maximum(whole - unroll, -chunk.first)
    ahead, inputs = (), inputs_at(chunk, step)
    if KIND.distance > 0:
        prefetch_steps(step - KIND.distance, chunk, KIND.distance, KIND)
    for n in tl.static_range(unroll):
        ahead = ahead + (load(inputs, step, n, chunk, KIND),)
    return ahead


@triton.jit
def run_steps(carried, ahead, low, high, chunk, couple: tl.constexpr, KIND: tl.constexpr):
    """Steps `high` - 1 down to `low` of a chunk, in rounds of `unroll`; see `one`.

    Gradients of coefficients are added up in float64 after every round. `ahead` is what the first
    round reads; the next one's is loaded as in `forward.run_steps`.
    """
    s, g, sums, restarts = carried
    unroll: tl.constexpr = KIND.unroll
    if not KIND.wide and unroll > 1:
        for n in range(0, (high - low) % unroll):
            i = high - 1 - n
            results, few = at_step(chunk.results, i), zeros(len(sums), s[0], KIND.real)
            loaded = as_numbers(load(inputs_at(chunk, i), i, 0, chunk, KIND), KIND)
            now = (s, g, few, restarts)
            s, g, few, restarts = one(now, loaded, results, i, 0, chunk, couple, KIND)
            sums = plus(sums, cast(few, tl.float64))
    rounds = (high - low) // unroll
    for n in range(0, rounds):
        i = low + (rounds - 1 - n) * unroll
        later = tl.maximum(i - unroll, 0)
        if KIND.distance > 0:
            prefetch_steps(later - KIND.distance, chunk, unroll, KIND)
        results, few = at_step(chunk.results, i), zeros(len(sums), s[0], KIND.real)
        inputs, coming, now = inputs_at(chunk, later), (), (s, g, few, restarts)
        if KIND.paired is None:
            for m in tl.static_range(unroll - 1, -1, -1):
                coming = (load(inputs, later, m, chunk, KIND),) + coming
                now = one(now, as_numbers(ahead[m], KIND), results, i + m, m, chunk, couple, KIND)
        else:
            for m in tl.static_range(unroll):
                coming = coming + (load(inputs, later, m, chunk, KIND),)
            if in_time(i, chunk):
                for m in tl.static_range(unroll - 1, -1, -1):
                    loaded = as_numbers(ahead[m], KIND)
                    now = one(now, loaded, results, i + m, m, chunk, couple, KIND)
        ahead = coming
        s, g, few, restarts = now
        sums = plus(sums, cast(few, tl.float64))
    return s, g, sums, restarts, ahead


@triton.jit
def run(s, g, ahead, begin, end, chunk, KIND: tl.constexpr):
    """Steps without results, counted from the last of the chunk."""
    low, high = chunk.length - end, chunk.length - begin
    s, g, _, _, ahead = run_steps((s, g, (), ()), ahead, low, high, chunk, True, KIND)
    return s, g, ahead


@triton.jit
def run_chunk(s, g, ahead, chunk, KIND: tl.constexpr):
    """The chunk with its results, and without the products that couple chunks."""
    count: tl.constexpr = len(s)
    sums = zeros(len(chunk.p.coefficients), s[0], tl.float64)
    restarts = zeros(count if KIND.starts == "resets" else 0, s[0], KIND.real)
    carried = (s, (), sums, restarts)
    s, _, sums, restarts, _ = run_steps(carried, ahead, 0, chunk.length, chunk, False, KIND)
    p, grads = chunk.p, chunk.given.grads
    save(grads.sums, sums, p, chunk.k, chunk.d, chunk.here)
    row = p.b + 0 * chunk.k if KIND.wide else p.b  # of the shape of a group
    for i in tl.static_range(count):
        at = grads.initial + (row * count + i) * p.hidden + chunk.d
        tl.store(at, s[i], mask=only(chunk.here, chunk.first == 0))
    save(grads.initial, restarts, p, chunk.k + p.batch, chunk.d, chunk.here)
    return s, ()


@triton.jit
def unmeasured(count: tl.constexpr, p, rows: tl.constexpr, KIND: tl.constexpr):
    """Gaps and sizes, of all components together, that `measure` begins with."""
    block: tl.constexpr = KIND.block
    return tl.zeros([rows, block], KIND.real), tl.zeros([1, block], KIND.real)


@triton.jit
def measure(gaps, sizes, edges, p, before, k, d, mask, KIND: tl.constexpr):
    """The largest gaps at starts of chunks `k`, and sizes of the ends of those `before`."""
    count: tl.constexpr = len(KIND.gradients)
    size = tl.zeros_like(gaps)
    for i in tl.static_range(count):
        e = tl.load(edge(edges.ends, p, before, i, count, d), mask=mask, other=0.0)
        s = tl.load(edge(edges.guess, p, k, i, count, d), mask=mask, other=0.0)
        gaps = tl.maximum(gaps, tl.where(e == s, 0.0, magnitude(e - s)))
        size = tl.maximum(size, tl.abs(bounded(e)))
    return gaps, tl.maximum(sizes, tl.max(size, axis=0)[None, :])


@triton.jit
def judge(gaps, sizes, tolerance, KIND: tl.constexpr):
    """Whether gaps are too large, and the residual: in tolerances, 0 within them.

    Adjoints have no natural scale: each channel's is its largest one at the end of any chunk.
    """
    allowed, residual = tolerance * sizes, tl.full([], 0.0, KIND.real)
    if KIND.reports:
        residual = tl.max(tl.where(gaps <= allowed, 0.0, gaps / allowed))
    return tl.max(tl.where(gaps <= allowed, 0, 1)), residual


@triton.jit
def moved(start, end, delta, k, edges, p, tolerance, KIND: tl.constexpr):
    """Whether a correction matters to chunk `k`."""
    far = tl.zeros(p.channels.shape, tl.int32)
    for i in tl.static_range(len(start)):
        size = tl.maximum(tl.abs(bounded(start[i])), tl.abs(bounded(end[i])))
        near = tl.abs(delta[i]) <= tolerance * size
        far = tl.maximum(far, tl.where(near, 0, 1))
    return tl.max(tl.where(p.inside, far, 0)) > 0


@triton.jit
def verdict(residual, tolerance, iterations, most):
    """The status and the residual of a report."""
    return tl.where(residual > 0.0, 2, 1), residual * tolerance
