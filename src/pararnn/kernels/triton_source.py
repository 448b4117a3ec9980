"""Prints a recurrence as Triton: two kernels for the states, and two for the adjoint.

`sweep` gives one program a chunk of time and a block of channels. It runs the steps before the chunk
from the initial state to guess the state that the chunk starts from (the warm-up), with the tangent
of these steps, which says how much of their start is left. If nothing is, it runs the chunk and
writes the results; else it runs the chunk with its tangent and leaves the results to `refine`.

`refine` gives one program all chunks of a block of channels. It returns at once where every chunk
starts where the one before it ends; else it corrects the starts through the tangents and runs the
chunks again, group after group of them, until that holds.

The adjoint's kernels do the same backwards in time, with a product of transposed Jacobians in the
place of the tangent. Loops are unrolled and load the inputs of the next steps while they compute.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pararnn.kernels import printing
from pararnn.kernels.printing import BINARY
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.expressions import Expression, Operand, literal, topological

Precision = Literal["half", "single", "double"]
Starts = Literal["none", "own", "packed"]


@dataclass(frozen=True)
class Variant:
    """What a module is generated for, beside the recurrence.

    Attributes:
        precision: "double" computes in float64, the others in float32; "half" is for results in
            half precision and uses the hardware's tanh.
        starts: Whether sequences start inside: nowhere; each row of the batch from its own initial
            state; or sequences packed into one row, each from its own.
        unroll: Steps whose inputs are loaded ahead.
        fixed: Whether strides over time are compiled in: with them, addresses take half the
            registers. Only where they do not depend on the batch, which may vary.
        gradients: For the adjoint: which components have a gradient from outside.
    """

    precision: Precision
    starts: Starts
    unroll: int
    fixed: bool = True
    gradients: tuple[bool, ...] = ()

    @property
    def real(self) -> str:
        """The type of the arithmetic."""
        return "tl.float64" if self.precision == "double" else "tl.float32"


def forward_source(recurrence: Recurrence, variant: Variant) -> str:
    """The module with the kernels `sweep` and `refine` that compute states."""
    return _Forward(recurrence, variant).source()


def adjoint_source(recurrence: Recurrence, variant: Variant) -> str:
    """The module with the kernels `sweep` and `refine` that compute gradients."""
    return _Adjoint(recurrence, variant).source()


_FAST = {"tanh": "fast_tanh", "sigmoid": "fast_sigmoid", "exp": "fast_exp"}


def _language(variant: Variant, used: set[str]) -> printing.Language:
    """How Triton writes things; functions that are to be imported are put into `used`."""
    real = variant.real

    def number(value: float) -> str:
        text = literal(value)
        if text.endswith(("NAN", "INFINITY")):
            text = f'float("{value}")'
        return f"tl.full([], {text}, {real})"

    def term(op: str, args: Sequence[str]) -> str:
        if op in BINARY:
            return f"{args[0]} {BINARY[op]} {args[1]}"
        if op == "neg":
            return f"-{args[0]}"
        if op == "where":
            return f"tl.where({', '.join(args)})"
        if op == "logical_not":
            return f"{args[0]} == 0"
        if op == "abs":
            return f"tl.abs({args[0]})"
        if op == "to_float":
            return f"{args[0]}.to({real})"
        if op.startswith("to_"):
            return f"{args[0]}.to(tl.{op[3:]}).to({real})"
        if op == "largest":
            return number(1.7976931348623157e308 if variant.precision == "double" else 2.0**128 - 2.0**104)
        name = _FAST.get(op, op) if variant.precision == "half" else op
        used.add(name)
        return f"{name}({', '.join(args)})"

    return printing.Language(term, number, str, lambda name, value, _: f"{name} = {value}")


class _Lines:
    """Collects indented lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0

    def __call__(self, text: str = "") -> None:
        self.lines.append("    " * self.depth + text if text else "")

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self(head)
        self.depth += 1
        yield
        self.depth -= 1


