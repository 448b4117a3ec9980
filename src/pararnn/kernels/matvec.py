"""Products of matrices with a vector or two, fused with the vectors' own computation.

A vector is that of one text. Every program computes the whole vectors.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pararnn.kernels.triton.device import on_device, overlaps, processors
from pararnn.kernels.triton.expressions import function
from pararnn.planning.kernel_plans import plan_matvec
from pararnn.tracing.expressions import Operand, topological
from pararnn.tracing.written import read_expressions, write_expressions


class Leaf(NamedTuple):
    """Where the entries of a vector lie in a tensor.

    Entry i of text b is at `first + b * text + i // run * stride + i % run`. For a row of a table,
    such as an embedding, the number of the row stands for b.

    Attributes:
        first: The first entry of the first text.
        text: From one text to the next; 0 if all have the same.
        run: Entries that are neighbours; 0 if all entries of a text are one number.
        stride: From one run to the next.
        row: Which tensor behind those of all leaves has the number of the row, for every text; -1
            if it is no row of a table.
    """

    first: int
    text: int
    run: int
    stride: int
    row: int = -1


@dataclass(frozen=True)
class Vector:
    """The computation of a vector.

    Attributes:
        leaves: Where the entries of each input are.
        value: The vector.
        stored: Further results to store.
    """

    leaves: tuple[Leaf, ...]
    value: Operand
    stored: tuple[Operand, ...]

    def text(self) -> str:
        """The text for `read`: an argument of the operator, which a saved program may hold."""
        return json.dumps({"leaves": self.leaves, **write_expressions([self.value, *self.stored])})

    @classmethod
    def read(cls, text: str) -> Vector:
        """The vector of a text from an untrusted source: only known operations are read.

        Raises:
            ValueError: It is no text of a vector.
        """
        try:
            written = json.loads(text)
            leaves = tuple(Leaf(*map(int, leaf)) for leaf in written["leaves"])
            value, *stored = read_expressions(written, {"drive": len(leaves)}, also=["mean"])
            return cls(leaves, value, tuple(stored))
        except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise ValueError(f"{text[:80]!r} does not say how a vector is computed") from error

    @property
    def operations(self) -> list[str]:
        """What is computed for an entry."""
        found = [e.op for e in topological([self.value, *self.stored])]
        return [op for op in found if op != "drive"]


@functools.lru_cache(maxsize=256)
def _computed(text: str) -> tuple[Any, Vector]:
    """A function in Triton that computes the vector of a text, and the vector."""
    vector = Vector.read(text)
    roots = [vector.value, *vector.stored]
    return function("vector", {"drive": len(vector.leaves)}, roots, double=False), vector


_library = torch.library.Library("pararnn", "FRAGMENT")
_library.define(
    "matvec(Tensor[] leaves, Tensor[] matrices, str[] kinds, int texts, str vector) -> Tensor[]"
)


def _run(
    leaves: Sequence[Tensor],
    matrices: Sequence[Tensor],
    kinds: Sequence[str],
    texts: int,
    vector: str,
) -> list[Tensor]:
    """Products of every matrix, shape (heads, rows, inner), with a vector per head and text.

    Args:
        leaves: What the vectors are computed from, contiguous; then the numbers of rows.
        matrices: Of one shape and type.
        kinds: Names of the types of the products and of what is stored.
        texts: Number of texts.
        vector: How the vectors are computed, see `Vector.text`.

    Returns:
        The products, shape (matrices, heads, texts, rows), and what is stored, each (texts, heads *
        inner).
    """
    from pararnn.kernels.triton import matvec  # needs Triton, which this module does not

    compute, how = _computed(vector)
    results = _fake(leaves, matrices, kinds, texts, vector)
    leaves = tuple(leaf.contiguous() for leaf in leaves)
    matrices = tuple(matrix.contiguous() for matrix in matrices)
    first, (heads, rows, inner) = matrices[0], matrices[0].shape
    sizes = rows, len(matrices), heads, inner, first.itemsize
    launch = plan_matvec(*sizes, processors(first.device), len(how.operations), texts)
    with on_device(first):
        matvec.run[launch.programs, heads](
            leaves,
            matrices,
            results[0],
            tuple(results[1:]),
            rows,
            VECTOR=compute,
            LEAVES=tuple(map(tuple, how.leaves)),
            TEXTS=texts,
            INNER=inner,
            ROWS=launch.rows,
            BLOCK=launch.block,
            WORD=_word(matrices),
            AHEAD=launch.ahead,
            GROUP=launch.group,
            TILES=launch.tiles,
            num_warps=launch.warps,
            maxnreg=launch.registers,
            **_overlap(first),
        )
    return results


def _word(matrices: Sequence[Tensor]) -> int:
    """Weights that can be loaded as an integer of four bytes; 1 if none can."""
    count = {torch.bfloat16: 2, torch.int8: 4}.get(matrices[0].dtype, 1)
    whole = matrices[0].shape[-1] % count == 0 and all(m.data_ptr() % 4 == 0 for m in matrices)
    return count if whole else 1


def _overlap(tensor: Tensor) -> dict[str, Any]:
    """Arguments of a launch: whether it may start before the kernel before it has ended."""
    return {"PDL": True, "launch_pdl": True} if overlaps(tensor.device) else {"PDL": False}


def _fake(
    leaves: Sequence[Tensor],
    matrices: Sequence[Tensor],
    kinds: Sequence[str],
    texts: int,
    vector: str,
) -> list[Tensor]:
    heads, rows, inner = matrices[0].shape
    of_products, *others = (getattr(torch, kind) for kind in kinds)
    products = matrices[0].new_empty((len(matrices), heads, texts, rows), dtype=of_products)
    return [products, *(products.new_empty((texts, heads * inner), dtype=t) for t in others)]


_library.impl("matvec", _run, "CompositeExplicitAutograd")
torch.library.register_fake("pararnn::matvec", _fake, lib=_library)
