"""Prints many steps of a recurrence whose channels mix by products as one Triton kernel, `run`.

A program has one row, that is one chunk of one sequence, and the channels of one group (a head, or
all channels). It loads the blocks of the weights that belong to the group into registers once and
keeps states there too; every step loads what the next one reads while it computes, and writes its
states. Rows are independent of each other, so programs are too, and several on one multiprocessor
hide each other's latencies.

Names in the generated text: `s` states, `u` what is loaded of a drive, one step ahead.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pararnn.kernels import printing
from pararnn.kernels.triton_module import Lines, Variant, language_of, module_text, varies, wrapped
from pararnn.tracing.expressions import (
    LEAVES,
    Expression,
    Operand,
    formula,
    operands,
    topological,
)
from pararnn.tracing.products import Place, Products

# Products are sums over a weight of shape (result, factor // TILE, factor % TILE). With neighbours
# in memory along the last axis a thread has 4 of them in every tile, and all sums but the last,
# over 4 threads, stay within a thread.
TILE = 16


@dataclass(frozen=True)
class Form:
    """What a kernel is generated for, beside the products.

    Attributes:
        double: Computes in float64, else in float32.
        begins: Whether states are replaced before some steps.
        keep: Whether the states after all steps are written, or those after the last alone.
        redo: Whether some sequences are left as they are.
    """

    double: bool
    begins: bool
    keep: bool
    redo: bool = False


def width(products: Products) -> int:
    """Channels of a group in a kernel, a power of two."""
    return max(TILE, 1 << (products.size - 1).bit_length())


def source(products: Products, form: Form) -> str:
    """The module with the kernel `run`."""
    return _Steps(products, form).text()


class _Steps:
    def __init__(self, products: Products, form: Form) -> None:
        self.products, self.form = products, form
        self.components = range(len(products.step))
        self.moving = sorted({p.edge for p in products.drives})
        self.fixed = sorted({p.edge for p in products.coefficients})
        self.hidden = products.size * products.groups
        self.padded = width(products) != products.size
        self.variant = Variant("double" if form.double else "single", "none", 1)
        self.real = self.variant.real
        self.used: set[str] = set()
        self.out = Lines()

    def text(self) -> str:
        self.step()
        self.run()
        return module_text("a step", _equations(self.products.step), self.used, self.out)

    def language(self) -> printing.Language:
        plain = language_of(self.variant, self.used)
        tiles = f"({width(self.products) // TILE}, {TILE})"

        def term(op: str, args: Sequence[str]) -> str:
            if op != "dot":
                return plain.term(op, args)
            # What a step makes of the channels beyond the last may be anything.
            factors = f"tl.where(inside, {args[0]}, 0.0)" if self.padded else args[0]
            # Reshaped to three axes at once, Triton would lay products out like the state.
            terms = f"tl.reshape({factors}, {tiles})[None, :, :] * {args[1]}"
            return f"tl.sum(tl.sum({terms}, axis=1), axis=1)"

        return dataclasses.replace(plain, term=term)

    def leaves(self) -> list[str]:
        products = self.products
        counts = {"state": len(products.step), "drive": len(products.drives)}
        counts |= {"coefficient": len(products.coefficients), "weight": len(products.weights)}
        return [f"{kind}{n}" for kind, count in counts.items() for n in range(count)]

    def step(self) -> None:
        """A function of the leaves, for all channels of a program."""
        roots = self.products.step
        # Products first, as far as they do not depend on each other, so that they overlap.
        dots = [e for e in topological(roots) if e.op == "dot"]
        lines, values = printing.statements(self.language(), [*dots, *roots], {})
        shaped = [
            value if varies(root) else f"tl.zeros_like(state0) + {value}"
            for root, value in zip(roots, values[len(dots) :], strict=True)
        ]
        self.out()
        self.out("@triton.jit")
        with self.out.block(f"def step({', '.join(['inside', *self.leaves()])}):"):
            for line in lines:
                self.out(line)
            self.out(f"return {', '.join(shaped)}")
        self.out()

    def arguments(self) -> list[str]:
        names = [f"{name}{part}" for name in self.over_time() for part in ("", "_step", "_row")]
        if self.form.begins:
            names += [f"fresh{i}_channel" for i in self.components]
        names += [f"edge{e}" for e in self.fixed] + (["weights"] if self.products.weights else [])
        names += ["settled"] if self.form.redo else []
        names += [f"{kind}{i}" for kind in ("initial", "ends") for i in self.components]
        return [*names, "given", "batch", "time", "chunk", "first", "reverse"]

    def run(self) -> None:
        out = self.out
        out()
        numbers = '"given", "batch", "time", "chunk", "first", "reverse"'
        out(f"@triton.jit(do_not_specialize=[{numbers}])")
        out("def run(")
        for line in wrapped(self.arguments()):
            out(f"    {line}")
        with out.block("):"):
            out("row, group = tl.program_id(0), tl.program_id(1)")
            out("begin = (row % given) // batch * chunk")
            out("count = tl.minimum(chunk, time - begin)")
            out("first = tl.where(reverse > 0, count - 1, tl.minimum(first, count - 1))")
            out("steps = tl.where(reverse > 0, count, count - first)")
            if self.form.redo:
                out("steps = tl.where(tl.load(settled + row % given % batch) != 0, 0, steps)")
            out("last = tl.maximum(steps - 1, 0)")
            out("direction = tl.cast(1 - 2 * reverse, tl.int64)")
            out("position = tl.cast(begin + first, tl.int64)")
            out("sequence = tl.cast(row % given % batch, tl.int64)")
            out("row = tl.cast(row, tl.int64)")
            out(f"lane = tl.arange(0, {width(self.products)})")
            out(f"inside = lane < {self.products.size}")
            out(f"channel = group * {self.products.size} + lane")
            self.constants()
            for name in self.over_time():
                out(f"{name}_at = {name} + sequence * {name}_row + position * {name}_step")
                out(f"{name}_next = direction * {name}_step")
            for i in self.components:
                at = f"initial{i} + row * {self.hidden} + channel"
                out(f"s{i} = tl.load({at}, mask=inside, other=0.0).to({self.real})")
            self.load("0")
            with out.block("for i in range(0, steps):"):
                self.one()
            for i in self.components:
                out(f"tl.store(ends{i} + row * {self.hidden} + channel, s{i}, mask=inside)")
        out()

    def over_time(self) -> list[str]:
        """What has an address that moves on with the steps."""
        names = [f"edge{e}" for e in self.moving]
        if self.form.begins:
            names += ["begins", *(f"fresh{i}" for i in self.components)]
        if self.form.keep:
            names += [f"states{i}" for i in self.components]
        return names

    def constants(self) -> None:
        """What is loaded once."""
        out, wide = self.out, width(self.products)
        if self.products.weights:
            out(f"factor = tl.arange(0, {wide // TILE})[None, :, None] * {TILE}")
            out(f"factor += tl.arange(0, {TILE})[None, None, :]")
            out(f"block = weights + group * {wide**2} + lane[:, None, None] * {wide} + factor")
        for n, _ in enumerate(self.products.weights):
            at = f"block + {n * self.products.groups * wide**2}"
            out(f"weight{n} = tl.load({at}).to({self.real})")
        for n, place in enumerate(self.products.coefficients):
            at = _at(place, f"edge{place.edge}")
            out(f"coefficient{n} = tl.load({at}, mask=inside, other=0.0).to({self.real})")

    def load(self, step: str) -> None:
        """What a step reads, or the last one if there are not so many."""
        out = self.out
        out(f"ahead = tl.cast(tl.minimum({step}, last), tl.int64)")
        for n, place in enumerate(self.products.drives):
            at = _at(place, f"edge{place.edge}_at + ahead * edge{place.edge}_next")
            out(f"u{n} = tl.load({at}, mask=inside, other=0)")
        if self.form.begins:
            out("replaced = tl.load(begins_at + ahead * begins_next)")

    def one(self) -> None:
        """One step."""
        out = self.out
        for n, _ in enumerate(self.products.drives):
            out(f"drive{n} = u{n}.to({self.real})")
        if self.form.begins:
            with out.block("if replaced != 0:"):
                for i in self.components:
                    at = f"fresh{i}_at + tl.cast(i, tl.int64) * fresh{i}_next"
                    at += f" + channel * fresh{i}_channel"
                    out(f"s{i} = tl.load({at}, mask=inside, other=0.0).to({self.real})")
        self.load("i + 1")
        states = [f"s{i}" for i in self.components]
        given = ["inside", *states, *self.leaves()[len(states) :]]
        out(f"{', '.join(states)} = step({', '.join(given)})")
        if self.form.keep:
            for i in self.components:
                out(f"tl.store(states{i}_at + channel, s{i}, mask=inside)")
                out(f"states{i}_at += states{i}_next")


def _at(place: Place, base: str) -> str:
    """The address of the channels of a slot of an edge, or of its row, that is at `base`."""
    return f"{base} + group * {place.group} + lane * {place.channel} + {place.offset}"


def _equations(roots: Sequence[Operand]) -> list[str]:
    """The step as mathematics, one line per value that is used more than once and component."""
    order = topological(roots)
    uses = Counter(a for e in order for a in operands(e))
    shared = [e for e in order if uses[e] > 1 and e.op not in LEAVES]
    names: dict[Expression, str] = {e: f"t{n}" for n, e in enumerate(shared)}
    names |= {e: f"{e.op}{e.args[0]}" for e in order if e.op in LEAVES}
    lines = [f"{names[e]} = {formula(e, names)}" for e in shared]
    return lines + [f"state{i}' = {formula(root, names)}" for i, root in enumerate(roots)]
