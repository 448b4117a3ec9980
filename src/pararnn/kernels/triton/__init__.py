"""Kernels in Triton, written once for all cells; only the steps of a cell are generated (`steps`).

`solve` has three kernels. `sweep` gives one program a chunk of time and a block of channels. It
runs the steps before the chunk from the initial state to guess the state that the chunk starts from
(the warm-up), with the tangent of these steps, which says how much of their start is left. If
nothing is, it runs the chunk and writes the results; else it runs the chunk with its tangent and
leaves the results to others.

`correct` has a program for each chunk again. It returns at once if its chunk starts where the one
before it ends. Else it computes the right start through the tangents of chunks before, and runs its
chunk from there: one iteration of Newton's method. Of many chunks there are two. That is mostly
enough.

`refine` gives one program all chunks of a block of channels. It too returns where all is well; else
it iterates, group after group of chunks, until it is, at the latest when every chunk has become
exact.

They solve two systems. `forward` says how a chunk of states runs and how gaps between chunks are
measured; `adjoint` says so of gradients, which run backwards in time, with a product of transposed
Jacobians in the place of the tangent. Loops are unrolled and load the inputs of the next steps
while they compute. `tuples` says what kernels are given, `launch` gives it to them.

Where channels mix by products, `mixing` runs the steps of chunks. `pointwise` computes what stands
between products for all times at once, `matvec` a step of generation's products with one vector.
What they call is generated too, by `expressions`.
"""
