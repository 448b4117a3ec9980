"""What can be trained on the tasks, by name, and cells besides those of language models.

A name is that of a mixer, `transformer`, `mamba2`, or a stack of mixers as `pararnn.lm.catalogue`
has it, such as `paragru+attention`: one for each layer, from the first on and over again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pararnn.lm.catalogue import CELLS, architectures, register_cell

if TYPE_CHECKING:
    from torch import nn


def _indrnn(input_size: int, hidden_size: int, **options: Any) -> nn.Module:
    from pararnn import cells

    return cells.DiagonalElmanCell(input_size, hidden_size, nonlinearity="relu", **options)


def _cfc(input_size: int, hidden_size: int, **options: Any) -> nn.Module:
    from pararnn.tasks.even_times import EvenTimes

    return EvenTimes(input_size, hidden_size, **options)


def _slstm_heads(input_size: int, hidden_size: int, num_heads: int) -> nn.Module:
    from pararnn import cells

    return cells.HeadSLSTMCell(input_size, hidden_size, num_heads=num_heads)


def _block_gru(input_size: int, hidden_size: int, num_heads: int) -> nn.Module:
    from pararnn import cells

    return cells.BlockGRUCell(input_size, hidden_size, num_blocks=num_heads)


def _layer_norm_lstm(input_size: int, hidden_size: int, num_heads: int) -> nn.Module:
    from pararnn import cells

    return cells.LayerNormLSTMCell(input_size, hidden_size)


def _dense_gru(input_size: int, hidden_size: int, num_heads: int) -> nn.Module:
    from torch import nn

    return nn.GRUCell(input_size, hidden_size)


def _dense_lstm(input_size: int, hidden_size: int, num_heads: int) -> nn.Module:
    from torch import nn

    return nn.LSTMCell(input_size, hidden_size)


MORE_CELLS: dict[str, Callable[..., nn.Module]] = {
    "indrnn": _indrnn,
    "cfc": _cfc,
    "slstm-heads": _slstm_heads,
    "block-gru": _block_gru,
    "layer-norm-lstm": _layer_norm_lstm,
    "dense-gru": _dense_gru,
    "dense-lstm": _dense_lstm,
}
"""Cells by name, besides those that language models have; they are registered here."""

for _name, _factory in MORE_CELLS.items():
    if _name not in CELLS:
        register_cell(_name, _factory)

ARCHITECTURES = tuple(architectures())
