"""Times of the recurrence and of whole layers on a GPU.

Recurrences are compared with float64 before they are timed; layers, the loop and other
implementations, which are here to be compared in time, are not.

The limit of a size is the time in which the device copies as much as the recurrence must read and
write: every drive and state once forward; drives, states, their gradients backward.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pararnn
from pararnn.bench.timing import captured, copy_gigabytes_per_second, milliseconds
from pararnn.kernels import operators
from pararnn.tracing.structure import Layout

CELLS: dict[str, Callable[[int], nn.Module]] = {
    "ParaGRU": lambda size: pararnn.cells.ParaGRUCell(size, size),
    "ParaLSTM": lambda size: pararnn.cells.ParaLSTMCell(size, size),
}
SLOW = {"ParaGRU": -5.0, "ParaLSTM": 5.0}  # added to the gate's drive on every tenth channel
TOLERANCE = 1e-2  # of states and gradients in half precision, relative to the largest
_REFERENCE_CHANNELS = 40


@dataclass(frozen=True)
class Size:
    """Batch, steps and channels."""

    batch: int
    time: int
    hidden: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.time} D{self.hidden}"


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
Row = dict[str, Any]


class _Problem:
    """Random drives for a cell's recurrence, and how to run it forward and backward."""

    def __init__(self, cell: str, size: Size, slow: bool, dtype: torch.dtype) -> None:
        self.module = CELLS[cell](size.hidden)
        self.size = size
        rnn = pararnn.RNN(self.module.to("cuda"), backend="triton")
        self.traced = rnn.evaluation().traced
        recurrence = self.traced.recurrence
        assert recurrence is not None
        self.components = recurrence.num_components
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (size.batch, size.time, recurrence.num_drives, size.hidden)
        drives = torch.randn(shape, device="cuda", generator=generator, dtype=dtype)
        if slow:
            drives[:, :, 0, ::10] += SLOW[cell]
        weights = torch.randn(
            (recurrence.num_coefficients, size.hidden), device="cuda", generator=generator
        )
        self.drives = drives
        self.weights = weights.clamp(-0.5, 0.5)
        self.initial = torch.zeros(size.batch, self.components, size.hidden, device="cuda")
        self.cotangent = torch.randn(
            (size.batch, size.time, size.hidden), device="cuda", generator=generator, dtype=dtype
        )

    def plan(self, backend: str, solver: pararnn.Newton | None = None) -> str:
        """Name of the evaluation by a backend, drives and coefficients in one tensor each."""
        recurrence = self.traced.recurrence
        assert recurrence is not None
        layout = Layout(
            tuple((0, i) for i in range(recurrence.num_drives)),
            tuple((0, i) for i in range(recurrence.num_coefficients)),
        )
        return operators.plan(recurrence, layout, backend, solver or pararnn.Newton())

    def forward(self, plan: str) -> list[Tensor]:
        with torch.no_grad():
            return torch.ops.pararnn.recurrence(
                [self.drives], [self.weights], self.initial, None, plan
            )

    def backward(self, plan: str, states: list[Tensor]) -> list[Tensor]:
        grads = [self.cotangent] + [None] * (self.components - 1)
        with torch.no_grad():
            return torch.ops.pararnn.recurrence_backward(
                [self.drives], [self.weights], self.initial, None, states, grads, plan
            )

    def check(self, states: list[Tensor], grads: list[Tensor]) -> float:
        """Largest relative error on some channels of two rows, against float64 on the CPU."""
        rows = [0, self.size.batch - 1]
        some = torch.arange(0, self.size.hidden, max(1, self.size.hidden // _REFERENCE_CHANNELS))
        take = lambda t: t[rows][..., some.to(t.device)].double().cpu()  # noqa: E731
        plan = self.plan("c", pararnn.Newton(chunk=self.size.time))
        given = (
            [take(self.drives)],
            [self.weights[:, some.to("cuda")].double().cpu()],
            take(self.initial),
            None,
        )
        exact = torch.ops.pararnn.recurrence(*given, plan)[:-1]
        cotangents = [take(self.cotangent)] + [None] * (self.components - 1)
        gradients = torch.ops.pararnn.recurrence_backward(*given, exact, cotangents, plan)
        pairs = [(take(s), e) for s, e in zip(states, exact, strict=True)]
        pairs += [(take(grads[0]), gradients[0]), (take(grads[-1]), gradients[-1])]
        return max(float((a - e).abs().max() / e.abs().max().clamp_min(1e-30)) for a, e in pairs)


def recurrence_row(cell: str, size: Size, slow: bool, rate: float) -> Row:
    """One size of a recurrence in bfloat16: correct, then timed.

    Raises:
        AssertionError: A result is further from float64 than `TOLERANCE`.
    """
    problem = _Problem(cell, size, slow, torch.bfloat16)
    plan = problem.plan("triton")
    torch.cuda.reset_peak_memory_stats()
    *states, report = problem.forward(plan)
    grads = problem.backward(plan, states)
    error = problem.check(states, grads)
    assert error <= TOLERANCE, f"{cell} {size} slow={slow}: error {error:.1e} against float64"
    one = problem.cotangent.nbytes
    drives = problem.drives.nbytes // one
    found = pararnn.SolveReport(report)
    row = {
        "cell": cell,
        "size": str(size),
        "slow": slow,
        "error": error,
        "iterations": found.iterations,
        "chunks": found.chunks,
        "limit_forward_ms": one * (drives + problem.components) / rate / 1e6,
        "limit_backward_ms": one * (2 * drives + problem.components + 1) / rate / 1e6,
        "forward_ms": milliseconds(captured(lambda: problem.forward(plan))),
        "backward_ms": milliseconds(captured(lambda: problem.backward(plan, states))),
    }
    if size.time <= 4096:
        sequential = problem.plan("triton", pararnn.Newton(chunk=size.time))
        row["sequential_forward_ms"] = milliseconds(captured(lambda: problem.forward(sequential)))
        row["sequential_backward_ms"] = milliseconds(
            captured(lambda: problem.backward(sequential, states))
        )
    return row


def _forward_backward(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> Any:
    inputs = [x, *module.parameters()]

    def call() -> Any:
        y = run(x)
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    return call


def layer_row(size: Size) -> Row:
    """A whole ParaGRU layer with its projection beside cuDNN's `nn.GRU`, bfloat16."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(size.batch, size.time, size.hidden, requires_grad=True, **options)
    row: Row = {"size": str(size)}
    layers = {
        "paragru": pararnn.RNN(pararnn.cells.ParaGRUCell(size.hidden, size.hidden, **options)),
        "cudnn_gru": nn.GRU(size.hidden, size.hidden, batch_first=True, **options),
    }
    for name, layer in layers.items():
        if name != "paragru" and size.time > 2048:
            continue
        with torch.no_grad():
            row[f"{name}_forward_ms"] = milliseconds(lambda m=layer: m(x))  # type: ignore[misc]
        both = _forward_backward(lambda x, m=layer: m(x)[0], layer, x)  # type: ignore[misc]
        row[f"{name}_both_ms"] = milliseconds(both, budget_ms=500.0)
    return row


def loop_row(size: Size) -> Row:
    """The plain PyTorch loop over a ParaGRU's recurrence against ours, forward and backward."""
    problem = _Problem("ParaGRU", size, False, torch.bfloat16)
    plan = problem.plan("triton")
    *states, _ = problem.forward(plan)

    def ours() -> Any:
        return problem.forward(plan), problem.backward(plan, states)

    drives = problem.drives.detach().requires_grad_()
    a, b, e = problem.weights.to(torch.bfloat16)

    def loop() -> Any:
        h, outputs = problem.initial[:, 0].to(torch.bfloat16), []
        for u in drives.unbind(1):
            z = torch.sigmoid(a * h + u[:, 0])
            r = torch.sigmoid(b * h + u[:, 1])
            h = (1 - z) * h + z * torch.tanh(e * (h * r) + u[:, 2])
            outputs.append(h)
        return torch.autograd.grad(torch.stack(outputs, 1), drives, problem.cotangent)

    ours_ms, loop_ms = milliseconds(captured(ours)), milliseconds(loop, 3, 1000.0)
    return {"size": str(size), "time": size.time, "ours_ms": ours_ms, "loop_ms": loop_ms}


def hgrn_row(size: Size) -> Row:
    """flash-linear-attention's linear recurrence `chunk_hgrn` of the same width."""
    from fla.ops.hgrn import chunk_hgrn

    shape = (size.batch, size.time, size.hidden)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = nn.functional.logsigmoid(torch.randn_like(x)).detach().requires_grad_()
    cotangent = torch.randn_like(x)

    def both() -> Any:
        return torch.autograd.grad(chunk_hgrn(x, g)[0], [x, g], cotangent)

    return {"size": str(size), "hgrn_both_ms": milliseconds(both)}


def measure(quick: bool = False) -> Iterator[tuple[str, Row]]:
    """Measure everything; yields (kind of row, row) as it goes.

    Args:
        quick: Only the recurrence at the sizes of the table.

    Raises:
        RuntimeError: No CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("pararnn bench measures on a CUDA device, and there is none.")
    rate = copy_gigabytes_per_second()
    yield "device", {"name": torch.cuda.get_device_name(), "copy_gigabytes_per_second": rate}
    for slow in (False, True):
        for cell in CELLS:
            for size in TABLE:
                yield "recurrence", recurrence_row(cell, size, slow, rate)
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
    for size in LENGTHS:
        yield "length", recurrence_row("ParaGRU", size, False, rate)
