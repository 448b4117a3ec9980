"""What `planning.plan` decides by, facts of steps and of the machine, and the plans of a step."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pararnn.kernels.c.build import find_compiler
from pararnn.kernels.graphs import is_capturing
from pararnn.kernels.lowering import NotLowered, lower
from pararnn.kernels.triton.build import interpreted
from pararnn.kernels.triton.build import missing as triton_missing
from pararnn.kernels.triton.device import rounds_products
from pararnn.planning.kernel_plans import keeps_weights, kept_width
from pararnn.planning.plan import BackendChoice, Call, Facts, Machine, Plan, by_channels, decide
from pararnn.planning.settings import Solver
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.expressions import topological
from pararnn.tracing.step import Step


def facts_of(step: Step, name: str = "the cell", because: str = "") -> Facts:
    """Facts of a step; for an elementwise one without those in `all_facts`.

    Args:
        step: The step.
        name: Name of its cell.
        because: The reason why its channels reach each other or not, in words.
    """
    recurrence = step.recurrence
    if recurrence is not None:
        return Facts(
            name,
            elementwise=True,
            because=because,
            components=step.num_components,
            drives=recurrence.num_drives,
            obstacle=_lowering_obstacle(recurrence),
        )
    sizes = step.num_components, step.group, step.work, step.launches
    return Facts(name, False, because, *sizes, streams=streams(step))


def streams(step: Step) -> bool:
    """Whether a kernel for all steps on a GPU reads the weights at every step, by their sizes.

    One that has sums over channels does so too: who has such a kernel knows better.
    """
    matrices = [i.shape for i in step.inputs if not i.by_rows and len(i.shape) > 1]
    blocks = sum(map(math.prod, matrices)) // (step.hidden * step.group)
    return not keeps_weights(blocks, kept_width(step.group), step.dtype.itemsize)


def all_facts(facts: Facts, step: Step, backend: BackendChoice) -> Facts:
    """Also those facts that only the way of this backend needs."""
    if not by_channels(facts, backend):  # the module of the step is built
        return replace(facts, group=step.group, work=step.work, launches=step.launches)
    if backend.name != "triton":
        return facts
    assert step.recurrence is not None
    return replace(facts, operations=operations_of(step.recurrence))


def _lowering_obstacle(recurrence: Recurrence) -> str | None:
    try:
        lower([*recurrence.step, *recurrence.vjp])
    except NotLowered as error:
        return str(error)
    return None


def operations_of(recurrence: Recurrence) -> tuple[int, int]:
    """Arithmetic operations of a step with its Jacobian, forward and adjoint."""
    jacobian = [entry for row in recurrence.jacobian for entry in row]
    adjoint = [*recurrence.vjp[: recurrence.num_components], *jacobian]
    forward = len(topological(lower([*recurrence.step, *jacobian])))
    return forward, max(len(topological(lower(v))) for v in (adjoint, recurrence.vjp))


def machine_of(device: torch.device) -> Machine:
    """Facts of the machine: how much runs at once, which backends cannot run there, and why."""
    elsewhere = f"the tensors are on {device}"
    triton = None if device.type in ("cpu", "cuda") else elsewhere
    if device.type == "cpu" and not interpreted():
        triton = "the tensors are on the CPU, where Triton runs with TRITON_INTERPRET=1 only"
    processors, compiler = 1, "no C compiler was found (looked for $CC, cc, gcc, clang)"
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Machine(
        device.type,
        processors,
        obstacles=(("c", None if device.type == "cpu" else elsewhere), ("triton", triton)),
        missing=(
            ("c", None if find_compiler() else compiler),
            ("triton", triton_missing(device.type)),
        ),
    )


_MOST_PLANS = 256  # kept of a step


@dataclass(frozen=True)
class Planner:
    """The plans of a step. Who shows, chooses or runs asks here, so all have the same plan.

    Attributes:
        facts: Of the step; all that its way needs, see `all_facts`.
        backend: The chosen backend.
        solver: The user's; None to choose.
    """

    facts: Facts
    backend: BackendChoice
    solver: Solver | None
    _known: dict[tuple[Any, ...], Plan] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )
    _machines: dict[torch.device, Machine] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    @functools.cached_property
    def by_channels(self) -> bool:
        """Whether kernels solve for every channel by itself."""
        return by_channels(self.facts, self.backend)

    def plan(
        self,
        device: torch.device,
        batch: int,
        time: int,
        hidden: int,
        kept_in: torch.dtype,
        itemsize: int,
        gradients: int = 1,
        tracked: bool = True,
        elements: int = 0,
        may_loop: bool = False,
        library: str | None = None,
    ) -> Plan:
        """How a call is carried out now; see `Call`. A look takes a microsecond, a decision twenty.

        How the states and their adjoints are solved for depends on the first seven alone, which are
        all that an operator knows. The device is that of the tensors: a step that was exported and
        moved, or is known by its expressions alone, does not know it.
        """
        sizes = batch, time, hidden, kept_in, itemsize, gradients, tracked, elements
        rounds = capturing = False
        if device.type == "cuda":
            rounds, capturing = rounds_products(kept_in), is_capturing(device)
        call = *sizes, may_loop, library, rounds, capturing, torch.get_num_threads()
        plan = self._known.get((device, call))
        if plan is None:
            if len(self._known) >= _MOST_PLANS:
                self._known.clear()
            if device not in self._machines:
                self._machines[device] = machine_of(device)  # takes longer than a decision
            given = Call(*call), self._machines[device], self.backend, self.solver
            plan = self._known[device, call] = decide(self.facts, *given)
        return plan

    def without_kernel(self, direction: int, why: str) -> Planner:
        """Plans without the kernel for all steps of one direction."""
        kernels = [why if d == direction else k for d, k in enumerate(self.facts.kernels)]
        return replace(self, facts=replace(self.facts, kernels=(kernels[0], kernels[1])))
