"""Prints a recurrence as C: sweep, tangents and adjoint of one chunk of channels and time.

All functions take one array of 64-bit integers (`SIZES`, then addresses and strides), so that they
are called through ctypes with nothing to declare.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pararnn.kernels.primitives import PRIMITIVES
from pararnn.kernels.printing import (
    Language,
    equations,
    lowered_names,
    pair,
    statements,
)
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.expressions import Expression, Operand, literal

MAX_BLOCK = 256  # channels that one lane carries in its local arrays
SIZES = ("batch", "time", "hidden", "chunks", "chunk", "block", "threads", "rows", "limit")


def _body(
    roots: Iterable[Operand], results: Sequence[str], names: dict[Expression, str], indent: str
) -> list[str]:
    """Statements that compute `roots` from local variables named after the leaves."""
    lines, values = statements(_C, roots, names)
    lines += [f"{r} = {v};" for r, v in zip(results, values, strict=True)]
    return [indent + line for line in lines]


_C = Language(
    lambda op, args: PRIMITIVES[op].c.format(*args),
    lambda value: f"C({literal(value)})",
    lambda value: str(int(value)),
    lambda name, term, is_bool: f"const {'int' if is_bool else 'real'} {name} = {term};",
)


class _Writer:
    """Collects the three functions of one recurrence."""

    def __init__(self, recurrence: Recurrence) -> None:
        self.recurrence = recurrence
        self.names = lowered_names(recurrence)
        self.components = range(recurrence.num_components)
        self.drives = range(recurrence.num_drives)
        self.coefficients = range(recurrence.num_coefficients)
        self.lines: list[str] = []

    def add(self, text: str = "", indent: int = 0) -> None:
        self.lines.extend("  " * indent + line for line in text.split("\n"))

    def arguments(self, pointers: Sequence[str]) -> None:
        for i, name in enumerate(SIZES):
            self.add(f"const int64_t {name} = a[{i}];", 1)
        self.add(f"const int64_t *p = a + {len(SIZES)};", 1)
        self.add("const int32_t *starts = (const int32_t *)*p++;", 1)
        for m in self.drives:
            self.add(f"const real *drive_{m} = (const real *)*p++;", 1)
            self.add(f"const int64_t batch_stride_{m} = *p++, time_stride_{m} = *p++;", 1)
        for c in self.coefficients:
            self.add(f"const real *coefficient_{c} = (const real *)*p++ + d0;", 1)
        for name in pointers:
            self.add(f"{name} = (void *)*p++;", 1)

    def lane(self) -> None:
        """Where this lane is: row b, chunk k, channels d0 to d0 + n, times t0 to t1."""
        self.add("const int64_t blocks = (hidden + block - 1) / block;", 1)
        self.add("const int64_t b = lane / (blocks * chunks), k = lane / blocks % chunks;", 1)
        self.add("const int64_t n = hidden - d0 < block ? hidden - d0 : block;", 1)
        self.add("int64_t t0 = k * chunk, t1 = t0 + chunk < time ? t0 + chunk : time;", 1)

    def begin(self, name: str, pointers: Sequence[str]) -> None:
        self.add(f"static void {name}_lane(const int64_t *a, int64_t lane) {{")
        self.add("const int64_t d0 = lane % ((a[2] + a[5] - 1) / a[5]) * a[5];", 1)
        self.arguments(pointers)
        self.lane()

    def end(self, name: str) -> None:
        self.add("}\n")
        self.add(f"void {name}(const int64_t *a) {{ run({name}_lane, a); }}\n")

    def load_drives(self) -> None:
        for m in self.drives:
            at = f"drive_{m} + b * batch_stride_{m} + t * time_stride_{m} + d0"
            self.add(f"const real *restrict u{m} = {at};", 2)

    def locals(self, indent: int) -> None:
        for m in self.drives:
            self.add(f"const real drive{m} = u{m}[d];", indent)
        for c in self.coefficients:
            self.add(f"const real coefficient{c} = coefficient_{c}[d];", indent)

    def forward(self) -> None:
        """states[t] and the state after each chunk, from the state before it."""
        pointers = ["const real *initial", "const real *boundary", "real *ends"]
        pointers += [f"real *states_{i}" for i in self.components]
        self.begin("forward", pointers)
        count = len(self.components)
        for i in self.components:
            self.add(f"real s{i}[{MAX_BLOCK}], unused_{i}[{MAX_BLOCK}];", 1)
            self.add(
                f"memcpy(s{i}, boundary + ((b * chunks + k) * {count} + {i}) * hidden + d0,", 1
            )
            self.add("       n * sizeof(real));", 1)
        self.add("for (int64_t t = t0 > t1 - limit ? t0 : t1 - limit; t < t1; t++) {", 1)
        self.restart("s{i}", "")
        self.load_drives()
        for i in self.components:
            at = f"states_{i} + (b * time + t) * hidden + d0"
            self.add(f"real *restrict y{i} = states_{i} ? {at} : unused_{i};", 2)
        self.loop()
        for i in self.components:
            self.add(f"const real state{i} = s{i}[d];", 3)
        self.locals(3)
        results = [f"s{i}[d] = y{i}[d]" for i in self.components]
        self.lines += _body(self.recurrence.step, results, self.names, "      ")
        self.add("}", 2)
        self.add("}", 1)
        for i in self.components:
            self.add(f"memcpy(ends + ((b * chunks + k) * {count} + {i}) * hidden + d0, s{i},", 1)
            self.add("       n * sizeof(real));", 1)
        self.end("forward")

    def loop(self) -> None:
        self.add("#pragma omp simd")
        self.add("for (int64_t d = 0; d < n; d++) {", 2)

    def restart(self, target: str, extra: str) -> None:
        """Where a sequence starts, take its initial state."""
        count = len(self.components)
        self.add("if (starts && starts[b * time + t] >= 0) {", 2)
        self.add(f"const real *from = initial + starts[b * time + t] * {count} * hidden + d0;", 3)
        for i in self.components:
            at = target.format(i=i)
            self.add(f"memcpy({at}, from + {i} * hidden, n * sizeof(real));", 3)
        if extra:
            self.add(extra, 3)
        self.add("}", 2)

    def tangent(self) -> None:
        """The derivative of the state after each chunk in the state before it."""
        count = len(self.components)
        pairs = [(i, j) for i in self.components for j in self.components]
        self.begin("tangent", ["const real *initial", "const real *boundary", "real *tangents"])
        for i in self.components:
            self.add(f"real s{i}[{MAX_BLOCK}];", 1)
            self.add(
                f"memcpy(s{i}, boundary + ((b * chunks + k) * {count} + {i}) * hidden + d0,", 1
            )
            self.add("       n * sizeof(real));", 1)
        for i, j in pairs:
            self.add(f"real g{pair(i, j)}[{MAX_BLOCK}];", 1)
            self.add(f"for (int64_t d = 0; d < n; d++) g{pair(i, j)}[d] = C({int(i == j)});", 1)
        self.add("for (int64_t t = t0; t < t1; t++) {", 1)
        zeros = "\n      ".join(f"memset(g{pair(i, j)}, 0, n * sizeof(real));" for i, j in pairs)
        self.restart("s{i}", zeros)
        self.load_drives()
        self.loop()
        for i in self.components:
            self.add(f"const real state{i} = s{i}[d];", 3)
        for i, j in pairs:
            self.add(f"const real old{pair(i, j)} = g{pair(i, j)}[d];", 3)
            self.add(f"real jac{pair(i, j)};", 3)
        self.locals(3)
        roots = [*self.recurrence.step, *(self.recurrence.jacobian[i][j] for i, j in pairs)]
        results = [f"s{i}[d]" for i in self.components] + [f"jac{pair(i, j)}" for i, j in pairs]
        self.lines += _body(roots, results, self.names, "      ")
        for i, j in pairs:
            terms = " + ".join(f"jac{pair(i, m)} * old{pair(m, j)}" for m in self.components)
            self.add(f"g{pair(i, j)}[d] = {terms};", 3)
        self.add("}", 2)
        self.add("}", 1)
        for i, j in pairs:
            at = f"((b * chunks + k) * {count * count} + {i * count + j}) * hidden + d0"
            self.add(f"memcpy(tangents + {at}, g{pair(i, j)}, n * sizeof(real));", 1)
        self.end("tangent")

    def backward(self) -> None:
        """Adjoint of a chunk: gradients of what went in, from the adjoint of its last state."""
        count = len(self.components)
        pointers = ["const real *initial", "const real *incoming", "real *outgoing"]
        pointers += ["real *grad_initial", "double *grad_coefficients"]
        pointers += [f"const real *states_{i}" for i in self.components]
        pointers += [f"const real *grad_states_{i}" for i in self.components]
        self.begin("backward", pointers)
        for m in self.drives:
            self.add(f"real *grad_drive_{m} = (void *)*p++;", 1)
            self.add(f"const int64_t grad_batch_{m} = *p++, grad_time_{m} = *p++;", 1)
        self.add(f"real unused[{MAX_BLOCK}], zeros[{MAX_BLOCK}];", 1)
        self.add("memset(zeros, 0, sizeof zeros);", 1)
        for i in self.components:
            self.add(f"real adj{i}[{MAX_BLOCK}];", 1)
            self.add(
                f"memcpy(adj{i}, incoming + ((b * chunks + k) * {count} + {i}) * hidden + d0,", 1
            )
            self.add("       n * sizeof(real));", 1)
        for c in self.coefficients:
            self.add(f"double sum{c}[{MAX_BLOCK}];", 1)
            self.add(f"memset(sum{c}, 0, n * sizeof(double));", 1)
        self.add("t1 = t1 - t0 < limit ? t1 : t0 + limit;", 1)
        self.add("for (int64_t t = t1 - 1; t >= t0; t--) {", 1)
        self.add("const int64_t at = (b * time + t) * hidden + d0;", 2)
        self.add(
            "const int32_t start = starts ? starts[b * time + t] : t == 0 ? (int32_t)b : -1;", 2
        )
        for i in self.components:
            before = f"initial + (start * {count} + {i}) * hidden + d0"
            self.add(
                f"const real *restrict h{i} = start >= 0 ? {before} : states_{i} + at - hidden;", 2
            )
            gradient = f"grad_states_{i} ? grad_states_{i} + at : zeros"
            self.add(f"const real *restrict gy{i} = {gradient};", 2)
        self.load_drives()
        for m in self.drives:
            at = f"grad_drive_{m} + b * grad_batch_{m} + t * grad_time_{m} + d0"
            self.add(f"real *restrict gu{m} = grad_drive_{m} ? {at} : unused;", 2)
        self.loop()
        for i in self.components:
            self.add(f"const real state{i} = h{i}[d], adjoint{i} = adj{i}[d] + gy{i}[d];", 3)
        for c in self.coefficients:
            self.add(f"real term{c};", 3)
        self.locals(3)
        results = [f"adj{i}[d]" for i in self.components] + [f"gu{m}[d]" for m in self.drives]
        results += [f"term{c}" for c in self.coefficients]
        self.lines += _body(self.recurrence.vjp, results, self.names, "      ")
        for c in self.coefficients:
            self.add(f"sum{c}[d] += term{c};", 3)
        self.add("}", 2)
        self.add("if (start >= 0) {", 2)
        for i in self.components:
            at = f"((k * rows + start) * {count} + {i}) * hidden + d0 + d"
            self.add("if (grad_initial) for (int64_t d = 0; d < n; d++)", 3)
            self.add(f"grad_initial[{at}] += adj{i}[d];", 4)
            self.add(f"memset(adj{i}, 0, n * sizeof(real));", 3)
        self.add("}", 2)
        self.add("}", 1)
        for i in self.components:
            self.add(
                f"memcpy(outgoing + ((b * chunks + k) * {count} + {i}) * hidden + d0, adj{i},", 1
            )
            self.add("       n * sizeof(real));", 1)
        total = len(self.coefficients)
        for c in self.coefficients:
            at = f"((b * chunks + k) * {total} + {c}) * hidden + d0"
            self.add(f"if (grad_coefficients) memcpy(grad_coefficients + {at}, sum{c},", 1)
            self.add("       n * sizeof(double));", 1)
        self.end("backward")


_THREADS = """\
typedef struct {
  void (*lane)(const int64_t *, int64_t);
  const int64_t *a;
  int64_t first, last;
} job;

