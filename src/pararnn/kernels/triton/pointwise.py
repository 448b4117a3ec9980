"""Operations on each element of matrices: one kernel, around a generated function that says which.

A program has a block of rows and columns. Any number of rows is served by one compiled kernel.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def run(
    inputs,
    results,
    rows,
    OPERATIONS: tl.constexpr,
    PLACES: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DOUBLE: tl.constexpr,
):
    """Compute results from inputs.

    Args:
        inputs: Matrices (`rows`, `SIZE`), each (tensor, stride of rows, stride of columns).
        results: Matrices of some such side by side, each (tensor, stride of rows).
        rows: Their number.
        OPERATIONS: A generated function of the inputs.
        PLACES: Where what it returns is written: to which result, from which column on.
        SIZE: Columns.
        ROWS: Of a block.
        COLUMNS: Of a block.
        DOUBLE: Whether the arithmetic is in float64, else in float32.
    """
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < SIZE)
    values = ()
    for n in tl.static_range(len(inputs)):
        at = inputs[n][0] + row * inputs[n][1] + column * tl.cast(inputs[n][2], tl.int64)
        value = tl.load(at, mask=inside, other=0)
        values = values + (value.to(tl.float64 if DOUBLE else tl.float32),)
    values = OPERATIONS(SIZE, values)
    for n in tl.static_range(len(PLACES)):
        result = results[PLACES[n][0]]
        at = result[0] + PLACES[n][1] + row * result[1] + column
        tl.store(at, values[n].to(at.dtype.element_ty), mask=inside)
