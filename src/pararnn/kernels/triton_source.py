"""Prints a recurrence as Triton: three kernels for the states, and three for the adjoint.

`sweep` gives one program a chunk of time and a block of channels. It runs the steps before the chunk
from the initial state to guess the state that the chunk starts from (the warm-up), with the tangent
of these steps, which says how much of their start is left. If nothing is, it runs the chunk and
writes the results; else it runs the chunk with its tangent and leaves the results to `refine`.

`correct` returns at once where every chunk starts where the one before it ends. Else each of its
programs, which have a chunk each again, computes the right start through the tangents of all chunks
before, and runs its chunk from there: one iteration of Newton's method. That is nearly always enough.

`refine` gives one program all chunks of a block of channels. It too returns where all is well; else it
iterates, group after group of chunks, until it is, at the latest when every chunk has become exact.

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
    """The module with the kernels `sweep`, `correct` and `refine` that compute states."""
    return _Forward(recurrence, variant).source()


def adjoint_source(recurrence: Recurrence, variant: Variant) -> str:
    """The module with the kernels `sweep`, `correct` and `refine` that compute gradients."""
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

    def boundary(self, name: str, part: int, k: str = "k", d: str = "d") -> str:
        """Address of a part of what belongs to a chunk."""
        count = len(self.pairs if name == self.boundaries[2] else self.components)
        return f"{name} + ((b * chunks + {k}) * {count} + {part}) * hidden + {d}"

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

    beside: str  # the chunk that a chunk starts from
    has_one: str  # whether there is one

    def gaps(self, k: str, here: str, d: str, more: str, ends: str, guess: str) -> None:
        """Raise `gaps` to how far chunks start from where the chunks beside them end."""
        out = self.out
        mask = f"{here} & ({self.has_one.format(k=k)}){more}"
        for i in self.components:
            end = self.boundary(ends, i, self.beside.format(k=k), d)
            out(f"e = tl.load({end}, mask={mask}, other=0.0)")
            out(f"s = tl.load({self.boundary(guess, i, k, d)}, mask={mask}, other=0.0)")
            self.measure()

    def verdict(self, guess: str, ends: str, stored: bool) -> None:
        """`wrong`: whether anything is, in any chunk of these channels."""
        out = self.out
        shape = "[GROUP, BLOCK]"
        out("rows = tl.arange(0, GROUP)[:, None]")
        out("across = channels[None, :]")
        for name in self.measures:
            out(f"{name} = tl.zeros({shape}, {self.real})")
        out("lacking = tl.zeros([GROUP, 1], tl.int32)")
        with out.block("for g in range(0, chunks, GROUP):"):
            out("every = g + rows")
            out("there = (every < chunks) & (across < hidden)")
            self.gaps("every", "there", "across", "", ends, guess)
            if stored:
                out("kept_at = stored + (b * chunks + every) * tiles + tile")
                out("kept = tl.load(kept_at, mask=every < chunks, other=1)")
                out("lacking = tl.maximum(lacking, 1 - kept)")
        self.judge()
        out("wrong = tl.maximum(wrong, tl.max(lacking))")

    measures: tuple[str, ...]  # what `measure` raises

    @abc.abstractmethod
    def judge(self) -> None:
        """`wrong`, from what `measure` found."""

    @abc.abstractmethod
    def measure(self) -> None:
        """Raise `gaps` by the distance of ends `e` and guesses `s`."""

    def newton(self, chunk: str, coupling: str) -> None:
        """`from` and `delta`: the corrected start of a chunk, and by how much it is corrected.

        What overflows is left out, so that a start that was right stays as it is.
        """
        out, count = self.out, len(self.components)
        guess, ends, tangents = self.boundaries
        before = self.beside.format(k=chunk)
        for i, j in self.pairs:
            at = self.boundary(tangents, i * count + j, before, "channels")
            out(f"t{i}{j} = bounded(tl.load({at}, mask=inside) * ({coupling}))")
        for i in self.components:
            moved = " + ".join(f"t{i}{j} * delta{j}" for j in self.components)
            at = self.boundary(guess, i, chunk, "channels")
            out(f"old{i} = tl.load({at}, mask=inside)")
            at = self.boundary(ends, i, before, "channels")
            out(f"from{i} = tl.load({at}, mask=inside) + bounded({moved})")
        for i in self.components:
            out(f"delta{i} = tl.where(from{i} == old{i}, 0.0, bounded(from{i} - old{i}))")

    def own_chunk(self) -> None:
        """The chunk of a program that has one."""
        self.out("k = tl.program_id(0) // (tiles * batch)")
        self.out("first = k * chunk")
        self.out("length = tl.minimum(chunk, time - first)")


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
    beside, has_one = "{k} - 1", "{k} > 0"
    measures = ("gaps",)

    def source(self) -> str:
        step = self.recurrence.step
        jacobian = [self.recurrence.jacobian[i][j] for i, j in self.coupled]
        self.function("step", self.leaves(), step)
        self.function("step_with_jacobian", self.leaves(), [*step, *jacobian])
        self.sweep()
        self.correct()
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
            self.own_chunk()
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

    def judge(self) -> None:
        self.out("residual = tl.max(gaps)")
        self.out("wrong = tl.where(residual <= tolerance, 0, 1)")

    def correct(self) -> None:
        out, parts = self.out, [*map(str, self.components)]
        arguments = [*self.inputs(), *self.boundaries, "guess2", "ends2", "stored", *_SIZES]
        arguments += ["tolerance", "damping"]
        with self.kernel("correct", arguments, ["GROUP", "BLOCK"], wide=False):
            self.verdict("guess", "ends", stored=True)
            with out.block("if wrong == 0:"):
                out("return")
            self.own_chunk()
            for i in self.components:
                out(f"s{i} = tl.load({self.boundary('guess', i)}, mask=inside)")
                out(f"end{i} = tl.load({self.boundary('ends', i)}, mask=inside)")
                out(f"from{i} = s{i}")
                self.zeros(f"delta{i}")
            with out.block("for n in range(1, k + 1):"):
                self.newton("n", "1.0 - damping")
            out("far = tl.zeros([BLOCK], tl.float32)")
            for i in self.components:
                out(f"size = tl.maximum(tl.abs(from{i}), 1.0)")
                out(f"apart = tl.where(delta{i} == 0.0, 0.0, magnitude(delta{i} / size))")
                out("far = tl.maximum(far, apart.to(tl.float32))")
            out("kept = tl.load(stored + (b * chunks + k) * tiles + tile)")
            out("moved = tl.max(tl.where(inside, far, 0.0)) > tolerance")
            with out.block("if moved | (kept == 0):"):
                self.pointers()
                for i in self.components:
                    out(f"s{i} = from{i}")
                self.load_ahead(f"tl.minimum(0, length - {self.unroll})")
                self.loop("0", "length", couple=False, store=True)
                for i in self.components:
                    out(f"end{i} = s{i}")
                    out(f"s{i} = from{i}")
            self.save("guess2", "s", parts)
            self.save("ends2", "end", parts)

    def refine(self) -> None:
        out = self.out
        parts = [*map(str, self.components)]
        arguments = [*self.inputs(), *self.boundaries, "guess2", "ends2", "target", "stored"]
        arguments += ["report", *_SIZES, "tolerance", "most", "damping"]
        with self.kernel("refine", arguments, ["CORRECTED", "GROUP", "BLOCK"], wide=True):
            out("iterations = tl.full([], 1, tl.int32)")
            out("status = tl.full([], 1, tl.int32)")
            self.verdict("guess", "ends", stored=True)
            with out.block("if wrong > 0:"):
                with out.block("if CORRECTED:"):
                    out("iterations += 1")
                    self.verdict("guess2", "ends2", stored=False)
            with out.block("if CORRECTED:"):
                out("guess = guess2")
                out("ends = ends2")
            with out.block("if wrong > 0:"):
                out("residual = tl.full([], 0.0, " + self.real + ")")
                with out.block("for g in range(0, chunks, GROUP):"):
                    out("k = g + rows")
                    out("last = tl.minimum(g + GROUP, chunks)")
                    out("here = (k < last) & inside[None, :]")
                    out("first = k * chunk")
                    self.pointers()
                    self.zeros("gaps")
                    self.gaps("k", "here", "d", "", "ends", "guess")
                    out("kept_at = stored + (b * chunks + k) * tiles + tile")
                    out("kept = tl.load(kept_at, mask=k < last, other=1)")
                    out("unwritten = tl.max(1 - kept) * (0 if CORRECTED else 1)")
                    out("now = tl.max(gaps)")
                    out("seen = now")
                    out("sweeps = tl.full([], 1 if CORRECTED else 0, tl.int32)")
                    out("allowed = sweeps + last - g")
                    going = "(now > tolerance) | (unwritten > 0)"
                    with out.block(f"while ({going}) & (sweeps < allowed):"):
                        out("coupling = tl.where(sweeps + 1 < most, 1.0 - damping, 0.0)")
                        for i in self.components:
                            out(f"delta{i} = tl.zeros([BLOCK], {self.real})")
                        with out.block("for n in range(g, last):"):
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
                        self.gaps("k", "here", "d", " & (k > g)", "ends", "guess")
                        out("now = tl.max(gaps)")
                        out("unwritten = unwritten * 0")
                        out("sweeps += 1")
                        out("iterations = tl.maximum(iterations, tl.minimum(sweeps + 1, most))")
                        out("status = tl.where(sweeps < most, status, 2)")
                        out("seen = tl.where(sweeps < most, now, seen)")
                    out("residual = tl.maximum(residual, seen)")
            self.write_report(("iterations", "residual", "status", "chunks"))

    def fold(self) -> None:
        """Into `target`, the starts of a group one after another; its first starts exactly."""
        out = self.out
        with out.block("if n == 0:"):
            for i in self.components:
                out(f"from{i} = tl.load({self.boundary('guess', i, 'n', 'channels')}, mask=inside)")
        with out.block("else:"):
            out("strength = tl.where(n > g, coupling, 0.0)")
            self.newton("n", "strength")
        for i in self.components:
            at = self.boundary("target", i, "n", "channels")
            out(f"tl.store({at}, from{i}, mask=inside)")


class _Adjoint(_Module):
    """Gradients of everything that went into the states."""

    boundaries = ("incoming", "outgoing", "products")
    beside, has_one = "{k} + 1", "{k} + 1 < chunks"
    measures = ("gaps", "sizes")

    def source(self) -> str:
        recurrence, count = self.recurrence, self.recurrence.num_components
        leaves = [*self.leaves(), *(f"adjoint{i}" for i in self.components)]
        jacobian = [recurrence.jacobian[i][j] for i, j in self.coupled]
        self.function("adjoint_step", leaves, recurrence.vjp)
        self.function(
            "adjoint_with_jacobian", leaves, [*recurrence.vjp[:count], *jacobian]
        )
        self.sweep()
        self.correct()
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
            self.own_chunk()
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

    def judge(self) -> None:
        """Adjoints have no natural scale: each channel's is its largest one at any boundary."""
        self.out("allowed = tolerance * tl.max(sizes, axis=0)[None, :]")
        self.out("wrong = tl.max(tl.where(gaps <= allowed, 0, 1))")

    def correct(self) -> None:
        out, parts = self.out, [*map(str, self.components)]
        arguments = [*self.inputs(), *self.boundaries, "incoming2", "outgoing2", "stored"]
        with self.kernel(
            "correct", [*arguments, *_SIZES, "tolerance"], ["GROUP", "BLOCK"], wide=False
        ):
            self.verdict("incoming", "outgoing", stored=True)
            with out.block("if wrong == 0:"):
                out("return")
            self.own_chunk()
            if not self.starts:
                self.first_state("initial")
            for i in self.components:
                out(f"s{i} = tl.load({self.boundary('incoming', i)}, mask=inside)")
                out(f"end{i} = tl.load({self.boundary('outgoing', i)}, mask=inside)")
                out(f"from{i} = s{i}")
                self.zeros(f"delta{i}")
            with out.block("for m in range(0, chunks - 1 - k):"):
                out("n = chunks - 2 - m")
                self.newton("n", "1.0")
            out("scale = tolerance * tl.max(sizes, axis=0)")
            out("far = tl.zeros([BLOCK], tl.int32)")
            for i in self.components:
                out(f"far = tl.maximum(far, tl.where(tl.abs(delta{i}) <= scale, 0, 1))")
            out("kept = tl.load(stored + (b * chunks + k) * tiles + tile)")
            out("moved = tl.max(tl.where(inside, far, 0)) > 0")
            with out.block("if moved | (kept == 0):"):
                self.pointers()
                for i in self.components:
                    out(f"s{i} = from{i}")
                self.load_ahead(f"tl.maximum(length // {self.unroll} * {self.unroll} - {self.unroll}, -first)")
                self.run_chunk("length")
                for i in self.components:
                    out(f"end{i} = s{i}")
                    out(f"s{i} = from{i}")
            self.save("incoming2", "s", parts)
            self.save("outgoing2", "end", parts)

    def refine(self) -> None:
        out, parts = self.out, [*map(str, self.components)]
        arguments = [*self.inputs(), *self.boundaries, "incoming2", "outgoing2", "target", "stored"]
        with self.kernel(
            "refine", [*arguments, *_SIZES, "tolerance"], ["CORRECTED", "GROUP", "BLOCK"], wide=True
        ):
            self.verdict("incoming", "outgoing", stored=True)
            with out.block("if wrong > 0:"):
                with out.block("if CORRECTED:"):
                    self.verdict("incoming2", "outgoing2", stored=False)
            with out.block("if CORRECTED:"):
                out("incoming = incoming2")
                out("outgoing = outgoing2")
            with out.block("if wrong > 0:"):
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
                    self.zeros("sizes")
                    self.gaps("k", "here", "d", "", "outgoing", "incoming")
                    out("kept_at = stored + (b * chunks + k) * tiles + tile")
                    out("kept = tl.load(kept_at, mask=k < last, other=1)")
                    out("unwritten = tl.max(1 - kept) * (0 if CORRECTED else 1)")
                    out("now = tl.maximum(tl.max(tl.where(gaps <= allowed, 0, 1)), unwritten)")
                    out("sweeps = tl.full([], 0, tl.int32)")
                    with out.block("while (now > 0) & (sweeps < last - g):"):
                        for i in self.components:
                            out(f"delta{i} = tl.zeros([BLOCK], {self.real})")
                        with out.block("for m in range(0, last - g):"):
                            out("n = last - 1 - m")
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
                        self.gaps("k", "here", "d", " & (k + 1 < last)", "outgoing", "incoming")
                        out("now = tl.max(tl.where(gaps <= allowed, 0, 1))")
                        out("sweeps += 1")

    def fold(self) -> None:
        """Into `target`, the adjoints after each chunk of a group; the last one's is exact."""
        out = self.out
        with out.block("if n + 1 == chunks:"):
            for i in self.components:
                at = self.boundary("incoming", i, "n", "channels")
                out(f"from{i} = tl.load({at}, mask=inside)")
        with out.block("else:"):
            out("strength = tl.where(m > 0, 1.0, 0.0)")
            self.newton("n", "strength")
        for i in self.components:
            at = self.boundary("target", i, "n", "channels")
            out(f"tl.store({at}, from{i}, mask=inside)")
