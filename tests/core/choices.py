"""What is chosen for a cell, a shape, a device and settings, as text; without any device.

`choices` is the only place that knows who decides what inside the library. The file that it is
compared with, golden/choices.json, has one line per combination.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
import warnings
from dataclasses import dataclass
from unittest import mock

import torch
from torch import nn

from pararnn import RNN, Jacobi, Newton, Picard, QuasiNewton, Sequential
from pararnn.cells import (
    BlockGRUCell,
    DeltaMemoryCell,
    HeadSLSTMCell,
    LayerNormLSTMCell,
    M2RNNCell,
    OuterMemoryCell,
    ParaGRUCell,
    ParaLSTMCell,
    SLSTMCell,
)
from pararnn.kernels import facts, fused, operators
from pararnn.kernels.facts import all_facts, facts_of
from pararnn.kernels.triton import backend as triton_backend
from pararnn.kernels.triton.sweeps import Kept, Streamed
from pararnn.layers.pytorch_kernels import library_of
from pararnn.planning.c_plan import plan_c
from pararnn.planning.kernel_plans import plan_matvec, plan_spread, plan_wide
from pararnn.planning.plan import BackendError
from pararnn.planning.rows_plan import steps_at_once
from pararnn.solvers.chunks import Chunks, Cut
from pararnn.solvers.problem import Problem

from .pretend_gpu import pretend_gpu

INPUT = 6
ELEMENTWISE = {
    "paragru": lambda: ParaGRUCell(INPUT, 8),
    "paralstm": lambda: ParaLSTMCell(INPUT, 8),
    "slstm": lambda: SLSTMCell(INPUT, 8),
}
MIXING = {
    "rnn_8": lambda: nn.RNNCell(INPUT, 8),
    "gru_8": lambda: nn.GRUCell(INPUT, 8),
    "gru_64": lambda: nn.GRUCell(INPUT, 64),
    "gru_256": lambda: nn.GRUCell(INPUT, 256),
    "lstm_4": lambda: nn.LSTMCell(INPUT, 4),
    "lstm_64": lambda: nn.LSTMCell(INPUT, 64),
    "heads_64": lambda: HeadSLSTMCell(INPUT, 64, num_heads=2),
    "heads_1024": lambda: HeadSLSTMCell(INPUT, 1024, num_heads=2),
    "block_gru_512": lambda: BlockGRUCell(INPUT, 512),
    "layer_norm_lstm_64": lambda: LayerNormLSTMCell(INPUT, 64),
}
MEMORIES = {  # of 36 heads
    "m2rnn": lambda: M2RNNCell(INPUT, 64, 16, num_heads=36),
    "delta": lambda: DeltaMemoryCell(INPUT, 64, 16, num_heads=36),
    "outer": lambda: OuterMemoryCell(INPUT, 64, 16, num_heads=36),
    "square delta": lambda: DeltaMemoryCell(INPUT, 64, 64, num_heads=36),
}
SOLVERS = {
    "choose": None,
    "newton": Newton(),
    "chunk=1": Newton(chunk=1),
    "chunk=64": Newton(chunk=64),
    "iterations=2": Newton(max_iterations=2),
    "tolerance=0.01": Newton(tolerance=0.01),
    "quasi": QuasiNewton(),
    "picard": Picard(),
    "jacobi": Jacobi(),
    "jacobi-chunk=64": Jacobi(chunk=64),
    "sequential": Sequential(),
}
SHAPES = [  # batch, time, channels
    (1, 1, 8),
    (3, 31, 7),
    (1, 100, 64),
    (4, 4096, 64),
    (1, 65536, 64),
    (256, 128, 128),
    (1, 2048, 1024),
    (1, 65536, 1024),
    (8, 512, 1024),
    (8, 2048, 1024),
    (8, 2048, 2048),
    (32, 2048, 1024),
    (32, 2048, 2048),
    (64, 2048, 4096),
    (100_000, 3, 5),
    (2, 2_000_000, 16),
]
SIZES = [  # batch, time
    (1, 1),
    (3, 31),
    (1, 64),
    (1, 1000),
    (1, 65536),
    (4, 4096),
    (16, 256),
    (32, 2048),
    (256, 128),
    (1024, 1024),
]


@dataclass(frozen=True)
class Combination:
    """What a choice depends on."""

    cell: str
    shape: tuple[int, ...]
    device: str = "cpu"  # or "cuda"
    processors: int = 132  # multiprocessors of a GPU
    threads: int = 1  # of a CPU
    compiler: bool = True
    dtype: str = "float32"
    solver: str = "choose"
    backend: str = "auto"
    resets: bool = False
    train: bool = True

    def __str__(self):
        shown = [self.cell, "x".join(map(str, self.shape)), self.device, self.dtype]
        others = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)[3:]
            if field.name != "dtype" and getattr(self, field.name) != field.default
        ]
        return " ".join((*shown, *others))


def combinations():
    """All that are recorded."""
    make = Combination
    gpu = functools.partial(make, device="cuda")
    half = functools.partial(gpu, dtype="bfloat16")
    types = ("bfloat16", "float32", "float64")
    few = [SHAPES[i] for i in (0, 3, 4, 7, 9, 12)]
    for cell, shape, dtype in itertools.product(ELEMENTWISE, SHAPES, types):
        yield gpu(cell, shape, dtype=dtype)
    for cell, shape in itertools.product(ELEMENTWISE, SHAPES):
        yield make(cell, shape)
    for shape in SHAPES:
        yield half("paragru", shape, processors=16)
        yield half("paragru", shape, processors=84)
        yield make("paragru", shape, threads=16)
        yield make("paragru", shape, dtype="float64")
        yield make("paragru", shape, compiler=False)
    for shape, solver in itertools.product(few, list(SOLVERS)[1:]):
        yield half("paragru", shape, solver=solver)
        yield make("paragru", shape, solver=solver)
    for shape, backend in itertools.product(few[1:3], ("torch", "c", "triton")):
        yield half("paragru", shape, backend=backend)
        yield make("paragru", shape, backend=backend)
    for shape, resets in itertools.product(few, (False, True)):
        yield half("paragru", shape, resets=resets, train=False)
    yield from _of_mixing()
    for cell, size in itertools.product(MEMORIES, ((1, 1), (1, 16384), (8, 2048), (32, 1024))):
        yield half(cell, size)
    yield half("m2rnn", (8, 2048), solver="jacobi")
    yield half("outer", (8, 2048), backend="torch")
    for rows, count, heads, inner in itertools.product(
        (64, 1000, 4096, 50_000), (1, 3), (1, 8), (16, 1024, 16384)
    ):
        yield half("matvec", (rows, count, heads, inner))


def _of_mixing():
    make, gpu = Combination, functools.partial(Combination, device="cuda")
    for cell, size, train in itertools.product(MIXING, SIZES, (True, False)):
        yield make(cell, size, train=train)
    for cell, size in itertools.product(MIXING, SIZES):
        yield gpu(cell, size)
    for size, dtype in itertools.product(SIZES, ("bfloat16", "float64")):
        yield gpu("gru_64", size, dtype=dtype)
        yield make("gru_64", size, dtype=dtype)
    solvers = ("newton", "chunk=64", "iterations=2", "jacobi", "sequential")
    for cell, size, solver in itertools.product(("gru_8", "heads_64"), SIZES[3:6], solvers):
        yield gpu(cell, size, solver=solver)
        yield make(cell, size, solver=solver)
    for backend in ("torch", "c", "triton"):
        yield make("gru_8", (4, 4096), backend=backend)
    for size in SIZES:
        yield gpu("gru_64", size, train=False)
        yield gpu("gru_64", size, resets=True)


def recorded():
    """The choices for all combinations, by their names."""
    return {str(one): choices(one) for one in combinations()}


def choices(given):
    """What is chosen for a combination, as a mapping to texts and numbers."""
    if given.cell == "matvec":
        return _matvec(given)
    with contextlib.ExitStack() as stack:
        if given.device == "cuda":
            stack.enter_context(pretend_gpu(given.processors))
        else:
            stack.enter_context(mock.patch.object(facts, "interpreted", return_value=False))
        if not given.compiler:
            stack.enter_context(mock.patch.object(facts, "find_compiler", return_value=None))
        stack.enter_context(mock.patch.object(torch, "get_num_threads", return_value=given.threads))
        stack.enter_context(torch.set_grad_enabled(given.train))
        try:
            rnn = _layer(
                given.cell, given.device, given.dtype, given.solver, given.backend, given.compiler
            )
        except BackendError as error:
            return {"refused": re.sub(r"at \S*/(torch/\S+:)\d+", r"at \1", str(error))}
        return (_elementwise if rnn.runner().by_channels else _mixing)(rnn, given)


@functools.cache
def _layer(cell, device, dtype, solver, backend, _compiler):
    """A layer that is traced on a device."""
    torch.manual_seed(0)
    made = {**ELEMENTWISE, **MIXING, **MEMORIES}[cell]().to(getattr(torch, dtype))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a compiler it is slow
        return RNN(made, solver=SOLVERS[solver], backend=backend)


def _plan(rnn, given, known=None):
    """The plan for a combination, whatever the number of channels of the layer that is traced."""
    runner, (batch, time) = rnn.runner(), given.shape[:2]
    planner = operators.request_of(runner.request).planner
    planner = dataclasses.replace(planner, facts=known or planner.facts)  # of this machine
    hidden = given.shape[2] if given.cell in ELEMENTWISE else rnn.hidden_size
    dtype = getattr(torch, given.dtype)
    x = torch.zeros((), dtype=dtype).expand(batch, time, INPUT)
    tensors = [*rnn.cell.parameters(), x]
    return planner.plan(
        *(torch.device(given.device), batch, time, hidden, dtype),
        itemsize=dtype.itemsize,
        gradients=rnn.num_components,
        tracked=given.train,
        elements=max(t.numel() for t in tensors),
        may_loop=dtype not in (torch.float16, torch.bfloat16),
        library=None if given.resets else _library(rnn, dtype, given.device),
    )


def _library(rnn, dtype, device):
    """What of PyTorch's may run all steps, on a machine with cuDNN and oneDNN."""
    if rnn.backend != "auto" or rnn.solver is not None:
        return None
    with (
        mock.patch.object(torch.backends.cudnn, "is_available", return_value=True),
        mock.patch.object(torch.backends.mkldnn, "is_available", return_value=True),
        mock.patch.object(torch, "are_deterministic_algorithms_enabled", return_value=False),
    ):
        return library_of(rnn.cell, [dtype], dtype, device)