class _Module(abc.ABC):
    """What both directions share.

    Names in the generated text: `b` row of the batch, `k` chunk, `first` its first time, `i` step
    relative to that, `d` channels; `s` states or adjoints, `g` tangents or products, `c`
    coefficients. A kernel is `wide` when a program has a group of chunks: then `k` and `first` are
    columns, and all values have the shape [GROUP, BLOCK].
    """

    boundaries: tuple[str, str, str]  # first guesses, ends, and what couples them
    extra: tuple[str, ...]  # further values that are loaded with a step

    def __init__(self, recurrence: Recurrence, variant: Variant) -> None:
        self.recurrence, self.variant = recurrence, variant
        self.components = range(recurrence.num_components)
        self.drives = range(recurrence.num_drives)
        self.coefficients = range(recurrence.num_coefficients)
        self.pairs = [(i, j) for i in self.components for j in self.components]
        self.coupled = [(i, j) for i, j in self.pairs if recurrence.jacobian[i][j] != 0.0]
        self.real = variant.real
        self.starts = variant.starts != "none"
        self.used = {"bounded", "magnitude", "only"}
        self.out = _Lines()
        self.wide = False

    @property
    def unroll(self) -> int:
        """Steps whose inputs are loaded ahead; fewer where a program has many warps."""
        return min(_WIDE_UNROLL, self.variant.unroll) if self.wide else self.variant.unroll

    # Pieces of text

    def text(self) -> str:
        """The whole module."""
        lines = ['"""Generated by ParaRNN from a cell\'s step:', ""]
        lines += [f"    {line}" for line in printing.equations(self.recurrence)]
        lines += ['"""', "", "import triton", "import triton.language as tl", ""]
        names = ",\n    ".join(sorted(self.used))
        lines += [f"from pararnn.kernels.triton_functions import (\n    {names},\n)", ""]
        return "\n".join([*lines, *self.out.lines]).rstrip() + "\n"

    def function(self, name: str, leaves: Sequence[str], roots: Iterable[Operand]) -> None:
        """A function of the leaves that returns the roots, all of the shape of the state."""
        roots = list(roots)
        names = printing.lowered_names(self.recurrence)
        language = _language(self.variant, self.used)
        lines, values = printing.statements(language, roots, names)
        shaped = [
            value if _varies(root) else f"tl.zeros_like(state0) + {value}"
            for root, value in zip(roots, values, strict=True)
        ]
        self.out()
        self.out("@triton.jit")
        with self.out.block(f"def {name}({', '.join(leaves)}):"):
            for line in lines:
                self.out(line)
            self.out(f"return {', '.join(shaped)}")
        self.out()

    def leaves(self) -> list[str]:
        """Names of what a step is computed from."""
        counts = [("state", self.components), ("drive", self.drives)]
        counts.append(("coefficient", self.coefficients))
        return [f"{kind}{n}" for kind, numbers in counts for n in numbers]

    @contextmanager
    def kernel(
        self, name: str, arguments: Sequence[str], constants: Sequence[str], wide: bool
    ) -> Iterator[None]:
        """A kernel, and which rows, chunk and channels a program of it has."""
        out, self.wide = self.out, wide
        fixed = [a for a in arguments if a == "hidden" or (self.variant.fixed and "_time" in a)]
        varying = ", ".join(f'"{a}"' for a in arguments if a in _VARYING)
        out()
        out(f"@triton.jit(do_not_specialize=[{varying}])")
        out(f"def {name}(")
        constant = {*constants, *fixed}
        names = [f"{a}: tl.constexpr" if a in constant else a for a in [*arguments, *constants]]
        for line in _wrapped(names):
            out(f"    {line}")
        with out.block("):"):
            out("tiles = tl.cdiv(hidden, BLOCK)")
            out("tile = tl.program_id(0) % tiles")
            out("b = tl.cast(tl.program_id(0) // tiles % batch, tl.int64)")
            out("channels = tile * BLOCK + tl.arange(0, BLOCK)")
            out("inside = channels < hidden")
            for c in self.coefficients:
                shape = "[None, :]" if wide else ""
                loaded = f"tl.load(coefficient{c} + channels, mask=inside)"
                out(f"c{c} = {loaded}.to({self.real}){shape}")
            out("d = channels[None, :]" if wide else "d = channels")
            yield
        out()

    def inputs(self) -> list[str]:
        """Arguments that every kernel has."""
        names = [f"{n}{m}" for m in self.drives for n in ("drive", "drive_batch", "drive_time")]
        names += [f"coefficient{c}" for c in self.coefficients]
        names += ["initial", *(["starts"] if self.starts else [])]
        return names + [f"states{i}" for i in self.components]

    def first_state(self, name: str) -> None:
        """The state before time 0 of this row."""
        self.out(f"row = {'tl.cast(tl.load(starts + b * time), tl.int64)' if self.starts else 'b'}")
        for i in self.components:
            at = f"initial + (row * {len(self.components)} + {i}) * hidden + channels"
            shape = "[None, :]" if self.wide else ""
            self.out(f"{name}{i} = tl.load({at}, mask=inside).to({self.real}){shape}")

    def pointers(self) -> None:
        """Where the first step of the chunk is in every tensor over time."""
        out = self.out
        out("origin = tl.cast(first, tl.int64)")
        for m in self.drives:
            out(f"drive_at{m} = drive{m} + b * drive_batch{m} + origin * drive_time{m} + d")
        for i in self.components:
            out(f"states_at{i} = states{i} + (b * time + origin) * hidden + d")
        if self.starts:
            out("starts_at = starts + b * time + origin")

    def boundary(self, name: str, part: int, shift: int = 0) -> str:
        """Address of a part of what belongs to chunk k, or one beside it."""
        count = len(self.pairs if name == self.boundaries[2] else self.components)
        k = f"k + {shift}" if shift > 0 else f"k - {-shift}" if shift else "k"
        return f"{name} + ((b * chunks + {k}) * {count} + {part}) * hidden + d"

    def exists(self, step: str) -> str:
        """Which entries exist at a step of the chunk."""
        return f"here & (first + {step} < time)" if self.wide else "inside"

    def fill(self, name: str, identity: bool) -> None:
        """The identity, or zeros, as tangents."""
        shape = "[GROUP, BLOCK]" if self.wide else "[BLOCK]"
        for i, j in self.pairs:
            value = float(identity and i == j)
            self.out(f"{name}{i}{j} = tl.full({shape}, {value}, {self.real})")

    def zeros(self, name: str, kind: str | None = None) -> None:
        """A tensor of zeros."""
        shape = "[GROUP, BLOCK]" if self.wide else "[BLOCK]"
        self.out(f"{name} = tl.zeros({shape}, {kind or self.real})")

    def fresh(self, step: str) -> None:
        """Whether a sequence starts at a step, and where its initial state is."""
        mask = f", mask=(k < last) & (first + {step} < time), other=-1" if self.wide else ""
        self.out(f"start = tl.cast(tl.load(starts_at + {step}{mask}), tl.int64)")
        self.out("fresh = start >= 0")
        count = len(self.components)
        self.out(f"start_at = tl.maximum(start, 0) * {count} * hidden + d")

    def from_initial(self, name: str, step: str) -> None:
        """Replace states by initial ones where a sequence starts."""
        for i in self.components:
            at = f"initial + start_at + {i} * hidden"
            loaded = f"tl.load({at}, mask=only({self.exists(step)}, fresh))"
            self.out(f"{name}{i} = tl.where(fresh, {loaded}.to({self.real}), {name}{i})")

    def move(self, entry: str, matrix: list[list[str | None]], step: str) -> None:
        """Tangents `g` moved by a step, `g <- matrix g`; in groups only where the step exists."""
        names, sums = [], []
        for i, j in self.pairs:
            terms = [f"{matrix[i][m]} * {entry}{m}{j}" for m in self.components if matrix[i][m]]
            value = " + ".join(terms) or f"tl.zeros_like({entry}00)"
            if self.wide:
                value = f"tl.where({self.exists(step)}, {value}, {entry}{i}{j})"
            names.append(f"{entry}{i}{j}")
            sums.append(value)
        self.out(f"{', '.join(names)} = {', '.join(sums)}")

    def forgotten(self, exact: str) -> None:
        """Whether nothing is left of where the warm-up started; noted for `refine`."""
        sizes = " + ".join(f"magnitude(g{i}{j})" for i, j in self.pairs)
        self.out(f"left = tl.max(tl.where(inside, {sizes}, 0.0))")
        self.out(f"forgotten = ({exact}) | (left <= limit)")
        self.out("kept = tl.cast(forgotten, tl.int32)")
        self.out("tl.store(stored + (b * chunks + k) * tiles + tile, kept)")

    def save(self, name: str, value: str, parts: Iterable[str]) -> None:
        """Write what belongs to the chunk into a boundary tensor."""
        for n, part in enumerate(parts):
            mask = "here" if self.wide else "inside"
            self.out(f"tl.store({self.boundary(name, n)}, {value}{part}, mask={mask})")

    # The two kernels

    @abc.abstractmethod
    def addresses(self, step: str) -> None:
        """Where the inputs of the steps from `step` on are."""

    @abc.abstractmethod
    def load(self, step: str, number: int, target: str) -> None:
        """Load what a step needs, `number` steps after those addresses, into `target` names."""

    @abc.abstractmethod
    def one(self, step: str, number: int, couple: bool, store: bool) -> None:
        """One step from the loaded values; `couple`: with tangents."""

    @abc.abstractmethod
    def loaded(self) -> list[str]:
        """Names of the values that a step loads."""

    def load_ahead(self, step: str) -> None:
        """Load what the first steps of a loop need."""
        self.out(f"ahead = {step}")
        self.addresses("ahead")
        for number in range(self.unroll):
            self.load("ahead", number, f"_{number}")

    def step_ahead(self, number: int, couple: bool, store: bool) -> None:
        """A step of an unrolled loop: its inputs are there, those of a later step are loaded."""
        names = self.loaded()
        self.out(f"{', '.join(names)} = {', '.join(f'{n}_{number}' for n in names)}")
        self.load("ahead", number, f"_{number}")
        self.one(f"(i + {number})", number, couple, store)

    def check(self, condition: str, beside: int) -> None:
        """Raise `gaps` to how far chunks start from where the chunks beside them end."""
        guess, ends, _ = self.boundaries
        out = self.out
        for i in self.components:
            out(f"e = tl.load({self.boundary(ends, i, beside)}, mask={condition}, other=0.0)")
            out(f"s = tl.load({self.boundary(guess, i)}, mask={condition}, other=0.0)")
            self.measure()

    @abc.abstractmethod
    def measure(self) -> None:
        """Raise `gaps` by the distance of ends `e` and guesses `s`."""


