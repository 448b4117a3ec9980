r"""Multiple shooting: the one driver of all recurrences and of their adjoints.

A chunk maps the state before it to the state after it, $s_{k+1} = \Phi_k(s_k)$. From guesses
$s$, one iteration runs all chunks at once and corrects every guess through the chunks' tangents
$D_k = \Phi_k'(s_k)$:

$$\delta_{k+1} = \Phi_k(s_k) - s_{k+1} + D_k \delta_k, \qquad
s_{k+1} \gets \Phi_k(s_k) + D_k \delta_k.$$

This is Newton's method. Other methods replace $D_k$ by something cheaper (`_coupling`). The adjoint
is the same problem with time reversed and linear chunks, so `solve` serves both: each is a
`System`. The first guess comes from a warm-up: the last steps of the previous chunk, run from the
initial state.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from pararnn.planning.plan import Way
from pararnn.planning.settings import Solver
from pararnn.solvers.report import COMPLETED, CONVERGED, SEQUENTIAL

# The residual of a channel whose states are below 1 / SMALL counts relative to SMALL times the
# largest of them. A small factor costs ordinary cells an iteration: with 4, a slow ParaLSTM in
# bfloat16 (8 x 2,048 x 1,024) takes 3 and 1.6 times as long, with 16 it takes 2, as with 1e30.
SMALL = 16.0


Residual = Callable[[Tensor, Tensor], Tensor]


class System(abc.ABC):
    """A recurrence over time, cut into chunks, as `solve` sees it: the states or their adjoints.

    States of chunks are (batch, chunks, n, groups): the n entries of a group reach each other. The
    order of chunks is that of the run: those of adjoints begin with the last times.

    Args:
        start: The state before the first step, (batch, components, hidden).
        chunk: Steps per chunk.
        chunks: Chunks of time.
        residual: The residual of each sequence, (batch,), from ends of chunks and the starts of
            the next ones.
        settles: Whether to run all chunks once and leave it to `complete` which sequences
            converged. So nothing waits for the device.
    """

    def __init__(
        self, start: Tensor, chunk: int, chunks: int, residual: Residual, settles: bool = False
    ) -> None:
        self.start, self.chunk, self.chunks = start, chunk, chunks
        self.residual, self.settles = residual, settles

    def everywhere(self) -> Tensor:
        """The first states of all chunks if each has the one that time starts from."""
        return self.start.unsqueeze(1).expand(-1, self.chunks, -1, -1)

    @abc.abstractmethod
    def run(self, first: Tensor, last: int | None = None) -> tuple[list[Tensor], Tensor]:
        """Run all chunks.

        Args:
            first: The states before their first steps.
            last: How many of their last steps to run, without a result; None: all.

        Returns:
            The result, which the driver only hands on, and the states after the last steps.
        """

    @abc.abstractmethod
    def tangents(self, first: Tensor, found: list[Tensor]) -> Tensor:
        """d(last state) / d(first state) of all chunks, (batch, chunks, n, n, groups).

        Args:
            first: The first states.
            found: The result of a run from them.
        """

    @abc.abstractmethod
    def step_by_step(self) -> list[Tensor]:
        """The result of a run in one chunk."""

    def complete(self, found: list[Tensor], converged: Tensor) -> list[Tensor]:
        """The result if not all have converged.

        Args:
            found: The result of the last run, which may be overwritten.
            converged: Boolean (batch,).
        """
        return self.step_by_step()


_noted: ContextVar[list[float] | None] = ContextVar("residuals", default=None)


@contextlib.contextmanager
def noted_residuals() -> Iterator[list[float]]:
    """The largest residual after each iteration of the solves within, as they go on."""
    found: list[float] = []
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def solve(system: System, way: Way) -> tuple[list[Tensor], Tensor | None]:
    """Solve a system: warm-up, first guess, iterations, and completion step by step.

    Args:
        system: The system.
        way: The settings in force.

    Returns:
        The result, and the values of the report; None if there is one chunk.
    """
    if system.chunks == 1:
        return system.step_by_step(), None
    everywhere = system.everywhere()
    _, ends = system.run(everywhere, way.warm_up)
    contraction = None
    if way.give_up:
        moved = torch.inf
        if way.solver.coupling == "zero":
            moved = float(system.residual(ends[:, :-1], everywhere[:, 1:]).amax())
        contraction = Contraction(moved, way.warm_up / system.chunk)
    guess = torch.cat([everywhere[:, :1], ends[:, :-1]], 1)
    return _iterate(system, guess, way.solver, way.tolerance, contraction)


def state_residual(ends: Tensor, starts: Tensor, size: int = 1) -> Tensor:
    """The largest mismatch between chunks of each sequence; NaN if a state is NaN.

    The mismatch of an entry is relative to its size, at least 1; in a component whose entries are
    all small, to these. So an entry that overshoots never hides an error elsewhere.

    Args:
        ends: (batch, chunks, components, hidden), or vectors (batch, chunks, n, groups).
        starts: Likewise.
        size: Channels of a group.
    """
    apart = torch.where(ends == starts, 0.0, (ends - starts).abs() / ends.abs().clamp_min(1.0))
    apart, largest = (x.unflatten(2, (-1, size)).amax((1, 3)) for x in (apart, ends.abs()))
    scale = (SMALL * largest).clamp(torch.finfo(ends.dtype).tiny, 1.0)
    return (apart / scale).amax((1, 2))


def adjoint_residual(ends: Tensor, starts: Tensor) -> Tensor:
    """The largest mismatch of adjoints, relative to the largest finite adjoint of the group."""
    sizes = ends.abs().masked_fill(~ends.isfinite(), 0.0)
    apart = (ends - starts).abs() / sizes.amax((1, 2), keepdim=True)
    return torch.where(ends == starts, 0.0, apart).amax((1, 2, 3))


@dataclass(frozen=True)
class Contraction:
    """Recognises iterations that will not converge, by the factor that shrinks the residual.

    Attributes:
        residual: The last residual. At first that of the states before the warm-up, or infinity.
        part: Steps since that residual, as a part of a chunk: the cell could forget for as long.
    """

    residual: float
    part: float

    def is_hopeless(self, residual: float, left: int, tolerance: float, kind: str) -> bool:
        """Whether `left` more iterations will not reach the tolerance from this residual.

        Without tangents, the residual shrinks by the same factor in every chunk. With tangents, it
        shrinks ever faster once it begins to.
        """
        if kind != "zero":
            return not residual < self.residual
        factor = min(1.0, residual / self.residual) if self.residual else 1.0
        return not residual * factor ** (left / self.part) <= tolerance


def _iterate(
    system: System,
    guess: Tensor,
    settings: Solver,
    tolerance: float,
    contraction: Contraction | None,
) -> tuple[list[Tensor], Tensor]:
    """Iterate until every chunk ends where the next one starts, or complete step by step.

    Args:
        system: The system.
        guess: First states; those of the first chunk are exact.
        settings: Coupling, damping, iterations.
        tolerance: The tolerance.
        contraction: The contraction before the first iteration. It stops the loop once the
            remaining iterations will not reach the tolerance. None: never stop early.

    Returns:
        The result, and the values of the report: the iterations until convergence, or all
        iterations; the residual of the first states of the last sweep.
    """
    chunks, noted = system.chunks, _noted.get()
    most = min(settings.max_iterations or chunks, chunks)
    iterations = guess.new_full(guess.shape[:1], most, dtype=torch.float64)
    for iteration in range(1, most + 1):
        found, ends = system.run(guess)
        residual = system.residual(ends[:, :-1], guess[:, 1:])
        if noted is not None:
            noted.append(float(residual.amax()))
        converged = residual <= tolerance
        iterations = torch.where(converged, iterations.clamp_max(iteration), iterations)
        if system.settles:
            break
        if bool(converged.all()):  # a host sync
            return found, _report(iterations, residual, converged, chunks)
        if iteration == chunks:  # every chunk has started from its exact state
            return found, _report(iterations, residual, torch.ones_like(converged), chunks)
        if contraction is not None:
            now = float(residual.amax())
            if contraction.is_hopeless(now, most - iteration, tolerance, settings.coupling):
                iterations = torch.where(converged, iterations, iteration)
                break
            contraction = Contraction(now, 1.0)
        if iteration < most:
            if settings.coupling == "zero":
                guess = torch.cat([guess[:, :1], ends[:, :-1]], 1)
            else:
                coupling = _coupling(settings.coupling, system, guess, found)
                guess = newton_update(ends, guess, coupling, settings.damping)
    found = system.complete(found, converged)
    return found, _report(iterations, residual, converged, chunks)


def _report(iterations: Tensor, residual: Tensor, converged: Tensor, chunks: int) -> Tensor:
    status = torch.where(converged, CONVERGED, COMPLETED)
    count = torch.full_like(iterations, chunks)
    return torch.stack([iterations, residual.double(), status.double(), count], 1)


def _coupling(kind: str, system: System, guess: Tensor, found: list[Tensor]) -> Tensor:
    """The coupling of chunks: matrices shaped like tangents, or factors shaped like states."""
    if kind == "tangent":
        return system.tangents(guess, found)
    if kind == "diagonal":
        return system.tangents(guess, found).diagonal(dim1=2, dim2=3).transpose(2, 3)
    assert kind == "identity"
    return torch.ones_like(guess)


def newton_update(ends: Tensor, guess: Tensor, coupling: Tensor, damping: float) -> Tensor:
    """The next first states of all chunks.

    If the first state of a chunk did not change, the next chunk starts from its end. The coupling
    of a chunk is its tangent, or one factor for every entry of its state. A coupling that overflows
    is left out (Jacobi). So every iteration still makes one more chunk exact.
    """
    coupling = coupling[:, :-1] * (1.0 - damping) if damping else coupling[:, :-1]
    mismatch = torch.where(ends == guess.roll(-1, 1), 0.0, ends - guess.roll(-1, 1))[:, :-1]
    delta = _scan(coupling, _finite(mismatch))
    before = torch.cat([torch.zeros_like(delta[:, :1]), delta[:, :-1]], 1)
    return torch.cat([guess[:, :1], ends[:, :-1] + _finite(_apply(coupling, before))], 1)


def _scan(coupling: Tensor, offsets: Tensor) -> Tensor:
    """All `x_k = coupling_k x_{k-1} + offsets_k` from x_{-1} = 0, in log2(chunks) rounds."""
    shift = 1
    while shift < offsets.shape[1]:
        offsets = torch.cat(
            [
                offsets[:, :shift],
                offsets[:, shift:] + _finite(_apply(coupling[:, shift:], offsets[:, :-shift])),
            ],
            1,
        )
        product = _product(coupling[:, shift:], coupling[:, :-shift])
        coupling = torch.cat([coupling[:, :shift], _finite(product)], 1)
        shift *= 2
    return offsets


def _product(later: Tensor, earlier: Tensor) -> Tensor:
    if later.dim() == 4:
        return later * earlier
    return torch.einsum("bkijh,bkjmh->bkimh", later, earlier)


def _apply(coupling: Tensor, vectors: Tensor) -> Tensor:
    if coupling.dim() == 4:
        return coupling * vectors
    return torch.einsum("bkijh,bkjh->bkih", coupling, vectors)


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)


def sequential_report(batch: int, device: torch.device) -> Tensor:
    """The values of a report for sequences that were evaluated step by step."""
    values = torch.ones((batch, 4), dtype=torch.float64, device=device)
    values.narrow(1, 1, 2).fill_(SEQUENTIAL)  # 0, as the residual; a CUDA graph can hold that
    return values
