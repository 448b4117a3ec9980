"""Everything that `pararnn bench` measures."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

import pararnn
from pararnn.bench.others import hgrn_row, layer_row, pararnn_torch_rows
from pararnn.bench.problem import CELLS, SLOW, Problem, Row, Size
from pararnn.bench.recurrence import loop_row, recurrence_row
from pararnn.bench.timing import copy_gigabytes_per_second

TABLE = [
    Size(*s)
    for s in (
        (8, 512, 1024),
        (1, 2048, 1024),
        (8, 2048, 1024),
        (8, 2048, 2048),
        (32, 2048, 1024),
        (32, 2048, 2048),
        (1, 65536, 64),
    )
]
LENGTHS = [Size(1, 2**n, d) for d in (64, 1024) for n in range(8, 21, 2)]
LOOP_LENGTHS = [Size(1, 2**n, 1024) for n in range(6, 11)]
_MOST_PROCESSES = 32  # each has a context on the device


def measure(
    quick: bool = False, pararnn_torch: str | Path | None = None
) -> Iterator[tuple[str, Row]]:
    """Measure everything; yields (kind of row, row) as it goes.

    A recurrence whose results are wrong is not timed: its row is of the kind "wrong".

    Args:
        quick: Only the recurrence at the sizes of the table.
        pararnn_torch: Folder in which the package pararnn-torch is installed.

    Raises:
        RuntimeError: No CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("pararnn bench measures on a CUDA device, and there is none.")
    yield "compiled", {"kernels_of": compile_all([*TABLE, *([] if quick else LENGTHS)])}
    rate = copy_gigabytes_per_second()
    yield "device", {"name": torch.cuda.get_device_name(), "copy_gigabytes_per_second": rate}
    for slow, cell, size in itertools.product((False, True), CELLS, TABLE):
        if not slow or cell in SLOW:
            yield _row("recurrence", cell, size, slow, rate)
    if quick:
        return
    yield "loop", loop_row(Size(8, 512, 1024))
    for size in LOOP_LENGTHS:
        yield "loop", loop_row(size)
    for size in TABLE:
        yield "layer", layer_row(size)
    if importlib.util.find_spec("fla"):
        for size in TABLE:
            yield "hgrn", hgrn_row(size)
    else:
        yield "skipped", {"what": "chunk_hgrn: flash-linear-attention is not installed"}
    if pararnn_torch:
        for row in pararnn_torch_rows(pararnn_torch, TABLE):
            yield "pararnn_torch", row
    else:
        yield "skipped", {"what": "pararnn-torch: no folder was given that it is installed in"}
    for size in LENGTHS:
        yield _row("length", "ParaGRU", size, False, rate)


def _row(kind: str, cell: str, size: Size, slow: bool, rate: float) -> tuple[str, Row]:
    try:
        return kind, recurrence_row(cell, size, slow, rate)
    except AssertionError as error:
        return "wrong", {"what": str(error)}


def compile_all(sizes: list[Size]) -> int:
    """Compile the kernels of all cells at these sizes, in as many processes as there are cores.

    They stay in Triton's cache on disk. The largest sizes are left out: their inputs would not all
    fit the device at once, and most of their kernels are those of smaller ones.

    Returns:
        Combinations of cell and size that were run.
    """
    small = [s for s in sizes if s.batch * s.time * s.hidden <= 2**27]
    tasks = [(c, s) for c in CELLS for s in small if s in TABLE or c == "ParaGRU"]
    workers = min(_MOST_PROCESSES, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        return sum(pool.map(_run_once, tasks))


def _run_once(task: tuple[str, Size]) -> int:
    cell, size = task
    problem = Problem(cell, size, False, torch.bfloat16)
    solvers = [pararnn.Newton(), pararnn.Newton(chunk=size.time)]
    for solver in solvers if size.time <= 4096 else solvers[:1]:
        plan = problem.plan("triton", solver)
        *states, _ = problem.forward(plan)
        problem.backward(plan, states)
    torch.cuda.synchronize()
    return 1
