r"""Multiple shooting for a recurrence and for its adjoint.

A chunk maps the state before it to the state after it, $s_{k+1} = \Phi_k(s_k)$. From guesses
$s$, one iteration runs all chunks at once and corrects every guess through the chunks' tangents
$D_k = \Phi_k'(s_k)$:

$$\delta_{k+1} = \Phi_k(s_k) - s_{k+1} + D_k \delta_k, \qquad
s_{k+1} \gets \Phi_k(s_k) + D_k \delta_k.$$

This is Newton's method. Other methods replace $D_k$ by something cheaper (`_coupling`). The adjoint
is the same problem with time reversed and linear chunks, so one loop serves both. The first guess
comes from a warm-up: the last steps of the previous chunk, run from the initial state.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pararnn.planning.costs import COSTS
from pararnn.planning.settings import Solver
from pararnn.solvers.problem import Problem
from pararnn.solvers.report import COMPLETED, CONVERGED, SEQUENTIAL, act_on_failure
from pararnn.tracing.derivatives import Recurrence

# The residual of a channel whose states are below 1 / SMALL counts relative to SMALL times the
# largest of them. A small factor costs ordinary cells an iteration: with 4, a slow ParaLSTM in
# bfloat16 (8 x 2,048 x 1,024) takes 3 and 1.6 times as long, with 16 it takes 2, as with 1e30.
SMALL = 16.0


@dataclass(frozen=True)
class Gradients:
    """Where a backward pass writes.

    Attributes:
        drives: One (batch, time, hidden) per drive, last stride 1.
        coefficients: Float64 (batch, chunks, coefficients, hidden), to be summed over the first
            two.
        initial: (chunks, rows, components, hidden), zeros, to be summed over the first.
    """

    drives: Sequence[Tensor]
    coefficients: Tensor
    initial: Tensor


class ShootingBackend(abc.ABC):
    """A `Backend` that evaluates chunks and leaves the iteration to this module.

    All tensors of its problems are in the type of the arithmetic. `boundary`, `ends`, `incoming`
    and `outgoing` are (batch, chunks, components, hidden).
    """

    takes_heads = False
    recurrence: Recurrence
    compile_s = 0.0

    @abc.abstractmethod
    def auto_chunk(self, batch: int, time: int, hidden: int) -> int:
        """The chunk length for `Newton(chunk="auto")`."""

    @abc.abstractmethod
    def forward(
        self, problem: Problem, boundary: Tensor, states: Sequence[Tensor] | None, limit: int
    ) -> Tensor:
        """Step through the last `limit` steps of every chunk from `boundary`; return the ends.

        With `states`, one (batch, time, hidden) per component, also write every state there.
        """

    @abc.abstractmethod
    def tangent(self, problem: Problem, boundary: Tensor) -> Tensor:
        """d(end) / d(boundary) of every chunk, (batch, chunks, components, components, hidden)."""

    @abc.abstractmethod
    def backward(
        self,
        problem: Problem,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
        incoming: Tensor,
        gradients: Gradients | None,
        limit: int,
    ) -> Tensor:
        """Step back through the first `limit` steps of every chunk; return the adjoint before it.

        With `gradients`, also write them.
        """

    def parts(self, problem: Problem) -> int:
        """See `Backend.parts`."""
        return problem.batch

    def solve(self, problem: Problem, settings: Solver) -> tuple[list[Tensor], Tensor]:
        """See `Backend.solve`."""
        states, report = solve(self, *self._prepared(problem, settings))
        kept_in = problem.state_dtype
        return [s.to(kept_in) for s in states], report

    def solve_adjoint(
        self,
        problem: Problem,
        settings: Solver,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
        grad_drives: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.solve_adjoint`."""
        dtype = problem.dtype
        targets = [g if g.dtype is dtype else torch.empty_like(g, dtype=dtype) for g in grad_drives]
        found = solve_adjoint(
            self,
            *self._prepared(problem, settings),
            [s.to(dtype).contiguous() for s in states],
            [None if g is None else g.to(dtype).contiguous() for g in grad_states],
            targets,
        )
        for gradient, target in zip(grad_drives, targets, strict=True):
            if gradient is not target:
                gradient.copy_(target)
        return found.coefficients.sum((0, 1)), found.initial.sum(0)

    def _prepared(self, problem: Problem, settings: Solver) -> tuple[Problem, Solver, float]:
        """The problem in the type of the arithmetic and in chunks, the settings, the tolerance."""
        chunk = settings.chunk
        if chunk == "auto":
            chunk = self.auto_chunk(problem.batch, problem.time, problem.hidden)
        tolerance = settings.tolerance_for(problem.state_dtype)
        return problem.converted(min(int(chunk), problem.time)), settings, tolerance


