"""Prints the kernels that compute gradients: see `triton_source`."""

from __future__ import annotations

from pararnn.kernels.printing import pair
from pararnn.kernels.triton_module import SIZES, Module


class Adjoint(Module):
    """Gradients of everything that went into the states."""

    boundaries = ("incoming", "outgoing", "products")
    beside, has_one = "{k} + 1", "{k} + 1 < chunks"

    def source(self) -> str:
        recurrence, count = self.recurrence, self.recurrence.num_components
        leaves = [*self.leaves(), *(f"adjoint{i}" for i in self.components)]
        jacobian = [recurrence.jacobian[i][j] for i, j in self.coupled]
        self.function("adjoint_step", leaves, recurrence.vjp)
        self.function("adjoint_with_jacobian", leaves, [*recurrence.vjp[:count], *jacobian])
        self.sweep()
        self.correct()
        self.refine()
        return self.text()

    def inputs(self) -> list[str]:
        names = super().inputs()
        for i in self.gradients:
            names += [f"grad_states{i}", f"grad_states_batch{i}", f"grad_states_time{i}"]
        return [*names, *self.in_heads("grad_drive"), "grad_initial", "sums"]

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
            self.out(f"grad_drive_at{m} = grad_drive{m} + {at} + {self.lanes('grad_drive', m)}")

    def loaded(self) -> list[str]:
        names = [f"u{m}" for m in self.drives] + [f"h{i}" for i in self.components]
        return names + [f"q{i}" for i in self.gradients]

    def streams(self) -> list[tuple[str, str, str]]:
        first, rest = "tile * BLOCK", "hidden - tile * BLOCK"
        gradients = "grad_states{0} + b * grad_states_batch{0} + origin * grad_states_time{0}"
        states = "states{0} + (b * time + origin) * hidden"
        return [
            *self.drive_streams(),
            *(
                (f"{gradients.format(i)} + {first}", f"grad_states_time{i}", rest)
                for i in self.gradients
            ),
            *((f"{states.format(i)} + {first}", "hidden", rest) for i in self.components),
        ]

    def beyond(self, step: str) -> str:
        return f"{step} - DISTANCE"

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
            jacobian = [f"j{pair(i, j)}" for i, j in self.coupled]
            out(f"{', '.join([*before, *jacobian])} = adjoint_with_jacobian({', '.join(values)})")
            entry = lambda i, j: f"j{pair(i, j)}" if (i, j) in self.coupled else None  # noqa: E731
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
        """Where a sequence starts anew, the adjoint goes to its initial state and no further."""
        out, there = self.out, f"only({self.exists(step)}, fresh)"
        out("fresh = start >= batch  # not the first state of a row, see `run_chunk`")
        for i in self.components:
            if store and self.variant.starts == "resets":
                out(f"restarts{i} += tl.where({there}, before{i}, 0.0)")
            elif store:
                out(f"tl.store(grad_initial + start_at + {i} * hidden, before{i}, mask={there})")
            out(f"before{i} = tl.where(fresh, 0.0, before{i})")
        for i, j in self.pairs if couple else ():
            out(f"g{pair(i, j)} = tl.where(fresh, 0.0, g{pair(i, j)})")

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
            self.prefetch("ahead - DISTANCE", str(unroll))
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
        if self.variant.starts == "resets":
            for i in self.components:
                self.zeros(f"restarts{i}")
        self.loop("0", high, couple=False, store=True)
        mask = "here" if self.wide else "inside"
        for c in self.coefficients:
            at = f"((b * chunks + k) * {len(self.coefficients)} + {c}) * hidden + d"
            out(f"tl.store(sums + {at}, sum{c}, mask={mask})")
        row = "(b + 0 * k)" if self.wide else "b"  # the first has the shape of a group
        for i in self.components:
            at = f"grad_initial + ({row} * {len(self.components)} + {i}) * hidden + d"
            out(f"tl.store({at}, s{i}, mask=only({mask}, first == 0))")
            if self.variant.starts == "resets":
                at = self.boundary("grad_initial", i, "k + batch")
                out(f"tl.store({at}, restarts{i}, mask={mask})")

    def sweep(self) -> None:
        out, unroll = self.out, self.unroll
        arguments = [*self.inputs(), *self.boundaries, "stored", *SIZES, "warm", "limit"]
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
                self.warm_up_and_chunk(
                    low="tl.where(phase == 0, length, length - again)",
                    high="tl.where(phase == 0, length + lead, length)",
                    exact="first + length + lead == time",
                    run=lambda: self.run_chunk("length"),
                )
            with out.block("else:"):
                self.run_chunk("length")

    def nothing_measured(self, suffix: str, shape: str) -> None:
        for name in ("gaps", "sizes"):
            self.out(f"{name}{suffix} = tl.zeros({shape}, {self.real})")

    def measure(self, part: int, suffix: str) -> None:
        out, gaps, sizes = self.out, f"gaps{suffix}", f"sizes{suffix}"
        out("apart = tl.where(e == s, 0.0, magnitude(e - s))")
        out(f"{gaps} = tl.maximum({gaps}, apart)")
        out(f"{sizes} = tl.maximum({sizes}, tl.abs(bounded(e)))")

    def judge(self) -> None:
        """Adjoints have no natural scale: each channel's is its largest one at any boundary."""
        self.out("allowed = tolerance * tl.max(sizes_all, axis=0)[None, :]")
        self.out("wrong = tl.max(tl.where(gaps_all <= allowed, 0, 1))")
        self.excess("_all")

    def correct(self) -> None:
        out, parts = self.out, [*map(str, self.components)]
        arguments = [*self.inputs(), *self.boundaries, "incoming2", "outgoing2", "stored"]
        with self.kernel(
            "correct", [*arguments, *SIZES, "tolerance"], ["GROUP", "BLOCK"], wide=False
        ):
            self.own_chunk()
            if not self.starts:
                self.first_state("initial")
            for i in self.components:
                out(f"s{i} = tl.load({self.boundary('incoming', i)}, mask=inside)")
                out(f"end{i} = tl.load({self.boundary('outgoing', i)}, mask=inside)")
                out(f"from{i} = s{i}")
                self.zeros(f"delta{i}")
            self.unsettled("every >= k")
            out("high = tl.where(wrong > 0, chunks - 2, k)  # else only the chunk after matters")
            with out.block("for m in range(0, tl.minimum(high, chunks - 2) - k + 1):"):
                out("n = tl.minimum(high, chunks - 2) - m")
                self.newton("n", "1.0")
            out("far = tl.zeros([BLOCK], tl.int32)")
            for i in self.components:
                size = f"tl.maximum(tl.abs(bounded(from{i})), tl.abs(bounded(end{i})))"
                out(f"near = tl.abs(delta{i}) <= tolerance * {size}")
                out("far = tl.maximum(far, tl.where(near, 0, 1))")
            out("kept = tl.load(stored + (b * chunks + k) * tiles + tile)")
            out("moved = tl.max(tl.where(inside, far, 0)) > 0")
            with out.block("if moved | (kept == 0):"):
                self.pointers()
                for i in self.components:
                    out(f"s{i} = from{i}")
                self.load_ahead(
                    f"tl.maximum(length // {self.unroll} * {self.unroll} - {self.unroll}, -first)"
                )
                self.run_chunk("length")
                for i in self.components:
                    out(f"end{i} = s{i}")
                    out(f"s{i} = from{i}")
            self.save("incoming2", "s", parts)
            self.save("outgoing2", "end", parts)

    def refine(self) -> None:
        out, parts = self.out, [*map(str, self.components)]
        arguments = [*self.inputs(), *self.boundaries, "incoming2", "outgoing2", "target", "stored"]
        arguments += [*SIZES, "tolerance", *(["report", "most"] if self.variant.reports else [])]
        with self.kernel("refine", arguments, ["CORRECTED", "GROUP", "ROWS", "BLOCK"], wide=True):
            self.verdict("incoming", "outgoing", stored=True)
            self.reported("iterations = tl.full([], 1, tl.int32)", "seen = residual")
            with out.block("if wrong > 0:"), out.block("if CORRECTED:"):
                self.verdict("incoming2", "outgoing2", stored=False)
                self.reported("iterations += 1", "seen = tl.where(most > 1, residual, seen)")
            self.reported("needed = iterations", "unsettled = seen")
            with out.block("if CORRECTED:"):
                out("incoming = incoming2")
                out("outgoing = outgoing2")
            with out.block("if wrong > 0:"):
                if not self.starts:
                    self.first_state("initial")
                out("rows = tl.arange(0, GROUP)[:, None]")
                out("groups = tl.cdiv(chunks, GROUP)")
                self.reported("unsettled = tl.where(iterations <= most, seen * 0.0, seen)")
                with out.block("for group in range(0, groups):"):
                    out("g = (groups - 1 - group) * GROUP")
                    out("k = g + rows")
                    out("last = tl.minimum(g + GROUP, chunks)")
                    out("here = (k < last) & inside[None, :]")
                    out("first = k * chunk")
                    self.pointers()
                    self.nothing_measured("", "[GROUP, BLOCK]")
                    self.gaps("k", "here", "d", "", "outgoing", "incoming")
                    out("kept_at = stored + (b * chunks + k) * tiles + tile")
                    out("kept = tl.load(kept_at, mask=k < last, other=1)")
                    out("unwritten = tl.max(1 - kept) * (0 if CORRECTED else 1)")
                    out("now = tl.maximum(tl.max(tl.where(gaps <= allowed, 0, 1)), unwritten)")
                    self.excess("")
                    self.reported("seen = residual")
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
                        self.excess("")
                        self.reported(
                            "seen = tl.where(iterations + sweeps <= most, residual, seen)",
                            "needed = tl.maximum(needed, iterations + sweeps)",
                        )
                    most = "tl.where(iterations <= most, tl.maximum(unsettled, seen), unsettled)"
                    self.reported(f"unsettled = {most}")
            if self.variant.reports:
                status = "tl.where(unsettled > 0.0, 2, 1)"
                needed = "tl.minimum(needed, most)"
                self.write_report((needed, "unsettled * tolerance", status, "chunks"))

    def reported(self, *lines: str) -> None:
        """Statements for a report, where there is one."""
        for line in lines if self.variant.reports else ():
            self.out(line)

    def excess(self, suffix: str) -> None:
        """`residual` of a report, in tolerances; 0 where it is within them."""
        gaps = f"gaps{suffix}"
        self.reported(f"residual = tl.max(tl.where({gaps} <= allowed, 0.0, {gaps} / allowed))")

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
