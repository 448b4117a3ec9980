"""Evaluates chunks with plain PyTorch operations: any device, any operation, the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pararnn.solvers.problem import Problem
from pararnn.solvers.shooting import Gradients, ShootingBackend
from pararnn.tracing.derivatives import Recurrence, torch_function, torch_source

# Below about this many elements per operation its launch costs more than its arithmetic.
_ELEMENTS_PER_LAUNCH = 32768
_SHORTEST_CHUNK = 64


class TorchBackend(ShootingBackend):
    """One instance per recurrence."""

    name = "torch"

    def __init__(self, recurrence: Recurrence) -> None:
        self.recurrence = recurrence
        self.step = recurrence.function

    @functools.cached_property
    def step_with_jacobian(self) -> Callable[..., tuple[Tensor, ...]]:
        """New components, then the Jacobian row by row."""
        rows = [entry for row in self.recurrence.jacobian for entry in row]
        return torch_function([*self.recurrence.step, *rows], self.recurrence.leaves)

    @functools.cached_property
    def vjp(self) -> Callable[..., tuple[Tensor, ...]]:
        """Gradients of states, drives and coefficients."""
        leaves = [*self.recurrence.leaves, *self.recurrence.adjoints]
        return torch_function(self.recurrence.vjp, leaves)

    def source(self) -> str:
        """The generated Python."""
        inputs = self.recurrence.leaves
        step = torch_source(self.recurrence.step, inputs, "step")
        vjp = torch_source(self.recurrence.vjp, [*inputs, *self.recurrence.adjoints], "vjp")
        return f"{step}\n{vjp}"

    def auto_chunk(self, batch: int, time: int, hidden: int) -> int:
        """As many chunks as keep every operation near the size at which its launch pays."""
        wanted = _ELEMENTS_PER_LAUNCH // (batch * hidden)
        return -(-time // max(1, min(wanted, time // _SHORTEST_CHUNK)))

    def forward(
        self, problem: Problem, boundary: Tensor, states: Sequence[Tensor] | None, limit: int
    ) -> Tensor:
        """See `ShootingBackend.forward`."""
        now = list(boundary.unbind(2))
        for j in range(max(0, problem.chunk - limit), problem.chunk):
            now, new = self._advance(problem, j, now)
            if states is not None:
                for state, values in zip(states, new, strict=True):
                    state[:, j :: problem.chunk] = values
        return torch.stack(now, 2)

    def _advance(
        self, problem: Problem, j: int, now: list[Tensor]
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        """Step j of every chunk that has one; chunks without keep their state."""
        drives = [d[:, j :: problem.chunk] for d in problem.drives]
        active = drives[0].shape[1]
        before, _ = _restart(problem, j, [s[:, :active] for s in now])
        new = self.step(*before, *drives, *problem.coefficients)
        if active == now[0].shape[1]:
            return list(new), new
        return [torch.cat([n, s[:, active:]], 1) for n, s in zip(new, now, strict=True)], new

    def tangent(self, problem: Problem, boundary: Tensor) -> Tensor:
        """See `ShootingBackend.tangent`."""
        components = problem.recurrence.num_components
        now = boundary
        eye = torch.eye(components, dtype=boundary.dtype, device=boundary.device)
        shape = (*boundary.shape[:2], components, components, boundary.shape[3])
        tangent = eye[:, :, None].expand(shape)
        for j in range(problem.chunk):
            drives = [d[:, j :: problem.chunk] for d in problem.drives]
            active = drives[0].shape[1]
            before, start = _restart(problem, j, list(now[:, :active].unbind(2)))
            values = self.step_with_jacobian(*before, *drives, *problem.coefficients)
            new = torch.stack(values[:components], 2)
            local = torch.stack(values[components:], 2).unflatten(2, (components, components))
            moved = torch.einsum("bkijh,bkjmh->bkimh", local, tangent[:, :active])
            if start is not None:
                moved = torch.where(start[..., None, None], 0.0, moved)
            now = torch.cat([new, now[:, active:]], 1)
            tangent = torch.cat([moved, tangent[:, active:]], 1)
        return tangent

    def backward(
        self,
        problem: Problem,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
        incoming: Tensor,
        gradients: Gradients | None,
        limit: int,
    ) -> Tensor:
        """See `ShootingBackend.backward`."""
        recurrence, chunk = problem.recurrence, problem.chunk
        components, num_drives = recurrence.num_components, recurrence.num_drives
        adjoint = list(incoming.unbind(2))
        sums: list[Tensor | float] = [0.0] * recurrence.num_coefficients
        for j in reversed(range(min(limit, chunk))):
            drives = [d[:, j::chunk] for d in problem.drives]
            active = drives[0].shape[1]
            before, start = self._states_before(problem, states, j, active)
            total = [a[:, :active] for a in adjoint]
            total = [
                a if g is None else a + g[:, j::chunk]
                for a, g in zip(total, grad_states, strict=True)
            ]
            found = self.vjp(*before, *drives, *problem.coefficients, *total)
            out = list(found[:components])
            if gradients is not None:
                for target, value in zip(gradients.drives, found[components:], strict=False):
                    target[:, j::chunk] = value
                for c, value in enumerate(found[components + num_drives :]):
                    sums[c] = sums[c] + _padded(value.double(), adjoint[0].shape[1])
            if start is not None:
                if gradients is not None:
                    _add_initial(problem, gradients.initial, j, out)
                out = [torch.where(start, 0.0, o) for o in out]
            adjoint = [torch.cat([o, a[:, active:]], 1) for o, a in zip(out, adjoint, strict=True)]
        if gradients is not None:
            for c, total_sum in enumerate(sums):
                gradients.coefficients[:, :, c] = total_sum
            if problem.starts is None:
                gradients.initial[0] += torch.stack([a[:, 0] for a in adjoint], 1)
        return torch.stack(adjoint, 2)

    def _states_before(
        self, problem: Problem, states: Sequence[Tensor], j: int, active: int
    ) -> tuple[list[Tensor], Tensor | None]:
        if j > 0:
            before = [s[:, j - 1 :: problem.chunk][:, :active] for s in states]
        else:
            ends = [s[:, problem.chunk - 1 :: problem.chunk][:, : active - 1] for s in states]
            first = problem.first_states().unsqueeze(1).unbind(2)
            before = [torch.cat([f, e], 1) for f, e in zip(first, ends, strict=True)]
        return _restart(problem, j, before)


def _restart(problem: Problem, j: int, before: list[Tensor]) -> tuple[list[Tensor], Tensor | None]:
    """Replace states by initial ones where a sequence starts at step j of a chunk."""
    if problem.starts is None:
        return before, None
    rows = problem.starts[:, j :: problem.chunk].long()
    start = (rows >= 0).unsqueeze(-1)
    initial = problem.initial[rows.clamp_min(0)].unbind(2)
    return [torch.where(start, i, s) for i, s in zip(initial, before, strict=True)], start


def _add_initial(problem: Problem, target: Tensor, j: int, adjoint: list[Tensor]) -> None:
    """Add the adjoint before every start to the gradient of its initial state."""
    assert problem.starts is not None
    rows = problem.starts[:, j :: problem.chunk].long()
    b, k = (rows >= 0).nonzero(as_tuple=True)
    for i, value in enumerate(adjoint):
        target[:, :, i].index_put_((k, rows[b, k]), value[b, k], accumulate=True)


def _padded(x: Tensor, chunks: int) -> Tensor:
    missing = chunks - x.shape[1]
    return x if not missing else torch.cat([x, x.new_zeros((x.shape[0], missing, x.shape[2]))], 1)
