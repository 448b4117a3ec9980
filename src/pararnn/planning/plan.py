"""`choose_backend`: the backend of a layer; `decide`: how one call is carried out, and why.

Everything that is chosen for a solve is chosen here, from plain numbers: facts of the step, sizes
of the call, facts of the machine, and what the user asked for. Nothing is run, so every choice can
be tried without a device. Measured constants are fields of `Costs`. Who needs a plan asks
`kernels.facts.Planner`, which gathers these and keeps the plans.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from pararnn._notebook import table
from pararnn._words import counted
from pararnn.planning.backends import BACKENDS as BACKENDS
from pararnn.planning.backends import BackendError as BackendError
from pararnn.planning.backends import check_name as check_name
from pararnn.planning.c_plan import plan_c
from pararnn.planning.costs import COSTS, Costs
from pararnn.planning.kernel_plans import (
    TileCut,
    TileLaunch,
    TileSizes,
    cut_tiles,
    plan_tiles,
)
from pararnn.planning.pytorch_plan import NAMES as LIBRARIES
from pararnn.planning.pytorch_plan import Times, compare
from pararnn.planning.rows_plan import free_rows, plan_rows, prefers_cell, steps_at_once
from pararnn.planning.settings import Jacobi, Newton, Sequential, Solver
from pararnn.planning.triton_plan import Launch, Work, plan_launch

_TF32 = 2.0**-11  # the largest relative error of a factor that is rounded to TF32


@dataclass(frozen=True)
class Choice:
    """One choice.

    Attributes:
        what: What was chosen.
        value: The choice.
        because: The reason, in words.
    """

    what: str
    value: Any
    because: str


@dataclass(frozen=True)
class Facts:
    """What choices depend on of a step.

    Attributes:
        name: Name of the cell, for messages.
        elementwise: Whether channels do not reach each other.
        because: The reason why they do or do not.
        components: Tensors in the state.
        group: Channels that reach each other.
        work: Multiplications per row and step, roughly.
        launches: PyTorch operations of a step.
        drives: Tensors that a kernel for elementwise cells loads at every step.
        operations: Arithmetic operations of such a step with its Jacobian, forward and adjoint.
        obstacle: The reason why there are no kernels for elementwise cells; None if there are.
        kernels: The reasons why steps forward and backward do not run in one kernel; None if they
            do.
        streams: Whether such a kernel on a GPU reads the weights at every step, which are too large
            to be kept on the chip.
        few: Rows up to which programs can share them out and keep them all the same.
        one_call: Whether a step of the cell itself is hardly more than one call.
        tile: Sizes of the tiles that its state is cut into, for a kernel of all steps with the
            readout; None if there is no such kernel.
    """

    name: str = "the cell"
    elementwise: bool = True
    because: str = ""
    components: int = 1
    group: int = 1
    work: int = 1
    launches: int = 1
    drives: int = 1
    operations: tuple[int, int] = (1, 1)
    obstacle: str | None = None
    kernels: tuple[str | None, str | None] = (None, None)
    streams: bool = False
    few: int = 0
    one_call: bool = False
    tile: TileSizes | None = None

    @property
    def entries(self) -> int:
        """Numbers of the state that reach each other."""
        return self.components * self.group


@dataclass(frozen=True)
class Machine:
    """What choices depend on of a machine.

    Attributes:
        device: Type of the device.
        processors: Multiprocessors of a GPU; 1 elsewhere.
        obstacles: The reasons why the backends "c" and "triton" cannot run on the device; None for
            one that can.
        missing: What the machine lacks to build their kernels; None for one that it can build.
    """

    device: str
    processors: int = 1
    obstacles: tuple[tuple[str, str | None], ...] = ()
    missing: tuple[tuple[str, str | None], ...] = ()


class Call(NamedTuple):
    """What choices depend on of a call: equal calls of a step have one plan.

    Attributes:
        batch: Sequences.
        time: Steps.
        hidden: Channels.
        kept_in: Type of the states that are stored.
        itemsize: Bytes of an element of a drive.
        gradients: Components whose gradient comes from outside.
        tracked: Whether gradients may be asked for.
        elements: Elements of the largest tensor that it is given.
        may_loop: Whether a loop over the cell would give the same result.
        library: What of PyTorch's runs all steps of the cell and would give the same result:
            "cudnn", "onednn" or "aten" (a loop in C++); None if nothing does.
        rounds: Whether products of matrices round their factors (TF32).
        capturing: Whether the call is part of a CUDA graph.
        threads: Threads of PyTorch on a CPU.
    """

    batch: int
    time: int
    hidden: int
    kept_in: torch.dtype = torch.float32
    itemsize: int = 4
    gradients: int = 1
    tracked: bool = True
    elements: int = 0
    may_loop: bool = False
    library: str | None = None
    rounds: bool = False
    capturing: bool = False
    threads: int = 1


@dataclass(frozen=True)
class BackendChoice:
    """The chosen backend, and the reason.

    Attributes:
        name: Name of the backend.
        reason: The reason, in words.
        automatic: Whether PyTorch operations replace the backend if its kernels cannot be built.
        generated: Whether the call may use generated kernels.
        missing: What the machine lacks to build the kernels of a faster one; None for nothing.
    """

    name: str
    reason: str
    automatic: bool = False
    generated: bool = True
    missing: str | None = None


@dataclass(frozen=True)
class Way:
    """How one direction of a call is solved.

    Attributes:
        solver: The settings in force, with a number of steps per chunk.
        tolerance: The tolerance in force.
        steps: What runs the steps of a sweep: "kernel" (one for all), "graphs" (CUDA graphs of
            PyTorch operations) or "operations".
        settle: Whether there is one iteration, after which one more kernel runs the sequences that
            have not converged step by step. The device decides which, so there is no host sync.
        give_up: Whether iterations stop early once they will not reach the tolerance.
        in_graph: Whether the solve is replayed as one CUDA graph.
        warm_up: Steps that the first guess looks back; 0 with one chunk.
        piece: Steps of a piece of time that a backward pass in one chunk solves at a time.
        launch: How Triton's kernels for elementwise cells are launched.
        tile: How its kernels for states in tiles are.
    """

    solver: Solver
    tolerance: float
    steps: str = "kernel"
    settle: bool = False
    give_up: bool = False
    in_graph: bool = False
    warm_up: int = 0
    piece: int = 0
    launch: Launch | None = None
    tile: TileLaunch | None = None


@dataclass(frozen=True)
class Plan:
    """How one call is carried out; `str()` of it shows every choice with its reason.

    Attributes:
        backend: "torch", "c" or "triton".
        path: "kernel" (fused over time), "tiles" (all steps and the readout in one kernel), "rows"
            (chunks as rows of one batch), "loop" (the cell) or "pytorch" (PyTorch's own kernel
            for its own cell).
        forward: How the states are solved for.
        adjoint: How their adjoints are.
        in_graph: Whether the whole call, with its input part, is replayed as one CUDA graph.
        choices: All choices with their reasons.
    """

    backend: str
    path: str
    forward: Way
    adjoint: Way
    in_graph: bool
    choices: tuple[Choice, ...] = field(repr=False)

    def __str__(self) -> str:
        shown = [(c.what, str(c.value), c.because) for c in self.choices]
        widths = [max(len(row[i]) for row in shown) for i in range(2)]
        return "\n".join(
            f"{what:{widths[0]}s}  {value:{widths[1]}s}  {because}".rstrip()
            for what, value, because in shown
        )

    def _repr_html_(self) -> str:
        rows = [(c.what, c.value, c.because) for c in self.choices]
        return table(rows, header=("what", "choice", "because"))


def by_channels(facts: Facts, backend: BackendChoice) -> bool:
    """Whether kernels solve for every channel by itself; else chunks are rows."""
    return facts.elementwise and backend.name in BACKENDS


def by_tiles(facts: Facts, backend: BackendChoice, solver: Solver | None) -> bool:
    """Whether one kernel runs all steps with the readout, and states are not written."""
    asked = isinstance(solver, (Sequential, type(None)))
    return facts.tile is not None and backend.name == "triton" and asked


def choose_backend(
    name: str, facts: Facts, machine: Machine, solver: Solver | None = None
) -> BackendChoice:
    """Choose the backend.

    Args:
        name: What the user asked for: a backend, or "auto".
        facts: Of the step.
        machine: Of the device.
        solver: The user's; None to choose.

    Raises:
        BackendError: The named backend does not exist or cannot run the step; the message says
            why.
    """
    check_name(name)
    if name == "torch":
        return BackendChoice("torch", "asked for", generated=False)
    if not facts.elementwise:
        return _backend_of_rows(name, facts, machine)
    chosen = name if name != "auto" else "triton" if machine.device == "cuda" else "c"
    obstacle = None
    if chosen == "triton" and not isinstance(solver, (Newton, Sequential, type(None))):
        obstacle = f"it solves by Newton's method, not by {type(solver).__name__}"
    obstacle = obstacle or facts.obstacle or dict(machine.obstacles)[chosen]
    missing = None if obstacle else dict(machine.missing)[chosen]
    if obstacle is None and missing is None:
        if name == chosen:
            return BackendChoice(chosen, "asked for")
        return BackendChoice(chosen, _FASTEST[chosen], automatic=True)
    if name == chosen:
        raise _cannot_run(name, facts, str(obstacle or missing))
    return replace(without_kernels(str(obstacle or missing)), missing=missing)


_FASTEST = {
    "c": "generated C is the fastest on a CPU",
    "triton": "generated Triton is the fastest on a GPU",
}


def _backend_of_rows(name: str, facts: Facts, machine: Machine) -> BackendChoice:
    mixes = f"channels mix ({facts.because})"
    if name == "c" or (name == "auto" and machine.device == "cpu"):
        obstacle = dict(machine.obstacles)["c"] or dict(machine.missing)["c"]
        obstacle = obstacle or next(filter(None, facts.kernels), None)
        if obstacle is None:
            reason = "asked for" if name == "c" else f"{mixes}; its steps run in one kernel"
            return BackendChoice("c", reason, automatic=name == "auto", generated=False)
        if name == "c" and obstacle in facts.kernels:
            raise BackendError(
                "backend='c' evaluates cells that are elementwise, or that mix channels by "
                f"products with weights, and {facts.name} is neither ({facts.because}; in its "
                f"kernels: {obstacle}). Use backend='torch', or backend='auto' to choose."
            )
        if name == "c":
            raise _cannot_run(name, facts, obstacle)
    no_kernels = dict(machine.obstacles)["triton"] or dict(machine.missing)["triton"]
    needed = facts.kernels if name == "triton" else facts.kernels[:1]
    obstacle = no_kernels or next(filter(None, needed), None)
    if obstacle is None and (name == "triton" or machine.device == "cuda"):
        reason = "asked for" if name == "triton" else f"{mixes}; its steps run in one kernel"
        return BackendChoice("triton", reason)
    if name == "triton":
        raise _cannot_run(name, facts, obstacle or "")
    # kernels for all times at once may be generated even if those of steps are not
    return BackendChoice("torch", mixes, generated=no_kernels is None)


def _cannot_run(name: str, facts: Facts, why: str) -> BackendError:
    return BackendError(
        f"backend={name!r} cannot run {facts.name} here: {why}. Use backend='torch', or "
        "backend='auto' to choose."
    )


def without_kernels(why: str) -> BackendChoice:
    """PyTorch operations in place of kernels that cannot be had."""
    reason = f"generated kernels are not possible: {why.splitlines()[0]}"
    return BackendChoice("torch", reason, generated=False)


def decide(
    facts: Facts,
    call: Call,
    machine: Machine,
    backend: BackendChoice,
    solver: Solver | None = None,
    costs: Costs = COSTS,
) -> Plan:
    """Decide how a call is carried out.

    Args:
        facts: Of the step.
        call: Its sizes.
        machine: Of the device.
        backend: See `choose_backend`.
        solver: The user's; None to choose.
        costs: What work costs.
    """
    plan = _generated(facts, call, machine, backend, solver, costs)
    times = _times(plan, facts, call, costs) if solver is None and call.library else None
    if times is None:
        return plan
    half = call.kept_in not in (torch.float32, torch.float64)
    if times.ours <= costs.faster[half] * times.theirs:
        return plan
    because = f"{times.theirs:.3g} ms by the estimate, {times.ours:.3g} by our {plan.path}"
    called = Choice("path", "pytorch", f"{LIBRARIES[str(call.library)]}: {because}")
    choices = (Choice("backend", backend.name, backend.reason), called)
    way = Way(Sequential(), 0.0)
    return Plan(backend.name, "pytorch", way, way, False, choices)


def _times(plan: Plan, facts: Facts, call: Call, costs: Costs) -> Times | None:
    """What the library and PyTorch take, by the estimate; None if there is none."""
    way = plan.forward
    chunk = min(int(way.solver.chunk), call.time) if plan.path == "rows" else call.time
    kinds = {"operations": "loop" if chunk == call.time else "", "kernel": "c"}
    kind = "loop" if plan.path == "loop" else kinds.get(way.steps, "")
    if kind == "c" and plan.backend == "triton":
        kind = kind_of_kernel(facts, call.batch * -(-call.time // chunk))
    if plan.path not in ("rows", "loop") or call.time == 1:
        return None
    sizes = facts.work, call.hidden, call.batch, call.time, chunk, way.warm_up
    return compare(str(call.library), kind, *sizes, call.tracked, call.capturing, costs)


def _generated(
    facts: Facts,
    call: Call,
    machine: Machine,
    backend: BackendChoice,
    solver: Solver | None,
    costs: Costs,
) -> Plan:
    """How the library carries a call out with the cell alone, or with kernels for its step."""
    choices = [Choice("backend", backend.name, backend.reason)]
    if by_tiles(facts, backend, solver):
        ways = _tiles(facts, call, machine, solver, costs, choices)
        return Plan(backend.name, "tiles", *ways, False, tuple(choices))
    if by_channels(facts, backend):
        ways = _kernels(facts, call, machine, backend, solver, costs, choices)
        path = "kernel"
    elif call.may_loop and _is_loop(facts, call, machine, backend, solver, costs):
        choices.append(Choice("path", "loop", "calling the cell at every step is the fastest here"))
        way = Way(Sequential(), 0.0)
        return Plan(backend.name, "loop", way, way, False, tuple(choices))
    else:
        ways = _rows(facts, call, machine, backend, solver, costs, choices)
        path = "rows"
    in_graph = _in_graph(facts, call, machine, ways, solver, costs, choices)
    return Plan(backend.name, path, *ways, in_graph, tuple(choices))


def _is_loop(
    facts: Facts,
    call: Call,
    machine: Machine,
    backend: BackendChoice,
    solver: Solver | None,
    costs: Costs,
) -> bool:
    keeps = call.tracked and call.batch > costs.c_mixing_rows  # the loop does, and C does not
    if solver is not None or (_in_c(facts, call, backend, costs) and not keeps):
        return False
    free = _free_rows(facts, machine, backend, costs)
    sizes = facts.entries, free, call.batch, call.time
    one_call = facts.one_call and not call.tracked  # autograd takes as long again
    return prefers_cell(*sizes, machine.device, one_call, costs)


def _kernels(
    facts: Facts,
    call: Call,
    machine: Machine,
    backend: BackendChoice,
    solver: Solver | None,
    costs: Costs,
    choices: list[Choice],
) -> tuple[Way, Way]:
    """Kernels of elementwise cells, which step through chunks."""
    asked = solver or Newton()
    tolerance = asked.tolerance_for(call.kept_in)
    because = "kernels step through all chunks of all channels"
    choices.append(Choice("path", "kernel", because))
    method = "asked for" if solver else "the tangents of a channel are cheap"
    choices.append(Choice("method", type(asked).__name__, method))
    chunk = None if asked.chunk == "auto" else min(int(asked.chunk), call.time)
    if backend.name == "c":
        cut = plan_c(call.batch, call.time, call.hidden, chunk, call.threads, costs)
        choices.append(Choice("chunks", cut.chunks, cut.because if chunk is None else "asked for"))
        warm_up = _warm_up(costs.warm_up, cut.chunk, cut.chunks, choices)
        way = Way(_in_chunks(asked, cut.chunk), tolerance, warm_up=warm_up)
        return way, way
    loads = facts.drives, facts.drives + facts.components + call.gradients
    ways = []
    for adjoint, name in enumerate(("chunks forward", "chunks backward")):
        work = Work(loads[adjoint], call.itemsize, facts.operations[adjoint], facts.components)
        sizes = call.batch, call.time, call.hidden
        launch = plan_launch(
            *sizes, chunk, work, tolerance, machine.processors, bool(adjoint), costs
        )
        busy = launch.busy(call.batch, call.hidden, machine.processors)
        few = f"{busy:.2g} programs per multiprocessor without cutting time"
        choices.append(Choice(name, launch.chunks, few if chunk is None else "asked for"))
        warm_up = _warm_up(launch.warm, launch.chunk, launch.chunks, choices)
        if launch.corrections:
            because = "times that all chunks are corrected side by side, where they do not fit"
            choices.append(Choice("corrections", launch.corrections, because))
        settings = _in_chunks(asked, launch.chunk)
        ways.append(Way(settings, tolerance, warm_up=warm_up, launch=launch))
    return ways[0], ways[1]


def _tiles(
    facts: Facts,
    call: Call,
    machine: Machine,
    solver: Solver | None,
    costs: Costs,
    choices: list[Choice],
) -> tuple[Way, Way]:
    """One kernel for all steps and the readout."""
    sizes = facts.tile
    assert sizes is not None
    because = "one kernel runs all steps, with the state and the readout on the chip"
    choices.append(Choice("path", "tiles", because))
    tolerance = Jacobi().tolerance_for(call.kept_in)
    ways = []
    for backward, direction in enumerate(("forward", "backward")):
        given = machine.processors, bool(backward), costs
        cut = cut_tiles(sizes, call.batch, call.time, tolerance, *given)
        if solver is not None:
            cut = TileCut(call.time, 1, 0, "asked for")
        choices.append(Choice(f"chunks {direction}", cut.chunks, cut.because))
        half = call.kept_in.itemsize == 2
        launch = plan_tiles(sizes, call.batch, cut.chunks, *given, half)
        shape = [sizes.rows, sizes.columns]
        if sizes.split is not None:
            shape[sizes.split] //= launch.parts
        because = f"{counted(sizes.programs * launch.parts, 'program')} per sequence"
        if cut.chunks > 1:
            because += " and chunk"
        choices.append(Choice(f"tile {direction}", " x ".join(map(str, shape)), because))
        if cut.chunks == 1:
            ways.append(Way(Sequential(), 0.0, tile=launch))
        else:
            asked: Solver = Jacobi(chunk=cut.chunk, max_iterations=2)  # then in their order
            if sizes.tangents:
                asked = Newton(chunk=cut.chunk, max_iterations=3)
            ways.append(Way(asked, tolerance, settle=True, warm_up=cut.warm, tile=launch))
    if any(way.settle for way in ways):
        because = "entries of the state reach each other: tangents would cost too much"
        if sizes.tangents:
            because = "each entry of the state depends on itself alone: its tangent is a number"
        choices.append(Choice("method", "Newton" if sizes.tangents else "Jacobi", because))
    segments = -(-call.time // costs.tile_segment)
    entries = call.batch * segments * call.hidden * facts.components
    kept = entries * call.kept_in.itemsize / 2**20
    because = f"the backward pass runs them again from one state: {kept:.3g} MiB are kept"
    choices.append(Choice("steps of a segment", costs.tile_segment, because))
    return ways[0], ways[1]


def _in_chunks(solver: Solver, chunk: int) -> Solver:
    """The settings with that many steps per chunk."""
    return solver if isinstance(solver, Sequential) else replace(solver, chunk=chunk)


def _warm_up(steps: int, chunk: int, chunks: int, choices: list[Choice]) -> int:
    """Steps of the warm-up, which become a choice."""
    steps, because = min(steps, chunk), "steps that the first guess looks back"
    if chunks == 1:
        steps, because = 0, "there is one chunk"
    choices.append(Choice("warm-up", steps, because))
    return steps


def _rows(
    facts: Facts,
    call: Call,
    machine: Machine,
    backend: BackendChoice,
    solver: Solver | None,
    costs: Costs,
    choices: list[Choice],
) -> tuple[Way, Way]:
    """Chunks as rows of one batch."""
    choices.append(Choice("path", "rows", "chunks are rows of one batch, which step together"))
    free = _free_rows(facts, machine, backend, costs)
    chosen, because = solver, "asked for"
    if solver is None and _in_c(facts, call, backend, costs):
        chosen = Sequential()
    elif solver is None or solver.chunk == "auto":
        quick = backend.name == "triton" and call.batch <= facts.few
        chosen = plan_rows(facts.entries, free, call.batch, call.time, costs, quick)
        if solver is not None:
            chosen = _in_chunks(solver, int(chosen.chunk))
    assert chosen is not None
    chunk = min(int(chosen.chunk), call.time)
    chunks = -(-call.time // chunk)
    if solver is None and chunks > 1:
        because = f"{facts.entries} numbers reach each other: tangents "
        because += "are cheap" if isinstance(chosen, Newton) else "would cost too much"
    elif solver is None:
        because = "chunks are not worth their warm-up here"
        if _in_c(facts, call, backend, costs):
            because = "a step in C is cheap to start, so chunks save nothing"
    choices.append(Choice("method", type(chosen).__name__, because))
    because = f"arithmetic of {free:.3g} rows takes as long as the launches of a step"
    if solver is None and _in_c(facts, call, backend, costs):
        because = "steps in C need no launches, which chunks would save"
    given = solver is not None and solver.chunk != "auto"
    choices.append(Choice("chunks", chunks, "asked for" if given else because))
    warm_up = _warm_up(costs.warm_up, chunk, chunks, choices)
    piece = steps_at_once(call.batch, call.hidden, machine.device, costs)
    tolerance = chosen.tolerance_for(call.kept_in)
    if chosen.tolerance is None and call.rounds:
        tolerance = max(tolerance, _TF32)
    iterates = not isinstance(chosen, Sequential)
    ours = iterates and solver is None  # nobody asked for these iterations
    ways = []
    for direction, name in enumerate(("steps forward", "steps backward")):
        steps, why = _steps(facts, call, machine, backend, direction, chunks, costs)
        choices.append(Choice(name, steps, why))
        settle, settings = ours and steps == "kernel", chosen
        if settle:
            settings = replace(chosen, max_iterations=1)
        elif call.capturing and iterates:
            settings = Sequential()
            choices.append(Choice(name, "one chunk", "a captured call cannot wait for the device"))
        small = _elements(facts, call) <= costs.graph_elements
        in_graph = settle and small and not call.capturing
        give_up = ours and not settle
        ways.append(Way(settings, tolerance, steps, settle, give_up, in_graph, warm_up, piece))
    if isinstance(ways[1].solver, Sequential) and piece < call.time:
        because = "steps whose gates the backward pass keeps at a time"
        choices.append(Choice("piece backward", piece, because))
    return ways[0], ways[1]


def _free_rows(facts: Facts, machine: Machine, backend: BackendChoice, costs: Costs) -> float:
    """Rows of a step for which arithmetic takes as long as launches."""
    streams = facts.streams and backend.name == "triton"
    return free_rows(facts.work, facts.launches, machine.device, streams, costs)


def kind_of_kernel(facts: Facts, rows: int) -> str:
    """What a kernel on a GPU does with the weights, for so many rows."""
    if not facts.streams:
        return "kept"
    return "spread" if rows <= facts.few else "streamed"


def _elements(facts: Facts, call: Call) -> int:
    """Elements of all states."""
    return call.batch * call.time * call.hidden * facts.components


def _in_c(facts: Facts, call: Call, backend: BackendChoice, costs: Costs) -> bool:
    """Whether the steps of a call on rows run in C: if it was asked for, or has many steps."""
    worth = call.time >= costs.c_mixing_steps or not backend.automatic
    return backend.name == "c" and worth and facts.kernels == (None, None)


def _steps(
    facts: Facts,
    call: Call,
    machine: Machine,
    backend: BackendChoice,
    direction: int,
    chunks: int,
    costs: Costs,
) -> tuple[str, str]:
    """What carries out the steps of a sweep on rows, and why."""
    if backend.name == "c":
        if _in_c(facts, call, backend, costs):
            return "kernel", "one kernel in C runs all steps"
        few = "a kernel in C does not pay for so few steps"
        why = next(filter(None, facts.kernels), few)
        return "operations", f"PyTorch operations, one step after another: {why}"
    if backend.name == "triton":
        reason = facts.kernels[direction]
        if reason is None:
            where = {
                "kept": "on the chip",
                "spread": "on the chip, shared among programs",
                "streamed": "which it reads at every step",
            }[kind_of_kernel(facts, call.batch * chunks)]
            return "kernel", f"one kernel runs all steps, with the weights {where}"
    else:
        reason = facts.kernels[direction] if backend.generated else "PyTorch operations"
    if machine.device == "cuda":
        return "graphs", f"CUDA graphs of PyTorch operations: {reason}"
    return "operations", "PyTorch operations, one step after another"


def _in_graph(
    facts: Facts,
    call: Call,
    machine: Machine,
    ways: tuple[Way, Way],
    solver: Solver | None,
    costs: Costs,
    choices: list[Choice],
) -> bool:
    """Whether the whole call is one CUDA graph."""
    if machine.device != "cuda":
        return False
    needed = ways if call.tracked else ways[:1]
    largest = max(call.elements, _elements(facts, call))
    if solver is not None:
        why = "the solver that was asked for may wait for the device"
    elif not all(way.steps == "kernel" for way in needed):
        why = "the solve waits for the device"
    elif call.time == 1 or call.capturing:
        why = "there is one step" if call.time == 1 else "the call is captured already"
    elif largest > costs.graph_elements:
        why = "the GPU takes longer than Python does to launch everything"
    else:
        because = "Python takes longer to launch everything than the GPU to run it"
        choices.append(Choice("CUDA graph", "whole call", because))
        return True
    solve = any(way.in_graph for way in needed)
    choices.append(Choice("CUDA graph", "solve" if solve else "none", why))
    return False