def _elementwise(rnn, given):
    (batch, time, hidden), step = given.shape, rnn.runner().traced.step
    plan, dtype = _plan(rnn, given), getattr(torch, given.dtype)
    found = {"backend": plan.backend, "method": rnn.runner().method().__name__}
    found["graph"] = plan.in_graph
    if plan.backend == "triton":
        drive = torch.zeros((), dtype=dtype).expand(1, 1, 1, 8)
        initial = torch.zeros((), dtype=dtype).expand(1, step.num_components, 8)
        drives = [drive] * step.recurrence.num_drives
        problem = Problem(step.recurrence, drives, [], initial, None)
        found["precision"] = triton_backend._precision(problem)
        for direction, way in (("forward", plan.forward), ("adjoint", plan.adjoint)):
            launch = way.launch
            found[direction] = dataclasses.asdict(launch)
            found[direction]["wide"] = found[direction].pop("wide_unroll")
        return found
    chunk = min(plan.forward.solver.chunk, time)
    cut = plan_c(batch, time, hidden, chunk, given.threads)
    return found | {
        "chunk": cut.chunk,
        "chunks": cut.chunks,
        "threads": cut.threads,
        "block": cut.block,
    }


def _mixing(rnn, given):
    runner, time = rnn.runner(), given.shape[1]
    known = None
    if given.cell in ELEMENTWISE:
        step = _with_channels(runner.traced.step, given.shape[2])
        known = all_facts(facts_of(step), step, runner.choice)
    plan = _plan(rnn, given, known)
    found = {"backend": plan.backend, "method": runner.method().__name__}
    if plan.path in ("loop", "pytorch"):
        return found | {"path": plan.path}
    if plan.path == "tiles":
        launches = plan.forward.tile, plan.adjoint.tile
        cuts = {
            name: [t.parts, t.warps]
            for name, t in zip(("forward", "adjoint"), launches, strict=True)
        }
        chunks = [min(w.solver.chunk, time) for w in (plan.forward, plan.adjoint)]
        return found | {"path": "tiles", "chunk": chunks} | cuts
    way = plan.forward
    one_chunk = isinstance(way.solver, Sequential) or way.solver.chunk >= time
    found |= {"path": "rows", "chunk": "all" if one_chunk else way.solver.chunk}
    if not one_chunk:
        iterations = way.solver.max_iterations
        found |= {"solver": type(way.solver).__name__, "iterations": iterations}
    if given.device == "cuda":
        found["path"] = "kernel" if way.steps == "kernel" else "rows in graphs"
        kernel = _one_kernel(given.cell, given.dtype)
        if isinstance(kernel, Streamed):
            products, chunk = kernel.products, time if one_chunk else way.solver.chunk
            rows = given.shape[0] * -(-time // chunk)
            sizes = products.size, products.groups, rows, *kernel.most
            itemsize = 8 if given.dtype == "float64" else 4
            shared, spreads = 227 * 2**10, kernel.spreads
            launch = plan_spread(*sizes[:3], itemsize, given.processors, spreads.sizes)
            launch = launch or plan_wide(*sizes, itemsize, given.processors, shared)
            found["launch"] = dataclasses.asdict(launch)
        elif isinstance(kernel, Kept):
            found["warps"] = kernel.constants["num_warps"]
        else:
            found["no kernel"] = kernel
        if not runner.choice.generated:
            found["no kernel"] = "asked for"
    if way.steps == "kernel" and runner.solver is None:
        found["settles"] = way.settle  # after one iteration, without asking the device
        found["solve in a graph"] = way.in_graph
    found["graph"] = plan.in_graph
    piece = plan.adjoint.piece
    if given.cell in ELEMENTWISE:  # recorded for as many channels as are traced
        piece = steps_at_once(given.shape[0], rnn.hidden_size, given.device)
    return found | {"backward piece": piece}


def _with_channels(step, hidden):
    """An elementwise step with another number of channels."""
    sizes = [(*i.shape[:-1], i.shape[-1] * hidden // step.hidden) for i in step.inputs]
    pairs = zip(step.inputs, sizes, strict=True)
    inputs = tuple(dataclasses.replace(i, shape=size) for i, size in pairs)
    return dataclasses.replace(step, inputs=inputs, hidden=hidden)


@functools.cache
def _one_kernel(cell, dtype):
    """The kernel that runs many steps on a GPU, or why there is none."""
    of = _layer(cell, "cuda", dtype, "choose", "auto", True).runner().traced.step
    cut = Cut(2, 3, 3)
    inputs = [
        torch.zeros(*([2, 3] if i.by_rows else []), *i.shape, dtype=i.dtype) for i in of.inputs
    ]
    state = [torch.zeros(2, of.hidden, dtype=of.dtype) for _ in range(of.num_components)]
    kernel = fused._kernel(Chunks(of, cut, inputs, None, ()), state)
    return kernel


def _matvec(given):
    rows, matrices, heads, inner = given.shape
    itemsize = getattr(torch, given.dtype).itemsize
    launch = plan_matvec(rows, matrices, heads, inner, itemsize, given.processors)
    return dataclasses.asdict(launch) | {"bytes": math.prod(given.shape) * itemsize}
