"""Prints the kernels that compute states: see `triton_source`."""

from __future__ import annotations

from pararnn.kernels.printing import pair
from pararnn.kernels.triton_module import SIZES, Module
from pararnn.solvers.shooting import SMALL


class Forward(Module):
    """States from drives."""

    boundaries = ("guess", "ends", "tangents")
    beside, has_one = "{k} - 1", "{k} > 0"

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

    def streams(self) -> list[tuple[str, str, str]]:
        return self.drive_streams()

    def beyond(self, step: str) -> str:
        return f"{step} + {self.unroll}"

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
                out(f"g{pair(i, j)} = tl.where(fresh, 0.0, g{pair(i, j)})")
        values = [f"s{i}" for i in self.components]
        values += [f"u{m}.to({self.real})" for m in self.drives]
        values += [f"c{c}" for c in self.coefficients]
        new = [f"new{i}" for i in self.components]
        if couple:
            jacobian = [f"j{pair(i, j)}" for i, j in self.coupled]
            out(f"{', '.join([*new, *jacobian])} = step_with_jacobian({', '.join(values)})")
            entry = lambda i, j: f"j{pair(i, j)}" if (i, j) in self.coupled else None  # noqa: E731
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
            self.prefetch("ahead + DISTANCE", str(unroll))
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
        out = self.out
        arguments = [*self.inputs(), *self.boundaries, "stored", "report", *SIZES]
        with self.kernel("sweep", [*arguments, "warm", "limit"], ["MANY", "BLOCK"], wide=False):
            self.own_chunk()
            self.pointers()
            self.first_state("s")
            out("lead = tl.minimum(warm, first) if MANY else 0")
            self.load_ahead(f"tl.minimum(-lead, length - {self.unroll})")
            with out.block("if MANY:"):
                self.warm_up_and_chunk(
                    low="tl.where(phase == 0, -lead, 0)",
                    high="tl.where(phase == 0, 0, again)",
                    exact="lead == first",
                    run=lambda: self.loop("0", "length", couple=False, store=True),
                )
            with out.block("else:"):
                self.loop("0", "length", couple=False, store=True)
                self.write_report(("1", "0.0", "0", "1"))

    def nothing_measured(self, suffix: str, shape: str) -> None:
        for i in self.components:
            self.out(f"gaps{i}{suffix} = tl.zeros([BLOCK], {self.real})")
            self.out(f"sizes{i}{suffix} = tl.zeros([BLOCK], {self.real})")

    def measure(self, part: int, suffix: str) -> None:
        out, gaps, sizes = self.out, f"gaps{part}{suffix}", f"sizes{part}{suffix}"
        out("apart = magnitude(magnitude(e - s) / tl.maximum(tl.abs(e), 1.0))")
        out(f"{gaps} = tl.maximum({gaps}, tl.max(tl.where(e == s, 0.0, apart), axis=0))")
        out(f"{sizes} = tl.maximum({sizes}, tl.max(tl.where(e == e, tl.abs(e), 0.0), axis=0))")

    def residual(self, name: str, suffix: str) -> None:
        """See `shooting.state_residual`."""
        parts = [f"gaps{i}{suffix} / {self.scale(f'sizes{i}{suffix}')}" for i in self.components]
        most = parts[0]
        for part in parts[1:]:
            most = f"tl.maximum({most}, {part})"
        self.out(f"{name} = tl.max({most})")

    def scale(self, sizes: str) -> str:
        """What residuals below 1 of a channel count relative to."""
        tiny = 2.0**-1022 if self.variant.precision == "double" else 2.0**-126
        return f"tl.minimum(tl.maximum({SMALL} * {sizes}, {tiny}), 1.0)"

    def judge(self) -> None:
        self.residual("residual", "_all")
        self.out("wrong = tl.where(residual <= tolerance, 0, 1)")

    def correct(self) -> None:
        out, parts = self.out, [*map(str, self.components)]
        arguments = [*self.inputs(), *self.boundaries, "guess2", "ends2", "stored", *SIZES]
        arguments += ["tolerance", "damping"]
        with self.kernel("correct", arguments, ["GROUP", "BLOCK"], wide=False):
            self.own_chunk()
            for i in self.components:
                out(f"s{i} = tl.load({self.boundary('guess', i)}, mask=inside)")
                out(f"end{i} = tl.load({self.boundary('ends', i)}, mask=inside)")
                out(f"from{i} = s{i}")
                self.zeros(f"delta{i}")
            self.unsettled("every <= k")
            out("low = tl.where(wrong > 0, 1, k)  # else only the chunk before matters")
            with out.block("for n in range(tl.maximum(low, 1), k + 1):"):
                self.newton("n", "1.0 - damping")
            out("far = tl.zeros([BLOCK], tl.float32)")
            out("ended = (every[:, None] + 1 < chunks) & inside[None, :]")
            for i in self.components:
                at = self.boundary("ends", i, "every[:, None]", "channels[None, :]")
                out(f"e = tl.load({at}, mask=ended, other=0.0)")
                out("sizes = tl.max(tl.where(e == e, tl.abs(e), 0.0), axis=0)")
                out(f"size = tl.maximum(tl.abs(from{i}), {self.scale('sizes')})")
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
        arguments += ["report", *SIZES, "tolerance", "most", "damping"]
        with self.kernel("refine", arguments, ["CORRECTED", "GROUP", "ROWS", "BLOCK"], wide=True):
            out("iterations = tl.full([], 1, tl.int32)")
            out("status = tl.full([], 1, tl.int32)")
            self.verdict("guess", "ends", stored=True)
            with out.block("if wrong > 0:"), out.block("if CORRECTED:"):
                out("iterations += 1")
                self.verdict("guess2", "ends2", stored=False)
            with out.block("if CORRECTED:"):
                out("guess = guess2")
                out("ends = ends2")
            with out.block("if wrong > 0:"):
                out("rows = tl.arange(0, GROUP)[:, None]")
                out(f"residual = tl.full([], 0.0, {self.real})")
                for i in self.components:  # of the chunks before the group
                    out(f"earlier{i} = tl.zeros([BLOCK], {self.real})")
                with out.block("for g in range(0, chunks, GROUP):"):
                    out("k = g + rows")
                    out("last = tl.minimum(g + GROUP, chunks)")
                    out("here = (k < last) & inside[None, :]")
                    out("first = k * chunk")
                    self.pointers()
                    self.measure_group("")
                    out("kept_at = stored + (b * chunks + k) * tiles + tile")
                    out("kept = tl.load(kept_at, mask=k < last, other=1)")
                    out("unwritten = tl.max(1 - kept) * (0 if CORRECTED else 1)")
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
                        self.load_ahead("tl.full([], 0, tl.int32)")
                        with out.block("if CORRECTED:  # nearly right: the tangents are too"):
                            self.loop("0", "chunk", couple=False, store=True)
                        with out.block("else:"):
                            self.fill("g", identity=True)
                            self.loop("0", "chunk", couple=True, store=True)
                            self.save("tangents", "g", (f"{pair(i, j)}" for i, j in self.pairs))
                        self.save("ends", "s", parts)
                        out("tl.debug_barrier()")
                        self.measure_group(" & (k > g)")
                        out("unwritten = unwritten * 0")
                        out("sweeps += 1")
                        out("iterations = tl.maximum(iterations, tl.minimum(sweeps + 1, most))")
                        out("seen = tl.where(sweeps < most, now, seen)")
                        out("ended = (sweeps < most) | (seen <= tolerance)")
                        out("status = tl.where(ended, status, 2)")
                    out("residual = tl.maximum(residual, seen)")
                    for i in self.components:
                        out(f"earlier{i} = sizes{i}")
            self.write_report(("iterations", "residual", "status", "chunks"))

    def measure_group(self, more: str) -> None:
        """`now`: how far the chunks of a group are from fitting together."""
        self.nothing_measured("", "[BLOCK]")
        for i in self.components:
            self.out(f"sizes{i} = earlier{i}")
        self.gaps("k", "here", "d", more, "ends", "guess")
        self.residual("now", "")

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
