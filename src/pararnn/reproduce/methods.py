"""Ways to evaluate a cell over a sequence: what Figures 1, 5 and 6 time beside each other."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pararnn import RNN, Newton, Sequential, cells
from pararnn.kernels.graphs import captured
from pararnn.planning.settings import Solver
from pararnn.testing.loop import loop

CELLS: dict[str, Callable[[int, int], nn.Module]] = {
    "ParaGRU": cells.ParaGRUCell,
    "ParaLSTM": cells.ParaLSTMCell,
}
TOLERANCE = 1e-4  # of outputs and gradients in float32, relative to the largest
_MAMBA_STATE = 16  # entries per channel: the default of its authors


class Unavailable(RuntimeError):
    """The method cannot run here; the message says why."""


Layer = Callable[[Tensor], Tensor]
"""A layer's outputs (batch, time, channels) from its inputs (batch, time, channels)."""


@dataclass(frozen=True)
class Method:
    """A way to evaluate a layer.

    Attributes:
        name: In tables and plots.
        means: What it is, and its counterpart in the paper.
        make: The layer, from a cell on its device.
        exact: Whether it evaluates the cell itself, so that its results can be compared.
        graph: Whether it runs as a CUDA graph.
        kernels: Whether it has kernels to be compiled.
    """

    name: str
    means: str
    make: Callable[[nn.Module], nn.Module]
    exact: bool = True
    graph: bool = False
    kernels: bool = False


class _Loop(nn.Module):
    """One step after another in PyTorch, from a zero state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        size: Any = self.cell.hidden_size
        count = int(getattr(self.cell, "num_components", 1))
        zeros = tuple(x.new_zeros(len(x), size) for _ in range(count))
        return loop(self.cell, x, zeros if count > 1 else zeros[0])


class _Mamba(nn.Module):
    """Mamba's selective scan and the projections of its parameters: no gate, no convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rank = math.ceil(width / 16)
        self.parameters_of = nn.Linear(width, self.rank + 2 * _MAMBA_STATE, bias=False)
        self.step_size = nn.Linear(self.rank, width)
        decay = torch.arange(1, _MAMBA_STATE + 1, dtype=torch.float32).repeat(width, 1)
        self.log_decay = nn.Parameter(decay.log())
        self.skip = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        sizes = [self.rank, _MAMBA_STATE, _MAMBA_STATE]
        low, into, out = self.parameters_of(x).split(sizes, -1)
        rate = F.linear(low, self.step_size.weight)
        channels_first = (part.transpose(1, 2).contiguous() for part in (x, rate, into, out))
        u, delta, b, c = channels_first
        y = selective_scan_fn(
            u,
            delta,
            -self.log_decay.exp(),
            b,
            c,
            self.skip,
            delta_bias=self.step_size.bias,
            delta_softplus=True,
        )
        return (y.transpose(1, 2),)


def _layer(cell: nn.Module, backend: str = "auto", solver: Solver | None = None) -> nn.Module:
    return RNN(cell, backend=backend, solver=solver)


def _pytorch_layer(cell: nn.Module) -> nn.Module:
    """`nn.GRU` or `nn.LSTM` of the same width: other cells, with full recurrent matrices."""
    kind = nn.LSTM if int(getattr(cell, "num_components", 1)) > 1 else nn.GRU
    size: Any = cell.hidden_size
    return kind(size, size, batch_first=True)


def _mamba(cell: nn.Module) -> nn.Module:
    if importlib.util.find_spec("mamba_ssm") is None:
        raise Unavailable("mamba_ssm is not installed; it needs CUDA (extra mamba)")
    if not torch.cuda.is_available():
        raise Unavailable("mamba_ssm needs CUDA")
    size: Any = cell.hidden_size
    return _Mamba(size)