def solve(
    backend: ShootingBackend, problem: Problem, settings: Solver, tolerance: float
) -> tuple[list[Tensor], Tensor]:
    """Evaluate a recurrence, cut into `problem.chunk` steps.

    Returns:
        The states, one (batch, time, hidden) per component, and the report's values
        (iterations, residual, status, chunks).
    """
    drive = problem.drives[0]
    shape = (problem.batch, problem.time, problem.hidden)
    states = [drive.new_empty(shape) for _ in range(problem.recurrence.num_components)]
    first = problem.first_states().unsqueeze(1)
    if problem.chunks == 1:
        backend.forward(problem, first.contiguous(), states, problem.time)
        return states, sequential_report(problem.batch, drive.device)
    everywhere = first.expand(-1, problem.chunks, -1, -1).contiguous()
    ends = backend.forward(problem, everywhere, None, min(COSTS.warm_up, problem.chunk))
    guess = torch.cat([first, ends[:, :-1]], 1)
    progress = shoot(
        lambda s: backend.forward(problem, s, states, problem.chunk),
        lambda s: backend.tangent(problem, s),
        guess,
        settings,
        tolerance,
    )
    if not progress.all_converged:
        whole = problem.in_one_chunk()
        backend.forward(whole, first.contiguous(), states, whole.time)
    return states, progress.report()


def solve_adjoint(
    backend: ShootingBackend,
    problem: Problem,
    settings: Solver,
    tolerance: float,
    states: Sequence[Tensor],
    grad_states: Sequence[Tensor | None],
    grad_drives: Sequence[Tensor],
) -> Gradients:
    """Gradients of all inputs of a recurrence, from those of its states.

    `grad_drives`, laid out like the drives, receives the gradients of the drives.
    """
    drive, recurrence = problem.drives[0], problem.recurrence
    components, chunks = recurrence.num_components, problem.chunks
    sums = (problem.batch, chunks, recurrence.num_coefficients, problem.hidden)
    gradients = Gradients(
        grad_drives,
        drive.new_empty(sums, dtype=torch.float64),
        drive.new_zeros((chunks, *problem.initial.shape)),
    )
    zeros = drive.new_zeros((problem.batch, chunks, components, problem.hidden))
    if chunks == 1:
        backend.backward(problem, states, grad_states, zeros, gradients, problem.time)
        return gradients

    def sweep(incoming: Tensor) -> Tensor:
        gradients.initial.zero_()
        flipped = incoming.flip(1).contiguous()
        out = backend.backward(problem, states, grad_states, flipped, gradients, problem.chunk)
        return out.flip(1)

    def tangents(_: Tensor) -> Tensor:
        ends = torch.stack([s[:, problem.chunk - 1 :: problem.chunk] for s in states], 2)
        first = problem.first_states().unsqueeze(1)
        boundary = torch.cat([first, ends[:, : chunks - 1]], 1).contiguous()
        return backend.tangent(problem, boundary).transpose(2, 3).flip(1)

    limit = min(COSTS.warm_up, problem.chunk)
    out = backend.backward(problem, states, grad_states, zeros, None, limit).flip(1)
    guess = torch.cat([zeros[:, :1], out[:, :-1]], 1)
    progress = shoot(sweep, tangents, guess, settings, tolerance, adjoint_residual)
    if not progress.all_converged:
        act_on_failure(progress.report(), settings, tolerance, backwards=True)
        whole = problem.in_one_chunk()
        return solve_adjoint(backend, whole, settings, tolerance, states, grad_states, grad_drives)
    return gradients


