"""Times of the recurrence alone, forward and backward.

Results are compared with float64 before they are timed; the loop, which is here to be compared in
time, is not.
"""

from __future__ import annotations

from typing import Any

import torch

import pararnn
from pararnn.bench.problem import TOLERANCE, Problem, Row, Size
from pararnn.bench.timing import milliseconds
from pararnn.kernels.graphs import captured


def recurrence_row(cell: str, size: Size, slow: bool, rate: float) -> Row:
    """One size of a recurrence in bfloat16: correct, then timed.

    `extra_memory` is the peak beyond inputs, outputs and their gradients, relative to these.

    Raises:
        AssertionError: A result is further from float64 than `TOLERANCE`.
    """
    problem = Problem(cell, size, slow, torch.bfloat16)
    plan = problem.plan("triton")
    torch.cuda.reset_peak_memory_stats()
    *states, report = problem.forward(plan)
    grads = problem.backward(plan, states)
    extra = torch.cuda.max_memory_allocated() / torch.cuda.memory_allocated() - 1
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
        "extra_memory": extra,
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


def loop_row(size: Size) -> Row:
    """The plain PyTorch loop over a ParaGRU's recurrence against ours, forward and backward."""
    problem = Problem("ParaGRU", size, False, torch.bfloat16)
    plan = problem.plan("triton")
    *states, _ = problem.forward(plan)

    def ours() -> Any:
        return problem.forward(plan), problem.backward(plan, states)

    drives = problem.drives.detach().requires_grad_()
    a, b, e = problem.weights.to(torch.bfloat16)

    def loop() -> Any:
        h, outputs = problem.initial[:, 0].to(torch.bfloat16), []
        for u in drives.squeeze(3).unbind(1):
            z = torch.sigmoid(a * h + u[:, 0])
            r = torch.sigmoid(b * h + u[:, 1])
            h = (1 - z) * h + z * torch.tanh(e * (h * r) + u[:, 2])
            outputs.append(h)
        return torch.autograd.grad(torch.stack(outputs, 1), drives, problem.cotangent)

    ours_ms, loop_ms = milliseconds(captured(ours)), milliseconds(loop, 3, 1000.0)
    return {"size": str(size), "time": size.time, "ours_ms": ours_ms, "loop_ms": loop_ms}
