"""The path of cells whose state is cut into tiles: one kernel for all steps and the readout.

Here `solve` returns what is handed out instead of the states, which are never written: what is
handed out at all times, (batch, time, ...); the states after the last step, (rows, components,
hidden), one row per sequence; the states before every segment of time, (batch, segments *
components * hidden), from which the backward pass runs a segment again; and the values of the
report.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from pararnn.kernels.facts import Planner
from pararnn.kernels.lowering import NotLowered, lower
from pararnn.kernels.rows import Rows
from pararnn.kernels.triton.build import Launcher, Launches, form_of, load
from pararnn.kernels.triton.device import on_device, side_by_side
from pararnn.kernels.triton.tuples import Aligned
from pararnn.planning.kernel_plans import TILE, TileLaunch, TileSizes, segment_of_tiles
from pararnn.planning.plan import BackendChoice, Facts, Way
from pararnn.solvers.problem import has_reset_states
from pararnn.solvers.report import COMPLETED, CONVERGED
from pararnn.solvers.shooting import SMALL, sequential_report
from pararnn.tracing.step import Step, arithmetic
from pararnn.tracing.tile_layout import all_inputs, tiles
from pararnn.tracing.tiles import Axis, NotTiled, Place, Result, Tiles
from pararnn.tracing.traced import Readout

_HALF = (torch.float16, torch.bfloat16)
_known: weakref.WeakKeyDictionary[fx.GraphModule, dict[Any, Tiles | str]] = (
    weakref.WeakKeyDictionary()
)


def tiles_of(step: Step, readout: Readout | None) -> Tiles | str:
    """The step and its readout in tiles, or the reason why not; cached."""
    known = _known.setdefault(step.module, {})
    key = step.key, None if readout is None else readout.key
    if key not in known:
        try:
            found = tiles(step, readout)
            roots = [*found.step, found.readout.expression, *found.adjoints]
            roots += [entry for column in found.tangents for entry in column]
            lower([*roots, *(g.expression for g in found.gradients)])
            known[key] = found
        except (NotTiled, NotLowered) as error:
            known[key] = str(error)
    return known[key]


def sizes_of(found: Tiles) -> TileSizes:
    """What launches depend on."""
    return TileSizes(
        *(math.prod(found.programs), found.rows, found.columns, found.split, found.multiplied),
        tensors=len(found.state),
        weights=sum(
            place.rows.size > 1 < place.columns.size and not place.is_matrix
            for place in found.coefficient_places
        ),
        tangents=len(found.tangents),
    )


@dataclass(frozen=True)
class Tiled:
    """Runs all steps of a step and its readout; see `operators.Path`.

    In all methods `inputs` are those of the step and then those of the readout.

    Attributes:
        step: The step.
        readout: What is handed out; the first component when None.
        planner: Plans of calls.
    """

    step: Step
    readout: Readout | None
    planner: Planner
    _kernels: dict[Any, _Kernels] = field(default_factory=dict, repr=False, compare=False)

    @functools.cached_property
    def tiles(self) -> Tiles:
        """The step in tiles."""
        found = tiles_of(self.step, self.readout)
        assert isinstance(found, Tiles), found
        return found

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Which inputs have a gradient."""
        return self.tiles.differentiable

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is handed out, without batch and time."""
        return self.readout.shape if self.readout is not None else (self.step.hidden,)

    @functools.cached_property
    def rows(self) -> Rows:
        """The same by PyTorch operations, which support all derivatives."""
        plain = BackendChoice("torch", "", generated=False)
        return Rows(self.step, Planner(Facts(), plain, None))

    def source(self, dtype: torch.dtype) -> str:
        """The functions that are generated for the kernels, for inputs of a type."""
        from pararnn.kernels.triton.tile_steps import tiled_source  # needs Triton

        real = arithmetic([dtype, self.step.dtype])
        return tiled_source(self.tiles, _precision(dtype, real))

    def sizes(self, inputs: Sequence[Tensor]) -> tuple[int, int]:
        """Sequences and steps."""
        found = self.tiles
        batch, time = inputs[found.pieces[found.drives[0]].input].shape[:2]
        return batch, time

    def kinds(self, inputs: Sequence[Tensor], initial: Tensor) -> tuple[torch.dtype, int]:
        """See `operators.Path`."""
        kept_in = self.state_dtype(inputs, initial)
        return kept_in, kept_in.itemsize

    def state_dtype(self, inputs: Sequence[Tensor], initial: Tensor) -> torch.dtype:
        """The type of what is handed out and of states that are kept: that of the largest drive.

        A gate of one number per head may be wider.
        """
        given = [inputs[self.tiles.pieces[n].input] for n in self.tiles.drives]
        if arithmetic(t.dtype for t in (*inputs, initial)) is torch.float64:
            return torch.float64
        floats = [t for t in given if t.is_floating_point()] or [initial]
        return max(floats, key=lambda t: (t.shape[2:].numel(), t.dtype.itemsize)).dtype

    def solve(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """See `operators.Path`."""
        return list(self._call(inputs, initial, starts).forward())

    def adjoint(
        self,
        inputs: Sequence[Tensor],
        initial: Tensor,
        starts: Tensor | None,
        states: Sequence[Tensor],
        grad_states: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """See `operators.Path`."""
        _, _, kept = states
        of_y, of_ends, _ = grad_states
        found, of_initial = self._call(inputs, initial, starts).backward(kept, of_y, of_ends)
        return [*found, of_initial]

    def loop(
        self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None
    ) -> list[Tensor]:
        """See `operators.Path`: what `solve` returns, but no states of segments."""
        own = inputs[: len(self.step.inputs)]
        states = self.rows.loop(own, initial, starts)
        y = states[0] if self.readout is None else self.readout(states, inputs[len(own) :])
        joined = torch.stack(states, 2)
        if starts is None or has_reset_states(initial, len(joined)):
            ends = joined[:, -1]
        else:
            last = _last_steps(initial, starts)
            ends = torch.where((last < 0)[:, None, None], initial.to(y.dtype), joined[0, last])
        real = arithmetic(t.dtype for t in (*inputs, initial))
        return [y, ends.to(real), joined.new_empty(0)]

    def like_states(self, inputs: Sequence[Tensor], initial: Tensor) -> list[Tensor]:
        """See `operators.Path`."""
        dtype, (batch, time) = self.state_dtype(inputs, initial), self.sizes(inputs)
        _, components, hidden = initial.shape
        rows = batch if has_reset_states(initial, batch) else initial.shape[0]
        segments = -(-time // segment_of_tiles())
        like = functools.partial(initial.new_empty, dtype=dtype)
        real = arithmetic(t.dtype for t in (*inputs, initial))
        return [
            like((batch, time, *self.shape)),
            like((rows, components, hidden), dtype=real),  # a second call may go on from them
            like((batch, segments * components * hidden)),  # no size that could be 1 or not
            initial.new_empty((batch, 4), dtype=torch.float64),
        ]

    def like_gradients(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """See `operators.Path`."""
        return [inputs[i].new_empty(inputs[i].shape) for i in self.differentiable]

    def _call(self, inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None) -> _Call:
        batch, time = self.sizes(inputs)
        kept_in = self.state_dtype(inputs, initial)
        given = (*(inputs[n] for n, _ in all_inputs(self.step, self.readout)), initial)
        real = arithmetic(t.dtype for t in given)
        plan = self.planner.plan(
            initial.device, batch, time, initial.shape[2], kept_in, kept_in.itemsize
        )
        forward, adjoint = plan.forward, plan.adjoint
        assert forward.tile is not None
        assert adjoint.tile is not None
        key = kept_in, real, forward.tile, adjoint.tile
        if key not in self._kernels:
            self._kernels[key] = _Kernels(self.tiles, *key)
        sizes = batch, time, segment_of_tiles()
        return _Call(self._kernels[key], self, forward, adjoint, inputs, initial, starts, *sizes)


def _last_steps(initial: Tensor, starts: Tensor) -> Tensor:
    """The last step of every packed sequence, -1 for one without steps."""
    owners = starts.cummax(1).values[0].long()
    steps = torch.arange(starts.shape[1], device=starts.device)
    found = torch.full((len(initial),), -1, dtype=torch.int64, device=starts.device)
    return found.scatter_reduce(0, owners, steps, "amax")


@dataclass(frozen=True)
class _Kernels:
    """The generated functions and compile-time arguments of the kernels.

    Attributes:
        tiles: The step.
        kept_in: Type of what is handed out and of states that are kept.
        real: Type of the arithmetic.
        forward: How the kernels of the forward direction are launched.
        adjoint: How those of the backward direction are.
    """

    tiles: Tiles
    kept_in: torch.dtype
    real: torch.dtype
    forward: TileLaunch
    adjoint: TileLaunch
    launches: Launches = field(default_factory=Launches, repr=False, compare=False)

    @functools.cached_property
    def functions(self) -> Any:
        """The generated module."""
        from pararnn.kernels.triton.tile_steps import tiled_source  # needs Triton

        return load(tiled_source(self.tiles, _precision(self.kept_in, self.real)))

    @functools.cached_property
    def constants(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Compile-time arguments of both kernels."""
        return self._constants(self.forward), self._constants(self.adjoint)

    @functools.cached_property
    def alone(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same where chunks of time are run one after another."""
        launches = [replace(way, warps=way.warps_alone) for way in (self.forward, self.adjoint)]
        forward, adjoint = map(self._constants, launches)
        return forward, adjoint

    def _constants(self, launch: TileLaunch) -> dict[str, Any]:
        import triton.language as tl

        found = self.tiles
        types = {
            torch.float16: tl.float16,
            torch.bfloat16: tl.bfloat16,
            torch.float32: tl.float32,
            torch.float64: tl.float64,
        }
        place = functools.partial(_place, launch, found.split)
        drive = functools.partial(_place, launch, found.split, may_widen=True, direct=True)
        stored = _stored(found)
        divisors, rest = [], math.prod(found.programs)
        for size in found.programs:
            rest //= size
            divisors.append((size, rest))
        return {
            "DRIVES": tuple(map(drive, found.drive_places)),
            "COEFFICIENTS": tuple(map(place, found.coefficient_places)),
            "STATE": tuple(map(place, found.state)),
            "STORED": tuple(place(own, in_panels=self._in_panels(own)) for own in stored),
            "Y": (place(found.readout.place),),
            "PROGRAMS": tuple(divisors),
            "NUMBERS": math.prod(found.programs),
            "SPLIT": launch.parts,
            "REAL": types[self.real],
            "FACTORS": types[self.kept_in if self.kept_in in _HALF else self.real],
            "num_warps": launch.warps,
            "num_stages": 1,
            "maxnreg": launch.registers,
            "most_spilled": launch.spills,
        }

    def _in_panels(self, place: Place) -> bool:
        """Whether states that are kept lie as tensor cores have them; see `tile_values`."""
        multiplied = self.kept_in in _HALF and all(self.tiles.multiplied)
        return multiplied and place.columns.size % TILE == 0

    def parts(self, way: Way, result: Result) -> tuple[tuple[int, ...], int]:
        """A member of `PARTS`, see `tile_values.parts_of`, and how many partial sums there are."""
        assert way.tile is not None
        sizes = self.tiles.programs
        count = way.tile.parts if result.split else 1
        strides = [0] * len(sizes)
        for axis in result.summed:
            strides[axis] = count
            count *= sizes[axis]
        return (1 if result.split else 0, *strides), count


def _precision(kept_in: torch.dtype, real: torch.dtype) -> Literal["half", "single", "double"]:
    """See `steps.Module`."""
    if real is torch.float64:
        return "double"
    return "half" if kept_in in _HALF else "single"


def _stored(found: Tiles) -> list[Place]:
    """Where the state lies in tensors that only these kernels read: tile after tile."""
    places, first = [], 0
    for of in found.state:
        rows, columns = of.rows.size, of.columns.size
        strides, stride = [], rows * columns
        for size in reversed(found.programs):
            strides.append(stride)
            stride *= size
        lies = Axis(columns, rows), Axis(1, columns)
        places.append(Place(tuple(reversed(strides)), *lies, False, first))
        first += stride
    return places


def _place(
    launch: TileLaunch,
    split: int | None,
    place: Place,
    may_widen: bool = False,
    direct: bool = False,
    in_panels: bool = False,
) -> tuple[Any, ...]:
    """A place as `tile_values.placed` takes it.

    Args:
        launch: How the kernel is launched.
        split: The axis of a tile that may be cut.
        place: The place.
        may_widen: Whether it is loaded, see `TileLaunch.widens`.
        direct: Whether threads may read and write what they have of it, see `functions.read`.
        in_panels: Whether it lies in panels.
    """
    rows = place.rows
    if may_widen and launch.widens(rows.size, place.columns.size):
        # also in rows that fill up a block: all rows are the same
        rows = Axis(0, 1 << (launch.sizes.rows - 1).bit_length())
    axes = []
    whole, span = True, 1
    for at, axis in enumerate((rows, place.columns)):
        cut = split == at and launch.parts > 1 and not place.is_matrix
        block = launch.block_of(axis.size, at, place.is_matrix)
        step = block if cut and axis.size > 1 else 0
        whole = whole and (axis.size % block == 0 if step else axis.size == block)
        axes.append((axis.stride, axis.size, block, step))
        span += (min(axis.size, block) - 1) * axis.stride
    spans = span, 1 << (span - 1).bit_length()
    # with products of matrices, whose layouts are not those of memory
    direct = direct and any(launch.sizes.multiplied) and 1 in (axes[0][2], axes[1][2])
    narrows = rows is not place.rows and launch.narrows
    flags = in_panels, narrows, direct
    return (*axes[0], *axes[1], whole, *place.programs, place.offset, *spans, *flags)


@dataclass(frozen=True)
class _Call:
    """One call.

    Attributes:
        kernels: What is compiled, for this call and for others of other lengths.
        path: Where it is called.
        way_forward: How the forward direction is carried out.
        way_backward: How the backward direction is.
        inputs: See `Tiled`.
        initial: States before the first step.
        starts: Where sequences start anew, if they do.
        batch: Sequences.
        time: Steps.
        segment: Steps of a segment.
    """

    kernels: _Kernels
    path: Tiled
    way_forward: Way
    way_backward: Way
    inputs: Sequence[Tensor]
    initial: Tensor
    starts: Tensor | None
    batch: int
    time: int
    segment: int

    @functools.cached_property
    def is_packed(self) -> bool:
        """Whether there are several sequences in one row, each with steps of its own."""
        return self.starts is not None and not has_reset_states(self.initial, self.batch)

    @functools.cached_property
    def given(self) -> dict[str, Any]:
        """Arguments of both kernels."""
        found = self.kernels.tiles
        tensors = [self.inputs[p.input] for p in found.pieces]
        starts = None if self.starts is None else self.starts.contiguous()
        owners = starts.cummax(1).values if starts is not None and self.is_packed else None
        return {
            "drives": tuple(_over_time(_rows(tensors[n])) for n in found.drives),
            "coefficients": tuple(tensors[n].contiguous() for n in found.coefficients),
            "initial": self.initial.contiguous(),
            "starts": starts,
            "owners": owners,
            "batch": self.batch,
            "time": self.time,
            "segments": -(-self.time // self.segment),
            "HIDDEN": self.initial.shape[1] * self.initial.shape[2],
            "SEGMENT": self.segment,
        }

    def programs(self, way: Way, chunks: int = 1) -> tuple[int]:
        """The grid."""
        assert way.tile is not None
        return (self.batch * chunks * math.prod(self.kernels.tiles.programs) * way.tile.parts,)

    def chunks(self, way: Way) -> int:
        """Chunks of time."""
        return -(-self.time // min(int(way.solver.chunk), self.time))

    def launcher(self, way: Way, *more: Tensor | None) -> Launcher:
        """Launches of a direction, and of which further tensors it is given."""
        form = form_of((*self.inputs, self.initial, self.starts, *more))
        return self.kernels.launches.of((way, len(more), *form))

    def edge(self, chunks: int, columns: int = 1) -> Tensor:
        """Room for states or adjoints between chunks, or for matrices of so many columns."""
        _, components, hidden = self.initial.shape
        shape = self.batch * chunks * columns, components, hidden
        return self.initial.new_empty(shape, dtype=self.kernels.real)

    def edges(self, chunks: int) -> dict[str, Tensor]:
        """Room for the states or adjoints that chunks start from, and for those that they reach."""
        return {"guess": self.edge(chunks), "reached": self.edge(chunks)}

    def in_chunks(
        self,
        launcher: Launcher,
        kernels: Any,
        way: Way,
        given: dict[str, Any],
        mends: Sequence[dict[str, Any]],
        tangents: Callable[[dict[str, Any]], None],
        backward: bool,
    ) -> None:
        """Run all chunks side by side, then those again that do not fit: side by side, in order.

        By Newton's method, those of heads that remember longer than a warm-up are run for their
        tangents instead, and then from the starts that follow from these.

        Args:
            launcher: Launches the kernels.
            kernels: `tile_forward` or `tile_backward`.
            way: How the direction is carried out.
            given: Arguments of the kernel for one chunk.
            mends: Further arguments of the launches that run chunks again, in order at last.
            tangents: Runs chunks for their tangents, given further arguments.
            backward: Whether time runs backwards, and is counted in segments.
        """
        chunks, edges = self.chunks(way), self.edges(self.chunks(way))
        unit = self.segment if backward else 1
        chunk, warm = int(way.solver.chunk) // unit, way.warm_up // unit
        newton = way.solver.coupling == "tangent"
        affine = backward or self.kernels.tiles.is_affine
        verdict = self.initial.new_empty(self.programs(way), dtype=torch.int32)
        given = {**given, "chunks": chunks, "chunk": chunk, "tolerance": way.tolerance}
        sweeps = {**given, **edges, "verdict": verdict, "warm": warm}
        # with tangents at hand, a chunk that does not fit after its warm-up was swept in vain
        sweeps |= {"within": warm // 2 if newton else warm + chunk}
        launch = launcher.launch
        launch(kernels.sweep, self.programs(way), {**sweeps, "probes": 1})
        side = self.programs(way, chunks)
        sweep = lambda: launch(kernels.sweep, side, {**sweeps, "probes": 0})  # noqa: E731
        found: dict[str, Tensor | None] = {"verdict": verdict}
        if newton:
            columns = len(self.kernels.tiles.tangents)
            found["base"] = None if backward else self.edge(chunks)  # adjoints start from zeros
            found |= {"ended": self.edge(chunks), "matrices": self.edge(chunks, columns)}
            more = {"chunks": chunks, "chunk": chunk, "warm": warm, "COLUMNS": columns, **found}
            side_by_side(self.initial, sweep, lambda: tangents({**more, "begun": 0}))
        else:
            sweep()
        for n, own in enumerate(mends):
            new, composed, each = self.edges(chunks), None, 1
            if n == len(mends) - 1:
                given, each = {**given, **self.kernels.alone[int(backward)]}, chunks
            elif newton:
                reached, compose = (
                    edges["reached"],
                    functools.partial(self.compose, launcher, way, chunks),
                )
                if n > 0 and not affine:
                    # once more where chunks do not fit, from where they start with old tangents
                    known, found["verdict"] = found["verdict"], verdict.new_empty(verdict.shape)
                    asked = {**found, "verdict": known, "new_verdict": found["verdict"]}
                    found["base"] = compose(reached, asked, backward)
                    found["ended"] = self.edge(chunks)
                    tangents({**more, **found, "begun": 1})
                composed = compose(reached, {**found, "new_verdict": None}, backward)
                found |= {"base": new["guess"], "ended": new["reached"]}  # by the next launch
            others = {f"new_{name}": edge for name, edge in new.items()}
            checks = {"verdict": found["verdict"], "composed": composed, "each": each}
            again = {**given, **edges, **others, **own, **checks}
            launch(kernels.mend, self.programs(way, -(-chunks // each)), again)
            edges = new

    def compose(
        self,
        launcher: Launcher,
        way: Way,
        chunks: int,
        reached: Tensor,
        found: dict[str, Any],
        backward: bool,
    ) -> Tensor:
        """What chunks start from, see `tile_tangents.compose`."""
        from pararnn.kernels.triton import tile_tangents  # needs Triton

        launch = self.kernels.forward
        given = {
            **self.kernels.constants[int(backward)],
            **found,
            "reached": reached,
            "composed": reached.new_empty(reached.shape),
            "chunks": chunks,
            "step": -1 if backward else 1,
            "tolerance": way.tolerance,
            "HIDDEN": self.given["HIDDEN"],
            "COLUMNS": len(self.kernels.tiles.tangents),
            "SMALL": SMALL,
            "TINY": torch.finfo(self.kernels.real).tiny,
            "num_warps": launch.warps_alone,  # it only moves numbers
        }
        launcher.launch(tile_tangents.compose, self.programs(way), given)
        return given["composed"]

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is handed out, the last states, those before segments, and values of the report."""
        from pararnn.kernels.triton import tile_forward, tile_tangents  # need Triton

        kernels, way = self.kernels, self.way_forward
        launcher = self.launcher(way)
        like_y, like_ends, like_kept, _ = self.path.like_states(self.inputs, self.initial)
        shape = like_y.shape
        strides, count = kernels.parts(way, kernels.tiles.readout)
        y = like_y if count == 1 else like_y.new_empty((count, *shape), dtype=kernels.real)
        ends = like_ends
        if self.is_packed:  # a sequence without steps ends where it began
            ends = self.initial.to(like_ends.dtype, copy=True).contiguous()
        given = {
            **self.given,
            "y": _over_time(y[0] if count > 1 else y),
            "kept": like_kept,
            "ends": ends,
            "y_part": math.prod(shape),
            "STEP": kernels.functions.step,
            "Y_PARTS": (strides,),
            **kernels.constants[0],
        }
        chunks = self.chunks(way)

        def tangents(more: dict[str, Any]) -> None:
            more |= given | {"TANGENT": kernels.functions.tangent}
            launcher.launch(tile_tangents.tangents, self.programs(way, chunks), more)

        with on_device(self.initial):
            if chunks == 1:
                launcher.launch(tile_forward.forward, self.programs(way), given)
                report = sequential_report(self.batch, self.initial.device)
            else:
                rounds = (way.solver.max_iterations or chunks) - 1
                reports = rounds * chunks + 1
                report = self.initial.new_empty(
                    (self.batch, reports, self.programs(way)[0] // self.batch, 4),
                    dtype=torch.float64,
                )
                more: dict[str, Any] = {"SMALL": SMALL, "TINY": torch.finfo(kernels.real).tiny}
                more |= {"CONVERGED": CONVERGED, "COMPLETED": COMPLETED}
                more |= {"report": report, "reports": reports}
                mends = [
                    more | {"own_report": n * chunks, "passes": 2 + n % rounds}
                    for n in range(rounds + 1)
                ]
                self.in_chunks(launcher, tile_forward, way, given, mends, tangents, backward=False)
                report = report.flatten(1, 2).amax(1)
        y = y.sum(0).to(like_y.dtype) if count > 1 else y
        return y, ends, like_kept, report

    def backward(
        self, kept: Tensor, of_y: Tensor | None, of_ends: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Gradients of the differentiable inputs, and of initial states."""
        from pararnn.kernels.triton import tile_backward, tile_tangents  # need Triton

        kernels, way, found = self.kernels, self.way_backward, self.kernels.tiles
        launcher = self.launcher(way, kept, of_y, of_ends)
        results = dict(zip(found.wanted, found.gradients, strict=True))
        initial = self.initial
        _, components, hidden = initial.shape
        chunks = self.chunks(way)
        rows = self.batch * chunks
        scratch = kept.new_empty(rows, self.segment, components, hidden)
        resets = self.starts is not None and not self.is_packed
        fill = initial.new_empty if self.starts is None else initial.new_zeros
        count = self.batch + rows if resets else len(initial)
        of_initial = fill((count, components, hidden), dtype=kernels.real)
        buffers: dict[int, Tensor] = {}
        partial: dict[int, tuple[int, ...]] = {}
        counts: dict[int, int] = {}
        for n, result in results.items():
            own, shape = self.inputs[found.pieces[n].input], found.pieces[n].shape
            partial[n], counts[n] = kernels.parts(way, result)
            if n in found.drives:
                alone = counts[n] == 1
                over = self.batch, self.time, *shape
                buffers[n] = own.new_empty(
                    over if alone else (counts[n], *over),
                    dtype=own.dtype if alone else kernels.real,
                )
            else:
                buffers[n] = own.new_empty((counts[n], rows, *shape), dtype=kernels.real)
        drives = [n for n in found.drives if n in results]
        fixed = [n for n in found.coefficients if n in results]
        steps = self.batch * self.time
        sizes = {
            n: math.prod(found.pieces[n].shape) * (steps if n in drives else 1) for n in results
        }
        assert way.tile is not None
        place = functools.partial(_place, way.tile, found.split)
        given = {
            **self.given,
            "kept": kept,
            "scratch": scratch,
            "y_grad": None if of_y is None else _over_time(_rows(of_y)),
            "end_grads": None if of_ends is None else of_ends.contiguous(),
            "grads": tuple(
                _over_time(buffers[n] if counts[n] == 1 else buffers[n][0]) for n in drives
            ),
            "sums": tuple(buffers[n] for n in fixed),
            "initial_grads": of_initial,
            "grad_parts": tuple(sizes[n] for n in drives),
            "sum_parts": tuple(rows * sizes[n] for n in fixed),
            "sum_rows": tuple(sizes[n] for n in fixed),
            "AGAIN": kernels.functions.again,
            "ADJOINT": kernels.functions.adjoint,
            "GRADS": tuple(place(results[n].place, direct=True) for n in drives),
            "GRAD_PARTS": tuple(partial[n] for n in drives),
            "SUMS": tuple(place(results[n].place) for n in fixed),
            "SUM_PARTS": tuple(partial[n] for n in fixed),
            **kernels.constants[1],
        }

        def gather(more: dict[str, Any]) -> None:
            more |= given | {"GATHER": kernels.functions.gather}
            launcher.launch(tile_tangents.gather, self.programs(way, chunks), more)

        with on_device(initial):
            if chunks == 1:
                launcher.launch(tile_backward.backward, self.programs(way), given)
            else:
                mends: list[dict[str, Any]] = [
                    {} for _ in range(way.solver.max_iterations or chunks)
                ]
                self.in_chunks(launcher, tile_backward, way, given, mends, gather, backward=True)
        if resets:
            again = of_initial[self.batch :].unflatten(0, (self.batch, chunks)).sum(1)
            of_initial = torch.cat([of_initial[: self.batch], again])
        parts: dict[int, list[Tensor]] = {}
        for n in found.wanted:
            buffer = buffers[n]
            if n in fixed:
                buffer = buffer.flatten(0, 1).sum(0)
            elif counts[n] > 1:
                buffer = buffer.sum(0)
            parts.setdefault(found.pieces[n].input, []).append(buffer)
        gradients = [
            _joined(found, n, own).reshape(self.inputs[n].shape).to(self.inputs[n].dtype)
            for n, own in parts.items()
        ]
        if self.is_packed and of_ends is not None:  # what has no steps hands its gradient on
            last = _last_steps(initial, self.given["starts"])
            of_initial = torch.where((last < 0)[:, None, None], of_ends, of_initial)
        return gradients, of_initial.to(initial.dtype)


def _joined(found: Tiles, number: int, pieces: Sequence[Tensor]) -> Tensor:
    """The gradient of an input from those of its pieces."""
    cut = next(p.cut for p in found.pieces if p.input == number)
    if cut is None:
        return pieces[0]
    more = 2 if number in {found.pieces[n].input for n in found.drives} else 0
    return replace(cut, axis=cut.axis + more).joined(pieces)


def _rows(tensor: Tensor) -> Tensor:
    """A tensor (batch, time, ...) whose entries of a step lie side by side."""
    stride = 1
    for size, own in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size != 1 and own != stride:
            return tensor.contiguous()
        stride *= size
    return tensor


def _over_time(tensor: Tensor) -> Aligned:
    import triton.language as tl

    batch, time = (stride * tensor.itemsize for stride in tensor.stride()[:2])
    plain = tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor
    return Aligned(plain, batch, time, tl.constexpr(math.gcd(batch, time, 16)))
