"""Evaluates chunks with C generated from the recurrence and compiled by the system's compiler."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pararnn.kernels.c.build import CompilerError, load
from pararnn.kernels.c.source import SIZES, c_source
from pararnn.planning.costs import COSTS, Costs
from pararnn.solvers.problem import Problem
from pararnn.solvers.shooting import Gradients, ShootingBackend
from pararnn.tracing.derivatives import Recurrence


class CBackend(ShootingBackend):
    """One instance per recurrence; the libraries for float32 and float64 are made when needed."""

    name = "c"

    def __init__(self, recurrence: Recurrence) -> None:
        self.recurrence = recurrence
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

    def auto_chunk(self, batch: int, time: int, hidden: int) -> int:
        """One chunk, unless rows and channels are too few to give every thread its own."""
        lanes = batch * -(-hidden // COSTS.c_vector)
        wanted = -(-torch.get_num_threads() // lanes)
        return -(-time // max(1, min(wanted, time // COSTS.c_shortest_chunk)))

    def forward(
        self, problem: Problem, boundary: Tensor, states: Sequence[Tensor] | None, limit: int
    ) -> Tensor:
        """See `ShootingBackend.forward`."""
        ends = torch.empty_like(boundary)
        outputs = [None] * self.recurrence.num_components if states is None else states
        self._call("forward", problem, limit, [problem.initial, boundary, ends, *outputs])
        return ends

    def tangent(self, problem: Problem, boundary: Tensor) -> Tensor:
        """See `ShootingBackend.tangent`."""
        batch, chunks, components, hidden = boundary.shape
        tangents = boundary.new_empty((batch, chunks, components, components, hidden))
        pointers = [problem.initial, boundary, tangents]
        self._call("tangent", problem, problem.chunk, pointers)
        return tangents

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
        outgoing = torch.empty_like(incoming)
        pointers: list[Tensor | None] = [problem.initial, incoming, outgoing]
        if gradients is None:
            pointers += [None, None, *states, *grad_states]
            self._call("backward", problem, limit, pointers, [0] * 3 * len(problem.drives))
        else:
            pointers += [gradients.initial, gradients.coefficients, *states, *grad_states]
            self._call("backward", problem, limit, pointers, _strided(gradients.drives))
        return outgoing

    def _call(
        self,
        name: str,
        problem: Problem,
        limit: int,
        pointers: Iterable[Tensor | None],
        more: Iterable[int] = (),
    ) -> None:
        initial = problem.initial
        if not initial.is_cpu:
            raise ValueError(
                f"the kernels are for a CPU and the tensors are on {initial.device}; "
                "export the layer on the device that its program is to run on."
            )
        batch, time, hidden, chunks = problem.batch, problem.time, problem.hidden, problem.chunks
        small = batch * time * hidden < COSTS.c_small
        threads = 1 if small else torch.get_num_threads()
        sizes = {
            "batch": batch,
            "time": time,
            "hidden": hidden,
            "chunks": chunks,
            "chunk": problem.chunk,
            "block": _block(batch * chunks, hidden, threads),
            "threads": threads,
            "rows": initial.shape[0],
            "limit": limit,
        }
        arguments = [sizes[s] for s in SIZES] + [_address(problem.starts)]
        arguments += _strided(problem.drives)
        arguments += [c.data_ptr() for c in problem.coefficients]
        arguments += [*map(_address, pointers), *more]
        array = (ctypes.c_int64 * len(arguments))(*arguments)
        library = self.library(problem.drives[0].dtype is torch.float64)
        getattr(library, name)(array)


def _block(rows: int, hidden: int, threads: int, costs: Costs = COSTS) -> int:
    """Channels per lane: as many as fit, but enough lanes for all threads."""
    per_row = -(-threads // rows)
    block = -(-hidden // per_row)
    block = -(-block // costs.c_vector) * costs.c_vector
    return min(costs.c_block, block)


def _strided(tensors: Iterable[Tensor]) -> list[int]:
    """Address, batch stride and time stride of each."""
    return [n for t in tensors for n in (t.data_ptr(), t.stride(0), t.stride(1))]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
