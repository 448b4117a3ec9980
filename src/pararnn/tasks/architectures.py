"""What can be trained on the tasks, by name, and cells that language models do not have yet.

A name is that of a cell, `transformer`, `mamba2`, or a hybrid: names of cells and `attention`
joined by `+`, one for each layer, from the first on and over again.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pararnn import cells

ATTENTION, TRANSFORMER, MAMBA2 = "attention", "transformer", "mamba2"
BASELINES = (TRANSFORMER, MAMBA2)


class _EvenTimes(cells.ClosedFormContinuousCell):
    """A closed-form continuous-time cell whose steps are one unit of time apart."""

    def __init__(self, input_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(input_size, *args, **kwargs)
        self.input_size = input_size

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return super().forward(torch.cat([x, torch.ones_like(x[:, :1])], 1), state)


def _indrnn(input_size: int, hidden_size: int, **options: Any) -> nn.Module:
    return cells.DiagonalElmanCell(input_size, hidden_size, nonlinearity="relu", **options)


def _cfc(input_size: int, hidden_size: int, **options: Any) -> nn.Module:
    return _EvenTimes(input_size, hidden_size, **options)


def _slstm_heads(input_size: int, hidden_size: int, num_heads: int) -> nn.Module:
    return cells.HeadSLSTMCell(input_size, hidden_size, num_heads=num_heads)


def _block_gru(input_size: int, hidden_size: int, num_heads: int) -> nn.Module:
    return cells.BlockGRUCell(input_size, hidden_size, num_blocks=num_heads)


def _layer_norm_lstm(input_size: int, hidden_size: int, num_heads: int) -> nn.Module:
    return cells.LayerNormLSTMCell(input_size, hidden_size)


def _dense_gru(input_size: int, hidden_size: int, num_heads: int) -> nn.Module:
    return nn.GRUCell(input_size, hidden_size)


def _dense_lstm(input_size: int, hidden_size: int, num_heads: int) -> nn.Module:
    return nn.LSTMCell(input_size, hidden_size)


def _memory(kind: type[cells.MatrixMemoryCell]) -> Callable[..., nn.Module]:
    def make(input_size: int, hidden_size: int, num_heads: int) -> nn.Module:
        """As many keys as values, so that the outputs have `hidden_size` numbers."""
        size = hidden_size // num_heads
        return kind(input_size, size, size, num_heads=num_heads)

    return make


MORE_CELLS: dict[str, Callable[..., nn.Module]] = {
    "indrnn": _indrnn,
    "cfc": _cfc,
    "slstm-heads": _slstm_heads,
    "block-gru": _block_gru,
    "layer-norm-lstm": _layer_norm_lstm,
    "dense-gru": _dense_gru,
    "dense-lstm": _dense_lstm,
    "m2rnn": _memory(cells.M2RNNCell),
    "delta-memory": _memory(cells.DeltaMemoryCell),
    "outer-memory": _memory(cells.OuterMemoryCell),
}
"""Cells by name, besides those of `pararnn.lm.models.CELLS`; models register them there."""

LANGUAGE_MODEL_CELLS = (
    "paragru",
    "paralstm",
    "elman",
    "mgu",
    "janet",
    "lstm",
    "slstm",
    "mingru",
)
"""Names in `pararnn.lm.models.CELLS`, here without importing transformers."""

ARCHITECTURES = (*LANGUAGE_MODEL_CELLS, *MORE_CELLS, *BASELINES)


def mixers_of(name: str) -> list[str]:
    """The parts of a hybrid, or the one architecture.

    Raises:
        ValueError: A part does not exist, or cannot be part of a hybrid.
    """
    parts = name.split("+")
    known = ARCHITECTURES if len(parts) == 1 else (*LANGUAGE_MODEL_CELLS, *MORE_CELLS, ATTENTION)
    for part in parts:
        if part not in known:
            nearest = difflib.get_close_matches(part, known, n=1, cutoff=0.0)[0]
            nearest = ATTENTION if part == TRANSFORMER else nearest
            of_hybrid = f" in {name!r}" if len(parts) > 1 else ""
            raise ValueError(
                f"there is no architecture {part!r}{of_hybrid}; perhaps you meant {nearest!r}. "
                f"There are: {', '.join(known)}"
                + ("." if len(parts) > 1 else "; and hybrids such as paragru+attention.")
            )
    return parts


def accepted(factory: Callable[..., nn.Module], options: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that a factory of cells takes."""
    parameters = inspect.signature(factory).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(options)
    names = {p.name for p in parameters}
    return {name: value for name, value in options.items() if name in names}
