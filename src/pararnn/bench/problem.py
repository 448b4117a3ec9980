"""The problems that are timed: cells, sizes and random inputs.

The limit of a size is the time in which the device copies as much as the recurrence must read and
write: every drive and state once forward; drives, states, their gradients backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pararnn
from pararnn.kernels import operators
from pararnn.planning.plan import BackendChoice
from pararnn.tracing.step import Layout, step_of_channels


class InventedCell(nn.Module):
    """A cell that nobody has published, with as many drives, weights and gates as ParaGRU."""

    num_components = 1

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.input_size = self.hidden_size = hidden_size
        self.projection = nn.Linear(hidden_size, 3 * hidden_size)
        self.weights = nn.Parameter(torch.rand(3, hidden_size) - 0.5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """One step: mixes what two activations make of the state by a gate that sees both."""
        u, v, w = self.projection(x).chunk(3, -1)
        a, b, e = self.weights
        kept = h * torch.sigmoid(u + a * h)
        new = torch.tanh(v + b * h)
        gate = torch.sigmoid(w + e * (kept - new))
        return kept + gate * (new - kept)


CELLS: dict[str, Callable[[int], nn.Module]] = {
    "ParaGRU": lambda size: pararnn.cells.ParaGRUCell(size, size),
    "ParaLSTM": lambda size: pararnn.cells.ParaLSTMCell(size, size),
    "invented": InventedCell,
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


Row = dict[str, Any]


class Problem:
    """Random drives for a cell's recurrence, and how to run it forward and backward."""

    def __init__(self, cell: str, size: Size, slow: bool, dtype: torch.dtype) -> None:
        self.module = CELLS[cell](size.hidden)
        self.size = size
        rnn = pararnn.RNN(self.module.to("cuda"), backend="triton")
        self.traced = rnn.runner().traced
        recurrence = self.traced.step.recurrence
        assert recurrence is not None
        self.components = recurrence.num_components
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (size.batch, size.time, recurrence.num_drives, 1, size.hidden)
        drives = torch.randn(shape, device="cuda", generator=generator, dtype=dtype)
        if slow:
            drives[:, :, 0, :, ::10] += SLOW[cell]
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
        recurrence = self.traced.step.recurrence
        assert recurrence is not None
        layout = Layout(
            tuple((0, i) for i in range(recurrence.num_drives)),
            tuple((0, i) for i in range(recurrence.num_coefficients)),
        )
        return operators.register(
            step_of_channels(recurrence, layout), BackendChoice(backend, "asked for"), solver
        )

    def forward(self, plan: str) -> list[Tensor]:
        """States and the report."""
        with torch.no_grad():
            return torch.ops.pararnn.solve([self.drives, self.weights], self.initial, None, plan)

    def backward(self, plan: str, states: list[Tensor]) -> list[Tensor]:
        """Gradients of drives, coefficients and initial states."""
        grads = [self.cotangent] + [None] * (self.components - 1)
        with torch.no_grad():
            given = [self.drives, self.weights], self.initial, None
            return torch.ops.pararnn.adjoint(*given, states, grads, plan)

    def check(self, states: list[Tensor], grads: list[Tensor]) -> float:
        """Largest relative error on some channels of two rows, against float64 on the CPU."""
        rows = sorted({0, self.size.batch - 1})
        some = torch.arange(0, self.size.hidden, max(1, self.size.hidden // _REFERENCE_CHANNELS))
        take = lambda t: t[..., some.to(t.device)][rows].double().cpu()  # noqa: E731
        plan = self.plan("c", pararnn.Newton(chunk=self.size.time))
        given = (
            [take(self.drives), self.weights[:, some.to("cuda")].double().cpu()],
            take(self.initial),
            None,
        )
        exact = torch.ops.pararnn.solve(*given, plan)[:-1]
        cotangents = [take(self.cotangent)] + [None] * (self.components - 1)
        gradients = torch.ops.pararnn.adjoint(*given, exact, cotangents, plan)
        pairs = [(take(s), e) for s, e in zip(states, exact, strict=True)]
        pairs += [(take(grads[0]), gradients[0]), (take(grads[-1]), gradients[-1])]
        return max(float((a - e).abs().max() / e.abs().max().clamp_min(1e-30)) for a, e in pairs)