def _varies(root: Operand) -> bool:
    """Whether an expression has the shape of the state, not just that of a coefficient."""
    return any(e.op in ("state", "drive", "adjoint") for e in topological([root]))


def _wrapped(items: Sequence[str]) -> list[str]:
    """Items with commas, several a line."""
    lines, line = [], ""
    for item in items:
        if len(line) + len(item) > 88:
            lines.append(line.rstrip())
            line = ""
        line += f"{item}, "
    return [*lines, line.rstrip()]


_VARYING = frozenset("batch time chunks chunk warm most".split())  # compiled once for all values
_WIDE_UNROLL = 4
_SIZES = ["batch", "time", "hidden", "chunks", "chunk"]


class _Forward(_Module):
    """States from drives."""

    boundaries = ("guess", "ends", "tangents")

    def source(self) -> str:
        step = self.recurrence.step
        jacobian = [self.recurrence.jacobian[i][j] for i, j in self.coupled]
        self.function("step", self.leaves(), step)
        self.function("step_with_jacobian", self.leaves(), [*step, *jacobian])
        self.sweep()
        self.refine()
        return self.text()

    def loaded(self) -> list[str]:
        return [f"u{m}" for m in self.drives]

    def addresses(self, step: str) -> None:
        self.out(f"offset = tl.cast({step}, tl.int64)")
        for m in self.drives:
            self.out(f"u_at{m} = drive_at{m} + offset * drive_time{m}")

    def load(self, step: str, number: int, target: str) -> None:
        mask = self.exists(f"{step} + {number}")
        for m in self.drives:
            self.out(f"u{m}{target} = tl.load(u_at{m} + {number} * drive_time{m}, mask={mask})")

    def one(self, step: str, number: int, couple: bool, store: bool) -> None:
        out = self.out
        if self.starts:
            self.fresh(step)
            self.from_initial("s", step)
            for i, j in self.pairs if couple else ():
                out(f"g{i}{j} = tl.where(fresh, 0.0, g{i}{j})")
        values = [f"s{i}" for i in self.components]
        values += [f"u{m}.to({self.real})" for m in self.drives]
        values += [f"c{c}" for c in self.coefficients]
        new = [f"new{i}" for i in self.components]
        if couple:
            jacobian = [f"j{i}{j}" for i, j in self.coupled]
            out(f"{', '.join([*new, *jacobian])} = step_with_jacobian({', '.join(values)})")
            entry = lambda i, j: f"j{i}{j}" if (i, j) in self.coupled else None  # noqa: E731
            self.move("g", [[entry(i, j) for j in self.components] for i in self.components], step)
        else:
            out(f"{', '.join(new)} = step({', '.join(values)})")
        for i in self.components:
            value = f"tl.where({self.exists(step)}, new{i}, s{i})" if self.wide else f"new{i}"
            out(f"s{i} = {value}")
            if store:
                value = f"s{i}.to(states{i}.dtype.element_ty)"
                at = f"y_at{i} + {number} * hidden"
                out(f"tl.store({at}, {value}, mask={self.exists(step)})")

    def results(self, step: str, store: bool) -> None:
        """Where the results of the steps from `step` on go."""
        for i in self.components if store else ():
            self.out(f"y_at{i} = states_at{i} + tl.cast({step}, tl.int64) * hidden")

    def loop(self, low: str, high: str, couple: bool, store: bool) -> None:
        """Steps `low` to `high` of the chunk; the inputs of the first are loaded already."""
        out, unroll = self.out, self.unroll
        length = "chunk" if self.wide else "length"
        whole = high if self.wide else f"{high} - ({high} - {low}) % {unroll}"
        with out.block(f"for i in range({low}, {whole}, {unroll}):"):
            out(f"ahead = tl.minimum(i + {unroll}, {length} - {unroll})")
            self.addresses("ahead")
            self.results("i", store)
            for number in range(unroll):
                self.step_ahead(number, couple, store)
        if not self.wide and unroll > 1:
            with out.block(f"for i in range({whole}, {high}):"):
                self.addresses("i")
                self.results("i", store)
                self.load("i", 0, "")
                self.one("i", 0, couple, store)

    def sweep(self) -> None:
        out, parts = self.out, [*map(str, self.components)]
        arguments = [*self.inputs(), *self.boundaries, "stored", "report", *_SIZES]
        with self.kernel("sweep", [*arguments, "warm", "limit"], ["MANY", "BLOCK"], wide=False):
            out("k = tl.program_id(0) // (tiles * batch)")
            out("first = k * chunk")
            out("length = tl.minimum(chunk, time - first)")
            self.pointers()
            self.first_state("s")
            out("lead = tl.minimum(warm, first) if MANY else 0")
            self.load_ahead(f"tl.minimum(-lead, length - {self.unroll})")
            with out.block("if MANY:"):
                out("low = -lead")
                out("high = 0 * lead")
                self.fill("g", identity=True)
                with out.block("for phase in range(0, 2):  # the warm-up; then perhaps the chunk"):
                    self.fill("g", identity=True)
                    self.loop("low", "high", couple=True, store=False)
                    with out.block("if phase == 0:"):
                        self.save("guess", "s", parts)
                        self.forgotten("lead == first")
                        out("low = 0 * lead")
                        out("high = tl.where(forgotten, 0, length)")
                with out.block("if high == 0:"):
                    self.loop("0", "length", couple=False, store=True)
                    self.fill("g", identity=False)
                self.save("ends", "s", parts)
                self.save("tangents", "g", (f"{i}{j}" for i, j in self.pairs))
            with out.block("else:"):
                self.loop("0", "length", couple=False, store=True)
                self.write_report(("1", "0.0", "0", "1"))

    def write_report(self, values: Sequence[str]) -> None:
        """The row of the report that belongs to this block of channels."""
        self.out("part = report + (b * tiles + tile) * 4")
        for n, value in enumerate(values):
            self.out(f"tl.store(part + {n}, tl.cast({value}, tl.float64))")

    def measure(self) -> None:
        out = self.out
        out("apart = magnitude(magnitude(e - s) / tl.maximum(tl.abs(e), 1.0))")
        out("gaps = tl.maximum(gaps, tl.where(e == s, 0.0, apart))")

    def refine(self) -> None:
        out, parts = self.out, [*map(str, self.components)]
        arguments = [*self.inputs(), *self.boundaries, "target", "stored", "report", *_SIZES]
        arguments += ["tolerance", "most", "damping"]
        with self.kernel("refine", arguments, ["GROUP", "BLOCK"], wide=True):
            out("rows = tl.arange(0, GROUP)[:, None]")
            self.zeros("gaps")
            out("lacking = tl.zeros([GROUP, 1], tl.int32)")
            with out.block("for g in range(0, chunks, GROUP):"):
                out("k = g + rows")
                out("here = (k < chunks) & inside[None, :]")
                self.check("here & (k > 0)", -1)
                out("kept_at = stored + (b * chunks + k) * tiles + tile")
                out("kept = tl.load(kept_at, mask=k < chunks, other=1)")
                out("lacking = tl.maximum(lacking, 1 - kept)")
            out("residual = tl.max(gaps)")
            out("iterations = tl.full([], 1, tl.int32)")
            out("status = tl.full([], 1, tl.int32)")
            with out.block("if (tl.max(lacking) > 0) | (residual > tolerance):"):
                out(f"residual = tl.full([], 0.0, {self.real})")
                with out.block("for g in range(0, chunks, GROUP):"):
                    out("k = g + rows")
                    out("last = tl.minimum(g + GROUP, chunks)")
                    out("here = (k < last) & inside[None, :]")
                    out("first = k * chunk")
                    self.pointers()
                    self.zeros("gaps")
                    self.check("here & (k > 0)", -1)
                    out("kept_at = stored + (b * chunks + k) * tiles + tile")
                    out("kept = tl.load(kept_at, mask=k < last, other=1)")
                    out("unwritten = tl.max(1 - kept)")
                    out("now = tl.max(gaps)")
                    out("seen = now")
                    out("sweeps = tl.full([], 0, tl.int32)")
                    going = "((now > tolerance) | (unwritten > 0)) & (sweeps < last - g)"
                    with out.block(f"while {going}:"):
                        out("coupling = tl.where(sweeps + 1 < most, 1.0 - damping, 0.0)")
                        self.fold()
                        out("tl.debug_barrier()")
                        for i in self.components:
                            at = self.boundary("target", i)
                            out(f"s{i} = tl.load({at}, mask=here, other=0.0)")
                        self.save("guess", "s", parts)
                        self.fill("g", identity=True)
                        self.load_ahead("tl.full([], 0, tl.int32)")
                        self.loop("0", "chunk", couple=True, store=True)
                        self.save("ends", "s", parts)
                        self.save("tangents", "g", (f"{i}{j}" for i, j in self.pairs))
                        out("tl.debug_barrier()")
                        self.zeros("gaps")
                        self.check("here & (k > g)", -1)
                        out("now = tl.max(gaps)")
                        out("unwritten = unwritten * 0")
                        out("sweeps += 1")
                        out("seen = tl.where(sweeps < most, now, seen)")
                        out("iterations = tl.maximum(iterations, tl.minimum(sweeps + 1, most))")
                        out("status = tl.where(sweeps < most, status, 2)")
                    out("residual = tl.maximum(residual, seen)")
            self.write_report(("iterations", "residual", "status", "chunks"))

    def fold(self) -> None:
        """Starts of a group, one after another, from the ends and tangents of the chunks before.

        What overflows is left out, so that a start that was right stays as it is.
        """
        out, count = self.out, len(self.components)
        for i in self.components:
            out(f"delta{i} = tl.zeros([BLOCK], {self.real})")
        with out.block("for n in range(g, last):"):
            out("chunk_at = b * chunks + n")
            out(f"at = chunk_at * {count} * hidden + channels")
            out(f"tangents_at = tangents + (chunk_at - 1) * {count * count} * hidden + channels")
            for i, j in self.pairs:
                loaded = f"tl.load(tangents_at + {i * count + j} * hidden, mask=only(inside, n > g), other=0.0)"
                out(f"t{i}{j} = bounded({loaded} * coupling)")
            for i in self.components:
                moved = " + ".join(f"t{i}{j} * delta{j}" for j in self.components)
                out(f"old{i} = tl.load(guess + at + {i} * hidden, mask=inside, other=0.0)")
                out(f"end{i} = tl.load(ends + at + ({i} - {count}) * hidden, mask=only(inside, n > 0), other=0.0)")
                out(f"new{i} = tl.where(n > 0, end{i} + bounded({moved}), old{i})")
            for i in self.components:
                out(f"delta{i} = tl.where(new{i} == old{i}, 0.0, bounded(new{i} - old{i}))")
                out(f"tl.store(target + at + {i} * hidden, new{i}, mask=inside)")


