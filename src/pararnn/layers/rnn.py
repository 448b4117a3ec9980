"""`RNN`: any cell over a whole sequence."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pararnn.layers import across, pytorch_kernels
from pararnn.layers.arguments import (
    State,
    batched,
    by_row,
    check_boundaries,
    check_cell,
    check_resets,
    check_tensors,
    components_of,
    describe,
    map_state,
    num_sequences,
    shape_of,
    shapes_of,
    sizes_in,
    starts_of,
)
from pararnn.layers.checkpoints import check_steps, cuts_time, run_segments, with_segments
from pararnn.layers.compiled import valid_while_same
from pararnn.layers.constraints import keep_in_bounds
from pararnn.layers.mistakes import ends_at_the_cell
from pararnn.layers.runner import Runner
from pararnn.layers.shard import Given
from pararnn.layers.sizes import Sizes, UnknownSizes
from pararnn.layers.traces import Kept, Traces
from pararnn.planning.plan import Plan, check_name
from pararnn.planning.settings import Solver
from pararnn.solvers.ranks import Ranks
from pararnn.solvers.report import SolveReport
from pararnn.solvers.shooting import sequential_report
from pararnn.tracing.capture import (
    Snapshot,
    cell_subject,
    owner_of,
    readout_of,
    resolve,
    snapshot,
)
from pararnn.tracing.modes import autocasts, forward_of, transformed
from pararnn.tracing.packed import Shape
from pararnn.tracing.parametrised import computed_once
from pararnn.tracing.recorder import TraceError
from pararnn.tracing.structure import trace
from pararnn.tracing.traced import Traced
from pararnn.tracing.watch import Annealed, Watched

_STRUCTURES = ("elementwise", "heads", "dense")  # each includes those before it
_HALF = (torch.float16, torch.bfloat16)
_AS_IT_IS = contextlib.nullcontext()
_SWITCHING = threading.Lock()  # of a layer from one trace to another


class RNN(nn.Module):
    """Evaluates a cell over a sequence, for all times at once, with the sequential result.

    Args:
        cell: Module with `forward(x, state) -> state`, as `nn.GRUCell`: `x` (N, *features), state a
            tensor (N, *state_shape) or a tuple of them. With a method `readout(x, state) -> y` the
            layer hands out y (N, ...), of the state after the step; else the first tensor of the
            state.
        hidden_size: Short for `state_shape=(hidden_size,)` of each tensor, or a tuple of sizes
            where they differ; `cell.hidden_size` when None.
        num_components: Tensors in the state; `cell.num_components` when None, and without that
            found by trying.
        state_shape: Shape of the state without the batch, or a tuple of the shapes of its tensors;
            `cell.state_shape` when None.
        batch_first: x is (batch, time, *features), else (time, batch, *features).
        solver: How to solve: `Newton`, `QuasiNewton`, `Picard`, `Jacobi` or `Sequential`; None to
            choose from structure, shape and device.
        backend: "torch", "c", "triton", or "auto" to choose; one that is named runs or raises.
        structure: A claim about which channels have an influence on each other: "elementwise" (none
            on another), "heads" (only within equal groups of neighbours) or "dense"; checked
            against what tracing proves, nothing depends on it. None claims nothing.
        checkpoint_every: For long sequences: steps after which the state is kept for the backward
            pass, which computes everything between two such states again, one segment of so many
            steps at a time (activation checkpointing over time). When None, all is kept.

    Raises:
        TypeError: `cell` is not a module, or sizes are not to be found.
        TraceError: The cell does something that cannot be evaluated for all times.
        ValueError: The claim about its structure is false.

    Source: Danieli et al. 2025, arXiv 2510.21450.
    """

    changes_by_itself = tuple(
        "_known _runner _latest _watched _report _annealed _signature _traces".split()
    )

    def __init__(
        self,
        cell: nn.Module,
        *,
        hidden_size: int | tuple[int, ...] | None = None,
        num_components: int | None = None,
        state_shape: Shape | tuple[Shape, ...] | None = None,
        batch_first: bool = True,
        solver: Solver | None = None,
        backend: str = "auto",
        structure: str | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        super().__init__()
        check_cell(cell)
        check_steps(checkpoint_every)
        if solver is not None and not (isinstance(solver, Solver) and hasattr(solver, "coupling")):
            raise TypeError(
                "solver must be pararnn.Newton(...) or another of the methods (QuasiNewton, "
                f"Picard, Jacobi, Sequential), or None, got {solver!r}."
            )
        if structure is not None and structure not in _STRUCTURES:
            choices = ", ".join(map(repr, _STRUCTURES))
            raise ValueError(f"structure must be one of {choices}, or None, got {structure!r}.")
        self.cell = cell
        self.batch_first = batch_first
        self.solver = solver
        self.backend = backend
        self.structure = structure
        self.checkpoint_every = checkpoint_every
        self._known = Sizes(hidden_size, num_components, state_shape)
        self.ranks: Ranks | None = None  # among which time is split
        self._shapes: tuple[Shape, ...] = ()  # of the state of what is traced
        check_name(backend)
        self._runner: Runner | None = None
        self._signature: tuple[object, ...] = ()
        self._latest: tuple[torch.dtype, torch.device] | None = None
        self._watched: Watched | None = None
        self._traces = Traces()
        self._is_parametrised = False
        self._annealed = Annealed()
        self._report: Tensor | int | None = None  # a number of rows: they went step by step
        keep_in_bounds(self)
        with contextlib.suppress(UnknownSizes):  # the state of the first call may give them
            self._prepare_early()

    @property
    def hidden_size(self) -> int:
        """Entries of the first tensor of the state."""
        return math.prod(self.state_shapes[0])

    @property
    def num_components(self) -> int:
        """Tensors in the state."""
        return self._known.num_components(self.cell)

    @property
    def state_shapes(self) -> tuple[Shape, ...]:
        """The shape of every tensor in the state, without the batch."""
        return self._known.of(self.cell)

    @property
    def output_shape(self) -> Shape:
        """The shape of an output, without batch and time.

        Raises:
            TypeError: It is known only after a first call.
        """
        if readout_of(self.cell) is None:
            return self.state_shapes[0]
        readout = self.runner().traced.readout
        assert readout is not None
        return readout.shape

    @property
    def report(self) -> SolveReport | None:
        """How the last forward pass went; None before one or when compiled."""
        values = self._report
        if isinstance(values, int):
            values = sequential_report(values, torch.device("cpu"))
        return None if values is None else SolveReport(values)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        resets: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        reset_state: State | None = None,
    ) -> tuple[Tensor, State]:
        """Evaluate the cell at all times.

        Args:
            x: Inputs, (batch, time, *features), or (time, batch, *features) without `batch_first`,
                or (time, *features) for a single sequence.
            state: State before the first step: (batch, *state_shape), or a tuple of such tensors;
                without batch axis for a single sequence; zeros when None.
            resets: Boolean, (batch, time) laid out like x: where true, the state before this step
                is `reset_state`, at the first step too.
            cu_seqlens: Boundaries (0, ..., time) of sequences packed one after another into x of
                batch 1; `state` then has one row per sequence, and so has the returned state. A
                sequence may have no steps: its state stays as it is.
            reset_state: What resets restart from, like `state`, or without batch axis for all
                sequences; zeros when None.

        Returns:
            The outputs at all times, laid out like x: what the cell's `readout` returns, or without
            one the first tensor of the state. And the state after the last step, like `state`. Both
            have the type of x.

        Gradients: exact at the solution; they reach x, `state`, `reset_state` (the sum over all
            restarts) and the cell's parameters.
        """
        if self.ranks is None:
            given = self.laid_out(x, state, resets, cu_seqlens, reset_state)
            check_boundaries(given.x, given.cu_seqlens)
            y, final, report = self.at_all_times(*given[:-1])
        else:
            given, y, final, report = across.evaluate(
                self, self.ranks, x, state, resets, cu_seqlens, reset_state
            )
        if not torch.compiler.is_compiling():
            vars(self)["_report"] = report  # not by nn.Module.__setattr__, which takes 2 us
        if given.is_single:
            y = y.squeeze(0)
            final = final if cu_seqlens is not None else tuple(f.squeeze(0) for f in final)
        elif not self.batch_first:
            y = y.transpose(0, 1)
        return y, final if len(final) > 1 else final[0]

    def laid_out(
        self,
        x: Tensor,
        state: State | None,
        resets: Tensor | None,
        cu_seqlens: Tensor | None,
        reset_state: State | None,
    ) -> Given:
        """The arguments of `forward`, checked and laid out with batch and time first."""
        check_tensors("state", state)
        check_tensors("reset_state", reset_state)
        runner = self._runner_for(x, state)
        single = x.dim() == runner.feature_axes + 1
        check_resets(resets, x.shape[: 1 if single else 2], cu_seqlens, self.batch_first)
        if single:
            x = x.unsqueeze(0)
            state = batched(state, self._shapes)
            resets = None if resets is None else resets.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
            resets = None if resets is None else resets.transpose(0, 1)
        sequences = num_sequences(x.shape[0], cu_seqlens)
        parts = self._parts("state", state, sequences, x, self.batch_first)
        fresh: tuple[Tensor, ...] = ()
        if cu_seqlens is not None and reset_state is not None:
            raise ValueError(
                "reset_state is what resets restart from; with cu_seqlens every sequence starts "
                "from its own row of state."
            )
        if resets is not None or reset_state is not None:
            batch = x.shape[0]
            every = batched(reset_state, self._shapes)
            every = map_state(
                every, lambda s: s.expand(batch, *s.shape[1:]) if s.shape[0] == 1 else s
            )
            restarts = self._parts("reset_state", every, batch, x, self.batch_first)
            fresh = () if resets is None else restarts
        return Given(runner, x, parts, fresh, resets, cu_seqlens, single)

    def at_all_times(
        self,
        runner: Runner,
        x: Tensor,
        parts: tuple[Tensor, ...],
        fresh: tuple[Tensor, ...],
        resets: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | int | None]:
        """Outputs, the components after the last steps and the report; arguments as in `Given`."""
        if self.checkpoint_every is None or not cuts_time():
            return self._run(runner, x, parts, fresh, resets, cu_seqlens)
        run = functools.partial(self._run, runner)
        rest, tensors = (x, parts, fresh, resets, cu_seqlens), self._tensors(runner)
        return run_segments(run, self.checkpoint_every, runner.is_random, *rest, tensors)

    def _run(
        self,
        runner: Runner,
        x: Tensor,
        parts: tuple[Tensor, ...],
        fresh: tuple[Tensor, ...],
        resets: Tensor | None,
        cu_seqlens: Tensor | None,
        tensors: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | int | None]:
        """Carry out the plan of a call, or of a segment.

        Args:
            runner: The traced cell.
            x: Inputs, (batch, time, *features).
            parts: Components before the first step.
            fresh: Components that resets restart from, if there are resets.
            resets: As in `forward`, (batch, time).
            cu_seqlens: As in `forward`.
            tensors: What the cell reads; read from it when None.

        Returns:
            The outputs at all times, the components after the last steps, and the report.
        """
        starts, last = starts_of(x, resets, cu_seqlens)
        path = None
        if last is None and (tensors is None or not self._is_parametrised):
            path = self._path(runner, x, (*parts, *fresh), x.shape[1], resets is None)
        if path in ("pytorch", "loop") and tensors is not None:
            self._check_unchanged(runner, tensors)
        if path == "pytorch":
            y, *ends = [t.to(x.dtype) for t in pytorch_kernels.run(self.cell, x, parts)]
            return y, tuple(ends), x.shape[0]
        if path == "loop":
            one = 1 in x.shape[:2]
            inputs = x.unbind(1) if one else x.transpose(0, 1).contiguous().unbind(0)
            outputs, final = self._run_cell(runner, inputs, parts, resets, fresh)
            return torch.stack(outputs, 1), final, x.shape[0]
        if fresh:  # as `Problem.starts` has it
            parts = tuple(torch.cat(pair) for pair in zip(parts, fresh, strict=True))
        return self._evaluate(runner, x, parts, starts, last, tensors)

    def _check_unchanged(self, runner: Runner, tensors: Sequence[Tensor]) -> None:
        """Refuse to run the cell itself if a segment ran it with other tensors before."""
        now = [getattr(owner, name) for owner, name in runner.owners]
        if not all(map(Tensor.is_set_to, now, tensors)):
            raise RuntimeError(
                f"the parameters of {type(self.cell).__name__} are not those of the forward pass, "
                "and checkpoint_every evaluates segments again in the backward pass; call backward "
                "before they are replaced (inside of what torch.func.functional_call calls)."
            )

    def step(self, x_t: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Evaluate one step, as `forward` does on a sequence of length 1.

        Args:
            x_t: Inputs, (batch, *features), or (*features) for a single sequence.
            state: State before the step; zeros when None.

        Returns:
            The output, and the state after the step.
        """
        check_tensors("state", state)
        runner = self._runner_for(x_t, state, step=True)
        single = x_t.dim() == runner.feature_axes
        if single:
            x_t = x_t.unsqueeze(0)
            state = batched(state, self._shapes)
        parts = self._parts("state", state, x_t.shape[0], x_t)
        report: Tensor | int | None
        if self._path(runner, x_t, parts, 1, False) == "loop":
            (y,), final = self._run_cell(runner, [x_t], parts)
            report = x_t.shape[0]
        else:
            y, final, report = self._evaluate(runner, x_t.unsqueeze(1), parts, None, None)
            y = y.squeeze(1)
        if not torch.compiler.is_compiling():
            vars(self)["_report"] = report
        if single:
            y, final = y.squeeze(0), tuple(f.squeeze(0) for f in final)
        return y, final if len(final) > 1 else final[0]

    def _path(
        self, runner: Runner, x: Tensor, parts: tuple[Tensor, ...], time: int, whole: bool
    ) -> str | None:
        """The path of the plan, where it may be one around the traced step: see `_ways_around`.

        Args:
            runner: The traced cell.
            x: Inputs.
            parts: States that are given.
            time: Steps.
            whole: Whether no sequence begins anew on the way.
        """
        if runner.by_channels or torch.compiler.is_compiling() or transformed() or not len(x):
            return None
        kinds = [x.dtype, *[p.dtype for p in parts]]
        may_loop, library = self._ways_around(runner, kinds, x.device)
        library = library if whole else None
        if not (may_loop or library):
            return None
        tracked = torch.is_grad_enabled()
        sizes = x.shape[0], time, x.dtype
        return runner.plan(*sizes, tracked=tracked, may_loop=may_loop, library=library).path

    def _ways_around(
        self, runner: Runner, kinds: Sequence[torch.dtype], device: torch.device
    ) -> tuple[bool, str | None]:
        """What gives the results of the traced step: a loop over the cell, PyTorch's own kernel.

        Args:
            runner: The traced cell.
            kinds: The types of x and of the state.
            device: Where they are.
        """
        own = runner.traced.capture.dtype
        alike = all(k is own for k in kinds[1:]) and (
            kinds[0] is own or not kinds[0].is_floating_point
        )
        may_loop = alike and own not in _HALF and not autocasts(device.type)
        library = None
        if self.backend == "auto" and self.solver is None:
            library = pytorch_kernels.library_of(self.cell, kinds, own, device.type)
        return may_loop, library

    def _run_cell(
        self,
        runner: Runner,
        inputs: Sequence[Tensor],
        parts: tuple[Tensor, ...],
        resets: Tensor | None = None,
        fresh: tuple[Tensor, ...] = (),
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Outputs of the cell itself for every time, and the components after the last."""
        as_tuple, outputs = len(parts) > 1, []
        cell: Any = self._modules["cell"]
        call, readout = forward_of(cell) if len(inputs) > 1 else cell, readout_of(cell)
        begins = None if resets is None else resets.to(parts[0].device).unbind(1)
        with computed_once() if self._is_parametrised else _AS_IT_IS:
            for t, x_t in enumerate(inputs):
                if begins is not None:
                    pairs = zip(fresh, parts, strict=True)
                    parts = tuple(torch.where(by_row(begins[t], p), f, p) for f, p in pairs)
                parts = tuple(map(Tensor.contiguous, parts))  # as when it was traced
                parts = call(x_t, parts) if as_tuple else (call(x_t, parts[0]),)
                if readout is None:
                    outputs.append(parts[0])
                else:
                    y = readout(x_t, parts if as_tuple else parts[0])
                    outputs.append(y.to(parts[0].dtype))
        return outputs, tuple([p.clone() for p in parts])  # a part may be an output, or given

    def _evaluate(
        self,
        runner: Runner,
        x: Tensor,
        parts: tuple[Tensor, ...],
        starts: Tensor | None,
        last: Tensor | None,
        tensors: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """Outputs for x (batch, time, *features), the components after the last steps, the report.

        `tensors` are what the input part reads, if they have been read.
        """
        packing = runner.traced.packing
        first = packing.join(parts)
        own = self._tensors(runner) if tensors is None else list(tensors)
        rows = first
        if runner.is_tiled and last is not None:
            # two rows of states with one of x would be those of resets, see `has_reset_states`
            rows = nn.functional.pad(first, (0, 0, 0, 0, 0, 2))
        try:
            y, states, report, ends = runner.run(own, [x], rows, starts)
        except RuntimeError as error:
            self._refuse_types(error, x.dtype)
            raise
        if torch.compiler.is_compiling() or report is None or report.is_meta or not len(report):
            report = None
        dtype = x.dtype if x.is_floating_point() else (states[0] if ends is None else ends).dtype
        if ends is not None:
            final = list(ends[: (x if last is None else last).shape[0]].unbind(1))
        elif last is None:
            final = [s.select(1, -1) for s in states]
        else:  # a sequence without steps ends where it began
            pairs = zip(states, first.unbind(1), strict=True)
            final = [torch.where((last < 0).unsqueeze(1), p, s[0, last]) for s, p in pairs]
        if y is None:
            y = packing.split(states * (packing.num_components // len(states)))[0]
        # copies: with views, writing into y would change the state, which would keep all of y alive
        parts = packing.split([f.to(dtype, copy=True) for f in final])
        report = None if report is None else report.detach()
        return y.to(dtype), tuple([p.contiguous() for p in parts]), report

    def _tensors(self, runner: Runner) -> list[Tensor]:
        """What the input part reads."""
        if torch.compiler.is_compiling():
            return [resolve(self.cell, name) for name in runner.traced.input_part.names]
        with computed_once() if self._is_parametrised else _AS_IT_IS:
            return [getattr(owner, name) for owner, name in runner.owners]

    def plan(self, shape: Sequence[int], dtype: torch.dtype | None = None) -> Plan:
        """How a call would be carried out, and why; `print` it.

        Args:
            shape: Of x, as `forward` takes it.
            dtype: Of x; that of the cell when None.

        Raises:
            TypeError: Sizes of the cell are known only after a first call; `dtype` is no type.
            ValueError: Shapes that the layer refuses.
        """
        if not (dtype is None or isinstance(dtype, torch.dtype)):
            raise TypeError(
                f"dtype is {dtype!r}; pass a torch.dtype, such as torch.float32, or None for that "
                "of the cell."
            )
        runner, sizes = self.runner(), sizes_in("shape", shape)
        lead = len(sizes) - runner.feature_axes
        if lead not in (1, 2) or sizes[lead:] != runner.features:
            raise ValueError(f"shape is {sizes}; pass that of x: {self._layouts(runner.features)}.")
        if min(sizes[:lead]) < 1:
            raise ValueError(f"shape is {sizes}; a plan needs at least one sequence and one step.")
        batch, time = (
            (1, sizes[0]) if lead == 1 else sizes[:2] if self.batch_first else sizes[1::-1]
        )
        dtype, device = dtype or runner.traced.given[0].dtype, runner.traced.device
        segment = min(time, self.checkpoint_every or time)
        parameters = max([p.numel() for p in self.cell.parameters()], default=0)
        elements = max(parameters, math.prod(sizes) // time * segment)
        may_loop, library = self._ways_around(runner, [dtype], device)
        plan = runner.plan(
            batch,
            segment,
            dtype,
            elements,
            tracked=torch.is_grad_enabled(),
            may_loop=may_loop,
            library=library,
            shown=True,
        )
        if self.checkpoint_every is None:
            return plan
        kept_in = dtype if dtype.is_floating_point else runner.traced.step.dtype
        entries = batch * sum(map(math.prod, self.state_shapes))
        return with_segments(plan, time, segment, entries * kept_in.itemsize)

    def extra_repr(self) -> str:  # noqa: D102
        every = self.checkpoint_every
        segments = "" if every is None else f", checkpoint_every={every}"
        return f"batch_first={self.batch_first}, backend={self.backend!r}{segments}"

    def runner(self) -> Runner:
        """The cell as it is now, traced, and the backend chosen for it.

        Raises:
            TypeError: Sizes are known only after a first call.
        """
        if self._runner is None:
            self._prepare_early()
        elif not self._is_current():
            self._prepare_again(self._runner)
        if self._runner is None:
            name = type(self.cell).__name__
            if snapshot(self.cell).device.type == "meta":
                raise TypeError(
                    f"the parameters of {name} have no values (device meta); load them."
                )
            raise TypeError(
                f"{name} does not say the size of its input; call the layer once, or set "
                "self.input_size = ... in the cell."
            )
        return self._runner

    def _is_current(self) -> bool:
        """Whether the layer is as it was when it was traced."""
        watched, settings = self._watched, (self.backend, self.solver)
        unchanged = watched is not None and watched.is_current(self._modules["cell"])
        return unchanged and self._signature[-2:] == settings

    def _prepare_early(self) -> None:
        """Trace before the first call, if the cell says its sizes and has values."""
        input_size = getattr(self.cell, "input_size", None)
        if isinstance(input_size, int) and self._known.is_known(self.cell):
            now = snapshot(self.cell)
            if now.device.type != "meta":
                self._known.learn(self.cell, (), False)
                self._prepare((input_size,), now.dtype, now.device, now)

    def _prepare_again(self, runner: Runner) -> None:
        """Trace for inputs like those before; no more if the cell has lost its values."""
        now, kind = snapshot(self.cell), runner.traced.given[0].dtype
        if now.device.type == "meta":
            self._watched = self._latest = self._runner = None
        else:
            kind = now.own_dtype or kind if kind.is_floating_point else kind
            self._prepare(runner.features, kind, now.device, now)

    def _runner_for(self, x: Tensor, state: State | None, step: bool = False) -> Runner:
        if not isinstance(x, Tensor):
            way = "use torch.as_tensor(x)"
            if isinstance(x, nn.utils.rnn.PackedSequence):
                way = "put the sequences one after another and pass cu_seqlens"
            raise TypeError(f"x must be a tensor, got {describe(x)}; {way}.")
        if torch.compiler.is_compiling():
            if not self._is_traced(x.dtype):
                features = tuple([operator.index(n) for n in x.shape[1 if step else 2 :]])
                shapes = shapes_of(state, self._is_single(x, step))
                self._trace_for_compiler(features, x.dtype, x.device, shapes)
            self._get_ready()
            assert self._runner is not None
            return self._runner
        runner = self._runner
        if runner is None or not self._is_as_before(runner, x, step):
            shapes = shapes_of(state, self._is_single(x, step))
            self._known.learn(self.cell, shapes, self._runner is not None)
            features, now = self._features(x, step), snapshot(self.cell)
            runner = self._prepare(features, x.dtype, x.device, now)
        if not runner.is_ready:
            runner.get_ready()
        return runner

    def _is_traced(self, dtype: torch.dtype) -> bool:
        """Whether there is a trace of the cell as it is now, for x of a type."""
        kind = _kind(dtype, snapshot(self.cell))
        valid_while_same(self, functools.partial(RNN._trace_key, kind=kind))
        return self._trace_key(kind) is not None

    def _trace_key(self, kind: torch.dtype | None) -> object:
        """Equal keys mean equal traces; None if there is no trace of the cell as it is now.

        The trace is taken up: the latest call may have been of the cell as it was before.
        """
        kept, _ = self._traces.find(self.cell, kind, self.backend, self.solver)
        if kept is None:
            return None
        if kept.runner is not self._runner:
            self._take_up(kept, kind or kept.signature[1])
        part = kept.runner.input_part
        return kept.runner.request, part.module, part.names

    def _trace_for_compiler(
        self,
        features: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        shapes: tuple[Shape, ...],
    ) -> bool:
        """Trace a cell that has changed, or whose input size was not known before."""
        self._known.learn(self.cell, shapes, self._runner is not None)
        input_size = getattr(self.cell, "input_size", None)
        known = (input_size,) if isinstance(input_size, int) else features
        now = snapshot(self.cell)
        if any(map(_is_fake, now.tensors.values())):
            raise RuntimeError(
                f"{type(self.cell).__name__} has changed since it was traced, or never was for x "
                f"of type {dtype}, and torch.export passes tensors without values; call the layer "
                "once before."
            )
        self._prepare(known, dtype, device, now)
        return True

    def _get_ready(self) -> bool:
        """Build the kernels that the compiled program calls."""
        if self._runner is not None and not self._runner.is_ready:
            self._runner.get_ready()
        return True

    # The compiler calls these as they are and takes what they return as constants, as it does with
    # what torch.compiler.assume_constant_result marks, which would import it (2 s)
    for _function in (_is_traced, _trace_for_compiler, _get_ready):
        vars(_function)["_dynamo_marked_constant"] = True
    del _function

    def _is_as_before(self, runner: Runner, x: Tensor, step: bool) -> bool:
        """Whether x and the layer are as in the previous call."""
        if self._latest is None:
            return False
        dtype, device = self._latest
        shape, lead = x.shape, 1 if step else 2
        return (
            len(shape) == lead + runner.feature_axes
            and shape[lead:] == runner.features
            and x.dtype is dtype
            and x.device == device
            and 0 not in shape
            and self._is_current()
            and self._runner is runner  # of these, whatever other threads do
        )

    def _is_single(self, x: Tensor, step: bool) -> bool:
        """Whether x is a single sequence or, with `step`, one input without a batch."""
        known = isinstance(getattr(self.cell, "input_size", None), int)
        return known and x.dim() == (1 if step else 2)

    def _features(self, x: Tensor, step: bool) -> tuple[int, ...]:
        """The shape of one input, after a check of x: a sequence, or with `step` one time."""
        input_size = getattr(self.cell, "input_size", None)
        lead = 1 if step else 2
        known: tuple[int, ...] = tuple(x.shape[lead:])
        if isinstance(input_size, int):
            known = (input_size,)
        elif self._runner is not None:
            known = self._runner.features
        if x.dim() not in (len(known) + lead - 1, len(known) + lead) or (
            known and tuple(x.shape[-len(known) :]) != known
        ):
            if step:
                raise ValueError(
                    f"x_t has shape {tuple(x.shape)}; pass one time: {shape_of('batch', *known)}, "
                    f"or {shape_of(*known)} without a batch."
                )
            raise ValueError(f"x has shape {tuple(x.shape)}; pass {self._layouts(known)}.")
        lone = x.dim() == len(known) + 1
        if not step and x.shape[0 if lone or not self.batch_first else 1] == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}; time must be at least 1.")
        return known

    def _layouts(self, features: tuple[int, ...]) -> str:
        """The shapes that x may have, in words."""
        lead = ("batch", "time") if self.batch_first else ("time", "batch")
        single = shape_of("time", *features)
        return f"{shape_of(*lead, *features)}, or {single} for a single sequence"

    @ends_at_the_cell
    def _prepare(
        self, features: tuple[int, ...], dtype: torch.dtype, device: torch.device, now: Snapshot
    ) -> Runner:
        """The runner for such inputs; the cell is traced again when anything has changed."""
        if now.device.type == "meta" != device.type:
            raise ValueError(
                f"the parameters of {type(self.cell).__name__} have no values (device meta) but x "
                f"is on {device}; load them there. Offloading to a CPU or disk does not work for a "
                "cell: its parameters are read without a call of it."
            )
        kind = _kind(dtype, now)
        own = kind if kind and kind.is_floating_point else now.dtype
        signature = (features, own, device, kind, self.backend, self.solver)
        self._known.find_components(self.cell, features, kind or own)
        kept, change = self._traces.find(self.cell, *signature)
        if kept is None or kept.shapes != self.state_shapes:
            if change is not None:
                self._annealed.note(type(self.cell).__name__, change)
            kept = self._traced(signature)
            self._traces.add(kept)
        self._take_up(kept, dtype)
        return kept.runner

    def _take_up(self, kept: Kept, dtype: torch.dtype) -> None:
        """Go on with a trace, for x of a type."""
        with _SWITCHING:
            self._watched = None  # so that other threads check for themselves until all is set
            self._latest, self._is_parametrised = (dtype, kept.signature[2]), kept.is_parametrised
            self._signature, self._shapes, self._runner, self._watched = kept[:4]

    def _traced(self, signature: tuple[Any, ...]) -> Kept:
        """A new trace for such inputs."""
        features, own, device, kind, *_ = signature
        kind = kind or own
        shapes, subject = self.state_shapes, cell_subject(self.cell)
        try:
            traced = trace(subject, [(features, kind)], shapes, len(shapes) > 1, own, device)
        except TraceError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            self._refuse_types(error, kind)
            self._known.refuse(self.cell, error)
            raise
        if traced.capture.num_components < len(shapes) and all(len(s) == 1 for s in shapes):
            sizes = " and ".join(str(size) for (size,) in shapes)
            why = f"its components have {sizes} channels, side by side"
            traced = dataclasses.replace(traced, reason=why)
        self._check_claim(traced)
        tensors = traced.subject.tensors.__getitem__  # a look at the cell's may compute and write
        owner = functools.partial(owner_of, self.cell)
        one_call = isinstance(self.cell, nn.RNNCellBase)
        runner = Runner(traced, self.backend, self.solver, tensors, owner, one_call)
        watched = Watched(self.cell, traced.capture.ran, _tensors_of)
        is_parametrised = any(map(parametrize.is_parametrized, self.cell.modules()))
        return Kept(signature, shapes, runner, watched, is_parametrised)

    def _check_claim(self, traced: Traced) -> None:
        """Refuse a claimed structure that is narrower than the proved one; wider is allowed."""
        found = traced.structure
        claimed = _STRUCTURES.index(self.structure) if self.structure else len(_STRUCTURES)
        if claimed < _STRUCTURES.index(found.split()[0]):
            raise ValueError(
                f"structure={self.structure!r} is claimed but {traced.subject.name} is {found}: "
                f"{traced.reason}. Change the cell, or leave structure=None."
            )

    def _refuse_types(self, error: Exception, x: torch.dtype) -> None:
        """Raise a clear error if PyTorch complains of types and the type of x is not the cell's."""
        own = snapshot(self.cell).dtype
        if x is own or "type" not in str(error):
            return
        ways = [f"x.to({own})"]
        if x.is_complex:
            ways = ["torch.view_as_real(x).flatten(-2), twice as many features"]
        elif x.is_floating_point:
            ways += [f"cell.to({x})", "torch.autocast"]
        raise TypeError(
            f"x has type {x}, but the parameters of {type(self.cell).__name__} have type {own} "
            f"({error}); use {' or '.join(ways)}."
        ) from error

    def _parts(
        self,
        name: str,
        state: State | None,
        rows: int,
        x: Tensor,
        batch_first: bool | None = None,
    ) -> tuple[Tensor, ...]:
        """The components of a state, after a check; zeros if there is no state."""
        dtype_of = lambda: snapshot(self.cell).dtype  # noqa: E731
        return components_of(name, state, rows, x, self._shapes, dtype_of, batch_first)

    def _apply(self, fn: Any, recurse: bool = True) -> RNN:
        """Trace again at once after `.to(...)`, so that a compiled call finds everything ready."""
        super()._apply(fn, recurse)
        if self._runner is not None:
            self._prepare_again(self._runner)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out traces, which belong to this process; a copy traces again."""
        own = dict.fromkeys(("_runner", "_latest", "_watched", "_report"))
        return {**self.__dict__, **own, "_signature": (), "_traces": Traces()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        keep_in_bounds(self)


def _kind(dtype: torch.dtype, now: Snapshot) -> torch.dtype | None:
    """The type of x that a trace is for; None for floating point where the cell has its own."""
    return None if dtype.is_floating_point and now.own_dtype else dtype


def _tensors_of(cell: nn.Module) -> dict[str, Tensor]:
    return snapshot(cell).tensors


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor  # there when a compiler asks

    return isinstance(tensor, FakeTensor)
