"""Read a step, its readout and their adjoint as operations on tiles.

A value of one row is a tensor of any shape. Its axes are made of atoms: an axis of an input is one
atom, or several where a view takes it apart. Atoms that meet in an operation on each element are
the same axis of the cell, and so are the factors that a product sums over. From these follows how a
kernel lays the state out:

- axes along which nothing mixes, neither in the step nor in the readout, become programs;
- at most two others become the rows and columns of a tile, which a program holds.

A value has rows, columns, both or neither, and enters operations by broadcasting: a key has rows, a
value columns, a gate neither. A weight that is multiplied along columns is a matrix, columns x
columns. Gradients that lack an axis of the programs are sums over programs: partial sums here,
which are added up outside.
"""

from __future__ import annotations

from dataclasses import dataclass

from pararnn.tracing.expressions import Operand, topological
from pararnn.tracing.pieces import Cut


class NotTiled(Exception):
    """The step cannot be laid out as tiles; the message says why."""


@dataclass(frozen=True)
class Axis:
    """Rows or columns of a tile.

    Attributes:
        stride: In the memory of the tensor, in elements.
        size: Entries; 1 if there is no such axis.
    """

    stride: int = 0
    size: int = 1


@dataclass(frozen=True)
class Place:
    """Where the entries of a value lie in a tensor, or in one row of it at one step.

    Attributes:
        programs: Stride along every axis of the programs; 0 where it has none.
        rows: Its rows.
        columns: Its columns.
        is_matrix: Whether its rows and columns are both those of a weight.
        offset: Of the first entry.
    """

    programs: tuple[int, ...]
    rows: Axis
    columns: Axis
    is_matrix: bool
    offset: int = 0


@dataclass(frozen=True)
class Result:
    """A value that a kernel writes.

    Attributes:
        expression: The value.
        place: Where it goes.
        summed: Axes of the programs over which programs have partial sums.
        split: Whether it is a partial sum where programs have a part of the split axis.
    """

    expression: Operand
    place: Place
    summed: tuple[int, ...]
    split: bool


@dataclass(frozen=True)
class Piece:
    """An input, or a part of one that the step takes in parts.

    Attributes:
        input: Number of the input.
        shape: Of the piece, without rows.
        cut: Where the input is cut, with axes counted without rows; None where it is whole.
    """

    input: int
    shape: tuple[int, ...]
    cut: Cut | None


@dataclass(frozen=True)
class Tiles:
    """A step, its readout and their adjoint, laid out.

    Leaves of expressions are `state`, `drive` (pieces with rows), `coefficient` (those without) and
    `adjoint`: of the state after the step, and after those of the result that is handed out.

    Attributes:
        programs: Sizes of the axes of the programs.
        rows: Rows of a tile.
        columns: Columns.
        split: The axis of a tile that may be cut into parts which have programs of their own: 0, 1
            or None.
        multiplied: Whether rows and whether columns take part in products of matrices.
        pieces: Inputs, or the pieces of inputs.
        drives: Numbers of the pieces that are drives.
        coefficients: Numbers of the others.
        state: Where the tensors of the state lie in a row of components.
        drive_places: Where drives do.
        coefficient_places: Where coefficients do.
        step: New tensors of the state.
        readout: What is handed out.
        adjoints: Adjoints of the tensors of the state before the step.
        gradients: Gradients of pieces, each as if it were a tensor of its own.
        wanted: Numbers of these.
        tangents: The Jacobian of the step, see `tangents.tangents`; empty if entries of the state
            reach each other.
    """

    programs: tuple[int, ...]
    rows: int
    columns: int
    split: int | None
    multiplied: tuple[bool, bool]
    pieces: tuple[Piece, ...]
    drives: tuple[int, ...]
    coefficients: tuple[int, ...]
    state: tuple[Place, ...]
    drive_places: tuple[Place, ...]
    coefficient_places: tuple[Place, ...]
    step: tuple[Operand, ...]
    readout: Result
    adjoints: tuple[Operand, ...]
    gradients: tuple[Result, ...]
    wanted: tuple[int, ...]
    tangents: tuple[tuple[Operand, ...], ...]

    @property
    def is_affine(self) -> bool:
        """Whether tangents do not depend on the state."""
        nodes = topological(entry for column in self.tangents for entry in column)
        return all(node.op != "state" for node in nodes)

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Numbers of the inputs that have gradients."""
        return tuple(dict.fromkeys(self.pieces[n].input for n in self.wanted))
