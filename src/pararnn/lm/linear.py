"""Linear memories over all times at once, by the kernels of the package flash-linear-attention.

It needs a GPU and half precision. Everywhere else, for a single step and with a nonlinearity, a
memory runs as every other cell does (`pararnn.RNN`): same equations, states and gradients.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pararnn.cells import MatrixMemoryCell

_FORGETS_ALL = -120.0  # exp of it is 0 in float32
_TILE = 64  # keys or values; sizes in whole ones have the right gradients on Hopper GPUs
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Operator:
    """A linear step over all times at once.

    Attributes:
        module: Where flash-linear-attention has it.
        function: Its name there.
        inputs: From a cell and the parts that its `project` returns, the operator's arguments
            besides queries, keys and the decay: values, and `beta` if it has one.
        shares_keys: Whether it takes one query and one key for all heads of values.
    """

    module: str
    function: str
    inputs: Callable[[Any, tuple[Tensor, ...]], dict[str, Tensor]]
    shares_keys: bool = False

    def load(self, key_size: int, value_size: int) -> Callable[..., Any]:
        """The function, for heads of a size.

        Raises:
            RuntimeError: The package is not there, or does not fit Triton, PyTorch or the size.
        """
        try:
            function = getattr(importlib.import_module(self.module), self.function)
            _check_versions()
        except Exception as error:  # whatever an import of another package may raise
            raise RuntimeError(_reason(error)) from error
        _check_size(key_size, value_size)
        return function


def _values(cell: Any, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
    v = parts[2]
    return {"v": (cell.pace(parts[3]).unsqueeze(-1) * v).to(v.dtype)}


def _values_and_strength(cell: Any, parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {"v": parts[2], "beta": parts[4]}


SIMPLE_GLA = Operator("fla.ops.simple_gla", "chunk_simple_gla", _values)
GATED_DELTA = Operator(
    "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _values_and_strength, shares_keys=True
)


def missing(operator: Operator | None, key_size: int, value_size: int) -> str:
    """Why heads of a size cannot have the kernels of an operator; empty if they can."""
    if operator is None:
        return ""
    try:
        operator.load(key_size, value_size)
    except RuntimeError as error:
        return str(error)
    return ""


def choose(
    operator: Operator | None, cell: MatrixMemoryCell, backend: str
) -> Callable[..., Any] | None:
    """The function of an operator, where backend is "auto" and the cell can have it; else None.

    A backend that is named is one of ours, so the step runs in it.
    """
    if operator is None or backend != "auto" or not torch.cuda.is_available():
        return None
    size = cell.key_size, cell.value_size
    return None if missing(operator, *size) else operator.load(*size)


def fits(cell: MatrixMemoryCell, x: Tensor) -> bool:
    """Whether the kernels can take a memory's step over x, (batch, time, cell.input_size)."""
    linear = cell.nonlinearity == "linear"
    return linear and x.device.type == "cuda" and x.dtype in _HALF and x.shape[1] > 1


def evaluate(
    function: Callable[..., Any],
    operator: Operator | None,
    cell: MatrixMemoryCell,
    x: Tensor,
    state: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What `pararnn.RNN(cell)` returns for a linear cell without a projection of its own.

    A document begins where the decay is 0: the step keeps nothing of the state before it. So
    documents need no rows of their own, and how many there are need not be known.

    Args:
        function: What `choose` returned.
        operator: That of the cell.
        cell: A memory alone.
        x: Inputs, (batch, time, cell.input_size).
        state: Before the first step, (batch, heads, keys, values); None for zeros.
        resets: Where documents begin, (batch, time); None for nowhere.

    Returns:
        The readout, (batch, time, heads * values), and the last state, both of the type of x.
    """
    assert operator is not None
    parts = cell.project(x)
    heads = -1 if operator.shares_keys else cell.num_heads
    q, k = (keys.expand(*keys.shape[:2], heads, -1).contiguous() for keys in parts[:2])
    log_keep = -torch.exp(cell.log_rate) * cell.pace(parts[3])
    if resets is not None:
        log_keep = log_keep.masked_fill(resets.unsqueeze(-1), _FORGETS_ALL)
    y, last = function(
        q=q.to(x.dtype),
        k=k.to(x.dtype),
        g=log_keep,
        scale=1.0,
        initial_state=None if state is None else state.float(),
        output_final_state=True,
        **operator.inputs(cell, parts),
    )
    return y.flatten(2), last.to(x.dtype)


def _check_versions() -> None:
    """Raise what the package itself raises first in a backward pass with gates, if it does.

    Triton 3.4.0 to 3.7.0 computes wrong gradients there on Hopper GPUs, unless the package's
    tilelang kernels do it.
    """
    is_wrong = _about("TRITON_ABOVE_3_4_0", False) and not _about("TRITON_ABOVE_3_7_1", True)
    if (
        is_wrong
        and _about("IS_NVIDIA_HOPPER", False)
        and importlib.util.find_spec("tilelang") is None
    ):
        raise RuntimeError("wrong gradients on Hopper GPUs before Triton 3.7.1 without tilelang")


def _check_size(key_size: int, value_size: int) -> None:
    """Raise where the kernels compute wrong gradients, or read where they must not.

    A loop in float64 says so for 16 and 32 values, with Triton 3.7.1 (docs/results/quality.md).
    """
    if _about("IS_NVIDIA_HOPPER", False) and (key_size % _TILE or value_size % _TILE):
        raise RuntimeError(
            f"flash-linear-attention has wrong gradients on Hopper GPUs unless keys and values are "
            f"multiples of {_TILE}; a head has {key_size} and {value_size}"
        )


def _about(flag: str, unknown: bool) -> bool:
    """What the package knows of the GPU and of Triton, once it is imported."""
    return bool(getattr(sys.modules.get("fla.utils"), flag, unknown))


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == "fla":
        return "flash-linear-attention is not installed (pip install 'pararnn[fla]')"
    words = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"flash-linear-attention {_version('fla-core')} does not fit torch {torch.__version__} and "
        f"Triton {_version('triton')} ({words})"
    )


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "without a version"
