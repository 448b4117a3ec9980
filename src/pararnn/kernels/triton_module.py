"""What both directions of the generated Triton share: see `triton_source`."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pararnn.kernels import printing
from pararnn.kernels.printing import BINARY
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.expressions import Operand, literal, topological

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
        wide_unroll: The same in `refine`, whose programs have many warps.
        fixed: Whether strides over time are compiled in: with them, addresses take far fewer
            registers. Only where they do not depend on the batch, which may vary.
        gradients: For the adjoint: which components have a gradient from outside.
    """

    precision: Precision
    starts: Starts
    unroll: int
    wide_unroll: int = 1
    fixed: bool = True
    gradients: tuple[bool, ...] = ()

    @property
    def real(self) -> str:
        """The type of the arithmetic."""
        return "tl.float64" if self.precision == "double" else "tl.float32"


_FAST = {"tanh": "fast_tanh", "sigmoid": "fast_sigmoid", "exp": "fast_exp"}


def language_of(variant: Variant, used: set[str]) -> printing.Language:
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
            return f"{args[0]}.to(tl.float32).to(tl.{op[3:]}).to({real})"  # as PyTorch rounds
        if op == "largest":
            return number(
                1.7976931348623157e308 if variant.precision == "double" else 2.0**128 - 2.0**104
            )
        name = _FAST.get(op, op) if variant.precision == "half" else op
        used.add(name)
        return f"{name}({', '.join(args)})"

    return printing.Language(term, number, str, lambda name, value, _: f"{name} = {value}")


class Lines:
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