@dataclass(frozen=True)
class Progress:
    """The progress of an iteration, for every sequence.

    Attributes:
        iterations: Float64 (batch,): iterations until convergence, or all iterations.
        residual: (batch,): the last residual.
        converged: Boolean (batch,).
        all_converged: Whether all have converged; reading it needs no host sync.
        chunks: Chunks of time.
    """

    iterations: Tensor
    residual: Tensor
    converged: Tensor
    all_converged: bool
    chunks: int

    def report(self) -> Tensor:
        """The values of a report."""
        status = torch.where(self.converged, CONVERGED, COMPLETED)
        count = torch.full_like(self.iterations, self.chunks)
        return torch.stack([self.iterations, self.residual.double(), status.double(), count], 1)


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
    """The largest mismatch of adjoints, relative to the largest adjoint of the group."""
    apart = (ends - starts).abs() / ends.abs().amax((1, 2), keepdim=True)
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


def shoot(
    sweep: Callable[[Tensor], Tensor],
    tangents: Callable[[Tensor], Tensor],
    guess: Tensor,
    settings: Solver,
    tolerance: float,
    residual_of: Callable[[Tensor, Tensor], Tensor] = state_residual,
    contraction: Contraction | None = None,
    holds: Callable[[Tensor], bool] = bool,
) -> Progress:
    """Iterate until every chunk ends where the next one starts.

    Args:
        sweep: Runs all chunks from given first states, (batch, chunks, components, hidden), and
            returns their last states.
        tangents: The derivatives of the last states in the first, (batch, chunks, components,
            components, hidden).
        guess: First states; those of the first chunk are exact.
        settings: Coupling, damping, iterations.
        tolerance: The tolerance.
        residual_of: The residual of each sequence, from the ends of all chunks but the last and the
            starts of the next chunks.
        contraction: The contraction before the first iteration. It stops the loop once the
            remaining iterations will not reach the tolerance. None: never stop early.
        holds: Turns a boolean on the device into an answer; `bool` is a host sync.

    Returns:
        The progress. The residual is that of the first states of the last sweep.
    """
    chunks = guess.shape[1]
    most = min(settings.max_iterations or chunks, chunks)
    iterations = guess.new_full(guess.shape[:1], most, dtype=torch.float64)
    for iteration in range(1, most + 1):
        ends = sweep(guess)
        residual = residual_of(ends[:, :-1], guess[:, 1:])
        converged = residual <= tolerance
        iterations = torch.where(converged, iterations.clamp_max(iteration), iterations)
        if holds(converged.all()):
            return Progress(iterations, residual, converged, True, chunks)
        if iteration == chunks:  # every chunk has started from its exact state
            return Progress(iterations, residual, torch.ones_like(converged), True, chunks)
        if contraction is not None:
            now = float(residual.amax())
            if contraction.is_hopeless(now, most - iteration, tolerance, settings.coupling):
                iterations = torch.where(converged, iterations, iteration)
                break
            contraction = Contraction(now, 1.0)
        if iteration < most:
            coupling = _coupling(settings.coupling, tangents, guess)
            guess = newton_update(ends, guess, coupling, settings.damping)
    return Progress(iterations, residual, converged, False, chunks)


def _coupling(kind: str, tangents: Callable[[Tensor], Tensor], guess: Tensor) -> Tensor:
    """The coupling of chunks: matrices shaped like tangents, or factors shaped like states."""
    if kind == "tangent":
        return tangents(guess)
    if kind == "diagonal":
        return tangents(guess).diagonal(dim1=2, dim2=3).transpose(2, 3)
    return (torch.ones_like if kind == "identity" else torch.zeros_like)(guess)


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
