"""All measured constants that choices depend on: unit, meaning and the measurement of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """What work costs and what hardware holds, as far as a choice depends on it.

    The text after a field names its unit first and, at the end, the page with the measurement.
    "Estimate" stands where no page records one. The values change how fast a result is there,
    and never what it is beyond the tolerance. A pair is for forward and backward pass, unless it
    says otherwise.
    """

    # Cells whose channels mix, in chunks that are rows of one batch

    warm_up: int = 64
    """Steps that the first guess looks back, also in C. Gates that forget more slowly need
    iterations. Estimate."""
    largest_tangent: int = 8
    """Entries of a group up to which Newton is taken: a tangent costs as many sweeps. Estimate."""
    launch_work: int = 1 << 15
    """Multiplications that a CPU does while one operation is launched. Estimate, checked by
    benchmarks/mixing_loops.py: docs/results/mixing-cells.md."""
    step_work: int = 1 << 23
    """Multiplications that a GPU does in the time of a step, which is part of one kernel or graph.
    Estimate, checked by benchmarks/mixing.py: docs/results/mixing-cells.md."""
    streamed_work: int = 1 << 27
    """Multiplications that a GPU does in the time of a step of one kernel that reads the weights at
    every step. Estimate, checked by benchmarks/mixing.py: docs/results/mixing-cells.md."""
    worth: float = 2.0
    """Times as fast as the loop that chunks must be by the estimate, or the loop is taken: trying
    in vain costs the loop and one part in `worth` of it. Estimate, checked by
    benchmarks/mixing_loops.py: docs/results/mixing-cells.md."""
    patience: float = 0.5
    """Part of the loop's time that iterations may take. Estimate."""
    call: int = 32
    """Steps bound by launches that take as long as one call over the recurrent part.
    benchmarks/mixing_sweep.py: docs/results/mixing-cells.md."""
    call_against_one: int = 192
    """The same where a step of the cell is one call itself. benchmarks/mixing_sweep.py:
    docs/results/mixing-cells.md."""
    arithmetic_of_one: float = 2.0
    """Times that arithmetic weighs more where a step of the cell is one call, whose launches weigh
    less. Estimate, checked by benchmarks/mixing_sweep.py: docs/results/mixing-cells.md."""
    bound: float = 0.5
    """Part of the free rows from which on one chunk had better keep its gates than compute them
    again. Estimate, checked by benchmarks/mixing_loops.py: docs/results/mixing-cells.md."""
    bound_rows: int = 16
    """Rows from which on the same may hold. Estimate, checked by benchmarks/mixing_loops.py:
    docs/results/mixing-cells.md."""
    entries_of_a_row: int = 8
    """Entries of a group per row of `bound_rows`: in small heads gates weigh more than their
    products. Estimate, checked by benchmarks/mixing_loops.py: docs/results/mixing-cells.md."""

    # Launches of Triton's kernels for elementwise cells

    triton_warm_up: tuple[int, int, int] = (32, 64, 128)
    """Steps that the first guess looks back for results in half, single and double precision.
    Estimate."""
    channels_of_a_thread: int = 2
    """Channels of one thread. docs/results/gpu-kernels.md: with one, fast gates are slower."""
    most_unroll: int = 8
    """Steps whose inputs are loaded ahead, at most. Estimate."""
    most_ahead: int = 48
    """32-bit registers of a thread for inputs that are loaded ahead. Estimate."""
    most_operations: int = 512
    """Operations in an unrolled loop, at most: compile time grows faster than their number.
    Estimate."""
    least_programs: int = 4
    """Programs per multiprocessor that are wanted in any case where time is cut.
    docs/results/gpu-kernels.md."""
    wanted_programs: tuple[int, int] = (8, 12)
    """Programs per multiprocessor that are wanted as long as chunks stay long.
    docs/results/gpu-kernels.md."""
    enough_programs: tuple[float, float] = (6.0, 3.5)
    """Programs per multiprocessor with which time stays whole. docs/results/gpu-kernels.md."""
    most_chunks: tuple[int, int] = (2**30, 8)
    """Chunks, at most, where more than `least_programs` are wanted. Backward:
    docs/results/gpu-kernels.md."""
    long_chunk: int = 4
    """Warm-ups that a long chunk has. Estimate."""
    shortest_chunk: int = 2
    """Warm-ups that every chunk has. Estimate."""
    in_flight: int = 48 * 2**10
    """Bytes per multiprocessor on their way from memory. docs/results/gpu-kernels.md."""
    distances: tuple[int, ...] = (32, 16, 8, 4)
    """Steps that the prefetch into the L2 cache may look ahead. docs/results/gpu-kernels.md."""
    refine_group: int = 16
    """Chunks that one program of `refine` runs side by side, at most. Estimate."""
    corrections: int = 2
    """Corrections of all chunks side by side, forward, where there are more chunks than
    `refine_group`. By count: of the benchmark's slow gates in half precision, one leaves a
    twentieth of the chunks to `refine`, two leave none. Estimate.
    """
    looked_at: int = 32
    """Values of chunks that one program of `correct` loads in one go, for each channel. Estimate.
    """
    refine_rows: int = 256
    """Chunks that `refine` looks at in one go, at most. Estimate."""
    refine_warps: int = 8
    """Warps of a program of `refine` up to which it loads as far ahead as `sweep`. Estimate."""
    refine_unroll: int = 4
    """Steps that `refine` loads ahead, at most, with more warps. Estimate."""

    # Threads and chunks in C

    c_vector: int = 16
    """Channels of the narrowest block that is worth a thread of its own. Estimate."""
    c_small: int = 4096
    """Elements under which sharing among threads costs more than it saves. Estimate."""
    c_shortest_chunk: int = 256
    """Steps of a chunk, at least. Estimate, checked by benchmarks/cpu.py."""
    c_block: int = 256
    """Channels that one lane carries in its local arrays, at most. Estimate, checked by
    benchmarks/cpu.py."""

    c_mixing_steps: int = 64
    """Steps from which on a kernel for a cell whose channels mix is worth its compilation.
    Estimate."""
    c_mixing_rows: int = 64
    """Sequences up to which it is faster than a loop of PyTorch operations with gradients, which
    keeps gates that C computes again. docs/results/mixing-cells.md."""

    # PyTorch's kernels for its own cells, and ours; `pytorch_plan.milliseconds` says what is what

    faster: tuple[float, float] = (1.1, 2.0)
    """Times as fast as ours that PyTorch's kernel must be by the estimate to be taken; the second
    in half precision, where ours multiplies inputs in that type and PyTorch's kernel is called in
    float32. docs/results/mixing-cells.md has the first, the second is an estimate."""
    aten: tuple[tuple[float, ...], tuple[float, ...]] = (
        (22.8, 9.5e-5, 4.57, 0.013, 5.6e-5, 3.72e-3, 4.0e-5),
        (146.0, 3.6e-4, 31.5, 0.117, 3.2e-4, 8.51e-3, 1.01e-4),
    )
    """Microseconds of PyTorch's loop in C++ on a CPU, forward alone and with the backward pass.
    docs/results/mixing-cells.md."""
    onednn: tuple[tuple[float, ...], tuple[float, ...]] = (
        (83.0, 6.9e-4, 0.256, 0.0, 3.3e-5, 1.23e-3, 3.4e-5),
        (314.0, 3.8e-3, 1.3, 0.0, 6.0e-5, 4.2e-3, 1.14e-4),
    )
    """The same of an LSTM in oneDNN. docs/results/mixing-cells.md."""
    steps_of_cell: tuple[tuple[float, ...], tuple[float, ...]] = (
        (50.1, 3.7e-5, 15.3, 0.0205, 1.25e-4, 2.8e-3, 4.7e-5),
        (177.0, 6.1e-4, 57.2, 0.14, 4.4e-4, 6.61e-3, 1.13e-4),
    )
    """The same of ours where it loops over the cell. docs/results/mixing-cells.md."""
    steps_in_c: tuple[tuple[float, ...], tuple[float, ...]] = (
        (201.0, 1.44e-3, 0.116, 0.0, 3.1e-5, 1.16e-3, 4.1e-5),
        (938.0, 5.25e-3, 0.48, 0.0, 6.8e-5, 9.8e-3, 1.49e-4),
    )
    """The same of ours in C. docs/results/mixing-cells.md."""
    cudnn_on_chip: tuple[int, int] = (384, 192)
    """Channels up to which PyTorch has cuDNN keep the weights on the chip: of a cell with one gate
    or with more; by count, of what PyTorch's source compares with."""
    cudnn_kept: tuple[tuple[float, ...], ...] = (
        (718.0, 0.0, 0.0, 1.48e-3, 8.38e-6, 8.79e-5, 0.0),
        (1.52e03, 0.0, 0.0441, 4.84e-3, 0.0, 1.46e-4, 0.0),
        (0.0, 0.0, 0.0, 1.65e-3, 6.04e-6, 8.47e-6, 2.79e-7),
        (0.0, 0.0, 0.0, 5.34e-3, 0.0, 2.04e-5, 5.92e-7),
    )
    """Microseconds of cuDNN with weights on the chip: from Python forward alone, with the backward
    pass; in a CUDA graph of the user's likewise. docs/results/mixing-cells.md."""
    cudnn: tuple[tuple[float, ...], ...] = (
        (1.25e03, 0.0, 12.2, 9.64e-4, 0.0, 0.0, 1.24e-7),
        (2.32e03, 0.0, 29.6, 1.06e-4, 0.0, 0.0, 3.91e-7),
        (88.5, 0.0, 5.43, 0.0, 3.60e-7, 0.0, 1.85e-7),
        (45.2, 0.0, 12.3, 0.0, 1.60e-6, 1.80e-5, 5.18e-7),
    )
    """The same with weights that it reads at every step. docs/results/mixing-cells.md."""
    kept_sweeps: tuple[tuple[float, ...], ...] = (
        (250.0, 0.0, 0.3, 1.0e-3, 0.0, 5.0e-6, 1.0e-7),
        (600.0, 0.0, 0.3, 6.0e-3, 0.0, 2.0e-5, 5.0e-7),
        (50.0, 0.0, 0.3, 1.0e-3, 0.0, 5.0e-6, 1.0e-7),
        (100.0, 0.0, 0.3, 6.0e-3, 0.0, 2.0e-5, 5.0e-7),
    )
    """The same of our kernel with weights on the chip. Estimate, of few rows in
    docs/results/mixing-cells.md."""
    streamed_sweeps: tuple[tuple[float, ...], ...] = (
        (454.0, 0.0, 2.98, 3.52e-3, 0.0, 1.86e-6, 6.99e-8),
        (690.0, 0.0, 3.52, 0.0111, 0.0, 4.60e-5, 2.05e-7),
        (89.1, 0.0, 3.04, 3.76e-3, 0.0, 0.0, 6.72e-8),
        (103.0, 0.0, 5.57, 0.0103, 0.0, 2.22e-5, 2.19e-7),
    )
    """The same of our kernel that reads them at every step. docs/results/mixing-cells.md."""
    spread_sweeps: tuple[tuple[float, ...], ...] = (
        (735.0, 0.0, 1.23, 0.0, 0.0, 0.0, 2.79e-7),
        (1.55e03, 0.0, 2.19, 0.0, 0.0, 0.0, 9.23e-7),
        (89.1, 0.0, 1.23, 0.0, 0.0, 0.0, 2.79e-7),
        (103.0, 0.0, 2.19, 0.0, 0.0, 0.0, 9.23e-7),
    )
    """The same of our kernel whose programs share them out and keep them: fitted to three sizes of
    `nn.GRUCell`, within 19 %. docs/results/mixing-cells.md."""

    # CUDA graphs

    graph_elements: int = 1 << 22
    """Elements of the largest tensor up to which a call becomes a graph: a GPU is done before
    Python has launched everything, and the memory that graphs keep is small. Estimate; what graphs
    gain is in docs/results/gpu-kernels.md."""
    graph_steps: int = 128
    """Steps of a sweep in one graph; longer sweeps replay it. Estimate."""
    copied_together: int = 1 << 16
    """Elements of a tensor up to which one launch copies several: a multiprocessor copies so many.
    Estimate."""

    # Operations on each element, and sums

    pointwise_block: int = 1024
    """Elements of a program. Estimate."""
    long_sum: int = 4096
    """Rows from which on a sum is taken in two stages. Estimate."""
    parts_of_a_sum: int = 128
    """Sums of the first stage, which run side by side. Estimate."""

    # Products of matrices with a vector of each of a few texts

    matvec_tile: int = 128
    """Bytes of a tile per thread. docs/results/language-models.md: half as many rows at a time are
    slower."""
    matvec_ahead: int = 192
    """Bytes per thread that are on their way while a tile is multiplied.
    docs/results/language-models.md: 128 are slower by 2 %, and 256 were by 11 % in an earlier form.
    """
    matvec_most_ahead: int = 4
    """Tiles on their way, at most: each is a set of registers. Estimate."""
    matvec_grouped: int = 4
    """Tiles of a program up to which it takes the sums of two together.
    docs/results/language-models.md: with 2 and 4 tiles that is faster, with 11 slower."""
    matvec_threads: int = 512
    """Threads per multiprocessor. docs/results/language-models.md: a quarter fewer and a quarter
    more are slower."""
    matvec_registers: tuple[tuple[int, int, int, int], ...] = (
        (80, 88, 104, 128),
        (96, 128, 112, 128),
    )
    """Registers of a thread, for one text and for two: with a costly vector, in a program of one
    tile, of up to `matvec_grouped`, and of more. 128 are as many as there are for `matvec_threads`,
    by count. With fewer there is room for a program of the next product, which loads its first
    weights. docs/results/language-models.md: a step takes 2 to 3 % longer with as many as before,
    and for one text 5 % with 96 for all."""
    matvec_warps: tuple[int, int] = (4, 16)
    """Warps of a program, at least and at most. Estimate."""
    matvec_elements_of_a_warp: int = 1024
    """Elements of the vector per warp. Estimate."""
    matvec_operations: int = 24
    """Operations of an element from which on a program has fewer of them per warp: then fewer
    programs compute the vector, one on each multiprocessor for 2,048 elements. By count: a norm
    takes 12, a norm and the step of a ParaGRU 31. Estimate."""
    matvec_elements_of_a_costly_warp: int = 128
    """Elements per warp of such a vector. Estimate."""
    matvec_inner: tuple[int, int] = (16, 2**14)
    """Elements of the vector, at least and at most: a program holds it in registers. Estimate."""
    matvec_most_matrices: int = 8
    """Matrices in one kernel, at most. Estimate."""
    matvec_most_texts: int = 2
    """Texts up to which a product is such a kernel. docs/results/language-models.md: with four it
    is slower than PyTorch's products, with three about as fast."""

    moved_entries: int = 512
    """Numbers of an entry of a state that a program moves on. Estimate: four of a thread."""

    # The kernel for all steps of a cell whose channels mix

    rows_weights: int = 200 * 2**10
    """Bytes of weights that a program keeps, at most: most of the registers of a multiprocessor of
    an H100, by count."""
    rows_registers: int = 48
    """32-bit registers of a thread for weights, beyond which a program gets more threads. Estimate,
    checked by benchmarks/mixing.py: docs/results/mixing-cells.md."""
    rows_warps: int = 16
    """Warps of a program, at most. Estimate."""

    # The same where it reads the weights at every step; docs/results/mixing-cells.md has its times

    wide_rows: tuple[int, ...] = (16, 32)
    """Rows of a program: as few as tensor cores take, more where no two programs would share the
    channels of some rows. With 64 Triton takes other instructions, and is no faster.
    docs/results/mixing-cells.md."""
    wide_block: tuple[int, int] = (32, 128)
    """Channels that a program computes at a time, at least and at most.
    docs/results/mixing-cells.md."""
    wide_sums: int = 3 << 12
    """32-bit sums that a program has at a time, at most: half of its registers, by count."""
    wide_inner: int = 64
    """Channels that are multiplied at a time, at most. docs/results/mixing-cells.md."""
    wide_stages: int = 3
    """Blocks of these in use or on their way at a time. docs/results/mixing-cells.md."""
    wide_ahead: int = 160 * 2**10
    """Bytes of those on their way, at most: by count, of 227 KB of shared memory."""
    wide_small: int = 1 << 9
    """Sums of a product up to which a program has the smaller number of `wide_warps`.
    docs/results/mixing-cells.md."""
    wide_warps: tuple[int, int] = (4, 8)
    """Warps of a program. docs/results/mixing-cells.md."""
    wide_late: int = 128
    """Channels of a vector that a program computes again instead of waiting for others, at most. By
    count: two microseconds of a round for some hundred operations on each of 16 rows. Estimate."""

    # The same for few rows, where programs keep parts of the weights

    spread_rows: tuple[int, ...] = (1, 2, 4)
    """Rows that a program may have. Those of 1 and 4 are measured: docs/results/mixing-cells.md."""
    spread_weights: int = 128 * 2**10
    """Bytes of weights that a program keeps, at most: half of the registers of a multiprocessor of
    an H100, by count."""
    spread_warps: int = 8
    """Warps of a program. Estimate."""
    spread_step: float = 0.35
    """Time of a step against one of the kernel that reads the weights at every step, at most: 0.22
    to 0.35 where both were measured. docs/results/mixing-cells.md."""

    # Kernels of cells whose state is cut into tiles

    tile_entries: int = 1024
    """Entries of a tile per warp, at most: with more, registers are spilled.
    docs/results/matrix-memory.md."""
    tile_warps: int = 8
    """Warps of a program, at most. Estimate."""
    tile_programs: tuple[int, int] = (8, 8)
    """Programs per multiprocessor that are wanted where a tile may be cut.
    docs/results/matrix-memory.md."""
    tile_least_entries: int = 256
    """Entries of a tile per warp, at least, where there are too few programs: forward, since
    backward warps of one program wait for each other too often. docs/results/matrix-memory.md."""
    schedulers: int = 4
    """Of a multiprocessor, by count. A warp belongs to one, and has registers of its share."""
    scheduler_registers: int = 16384
    """Of a scheduler, by count."""
    tile_registers: float = 5.25
    """Registers that a thread needs for each of its entries, so that next to none are spilled: a
    scheduler has room for three warps of 168. docs/results/matrix-memory.md."""
    tile_spills: int = 8
    """Numbers that a thread may spill for that. docs/results/matrix-memory.md: with 6 to 8 a
    backward pass gained, with 22 and with 72 it lost."""
    tile_most_registers: int = 255
    """Of a thread. docs/results/matrix-memory.md says where backward all are needed."""
    tile_least: int = 16
    """Rows or columns of a part of a tile, at least: what tensor cores take, by count."""
    tile_warm_up: tuple[int, int, int] = (64, 128, 256)
    """Steps that the first guess of a chunk looks back for results in half, single and double
    precision. Estimate."""
    tile_full: tuple[int, int] = (16, 16)
    """Warps per multiprocessor, forward and backward, up to which time is cut.
    docs/results/matrix-memory.md."""
    tile_chunk: int = 4
    """Warm-ups that a chunk is at least as long as. Estimate."""
    tile_least_chunks: int = 16
    """Chunks, at least: with seven, a memory half of whose heads remember loses up to 70 %.
    docs/results/matrix-memory.md."""
    tile_segment: int = 16
    """Steps that the backward pass runs again from one state that was kept.
    docs/results/matrix-memory.md."""

    # Pieces and blocks of work, by what caches and memory hold

    piece: int = 1 << 17
    """Elements of a component in a piece of time that a backward pass solves step by step.
    Estimate."""
    piece_on_gpu: int = 1 << 22
    """The same on a GPU, which is done with fewer before Python has launched everything. Estimate.
    """
    shortest_piece: int = 16
    """Steps of a piece, at least. Estimate."""
    cached_block: int = 1 << 16
    """Elements of a tensor in a block of rows that fits a CPU's cache. Estimate."""

    # Time split over ranks

    rank_warm_up: float = 1 / 32
    """Part of a rank's steps, at least, that the first guess of the next rank looks back: what that
    costs, where a guess that is not good enough costs all of them once more. Estimate."""

    # Generation of text

    steps_between_checks: int = 32
    """Steps after which the host waits for the device to see whether all rows have ended.
    Estimate."""
    decoding_compile_s: float = 1.25
    """Seconds that compiling a step takes for each block: half a minute for 24 blocks. Estimate."""
    decoding_saved_us: float = 30.0
    """Microseconds by which a block's step is faster compiled. Estimate."""
    attention_room: int = 1024
    """Tokens of a text that attention has room for at first; then twice as many. Estimate."""
    mask_entries: int = 2**26
    """Entries of an attention mask that is made as a whole: 64 MiB. Longer ones come in parts, as
    of 8 sequences of 4,096 tokens with documents, or where time is split over ranks. Estimate."""
    part_of_scores: int = 1024
    """Scores that one multiprocessor looks at for the largest. docs/results/language-models.md."""


COSTS = Costs()
