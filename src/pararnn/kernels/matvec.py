"""Products of matrices with one vector, and what computes the vector, as one Triton kernel.

A step of generation reads every weight once, for one vector: its time is that of reading them, as
long as the memory is never idle. So a program loads its first rows of weights before it waits for
the kernel before it; and every program computes the whole vector, in registers, so that no kernel
of a few thousand numbers stands between two products. No kernel may write weights while others run:
a step of generation reads them only, and a CUDA graph waits for what was launched before it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pararnn.kernels import printing
from pararnn.kernels.triton.backend import on_device, overlaps
from pararnn.kernels.triton.build import load
from pararnn.kernels.triton_module import Lines, Variant, language_of, module_text, wrapped
from pararnn.tracing.expressions import Operand
from pararnn.tracing.written import read_expressions, write_expressions

MOST_INNER = 2**14  # elements of a vector: a program holds it in registers
_BYTES = 128  # of a tile for every thread
_THREADS = 512  # per multiprocessor
_REGISTERS = 128  # of a thread: as many as there are for those


@dataclass(frozen=True)
class Vector:
    """How a vector is computed.

    Attributes:
        leaves: Which of the tensors it is computed from are vectors, and not one number.
        means: Vectors whose means are leaves too, numbered after the tensors.
        value: The vector.
        stored: Others that are kept.
    """

    leaves: tuple[bool, ...]
    means: tuple[Operand, ...]
    value: Operand
    stored: tuple[Operand, ...]

    def text(self) -> str:
        """What `read` reads: an argument of the operator, which a saved program may hold."""
        written = write_expressions([*self.means, self.value, *self.stored])
        return json.dumps({"leaves": self.leaves, "means": len(self.means), **written})

    @classmethod
    def read(cls, text: str) -> Vector:
        """The vector of a text, which may come from anywhere: only known operations are read.

        Raises:
            ValueError: It is no text of a vector.
        """
        try:
            written = json.loads(text)
            leaves, means = tuple(map(bool, written["leaves"])), int(written["means"])
            counts = {"drive": len(leaves) + means}
            roots = read_expressions(written, counts)
            return cls(leaves, roots[:means], roots[means], roots[means + 1 :])
        except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise ValueError(f"{text[:80]!r} does not say how a vector is computed") from error


def source(vector: Vector, matrices: int) -> str:
    """The module with the kernel `run`, for so many matrices."""
    used, out = set[str](), Lines()
    computing = _statements(vector, language_of(Variant("single", "none", 1), used))
    given = [f"matrix{i}" for i in range(matrices)]
    names = [f"leaf{i}" for i, _ in enumerate(vector.leaves)]
    names += [*given, "result", *(f"stored{i}" for i, _ in enumerate(vector.stored)), "rows"]
    sizes = ["INNER", "ROWS", "BLOCK"]
    _function(out, "load", [*given, "tile", "rows"], sizes)
    with out.block("):"):
        out("tiles = tl.cdiv(rows, ROWS)")
        out("at = matrix0")
        for i, name in enumerate(given[1:], start=1):
            out(f"at = tl.where(tile >= {i} * tiles, {name}, at)")
        out(f"past = tile // ({matrices} * tiles) * rows  # after the last tile there is nothing")
        out("row = tile % tiles * ROWS + tl.arange(0, ROWS)[:, None]")
        out("column = tl.arange(0, BLOCK)[None, :]")
        out("inside = (row + past < rows) & (column < INNER)")
        out("at += tl.cast(tl.program_id(1) * rows + row, tl.int64) * INNER + column")
        out('return tl.load(at, mask=inside, other=0.0, eviction_policy="evict_first")')
    load_tile = f"load({', '.join(given)}, {{}}, rows, {', '.join(sizes)})".format
    _function(out, "run", names, [*sizes, "PDL"])
    with out.block("):"):
        out("column = tl.arange(0, BLOCK)[None, :]")
        out("inside = column < INNER")
        out("here = tl.program_id(1) * INNER + column")
        out(f"weights = {load_tile('tl.program_id(0)')}")
        with out.block("if PDL:  # all but weights may be what the kernel before writes"):
            out("tl.extra.cuda.gdc_launch_dependents()")
            out("tl.extra.cuda.gdc_wait()")
        for line in computing:
            out(line)
        out("tiles = tl.cdiv(rows, ROWS)")
        last = f"{matrices} * tiles"
        with out.block(f"for tile in range(tl.program_id(0), {last}, tl.num_programs(0)):"):
            out(f"following = {load_tile('tile + tl.num_programs(0)')}")
            out("total = tl.sum(weights.to(tl.float32) * vector, 1)")
            out("row = tile % tiles * ROWS + tl.arange(0, ROWS)")
            out("at = tile // tiles * tl.num_programs(1) + tl.program_id(1)")
            out("tl.store(result + at * rows + row, total, mask=row < rows)")
            out("weights = following")
    return module_text("products with a vector and what computes it", [], used, out)


def _function(out: Lines, name: str, arguments: list[str], constants: list[str]) -> None:
    """Begin a function of Triton."""
    out()
    out()
    out("@triton.jit")
    out(f"def {name}(")
    for line in wrapped([*arguments, *(f"{c}: tl.constexpr" for c in constants)]):
        out(f"    {line}")


def _statements(vector: Vector, language: printing.Language) -> list[str]:
    """The vector, and what is stored, from the leaves."""
    lines = []

    def printed(root: Operand) -> str:
        made, (value,) = printing.statements(language, [root], {})
        lines.extend(made)
        return value

    for i, many in enumerate(vector.leaves):
        at = f"leaf{i} + here, mask=inside, other=0.0" if many else f"leaf{i}"
        lines.append(f"drive{i} = tl.load({at}).to(tl.float32)")
    for i, mean in enumerate(vector.means, start=len(vector.leaves)):
        value = f"tl.where(inside, {printed(mean)}, 0.0)"
        lines.append(f"drive{i} = tl.sum({value}, 1)[:, None] / INNER")
    if vector.stored:
        lines.append("first = column + tl.program_id(0) * INNER < INNER  # in one program")
    for i, kept in enumerate(vector.stored):
        lines.append(f"tl.store(stored{i} + here, {printed(kept)}, mask=first)")
    lines.append(f"vector = tl.where(inside, {printed(vector.value)}, 0.0)")
    return lines


@dataclass(frozen=True)
class _Launch:
    """Programs per head, their rows and columns at a time, and their warps."""

    programs: int
    rows: int
    block: int
    warps: int


def _launch(
    rows: int, matrices: int, heads: int, inner: int, itemsize: int, processors: int
) -> _Launch:
    """As many programs as the device runs at a time, so that no multiprocessor has more to read.

    Of tiles that share the rows equally well the largest: more is on its way at a time.
    """
    block = 1 << (inner - 1).bit_length()
    warps = min(16, max(4, block // 1024))
    most = max(1, processors * _THREADS // (32 * warps) // heads)

    def launch(height: int) -> _Launch:
        return _Launch(min(-(-rows // height) * matrices, most), height, block, warps)

    def longest(launch: _Launch) -> int:
        tiles = -(-rows // launch.rows) * matrices
        programs = -(-launch.programs * heads // processors)
        return programs * -(-tiles // launch.programs) * launch.rows

    largest = max(1, _BYTES * 32 * warps // (block * itemsize))
    return min((launch(largest >> i) for i in range(largest.bit_length())), key=longest)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=256)
def _module(text: str, matrices: int) -> ModuleType:
    """The module of kernels for vectors of a text."""
    return load(source(Vector.read(text), matrices))


_library = torch.library.Library("pararnn", "FRAGMENT")
_library.define("matvec(Tensor[] leaves, Tensor[] matrices, str[] kinds, str vector) -> Tensor[]")


def _run(
    leaves: Sequence[Tensor], matrices: Sequence[Tensor], kinds: Sequence[str], vector: str
) -> list[Tensor]:
    """Products of every matrix, shape (heads, rows, inner), with a vector per head.

    Args:
        leaves: What the vectors are computed from: shape (heads * inner,), or one number.
        matrices: Of one shape and type.
        kinds: Names of the types of what is stored.
        vector: How they are computed, see `Vector.text`.

    Returns:
        The products, shape (matrices, heads, rows), and what is stored, shape (heads * inner,).
    """
    results = _fake(leaves, matrices, kinds, vector)
    first, (heads, rows, inner) = matrices[0], matrices[0].shape
    processors = _processors(first.device)
    launch = _launch(rows, len(matrices), heads, inner, first.itemsize, processors)
    pdl = overlaps(first.device)
    with on_device(first):
        _module(vector, len(matrices)).run[launch.programs, heads](
            *(leaf.contiguous() for leaf in leaves),
            *(matrix.contiguous() for matrix in matrices),
            *results,
            rows,
            INNER=inner,
            ROWS=launch.rows,
            BLOCK=launch.block,
            PDL=pdl,
            num_warps=launch.warps,
            maxnreg=_REGISTERS,
            **({"launch_pdl": True} if pdl else {}),
        )
    return results


def _fake(
    leaves: Sequence[Tensor], matrices: Sequence[Tensor], kinds: Sequence[str], vector: str
) -> list[Tensor]:
    heads, rows, inner = matrices[0].shape
    products = matrices[0].new_empty(len(matrices), heads, rows)
    types = [getattr(torch, kind) for kind in kinds]
    return [products, *(products.new_empty(heads * inner, dtype=dtype) for dtype in types)]


_library.impl("matvec", _run, "CompositeExplicitAutograd")
torch.library.register_fake("pararnn::matvec", _fake, lib=_library)