class _Adjoint(_Module):
    """Gradients of everything that went into the states."""

    boundaries = ("incoming", "outgoing", "products")

    def source(self) -> str:
        recurrence, count = self.recurrence, self.recurrence.num_components
        leaves = [*self.leaves(), *(f"adjoint{i}" for i in self.components)]
        jacobian = [recurrence.jacobian[i][j] for i, j in self.coupled]
        self.function("adjoint_step", leaves, recurrence.vjp)
        self.function(
            "adjoint_with_jacobian", leaves, [*recurrence.vjp[:count], *jacobian]
        )
        self.sweep()
        self.refine()
        return self.text()

    def inputs(self) -> list[str]:
        names = super().inputs()
        for i in self.gradients:
            names += [f"grad_states{i}", f"grad_states_batch{i}", f"grad_states_time{i}"]
        for m in self.drives:
            names += [f"grad_drive{m}", f"grad_drive_batch{m}", f"grad_drive_time{m}"]
        return [*names, "grad_initial", "sums"]

    @property
    def gradients(self) -> list[int]:
        """Components with a gradient from outside."""
        return [i for i in self.components if self.variant.gradients[i]]

    def pointers(self) -> None:
        super().pointers()
        for i in self.gradients:
            at = f"b * grad_states_batch{i} + origin * grad_states_time{i}"
            self.out(f"grad_states_at{i} = grad_states{i} + {at} + d")
        for m in self.drives:
            at = f"b * grad_drive_batch{m} + origin * grad_drive_time{m}"
            self.out(f"grad_drive_at{m} = grad_drive{m} + {at} + d")

    def loaded(self) -> list[str]:
        names = [f"u{m}" for m in self.drives] + [f"h{i}" for i in self.components]
        return names + [f"q{i}" for i in self.gradients]

    def addresses(self, step: str) -> None:
        out = self.out
        out(f"offset = tl.cast({step}, tl.int64)")
        for m in self.drives:
            out(f"u_at{m} = drive_at{m} + offset * drive_time{m}")
        for i in self.components:
            out(f"h_at{i} = states_at{i} + (offset - 1) * hidden")
        for i in self.gradients:
            out(f"q_at{i} = grad_states_at{i} + offset * grad_states_time{i}")

    def load(self, step: str, number: int, target: str) -> None:
        out, mask = self.out, self.exists(f"{step} + {number}")
        for m in self.drives:
            out(f"u{m}{target} = tl.load(u_at{m} + {number} * drive_time{m}, mask={mask})")
        before = mask if number else f"only({mask}, first + {step} > 0)"
        for i in self.components:
            out(f"h{i}{target} = tl.load(h_at{i} + {number} * hidden, mask={before})")
        for i in self.gradients:
            at = f"q_at{i} + {number} * grad_states_time{i}"
            out(f"q{i}{target} = tl.load({at}, mask={mask})")

    def one(self, step: str, number: int, couple: bool, store: bool) -> None:
        out, real = self.out, self.real
        for i in self.components:
            out(f"h{i} = h{i}.to({real})")
        if self.starts:
            self.fresh(step)
            self.from_initial("h", step)
        elif number == 0:
            for i in self.components:
                out(f"h{i} = tl.where(first + {step} > 0, h{i}, initial{i})")
        values = [f"h{i}" for i in self.components]
        values += [f"u{m}.to({real})" for m in self.drives]
        values += [f"c{c}" for c in self.coefficients]
        for i in self.components:
            values.append(f"s{i} + q{i}.to({real})" if i in self.gradients else f"s{i}")
        before = [f"before{i}" for i in self.components]
        if couple:
            jacobian = [f"j{i}{j}" for i, j in self.coupled]
            out(f"{', '.join([*before, *jacobian])} = adjoint_with_jacobian({', '.join(values)})")
            entry = lambda i, j: f"j{i}{j}" if (i, j) in self.coupled else None  # noqa: E731
            self.move("g", [[entry(j, i) for j in self.components] for i in self.components], step)
        else:
            terms = [f"term{c}" for c in self.coefficients]
            found = [*before, *(f"du{m}" for m in self.drives), *terms]
            out(f"{', '.join(found)} = adjoint_step({', '.join(values)})")
        if store:
            for m in self.drives:
                at = f"du_at{m} + {number} * grad_drive_time{m}"
                value = f"du{m}.to(grad_drive{m}.dtype.element_ty)"
                out(f"tl.store({at}, {value}, mask={self.exists(step)})")
            for c in self.coefficients:
                term = f"tl.where({self.exists(step)}, term{c}, 0.0)" if self.wide else f"term{c}"
                out(f"few{c} += {term}")
        if self.starts:
            self.restarted(step, couple, store)
        for i in self.components:
            value = f"tl.where({self.exists(step)}, before{i}, s{i})" if self.wide else f"before{i}"
            out(f"s{i} = {value}")

    def restarted(self, step: str, couple: bool, store: bool) -> None:
        """Where a sequence starts, the adjoint goes to its initial state and no further."""
        out, there = self.out, f"only({self.exists(step)}, fresh)"
        for i in self.components:
            if store and self.variant.starts == "own":
                out(f"own{i} += tl.where({there}, before{i}, 0.0)")
            elif store:
                out(f"tl.store(grad_initial + start_at + {i} * hidden, before{i}, mask={there})")
            out(f"before{i} = tl.where(fresh, 0.0, before{i})")
        for i, j in self.pairs if couple else ():
            out(f"g{i}{j} = tl.where(fresh, 0.0, g{i}{j})")

    def loop(self, low: str, high: str, couple: bool, store: bool) -> None:
        """Steps `high` - 1 down to `low`; the inputs of the first block are loaded already."""
        out, unroll = self.out, self.unroll
        if not self.wide and unroll > 1:
            with out.block(f"for n in range(0, ({high} - {low}) % {unroll}):"):
                out(f"i = {high} - 1 - n")
                self.begin(store)
                self.addresses("i")
                self.load("i", 0, "")
                self.one("i", 0, couple, store)
                self.end_sums(store)
        out(f"blocks = ({high} - {low}) // {unroll}")
        with out.block("for n in range(0, blocks):"):
            out(f"i = {low} + (blocks - 1 - n) * {unroll}")
            out(f"ahead = tl.maximum(i - {unroll}, 0)")
            self.begin(store)
            self.addresses("ahead")
            for number in reversed(range(unroll)):
                self.step_ahead(number, couple, store)
            self.end_sums(store)

    def begin(self, store: bool) -> None:
        """Where gradients of drives go; those of coefficients: a few terms at a time ..."""
        for m in self.drives if store else ():
            self.out(f"du_at{m} = grad_drive_at{m} + tl.cast(i, tl.int64) * grad_drive_time{m}")
        for c in self.coefficients if store else ():
            self.zeros(f"few{c}")

    def end_sums(self, store: bool) -> None:
        """... then added in float64."""
        for c in self.coefficients if store else ():
            self.out(f"sum{c} += tl.cast(few{c}, tl.float64)")

    def run_chunk(self, high: str) -> None:
        """The chunk with all its results."""
        out = self.out
        for c in self.coefficients:
            self.zeros(f"sum{c}", "tl.float64")
        if self.variant.starts == "own":
            for i in self.components:
                self.zeros(f"own{i}")
        self.loop("0", high, couple=False, store=True)
        mask = "here" if self.wide else "inside"
        for c in self.coefficients:
            at = f"((b * chunks + k) * {len(self.coefficients)} + {c}) * hidden + d"
            out(f"tl.store(sums + {at}, sum{c}, mask={mask})")
        for i in self.components:
            if self.variant.starts == "own":
                at = self.boundary("grad_initial", i)
                out(f"tl.store({at}, own{i}, mask={mask})")
            elif not self.starts:
                row = "(b + 0 * k)" if self.wide else "b"  # the first has the shape of a group
                at = f"grad_initial + ({row} * {len(self.components)} + {i}) * hidden + d"
                out(f"tl.store({at}, s{i}, mask=only({mask}, first == 0))")

    def sweep(self) -> None:
        out, unroll = self.out, self.unroll
        parts = [*map(str, self.components)]
        arguments = [*self.inputs(), *self.boundaries, "stored", *_SIZES, "warm", "limit"]
        with self.kernel("sweep", arguments, ["MANY", "BLOCK"], wide=False):
            out("k = tl.program_id(0) // (tiles * batch)")
            out("first = k * chunk")
            out("length = tl.minimum(chunk, time - first)")
            self.pointers()
            if not self.starts:
                self.first_state("initial")
            for i in self.components:
                self.zeros(f"s{i}")
            out("lead = tl.minimum(warm, time - first - length) if MANY else 0")
            begin = f"length // {unroll} * {unroll} + lead // {unroll} * {unroll} - {unroll}"
            self.load_ahead(f"tl.maximum({begin}, -first)")
            with out.block("if MANY:"):
                out("low = length")
                out("high = length + lead")
                self.fill("g", identity=True)
                with out.block("for phase in range(0, 2):  # the warm-up; then perhaps the chunk"):
                    self.fill("g", identity=True)
                    self.loop("low", "high", couple=True, store=False)
                    with out.block("if phase == 0:"):
                        self.save("incoming", "s", parts)
                        self.forgotten("first + length + lead == time")
                        out("low = tl.where(forgotten, length, 0)")
                        out("high = length")
                with out.block("if low > 0:"):
                    self.run_chunk("length")
                    self.fill("g", identity=False)
                self.save("outgoing", "s", parts)
                self.save("products", "g", (f"{i}{j}" for i, j in self.pairs))
            with out.block("else:"):
                self.run_chunk("length")

    def measure(self) -> None:
        self.out("apart = tl.where(e == s, 0.0, magnitude(e - s))")
        self.out("gaps = tl.maximum(gaps, apart)")
        self.out("sizes = tl.maximum(sizes, tl.abs(bounded(e)))")

    def refine(self) -> None:
        out, parts = self.out, [*map(str, self.components)]
        arguments = [*self.inputs(), *self.boundaries, "target", "stored", *_SIZES, "tolerance"]
        with self.kernel("refine", arguments, ["GROUP", "BLOCK"], wide=True):
            out("rows = tl.arange(0, GROUP)[:, None]")
            self.zeros("gaps")
            self.zeros("sizes")
            out("lacking = tl.zeros([GROUP, 1], tl.int32)")
            with out.block("for g in range(0, chunks, GROUP):"):
                out("k = g + rows")
                out("here = (k < chunks) & inside[None, :]")
                self.check("here & (k + 1 < chunks)", 1)
                out("kept_at = stored + (b * chunks + k) * tiles + tile")
                out("kept = tl.load(kept_at, mask=k < chunks, other=1)")
                out("lacking = tl.maximum(lacking, 1 - kept)")
            out("allowed = tolerance * tl.max(sizes, axis=0)[None, :]")
            out("wrong = tl.max(tl.where(gaps > allowed, 1, 0))")
            with out.block("if (tl.max(lacking) > 0) | (wrong > 0):"):
                if not self.starts:
                    self.first_state("initial")
                out("groups = tl.cdiv(chunks, GROUP)")
                with out.block("for group in range(0, groups):"):
                    out("g = (groups - 1 - group) * GROUP")
                    out("k = g + rows")
                    out("last = tl.minimum(g + GROUP, chunks)")
                    out("here = (k < last) & inside[None, :]")
                    out("first = k * chunk")
                    self.pointers()
                    self.zeros("gaps")
                    self.check("here & (k + 1 < chunks)", 1)
                    out("kept_at = stored + (b * chunks + k) * tiles + tile")
                    out("kept = tl.load(kept_at, mask=k < last, other=1)")
                    out("wrong = tl.maximum(tl.max(tl.where(gaps > allowed, 1, 0)), tl.max(1 - kept))")
                    out("sweeps = tl.full([], 0, tl.int32)")
                    with out.block("while (wrong > 0) & (sweeps < last - g):"):
                        self.fold()
                        out("tl.debug_barrier()")
                        for i in self.components:
                            at = self.boundary("target", i)
                            out(f"s{i} = tl.load({at}, mask=here, other=0.0)")
                        self.save("incoming", "s", parts)
                        self.load_ahead(f"chunk - {self.unroll}")
                        self.run_chunk("chunk")
                        self.save("outgoing", "s", parts)
                        out("tl.debug_barrier()")
                        self.zeros("gaps")
                        self.check("here & (k + 1 < last)", 1)
                        out("wrong = tl.max(tl.where(gaps > allowed, 1, 0))")
                        out("sweeps += 1")

    def fold(self) -> None:
        """Adjoints after each chunk of a group, from the last to the first; see the forward one."""
        out, count = self.out, len(self.components)
        for i in self.components:
            out(f"delta{i} = tl.zeros([BLOCK], {self.real})")
        with out.block("for m in range(0, last - g):"):
            out("n = last - 1 - m")
            out("chunk_at = b * chunks + n")
            out(f"at = chunk_at * {count} * hidden + channels")
            out(f"products_at = products + (chunk_at + 1) * {count * count} * hidden + channels")
            for i, j in self.pairs:
                loaded = f"tl.load(products_at + {i * count + j} * hidden, mask=only(inside, m > 0), other=0.0)"
                out(f"t{i}{j} = bounded({loaded})")
            for i in self.components:
                moved = " + ".join(f"t{i}{j} * delta{j}" for j in self.components)
                known = "only(inside, n + 1 < chunks)"
                out(f"old{i} = tl.load(incoming + at + {i} * hidden, mask=inside, other=0.0)")
                out(f"end{i} = tl.load(outgoing + at + ({i} + {count}) * hidden, mask={known}, other=0.0)")
                out(f"new{i} = tl.where(n + 1 < chunks, end{i} + bounded({moved}), old{i})")
            for i in self.components:
                out(f"delta{i} = tl.where(new{i} == old{i}, 0.0, bounded(new{i} - old{i}))")
                out(f"tl.store(target + at + {i} * hidden, new{i}, mask=inside)")