static void *work(void *argument) {
  const job *j = argument;
  for (int64_t lane = j->first; lane < j->last; lane++) j->lane(j->a, lane);
  return 0;
}

/* Shares the lanes (rows x chunks x blocks of channels) among threads, always in the same way.
   With OpenMP these are PyTorch's own threads, awake from the operation before. */
static void run(void (*lane)(const int64_t *, int64_t), const int64_t *a) {
  const int64_t lanes = a[0] * a[3] * ((a[2] + a[5] - 1) / a[5]);
  int64_t threads = a[6] < lanes ? a[6] : lanes;
  threads = threads > 256 ? 256 : threads;
  job jobs[256];
  for (int64_t i = 0; i < threads; i++)
    jobs[i] = (job){lane, a, lanes * i / threads, lanes * (i + 1) / threads};
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < threads; i++) work(&jobs[i]);
#else
  pthread_t ids[256];
  int started[256];
  for (int64_t i = 0; i < threads; i++)
    started[i] = i > 0 && pthread_create(&ids[i], 0, work, &jobs[i]) == 0;
  for (int64_t i = 0; i < threads; i++) {
    if (started[i]) pthread_join(ids[i], 0);
    else work(&jobs[i]);
  }
#endif
}
"""


def c_source(recurrence: Recurrence, double: bool) -> str:
    """Print the C file of a recurrence.

    Raises:
        NotLowered: The cell uses an operation that has no rule for kernels.
    """
    writer = _Writer(recurrence)
    writer.add("/* Generated by ParaRNN from a cell's step:")
    for line in equations(recurrence):
        writer.add(f"     {line}")
    writer.add(f"*/\n#define DOUBLE {int(double)}")
    writer.add(Path(__file__).with_name("runtime.h").read_text())
    writer.add(_THREADS)
    writer.forward()
    writer.tangent()
    writer.backward()
    return "\n".join(writer.lines)
