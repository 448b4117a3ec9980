"""The table of cells by their names in a configuration."""

from collections.abc import Callable

from torch import nn

from pararnn import cells

CellFactory = Callable[..., nn.Module]

CELLS: dict[str, CellFactory] = {
    "paragru": cells.ParaGRUCell,
    "paralstm": cells.ParaLSTMCell,
    "elman": cells.DiagonalElmanCell,
    "mgu": cells.MinimalGatedCell,
    "janet": cells.ForgetGateCell,
    "lstm": cells.DiagonalLSTMCell,
    "slstm": cells.SLSTMCell,
    "mingru": cells.MinGRUCell,
}
"""Cells by the names that `ParaRNNConfig(cell=...)` and `pararnn train --model` take."""


def register_cell(name: str, factory: CellFactory) -> None:
    """Make a cell available to `ParaRNNConfig(cell=name)`.

    Args:
        name: A name that no other factory has.
        factory: Called as `factory(input_size, hidden_size, num_heads=..., **cell_options)`;
            returns a cell for `pararnn.RNN`, whose outputs have `hidden_size` numbers. Its state
            may have any shape.

    Raises:
        ValueError: The name belongs to another factory.
    """
    if CELLS.setdefault(name, factory) is not factory:
        raise ValueError(f"cell name {name!r} is taken by {CELLS[name]!r}; choose another name.")
