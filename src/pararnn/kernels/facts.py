"""What `planning.plan` decides by: facts of steps, and of the machine that they run on."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from pararnn.kernels.c.build import find_compiler
from pararnn.kernels.lowering import NotLowered, lower
from pararnn.kernels.triton.build import interpreted
from pararnn.kernels.triton.build import missing as triton_missing
from pararnn.planning.plan import Facts, Machine
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.expressions import topological
from pararnn.tracing.step import Step


def facts_of(step: Step, name: str = "the cell", because: str = "") -> Facts:
    """Facts of a step; for an elementwise one without those that only rows need, see `on_rows`.

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
    known = Facts(name, elementwise=False, because=because, components=step.num_components)
    return on_rows(known, step)


def on_rows(facts: Facts, step: Step) -> Facts:
    """All facts of a step, also those that only rows need; the module of the step is built."""
    return replace(facts, group=step.group, work=step.work, launches=step.launches)


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
    """Facts of the machine for `decide`: how much runs at once."""
    if device.type == "cuda":
        return _gpu(device)
    return Machine(device.type, threads=torch.get_num_threads())


@functools.lru_cache(maxsize=64)
def _gpu(device: torch.device) -> Machine:
    return Machine("cuda", torch.cuda.get_device_properties(device).multi_processor_count)


def obstacles_of(device: torch.device) -> Machine:
    """Facts of the machine for the choice of a backend: which ones cannot run there, and why."""
    elsewhere = f"the tensors are on {device}"
    triton = None if device.type in ("cpu", "cuda") else elsewhere
    if device.type == "cpu" and not interpreted():
        triton = "the tensors are on the CPU, where Triton runs with TRITON_INTERPRET=1 only"
    return Machine(
        device.type,
        obstacles=(("c", None if device.type == "cpu" else elsewhere), ("triton", triton)),
        missing=(("c", _no_compiler()), ("triton", triton_missing(device.type))),
    )


def _no_compiler() -> str | None:
    return None if find_compiler() else "no C compiler was found (looked for $CC, cc, gcc, clang)"


def rounds(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of matrices round their factors (TF32), for states that are kept so."""
    if device.type != "cuda" or dtype is torch.float64:
        return False
    return torch.get_float32_matmul_precision() != "highest"
