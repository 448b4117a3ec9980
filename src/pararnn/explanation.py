"""`explain`: what a layer found in its cell and how it evaluates it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from pararnn._notebook import Made, Report, folded, lines, show, table
from pararnn._words import counted
from pararnn.kernels import operators
from pararnn.kernels.channels import Channels
from pararnn.kernels.printing import equations
from pararnn.kernels.rows import Rows
from pararnn.kernels.tiled import Tiled
from pararnn.layers.rnn import RNN
from pararnn.planning.plan import Plan
from pararnn.tracing.expressions import leaf
from pararnn.tracing.formulas import formulas
from pararnn.tracing.operations import MOVES, operation_name
from pararnn.tracing.recorder import show_place
from pararnn.tracing.traced import Traced


@dataclass(frozen=True, repr=False)
class Explanation(Report):
    """What `explain` found; `str()` of it is the report, which a notebook shows as a table.

    Attributes:
        cell: Name of the cell's class.
        equations: The step as found, one line per value. Where channels mix, what only rearranges
            is left out, and `v[0]` is the first part of a value that is split.
        structure: "elementwise", "heads (size n)" or "dense".
        structure_reason: Why.
        state: One line per tensor of the state: its shape, and along which axes its entries reach
            each other.
        readout: Operations that make the output from the state after the step; empty if the output
            is the first tensor of the state. They run for all times at once, or in the kernel of
            the steps.
        input_part: Operations that run once for all times.
        recurrent_part: Operations that depend on the state.
        drives: Names of what the input part hands over for every time.
        coefficients: Names of what it hands over once.
        shape: Of x, for the plan.
        plan: How a call on x of that shape is carried out, and why.
        source: What was generated for the steps, C or functions in Triton, forwards and backwards;
            the recurrent part as a function in PyTorch if PyTorch operations carry them out.
        compile_s: Seconds that compiling and loading its kernels took in this process so far;
            without those in Triton of cells whose channels mix, which their first call compiles.
    """

    cell: str
    equations: list[str]
    structure: str
    structure_reason: str
    state: list[str]
    readout: list[str]
    input_part: list[str]
    recurrent_part: list[str]
    drives: list[str]
    coefficients: list[str]
    shape: tuple[int, ...]
    plan: Plan
    source: str = field(repr=False)
    compile_s: float

    def __repr__(self) -> str:
        return f"<Explanation of {self.cell}: {self.structure}, print it for the report>"

    def __str__(self) -> str:
        indented = lambda lines: "\n".join(f"    {line}" for line in lines) or "    (none)"  # noqa: E731
        return (
            f"{self.cell}: {self.structure}, because {self.structure_reason}\n"
            f"  state\n{indented(self.state)}\n"
            f"  equations\n{indented(self.equations)}\n"
            f"  input part, once for all times\n{indented(self.input_part)}\n"
            f"  recurrent part\n{indented(self.recurrent_part)}\n"
            f"  readout, {self._readout_runs}\n{indented(self.readout)}\n"
            f"  drives        {', '.join(self.drives) or '(none)'}\n"
            f"  coefficients  {', '.join(self.coefficients) or '(none)'}\n"
            f"  plan for x of shape {self.shape}\n{indented(str(self.plan).splitlines())}\n"
            f"  source        {counted(len(self.source.splitlines()), 'line')}, in .source; "
            f"{self._compiled}"
        )

    def _repr_html_(self) -> str:
        return table(
            [
                ("structure", f"{self.structure}, because {self.structure_reason}"),
                ("state", lines(self.state)),
                ("equations", lines(self.equations) or "(none)"),
                ("input part, once for all times", lines(self.input_part) or "(none)"),
                ("recurrent part", lines(self.recurrent_part) or "(none)"),
                (f"readout, {self._readout_runs}", lines(self.readout) or "(none)"),
                ("drives", ", ".join(self.drives) or "(none)"),
                ("coefficients", ", ".join(self.coefficients) or "(none)"),
                (f"plan for x of shape {self.shape}", Made(self.plan._repr_html_())),
                ("source", folded(counted(len(self.source.splitlines()), "line"), self.source)),
                ("", self._compiled),
            ],
            header=(self.cell, ""),
        )

    @property
    def _readout_runs(self) -> str:
        return "in the kernel of the steps" if self.plan.path == "tiles" else "once for all times"

    @property
    def _compiled(self) -> str:
        return f"kernels took {self.compile_s:.2f} s to compile and load so far"


def explain(rnn: RNN, shape: Sequence[int] | None = None) -> Explanation:
    """Show what a layer found in its cell and how it would carry out a call, and return it.

    It is printed; in a notebook it is a table.

    Args:
        rnn: A layer whose cell says its input size, or that was called once.
        shape: Of x as the layer takes it; 8 sequences of 1,024 steps when None.

    Raises:
        TypeError: Not an `RNN`, or one whose sizes are not known yet.
    """
    if not isinstance(rnn, RNN):
        raise TypeError(
            f"explain takes a pararnn.RNN, got {type(rnn).__name__}; wrap a cell as RNN(cell), and "
            "take one of .layers of a ParaGRU, a ParaLSTM or what parallelize made."
        )
    runner = rnn.runner()
    traced = runner.traced
    recurrence = traced.step.recurrence
    if recurrence is None:
        drives = [_name(e) for e in traced.parts.edges if e.meta["by_rows"]]
        coefficients = [_name(e) for e in traced.parts.edges if not e.meta["by_rows"]]
        lines = formulas(traced.parts)
    else:
        names = recurrence.names
        drives = [names[leaf("drive", i)] for i in range(recurrence.num_drives)]
        coefficients = [names[leaf("coefficient", i)] for i in range(recurrence.num_coefficients)]
        lines = equations(recurrence)
    if shape is None:
        shape = (8, 1024) if rnn.batch_first else (1024, 8)
        shape = (*shape, *runner.features)
    plan = rnn.plan(shape)
    path = operators.request_of(runner.request).path
    source, compile_s = traced.step.module.code, 0.0
    if isinstance(path, Channels):
        source, compile_s = path.backend.source(), path.backend.compile_s
    elif isinstance(path, Tiled):
        source = path.source(traced.capture.dtype)
    elif isinstance(path, Rows):
        generated, compile_s = path.generated(plan)
        source = generated or source
    explanation = Explanation(
        traced.subject.name,
        lines,
        traced.structure,
        traced.reason,
        _state(traced),
        _operations(traced.parts.readout.operations if traced.parts.readout else []),
        _operations(_input_operations(traced)),
        _operations(traced.parts.recurrent),
        drives,
        coefficients,
        tuple(shape),
        plan,
        source,
        compile_s,
    )
    show(explanation)
    return explanation


def _name(node: fx.Node) -> str:
    return str(node.meta.get("name") or node.name)


def _state(traced: Traced) -> list[str]:
    """Shapes of the state, and along which axes entries reach each other."""
    packing = traced.packing
    apart = packing.apart or ((),) * len(packing.shapes)
    if traced.structure == "elementwise":
        return [f"{shape}: every entry by itself" for shape in packing.shapes]
    lines = []
    for shape, axes in zip(packing.shapes, apart, strict=True):
        mixing = [a for a in range(len(shape)) if a not in axes]
        words = f"along {_axes(mixing)}" if mixing else "only as parts of the other tensors"
        words = f"{shape}: entries reach each other {words}"
        lines.append(words + (f", not along {_axes(axes)}" if axes else ""))
    if len(set(packing.shapes)) > 1:
        lines.append(f"groups of {traced.step.group} entries, of all tensors together")
    elif traced.step.group < traced.step.hidden:
        lines.append(f"groups of {traced.step.group} entries of each tensor")
    return lines


def _axes(axes: Sequence[int]) -> str:
    """Axes in words, counted without the batch."""
    return f"ax{'e' if len(axes) > 1 else 'i'}s {' and '.join(map(str, axes))}"


def _input_operations(traced: Traced) -> list[fx.Node]:
    """Operations that depend on x alone."""
    parts = traced.parts
    after = set(parts.recurrent) | set(parts.readout.operations if parts.readout else [])
    nodes = traced.capture.graph.nodes
    return [n for n in nodes if n not in after and not n.meta.get("is_count")]


def _is_ours(node: fx.Node) -> bool:
    """Whether an operation moves the state between its shape and where it lies in memory."""
    name = operation_name(node.target)
    return node.meta.get("place") is None and (name in MOVES or name == "clone")


def _operations(nodes: Sequence[fx.Node]) -> list[str]:
    chosen = [n for n in nodes if hasattr(n.target, "_schema") and not _is_ours(n)]
    return [
        f"{str(n.target).removeprefix('aten.'):24s} {show_place(n.meta.get('place'))}"
        for n in chosen
    ]
