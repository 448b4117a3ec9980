"""The tuples that the written kernels take, and those that they work with.

Names in the kernels: `s` states or adjoints, `g` what couples chunks (tangents forward, products of
transposed Jacobians backward), `u` drives, `i` a step counted from the first of a
chunk, `d` channels.
"""

from __future__ import annotations

from collections import namedtuple

# Arguments

# A tensor (batch, time, heads, size of a head), its strides, and that size.
InHeads = namedtuple("InHeads", "at batch time head size")

# A tensor (batch, time, channels), and its strides.
OverTime = namedtuple("OverTime", "at batch time")

# The same, with strides in bytes and a power of two that divides both, which is compiled in.
Aligned = namedtuple("Aligned", "at batch time align")

# What a system is given.
# drives: each InHeads
# coefficients: (channels,)
# initial: states before the first step, (rows, components, channels)
# starts: nothing, or one tensor (batch, time): the row of `initial` that a sequence starts from at
#     a step; -1 where none starts
# states: (batch, time, channels), which the forward direction writes
# grads: Grads for the adjoint, else nothing
Given = namedtuple("Given", "drives coefficients initial starts states grads")

# Gradients, of which the adjoint is given the first.
# states: gradients of those components of the states that have one, each OverTime
# drives: where gradients of drives go, each InHeads
# initial: where those of initial states go; with resets first those of the rows of the batch, then
#     what every chunk adds to those of second initial states
# sums: where those of coefficients go, (batch, chunks, coefficients, channels)
Grads = namedtuple("Grads", "states drives initial sums")

# What is known of every chunk, (batch, chunks, parts, channels).
# guess: the state or adjoint that it starts from
# ends: the one that it ends in
# coupling: how that one depends on that which it starts from
# stored: in which iteration its results were written, 0 if in none, (batch, chunks, blocks of
#     channels)
Edges = namedtuple("Edges", "guess ends coupling stored")

# The first two after `correct`, and the residual of every chunk and block of channels before it,
# infinite where that chunk ran again; `target` is for the starts that `refine` computes.
Corrected = namedtuple("Corrected", "guess ends residual target")

# What a kernel is compiled for.
# step: a step of the cell, or one of its adjoint
# step_with_jacobian: the same, and the entries of the Jacobian that are not zero
# entries: for every entry, row by row, where it is among these; -1 for zeros. The adjoint has those
#     of the transposed Jacobian
# load_ahead, run, run_chunk, unmeasured, measure, judge, moved, verdict: those of a system, which
#     have these names in `forward` and `adjoint`
# version: text that differs where any of these functions does
# real: the type of the arithmetic
# small, tiny: a residual below 1 counts relative to `small` times the largest state of its channel,
#     and to no less than `tiny`
# starts: whether sequences start inside: "none"; "resets", from a second initial state of each row
#     of the batch; "packed", sequences in one row, each from its own
# hidden, block: channels of a state, and of a program
# unroll: steps whose inputs are loaded ahead
# distance: steps beyond those that are brought into the L2 cache
# many: whether there are several chunks
# group, rows: chunks that `refine` runs side by side, and that it looks at in one go
# wide: whether programs have such a group
# looked_at: chunks that `correct` looks at in one go
# corrected: how often `correct` ran before
# overlap: whether kernels start before the one before has ended
# backward: whether it is the adjoint
# gradients: for every component, where its gradient is among those of states; -1 where none is
# reports: whether `refine` says how it went, which it need not for the adjoint
# paired: the type of what is read over time, if two neighbours are loaded as one number of 32 bits;
#     None if not
Kind = namedtuple(
    "Kind",
    "step step_with_jacobian load_ahead run run_chunk unmeasured measure judge moved verdict"
    " version entries real small tiny starts hidden block unroll distance many group rows looked_at"
    " wide corrected overlap backward gradients reports paired",
)

# Inside

# A program: its row of the batch, block of channels, coefficients, and the sizes of the problem.
Program = namedtuple(
    "Program", "b tile tiles channels inside coefficients batch time hidden chunks chunk"
)

# Where a step is in a tensor over time, the stride to the next one, and how many channels of a row
# follow in memory.
Stream = namedtuple("Stream", "at time rest")

# The chunk of a program, or its group of chunks.
# k, first, length: its number, first time and steps
# exists, here, d: which of a group there are, which entries of values, and their channels
# read_here: which entries there are of what is read, which may be pairs
# drives, states, gradients: streams of what is read; `lines` are the same of its first channel
# starts: where those in `given` are
# results: where gradients of drives go
# before: for the adjoint the states before time 0, where sequences do not start inside
Chunk = namedtuple(
    "Chunk",
    "p given k first length exists here d read_here drives states gradients lines starts results"
    " before",
)
