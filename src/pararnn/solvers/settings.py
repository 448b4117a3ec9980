"""What a user can set about a solve, and what a solve reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Newton:
    """Multiple-shooting Newton over chunks of time.

    Time is cut into chunks that are stepped through at once; the states between chunks are the
    unknowns of Newton's method. `chunk=1` is the method of Danieli et al. 2025 (arXiv 2510.21450),
    one chunk is the sequential loop. Whatever the settings, the result is the sequential one: the
    first k chunks are exact after k iterations, and what has not converged after `max_iterations`
    is evaluated step by step.

    Args:
        tolerance: Converged when every state at a chunk end agrees with the guess that the next
            chunk was computed from to this, relative to its size where that is above 1. None: 1e-13
            in float64, 1e-6 in float32, and half the spacing at 1 in half precision.
        max_iterations: Iterations before the rest is evaluated step by step; None for as many as
            there are chunks, after which nothing is left.
        chunk: Steps per chunk, or "auto" to choose from shape, device and backend.
        damping: In [0, 1): the tangents are multiplied by 1 - damping, which leaves the solution
            alone and calms an iteration that overshoots.
    """

    tolerance: float | None = None
    max_iterations: int | None = None
    chunk: int | Literal["auto"] = "auto"
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}.")
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}.")
        if self.chunk != "auto" and (not isinstance(self.chunk, int) or self.chunk < 1):
            raise ValueError(f"chunk must be 'auto' or at least 1 step, got {self.chunk!r}.")
        if not 0 <= self.damping < 1:
            raise ValueError(f"damping must be in [0, 1), got {self.damping}.")

    def tolerance_for(self, dtype: torch.dtype) -> float:
        """The tolerance in force for states of a type."""
        if self.tolerance is not None:
            return self.tolerance
        default = {torch.float64: 1e-13, torch.float32: 1e-6}
        return default.get(dtype) or torch.finfo(dtype).eps / 2


STATUS = ("sequential", "converged", "completed step by step")
SEQUENTIAL, CONVERGED, COMPLETED = range(3)


@dataclass(frozen=True)
class SolveReport:
    """How the last forward pass of a layer went; reading a value waits for the device.

    Attributes:
        values: Float64 (parts, 4) on the device of the solve: iterations, residual, status and
            chunks of every part of the batch and channels that is solved by itself.
    """

    values: Tensor

    @property
    def iterations(self) -> int:
        """Passes over all chunks, in the part that needed most."""
        return int(self.values[:, 0].amax())

    @property
    def residual(self) -> float:
        """Largest disagreement at a chunk end, relative to the state's size where above 1.

        Infinite if iterations overflowed before the solve was completed step by step; NaN only if
        the states themselves are.
        """
        overflowed = self.values[:, 1].isnan() & (self.values[:, 2] == COMPLETED)
        return float(self.values[:, 1].masked_fill(overflowed, torch.inf).amax())

    @property
    def status(self) -> str:
        """One of `STATUS`."""
        return STATUS[int(self.values[:, 2].amax())]

    @property
    def chunks(self) -> int:
        """Chunks of time evaluated at once."""
        return int(self.values[:, 3].amax())

    def __str__(self) -> str:
        return (
            f"{self.status}: {self.chunks} chunks, {self.iterations} iterations, "
            f"residual {self.residual:.1e}"
        )
