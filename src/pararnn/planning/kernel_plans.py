"""How kernels are launched that are the same in every plan: by sizes and by what a GPU holds."""

from __future__ import annotations

from dataclasses import dataclass

from pararnn.planning.costs import COSTS, Costs


@dataclass(frozen=True)
class MatvecLaunch:
    """How a product of matrices with one vector is launched.

    Attributes:
        programs: Programs per head.
        rows: Rows of one at a time.
        block: Columns.
        warps: Warps of a program.
    """

    programs: int
    rows: int
    block: int
    warps: int


def plan_matvec(
    rows: int,
    matrices: int,
    heads: int,
    inner: int,
    itemsize: int,
    processors: int,
    costs: Costs = COSTS,
) -> MatvecLaunch:
    """As many programs as the device runs at a time, so that no multiprocessor has more to read.

    Of tiles that share the rows equally well the largest: more is on its way at a time.
    """
    block = 1 << (inner - 1).bit_length()
    least, most_warps = costs.matvec_warps
    warps = min(most_warps, max(least, block // costs.matvec_elements_of_a_warp))
    most = max(1, processors * costs.matvec_threads // (32 * warps) // heads)

    def launch(height: int) -> MatvecLaunch:
        return MatvecLaunch(min(-(-rows // height) * matrices, most), height, block, warps)

    def longest(launch: MatvecLaunch) -> int:
        tiles = -(-rows // launch.rows) * matrices
        programs = -(-launch.programs * heads // processors)
        return programs * -(-tiles // launch.programs) * launch.rows

    largest = max(1, costs.matvec_tile * 32 * warps // (block * itemsize))
    return min((launch(largest >> i) for i in range(largest.bit_length())), key=longest)


def rows_obstacle(weights: int, width: int, itemsize: int, costs: Costs = COSTS) -> str | None:
    """The reason why the weights of a step do not fit on the chip; None if they do.

    Args:
        weights: Blocks of weights, each width x width.
        width: Channels of a program.
        itemsize: Bytes of an element.
        costs: What the chip holds.
    """
    size, most = weights * width**2 * itemsize, costs.rows_weights
    if size <= most:
        return None
    return f"its weights take {size >> 10} KB on the chip, which has {most >> 10} KB"


def rows_warps(weights: int, width: int, itemsize: int, costs: Costs = COSTS) -> int:
    """Warps of a program that keeps so many weights; arguments as for `rows_obstacle`."""
    of_a_warp = 4 * 32 * costs.rows_registers  # bytes
    wanted = max(1, -(-weights * width**2 * itemsize // of_a_warp))
    most = min(costs.rows_warps, width * 4 // 32)  # four threads a sum
    return min(most, 1 << (wanted - 1).bit_length())


def steps_of_graphs(first: int, steps: int, costs: Costs = COSTS) -> list[tuple[int, int]]:
    """The steps from `first` on, in pieces (begin, end) that are a CUDA graph each."""
    begins = range(first, steps, costs.graph_steps)
    return [(begin, min(begin + costs.graph_steps, steps)) for begin in begins]


def pointwise_block(size: int, costs: Costs = COSTS) -> tuple[int, int]:
    """Columns and rows of a program of operations on each element.

    Args:
        size: The last axis.
        costs: Elements of a program.
    """
    columns = min(costs.pointwise_block, 1 << (size - 1).bit_length())
    return columns, costs.pointwise_block // columns