class Module(abc.ABC):
    """What both directions share.

    Names in the generated text: `b` row of the batch, `k` chunk, `first` its first time, `i` step
    relative to that, `d` channels; `s` states or adjoints, `g` tangents or products, `c`
    coefficients. A kernel is `wide` when a program has a group of chunks: then `k` and `first` are
    columns, and all values have the shape [GROUP, BLOCK].
    """

    boundaries: tuple[str, str, str]  # first guesses, ends, and what couples them
    beside: str  # the chunk that a chunk starts from
    has_one: str  # whether there is one
    measures: tuple[str, ...]  # what `measure` raises

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
        self.out = Lines()
        self.wide = False

    @property
    def unroll(self) -> int:
        """Steps whose inputs are loaded ahead."""
        return self.variant.wide_unroll if self.wide else self.variant.unroll

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
        language = language_of(self.variant, self.used)
        lines, values = printing.statements(language, roots, names)
        shaped = [
            value if varies(root) else f"tl.zeros_like(state0) + {value}"
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
        fixed = [a for a in arguments if a == "hidden" or "_size" in a]
        fixed += [a for a in arguments if self.variant.fixed and "_time" in a]
        varying = ", ".join(f'"{a}"' for a in arguments if a in _VARYING)
        out()
        out(f"@triton.jit(do_not_specialize=[{varying}])")
        out(f"def {name}(")
        constants = [*constants, *([] if wide else ["DISTANCE"]), "PDL"]
        constant = {*constants, *fixed}
        names = [f"{a}: tl.constexpr" if a in constant else a for a in [*arguments, *constants]]
        for line in wrapped(names):
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
            with out.block("if PDL:  # the kernels overlap until one needs what another wrote"):
                if name != "sweep":
                    out("tl.extra.cuda.gdc_wait()")
                if name != "refine":
                    out("tl.extra.cuda.gdc_launch_dependents()")
            yield
        out()

    def inputs(self) -> list[str]:
        """Arguments that every kernel has."""
        names = self.in_heads("drive")
        names += [f"coefficient{c}" for c in self.coefficients]
        names += ["initial", *(["starts"] if self.starts else [])]
        return names + [f"states{i}" for i in self.components]

    def in_heads(self, name: str) -> list[str]:
        """Arguments that say where the drives, or their gradients, are."""
        parts = (name, *(f"{name}_{n}" for n in ("batch", "time", "head", "size")))
        return [f"{part}{m}" for m in self.drives for part in parts]

    def lanes(self, name: str, m: int) -> str:
        """Where the channels are in a row of a drive, whose heads may lie apart."""
        size = f"{name}_size{m}"
        return f"({_lane('d', name, m)} if {size} < hidden else d)"

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
            at = f"drive{m} + b * drive_batch{m} + origin * drive_time{m}"
            out(f"drive_at{m} = {at} + {self.lanes('drive', m)}")
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
        """Whether nothing is left of where the warm-up started; noted for the other kernels."""
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

    # Steps

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

    @abc.abstractmethod
    def streams(self) -> list[tuple[str, str, str]]:
        """Every tensor over time that a step reads: where the program starts, stride, channels."""

    def prefetch(self, step: str, steps: str) -> None:
        """Bring the inputs of the steps from `step` on into the L2 cache, where they exist."""
        if self.wide:
            return
        self.used.add("prefetch")
        with self.out.block("if DISTANCE > 0:"):
            for base, stride, channels in self.streams():
                given = f"{step}, -origin, time - 1 - origin, {channels}, {steps}, BLOCK"
                self.out(f"prefetch({base}, {stride}, {given})")

    def drive_streams(self) -> list[tuple[str, str, str]]:
        """The drives among `streams`."""
        at = "drive{0} + b * drive_batch{0} + origin * drive_time{0} + "
        first = "tile * BLOCK"
        return [
            (
                at.format(m) + _lane(first, "drive", m),
                f"drive_time{m}",
                f"drive_size{m} - {first} % drive_size{m}",
            )
            for m in self.drives
        ]

    def load_ahead(self, step: str) -> None:
        """Load what the first steps of a loop need."""
        self.out(f"ahead = {step}")
        self.prefetch(self.beyond("ahead"), "DISTANCE")
        self.addresses("ahead")
        for number in range(self.unroll):
            self.load("ahead", number, f"_{number}")

    def step_ahead(self, number: int, couple: bool, store: bool) -> None:
        """A step of an unrolled loop: its inputs are there, those of a later step are loaded."""
        names = self.loaded()
        self.out(f"{', '.join(names)} = {', '.join(f'{n}_{number}' for n in names)}")
        self.load("ahead", number, f"_{number}")
        self.one(f"(i + {number})", number, couple, store)

    @abc.abstractmethod
    def beyond(self, step: str) -> str:
        """The first of DISTANCE steps whose turn comes after the block at `step`."""

    @abc.abstractmethod
    def loop(self, low: str, high: str, couple: bool, store: bool) -> None:
        """The steps of the chunk from `low` to `high`, in the direction of the module."""

    def warm_up_and_chunk(self, low: str, high: str, exact: str, run: Callable[[], None]) -> None:
        """The body of `sweep` for one of many chunks.

        Two passes of one loop: the warm-up, and, if it did not forget its start, the chunk without
        results. Their bounds are computed from the pass: Triton 3.6 loses the update of a bound
        that is assigned in a branch inside of the loop.

        Args:
            low: First step of a pass.
            high: The step after its last.
            exact: Whether the warm-up started from the right state.
            run: Prints the chunk with its results.
        """
        out, parts = self.out, [*map(str, self.components)]
        guess, ends, tangents = self.boundaries
        out("again = 0 * lead")
        self.fill("g", identity=True)
        with out.block("for phase in range(0, 2):  # the warm-up; then perhaps the chunk"):
            self.fill("g", identity=True)
            out(f"low = {low}")
            out(f"high = {high}")
            self.loop("low", "high", couple=True, store=False)
            with out.block("if phase == 0:"):
                self.save(guess, "s", parts)
                self.forgotten(exact)
                out("again = tl.where(forgotten, 0, length)")
        with out.block("if again == 0:"):
            run()
            self.fill("g", identity=False)
        self.save(ends, "s", parts)
        self.save(tangents, "g", (f"{i}{j}" for i, j in self.pairs))

    # How far chunks are from fitting together, and what corrects them

    def gaps(
        self, k: str, here: str, d: str, more: str, ends: str, guess: str, suffix: str = ""
    ) -> None:
        """Raise `gaps` to how far chunks start from where the chunks beside them end."""
        out = self.out
        mask = f"{here} & ({self.has_one.format(k=k)}){more}"
        for i in self.components:
            end = self.boundary(ends, i, self.beside.format(k=k), d)
            out(f"e = tl.load({end}, mask={mask}, other=0.0)")
            out(f"s = tl.load({self.boundary(guess, i, k, d)}, mask={mask}, other=0.0)")
            self.measure(suffix)

    def verdict(self, guess: str, ends: str, stored: bool) -> None:
        """`wrong`: whether anything is, in any chunk of these channels."""
        out = self.out
        out("across = channels[None, :]")
        for name in self.measures:
            out(f"{name}_all = tl.zeros([ROWS, BLOCK], {self.real})")
        out("lacking = tl.zeros([ROWS, 1], tl.int32)")
        with out.block("for g in range(0, chunks, ROWS):"):
            out("every = g + tl.arange(0, ROWS)[:, None]")
            out("there = (every < chunks) & (across < hidden)")
            self.gaps("every", "there", "across", "", ends, guess, "_all")
            if stored:
                out("kept_at = stored + (b * chunks + every) * tiles + tile")
                out("kept = tl.load(kept_at, mask=every < chunks, other=1)")
                out("lacking = tl.maximum(lacking, 1 - kept)")
        self.judge()
        out("wrong = tl.maximum(wrong, tl.max(lacking))")

    def unsettled(self, depends_on: str) -> None:
        """`wrong`: whether a chunk is lacking that this one depends on, or this one itself."""
        out = self.out
        out("every = tl.arange(0, GROUP)")
        out("kept_at = stored + (b * chunks + every) * tiles + tile")
        out(f"kept = tl.load(kept_at, mask=(every < chunks) & ({depends_on}), other=1)")
        out("wrong = tl.max(1 - kept)")

    @abc.abstractmethod
    def judge(self) -> None:
        """`wrong`, from what `measure` found."""

    @abc.abstractmethod
    def measure(self, suffix: str) -> None:
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


def _lane(channel: str, name: str, m: int) -> str:
    """Where a channel is in a row of a tensor in heads."""
    size = f"{name}_size{m}"
    return f"tl.cast({channel} // {size}, tl.int64) * {name}_head{m} + {channel} % {size}"


def varies(root: Operand) -> bool:
    """Whether an expression has the shape of the state, not just that of a coefficient."""
    return any(e.op in ("state", "drive", "adjoint") for e in topological([root]))


def wrapped(items: Sequence[str]) -> list[str]:
    """Items with commas, several a line."""
    lines, line = [], ""
    for item in items:
        if len(line) + len(item) > 88:
            lines.append(line.rstrip())
            line = ""
        line += f"{item}, "
    return [*lines, line.rstrip()]


_VARYING = frozenset("batch time chunks chunk warm most".split())  # compiled once for all values
SIZES = ["batch", "time", "hidden", "chunks", "chunk"]