_ALL = (
    Method("loop", "one step after another in PyTorch, from Python (the paper: Seq)", _Loop),
    Method("loop in a graph", "the same loop as one CUDA graph", _Loop, graph=True),
    Method(
        "Newton in PyTorch",
        "Newton's method with chunks of one step in PyTorch operations (the paper: PyTorch)",
        functools.partial(_layer, backend="torch", solver=Newton(chunk=1)),
    ),
    Method(
        "chunks in PyTorch",
        "the same backend with chunks and method as the library chooses",
        functools.partial(_layer, backend="torch"),
    ),
    Method(
        "Newton in kernels",
        "the paper's algorithm, chunks of one step, in our kernels, which are made for longer ones "
        "(the paper: Fused)",
        functools.partial(_layer, solver=Newton(chunk=1)),
        kernels=True,
    ),
    Method(
        "one chunk in a kernel",
        "one step after another in one generated kernel",
        functools.partial(_layer, solver=Sequential()),
        kernels=True,
    ),
    Method("library", "what the library does by default", _layer, kernels=True),
    Method(
        "PyTorch layer",
        "nn.GRU or nn.LSTM, by cuDNN on a GPU: other cells, with full recurrent matrices",
        _pytorch_layer,
        exact=False,
    ),
    Method(
        "Mamba",
        "mamba_ssm's selective scan with its projections, a linear recurrence (the paper: Mamba)",
        _mamba,
        exact=False,
    ),
)
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


class Problem:
    """A cell, random inputs, and the exact results.

    Args:
        cell: A name in `CELLS`.
        batch: Sequences.
        time: Steps.
        width: Channels.
        device: Where it is evaluated.
    """

    def __init__(self, cell: str, batch: int, time: int, width: int, device: torch.device) -> None:
        torch.manual_seed(0)
        self.cell = CELLS[cell](width, width).to(device)
        self.x = torch.randn(batch, time, width).to(device).requires_grad_()
        self.exact: tuple[Tensor, Tensor] | None = None

    def call(self, layer: nn.Module, way: str) -> Callable[[], Any]:
        """The work that is timed: "forward", or "both", with gradients of the sum of squares."""
        if way == "forward":

            def forward() -> Tensor:
                with torch.no_grad():
                    return layer(self.x)[0]

            return forward
        inputs = [self.x, *layer.parameters()]

        def both() -> Any:
            y = layer(self.x)[0]
            return y.detach(), torch.autograd.grad((y * y).sum(), inputs)

        return both

    def error(self, layer: nn.Module) -> float:
        """Largest error of outputs and of the gradient of x, relative to the largest of each."""
        if self.exact is None:
            self.exact = self._reference()
        y = layer(self.x)[0]
        (gradient,) = torch.autograd.grad((y * y).sum(), [self.x])
        pairs = zip((y.detach(), gradient), self.exact, strict=True)
        return max(float((a.cpu() - e).abs().max() / e.abs().max()) for a, e in pairs)

    def _reference(self) -> tuple[Tensor, Tensor]:
        """In float64 on the CPU: the loop, or where it takes long one chunk in C."""
        cell = copy.deepcopy(self.cell).double().cpu()
        x = self.x.detach().double().cpu().requires_grad_()
        backend = "c" if x.shape[1] > 2**9 else None
        layer = _Loop(cell) if backend is None else _layer(cell, backend, Sequential())
        y = layer(x)[0]
        return y.detach(), torch.autograd.grad((y * y).sum(), [x])[0]


def prepared(problem: Problem, method: Method, way: str) -> Callable[[], Any]:
    """The work to time, its results compared where the method evaluates the cell itself.

    Raises:
        Unavailable: It cannot run here.
        AssertionError: Its results are further from float64 than `TOLERANCE`.
    """
    device = problem.x.device
    if method.graph and device.type != "cuda":
        raise Unavailable("a CUDA graph needs a GPU")
    layer = method.make(problem.cell).to(device)
    if method.exact and not method.graph:  # as a graph it is the same loop
        error = problem.error(layer)
        assert error <= TOLERANCE, f"error {error:.1e} against float64; it is not timed"
    call = problem.call(layer, way)
    return captured(call) if method.graph else call
