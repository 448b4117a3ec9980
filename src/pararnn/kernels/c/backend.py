"""Evaluates chunks with C generated from the recurrence and compiled by the system's compiler."""

from __future__ import annotations

import abc
import ctypes
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pararnn.kernels.c.build import CompilerError, load
from pararnn.kernels.c.source import SIZES, c_source
from pararnn.planning.c_plan import plan_c
from pararnn.planning.plan import Way
from pararnn.solvers.problem import Problem
from pararnn.solvers.report import act_on_failure
from pararnn.solvers.shooting import (
    Residual,
    System,
    adjoint_residual,
    sequential_report,
    solve,
    state_residual,
)
from pararnn.tracing.derivatives import Recurrence


class CBackend:
    """One instance per recurrence; the libraries for float32 and float64 are made when needed."""

    name = "c"
    takes_heads = False

    def __init__(self, recurrence: Recurrence) -> None:
        self.recurrence = recurrence
        self.compile_s = 0.0
        self._libraries: dict[bool, ctypes.CDLL] = {}
        self._obstacles: dict[bool, str] = {}

    def library(self, double: bool) -> ctypes.CDLL:
        """The compiled functions for one type.

        Raises:
            CompilerError: They cannot be built here.
        """
        if double not in self._libraries:
            begin = time.perf_counter()
            loaded = load(self.source(double), ("forward", "tangent", "backward"))
            self.compile_s += time.perf_counter() - begin
            self._libraries[double] = loaded
        return self._libraries[double]

    def obstacle(self, double: bool) -> str | None:
        """Why the functions for one type cannot be built, which is tried once."""
        if double not in self._libraries and double not in self._obstacles:
            try:
                self.library(double)
            except CompilerError as error:
                self._obstacles[double] = str(error)
        return self._obstacles.get(double)

    def source(self, double: bool = False) -> str:
        """The generated C."""
        return c_source(self.recurrence, double)

    def parts(self, problem: Problem) -> int:
        """See `Backend.parts`."""
        return problem.batch

    def solve(self, problem: Problem, way: Way) -> tuple[list[Tensor], Tensor]:
        """See `Backend.solve`."""
        kept_in = problem.state_dtype
        system = _States(self, problem.converted(), _steps_of_a_chunk(problem, way))
        states, report = solve(system, way)
        if report is None:
            report = sequential_report(problem.batch, problem.initial.device)
        return [s.to(kept_in) for s in states], report

    def solve_adjoint(
        self,
        problem: Problem,
        way: Way,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
        grad_drives: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.solve_adjoint`."""
        dtype = problem.dtype
        targets = [g if g.dtype is dtype else torch.empty_like(g, dtype=dtype) for g in grad_drives]
        system = _Adjoints(
            self,
            problem.converted(),
            _steps_of_a_chunk(problem, way),
            [s.to(dtype).contiguous() for s in states],
            [None if g is None else g.to(dtype).contiguous() for g in grad_states],
            targets,
        )
        (of_initial, sums), report = solve(system, way)
        if report is not None:
            act_on_failure(report, way.solver, way.tolerance, backwards=True)
        for gradient, target in zip(grad_drives, targets, strict=True):
            if gradient is not target:
                gradient.copy_(target)
        return sums.sum((0, 1)), of_initial.sum(0)

    def tangents(self, problem: Problem, chunk: int, before: Tensor) -> Tensor:
        """d(state after) / d(state before) of all chunks, see `System.tangents`."""
        batch, chunks, components, hidden = before.shape
        tangents = before.new_empty((batch, chunks, components, components, hidden))
        pointers = [problem.initial, before.contiguous(), tangents]
        self.call("tangent", problem, chunk, chunk, pointers)
        return tangents

    def call(
        self,
        name: str,
        problem: Problem,
        chunk: int,
        limit: int,
        pointers: Iterable[Tensor | None],
        strided: Iterable[Tensor | None] = (),
    ) -> None:
        """Call a function of `loop.c`.

        Args:
            name: "forward", "tangent" or "backward".
            problem: The problem, in the type of the arithmetic.
            chunk: Steps per chunk.
            limit: How many of these to run: the last ones, or for "backward" the first.
            pointers: What else it takes, as the struct of its arguments lists it.
            strided: Likewise: (batch, time, hidden) of any strides.
        """
        initial = problem.initial
        if not initial.is_cpu:
            raise ValueError(
                f"the kernels are for a CPU and the tensors are on {initial.device}; "
                "export the layer on the device that its program is to run on."
            )
        batch, time, hidden = problem.batch, problem.time, problem.hidden
        cut = plan_c(batch, time, hidden, chunk, torch.get_num_threads())
        sizes = {
            "batch": batch,
            "time": time,
            "hidden": hidden,
            "chunks": -(-time // chunk),
            "chunk": chunk,
            "block": cut.block,
            "threads": cut.threads,
            "rows": initial.shape[0],
            "limit": limit,
        }
        arguments = [sizes[s] for s in SIZES] + [_address(problem.starts)]
        arguments += _strided(problem.drives)
        arguments += [c.data_ptr() for c in problem.coefficients]
        arguments += [*map(_address, pointers), *_strided(strided)]
        array = (ctypes.c_int64 * len(arguments))(*arguments)
        library = self.library(problem.drives[0].dtype is torch.float64)
        getattr(library, name)(array)


class _InC(System):
    """A system whose chunks run in C. There chunks are in the order of the states."""

    def __init__(
        self, backend: CBackend, problem: Problem, chunk: int, start: Tensor, residual: Residual
    ) -> None:
        super().__init__(start, chunk, -(-problem.time // chunk), residual)
        self.backend, self.problem = backend, problem

    def run(self, first: Tensor, last: int | None = None) -> tuple[list[Tensor], Tensor]:
        return self._run(self.chunk, first.contiguous(), last)

    def step_by_step(self) -> list[Tensor]:
        return self._run(self.problem.time, self.start.unsqueeze(1).contiguous())[0]

    @abc.abstractmethod
    def _run(
        self, chunk: int, first: Tensor, last: int | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """See `System.run`; for any number of steps per chunk."""


class _States(_InC):
    """The states. Results are one (batch, time, hidden) per component."""

    def __init__(self, backend: CBackend, problem: Problem, chunk: int) -> None:
        super().__init__(backend, problem, chunk, problem.first_states(), state_residual)
        shape = (problem.batch, problem.time, problem.hidden)
        self.states = [problem.drives[0].new_empty(shape) for _ in range(self.start.shape[1])]

    def tangents(self, first: Tensor, found: list[Tensor]) -> Tensor:
        return self.backend.tangents(self.problem, self.chunk, first)

    def _run(
        self, chunk: int, first: Tensor, last: int | None = None
    ) -> tuple[list[Tensor], Tensor]:
        ends = torch.empty_like(first)
        states = self.states if last is None else [None] * len(self.states)
        pointers = [self.problem.initial, first, ends, *states]
        self.backend.call("forward", self.problem, chunk, last or chunk, pointers)
        return self.states, ends


class _Adjoints(_InC):
    """The adjoints, and the gradients of all inputs.

    Results are the gradients of initial states, (chunks, rows, components, hidden), and of
    coefficients, float64 (batch, chunks, coefficients, hidden), to be summed. Those of the drives
    are written into `grad_drives`.
    """

    def __init__(
        self,
        backend: CBackend,
        problem: Problem,
        chunk: int,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
        grad_drives: Sequence[Tensor],
    ) -> None:
        start = states[0].new_zeros(problem.batch, len(states), problem.hidden)
        super().__init__(backend, problem, chunk, start, adjoint_residual)
        self.states, self.grad_states, self.grad_drives = states, grad_states, grad_drives

    def tangents(self, first: Tensor, found: list[Tensor]) -> Tensor:
        ends = torch.stack([s[:, self.chunk - 1 :: self.chunk] for s in self.states], 2)
        before = [self.problem.first_states().unsqueeze(1), ends[:, : self.chunks - 1]]
        tangents = self.backend.tangents(self.problem, self.chunk, torch.cat(before, 1))
        return tangents.transpose(2, 3).flip(1)

    def _run(
        self, chunk: int, first: Tensor, last: int | None = None
    ) -> tuple[list[Tensor], Tensor]:
        problem, chunks = self.problem, first.shape[1]
        after = first if chunks == 1 else first.flip(1)
        before = torch.empty_like(after)
        gradients: list[Tensor] = []
        if last is None:
            sums = (problem.batch, chunks, len(problem.coefficients), problem.hidden)
            gradients += [
                after.new_zeros(chunks, *problem.initial.shape),
                after.new_empty(sums, dtype=torch.float64),
            ]
        pointers = [problem.initial, after, before, *(gradients or (None, None))]
        pointers += [*self.states, *self.grad_states]
        drives = self.grad_drives if gradients else [None] * len(self.grad_drives)
        self.backend.call("backward", problem, chunk, last or chunk, pointers, drives)
        return gradients, before if chunks == 1 else before.flip(1)


def _steps_of_a_chunk(problem: Problem, way: Way) -> int:
    return min(int(way.solver.chunk), problem.time)


def _strided(tensors: Iterable[Tensor | None]) -> list[int]:
    """Address, batch stride and time stride of each."""
    found: list[int] = []
    for t in tensors:
        found += (0, 0, 0) if t is None else (t.data_ptr(), t.stride(0), t.stride(1))
    return found


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
