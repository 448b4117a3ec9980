"""The settings of a solve that a user may choose."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch

from pararnn._whole import check_whole

Failure = Literal["sequential", "warn", "raise"]
_DEFAULT_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}


@dataclass(frozen=True)
class Solver:
    """Base of all methods: multiple shooting over chunks of time.

    A solver cuts time into chunks and steps through all of them at once. The states between chunks
    are the unknowns of an iteration. The methods differ in how they carry a correction of a chunk's
    first state to its last state. Every method gives the sequential result: the first k chunks are
    exact after k iterations, and `max_iterations` is followed by an evaluation step by step.
    Gradients are exact at the solution. Gonzalez et al. 2025 (arXiv 2509.21716) describe the
    family.

    Args:
        tolerance: Largest allowed difference between a state at the end of a chunk and the first
            state of the next chunk. It is relative to the state's size above 1. If all states of a
            channel are below 1/16, it is relative to 16 times the largest of them, down to the
            smallest normal number. For adjoints it is relative to the largest of their channel. In
            mixing cells, a component of a group takes the place of a channel. None: 1e-13 in
            float64, 1e-6 in float32, half the spacing at 1 in half precision.
        max_iterations: Iterations before the rest is evaluated step by step; None: the number of
            chunks, which always suffices.
        chunk: Steps per chunk, or "auto" to choose from shape, device and backend.
        on_failure: Reaction to `max_iterations` without convergence, forwards or backwards:
            "sequential" evaluates step by step, "warn" does that and warns, "raise" raises
            `ConvergenceError`.
    """

    coupling: ClassVar[Literal["tangent", "diagonal", "identity", "zero"]]
    damping: ClassVar[float] = 0.0

    tolerance: float | None = None
    max_iterations: int | None = None
    chunk: int | Literal["auto"] = "auto"
    on_failure: Failure = field(default="sequential", kw_only=True)

    def __post_init__(self) -> None:
        if self.tolerance is not None and not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}.")
        if self.max_iterations is not None:
            check_whole(max_iterations=self.max_iterations)
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}.")
        if self.chunk != "auto" and (not isinstance(self.chunk, int) or self.chunk < 1):
            raise ValueError(f"chunk must be 'auto' or at least 1 step, got {self.chunk!r}.")
        if self.on_failure not in get_args(Failure):
            choices = ", ".join(map(repr, get_args(Failure)))
            raise ValueError(f"on_failure must be one of {choices}, got {self.on_failure!r}.")

    def tolerance_for(self, dtype: torch.dtype) -> float:
        """The tolerance for states of a type."""
        if self.tolerance is not None:
            return self.tolerance
        return _DEFAULT_TOLERANCE.get(dtype) or torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Damped(Solver):
    """Methods that can be damped.

    Args:
        damping: In [0, 1): multiplies the coupling by 1 - damping. This keeps the solution and
            damps an iteration that overshoots (Gonzalez et al. 2024, arXiv 2407.19115).
    """

    damping: float = 0.0  # type: ignore[misc] # of every instance here

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < 1:
            raise ValueError(f"damping must be in [0, 1), got {self.damping}.")


@dataclass(frozen=True)
class Newton(Damped):
    """Newton's method: chunks are coupled by their full tangents.

    It needs the fewest iterations. `chunk=1` is the method of Danieli et al. 2025 (arXiv
    2510.21450); one chunk is the sequential loop. In a mixing cell, the tangent of a chunk costs
    one run through the chunk for every channel of a head. The arguments are those of `Solver` and
    `Damped`.
    """

    coupling = "tangent"


@dataclass(frozen=True)
class QuasiNewton(Damped):
    """Chunks are coupled by the diagonal of their tangents: quasi-DEER with chunks.

    In a mixing cell an iteration costs as much as one of `Newton`, but its memory is not quadratic
    in the number of channels. Gonzalez et al. 2024, arXiv 2407.19115. The arguments are those of
    `Solver` and `Damped`.
    """

    coupling = "diagonal"


@dataclass(frozen=True)
class Picard(Damped):
    """Chunks are coupled by the identity: a correction reaches the end of a chunk unchanged.

    Good for states that hardly change within a chunk. Gonzalez et al. 2025, arXiv 2509.21716. The
    arguments are those of `Solver` and `Damped`.
    """

    coupling = "identity"


@dataclass(frozen=True)
class Jacobi(Solver):
    """Chunks are not coupled: each starts from the previous end of the chunk before it.

    An iteration is one pass and makes the warm-up one chunk longer. Good for cells that forget
    within a few chunks. Gonzalez et al. 2025, arXiv 2509.21716. The arguments are those of
    `Solver`.
    """

    coupling = "zero"


@dataclass(frozen=True)
class Sequential(Solver):
    """Step by step: all of time is one chunk. It has no settings."""

    coupling = "zero"

    tolerance: None = field(default=None, init=False)
    max_iterations: None = field(default=None, init=False)
    chunk: int = field(default=sys.maxsize, init=False, repr=False)
    on_failure: Failure = field(default="sequential", init=False)
