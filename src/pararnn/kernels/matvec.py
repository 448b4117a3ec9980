"""Products of matrices with one vector, fused with the vector's own computation."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pararnn.kernels.triton.device import on_device, overlaps
from pararnn.kernels.triton.expressions import function
from pararnn.planning.costs import COSTS
from pararnn.planning.kernel_plans import plan_matvec
from pararnn.tracing.expressions import Operand
from pararnn.tracing.written import read_expressions, write_expressions


@dataclass(frozen=True)
class Vector:
    """The computation of a vector.

    Attributes:
        leaves: Whether each input is a vector; the others are one number.
        value: The vector.
        stored: Further results to store.
    """

    leaves: tuple[bool, ...]
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
            leaves = tuple(map(bool, written["leaves"]))
            value, *stored = read_expressions(written, {"drive": len(leaves)}, also=["mean"])
            return cls(leaves, value, tuple(stored))
        except (KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise ValueError(f"{text[:80]!r} does not say how a vector is computed") from error


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.lru_cache(maxsize=256)
def _computed(text: str) -> tuple[Any, tuple[bool, ...]]:
    """A function in Triton that computes the vector of a text; which of its leaves are vectors."""
    vector = Vector.read(text)
    roots = [vector.value, *vector.stored]
    return function("vector", {"drive": len(vector.leaves)}, roots, double=False), vector.leaves


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
    from pararnn.kernels.triton import matvec  # needs Triton, which this module does not

    compute, is_vector = _computed(vector)
    products, *stored = results = _fake(leaves, matrices, kinds, vector)
    first, (heads, rows, inner) = matrices[0], matrices[0].shape
    processors = _processors(first.device)
    launch = plan_matvec(rows, len(matrices), heads, inner, first.itemsize, processors)
    pdl = overlaps(first.device)
    with on_device(first):
        matvec.run[launch.programs, heads](
            tuple(leaf.contiguous() for leaf in leaves),
            tuple(matrix.contiguous() for matrix in matrices),
            products,
            tuple(stored),
            rows,
            VECTOR=compute,
            IS_VECTOR=is_vector,
            INNER=inner,
            ROWS=launch.rows,
            BLOCK=launch.block,
            PDL=pdl,
            num_warps=launch.warps,
            maxnreg=COSTS.matvec_registers,
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
