"""What a solve reports."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from pararnn._notebook import table
from pararnn._words import counted
from pararnn.planning.settings import Solver

STATUS = ("sequential", "converged", "completed step by step")
SEQUENTIAL, CONVERGED, COMPLETED = range(3)


@dataclass(frozen=True)
class SolveReport:
    """How the last solve of a layer went. Reading a value is a host sync.

    `report[i]` is the report of part i alone, `len(report)` their number. The parts are the
    sequences of the batch, or with backend "triton" its tiles of sequences and channels.

    Attributes:
        values: Float64 (parts, 4) on the device of the solve: iterations, residual, status and
            number of chunks of every part.
    """

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: int) -> SolveReport:
        return SolveReport(self.values[part].unsqueeze(0))

    @property
    def iterations(self) -> int:
        """Passes over all chunks, in the part that needed most."""
        return int(self.values[:, 0].amax())

    @property
    def residual(self) -> float:
        """Largest disagreement at a chunk end, relative as `Solver.tolerance` says.

        Infinite if iterations overflowed before the solve was completed step by step; NaN only if
        the states themselves are.
        """
        overflowed = self.values[:, 1].isnan() & (self.values[:, 2] == COMPLETED)
        return float(self.values[:, 1].masked_fill(overflowed, torch.inf).amax())

    @property
    def status(self) -> str:
        """One of `STATUS`: the worst of all parts."""
        return STATUS[int(self.values[:, 2].amax())]

    @property
    def chunks(self) -> int:
        """Chunks of time evaluated at once."""
        return int(self.values[:, 3].amax())

    @property
    def failures(self) -> str:
        """The parts that did not converge, in words."""
        failed = (self.values[:, 2] == COMPLETED).nonzero().flatten().tolist()
        shown = ", ".join(map(str, failed[:8])) + (", ..." if len(failed) > 8 else "")
        if len(failed) == len(self) == 1:
            return "the solve did not converge"
        return f"{len(failed)} of {len(self)} parts of the batch ({shown}) did not converge"

    def __str__(self) -> str:
        return (
            f"{self.status}: {counted(self.chunks, 'chunk')}, "
            f"{counted(self.iterations, 'iteration')}, residual {self.residual:.1e}"
        )

    def _repr_html_(self) -> str:
        rows = [(self.status, self.chunks, self.iterations, f"{self.residual:.1e}")]
        return table(rows, header=("status", "chunks", "iterations", "residual"))


class ConvergenceError(RuntimeError):
    """A solve with `on_failure="raise"`, of the states or of their adjoints, did not converge.

    Attributes:
        report: How it went, by sequence.
    """

    def __init__(self, report: SolveReport, tolerance: float, backwards: bool = False) -> None:
        super().__init__(
            f"{'in the backward pass, ' if backwards else ''}{report.failures} after "
            f"{counted(report.iterations, 'iteration')}: the residual is {report.residual:.1e}, "
            "the tolerance "
            f"{tolerance:.1e}. Allow more iterations or "
            "longer chunks, look at pararnn.diagnose(rnn, x), or take the sequential result with "
            'on_failure="sequential".'
        )
        self.report = report


def act_on_failure(
    values: Tensor, settings: Solver, tolerance: float, backwards: bool = False
) -> None:
    """Warn or raise as the settings ask, if a report's values say that a part did not converge.

    Args:
        values: Of the report.
        settings: Of the solve.
        tolerance: The tolerance that held.
        backwards: Whether it was the solve of the adjoints.

    Raises:
        ConvergenceError: With `on_failure="raise"`.
    """
    if settings.on_failure == "sequential" or not (values[:, 2] == COMPLETED).any():
        return
    error = ConvergenceError(SolveReport(values), tolerance, backwards)
    if settings.on_failure == "raise":
        raise error
    warnings.warn(f"evaluated step by step, since {error}", stacklevel=2)
