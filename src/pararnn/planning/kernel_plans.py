"""How kernels are launched that are the same in every plan: by sizes and by what a GPU holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pararnn._words import counted
from pararnn.planning.costs import COSTS, Costs

TILE = 16  # channels, of the least product in tensor cores too


@dataclass(frozen=True)
class MatvecLaunch:
    """How a product of matrices with one vector is launched.

    Attributes:
        programs: Programs per head.
        rows: Rows of one at a time.
        block: Columns.
        warps: Warps of a program.
        tiles: Of a program, at most.
        ahead: Tiles that are on their way at a time.
        group: Tiles whose sums are taken together.
        registers: Of a thread, at most.
    """

    programs: int
    rows: int
    block: int
    warps: int
    tiles: int
    ahead: int
    group: int
    registers: int


def plan_matvec(
    rows: int,
    matrices: int,
    heads: int,
    inner: int,
    itemsize: int,
    processors: int,
    operations: int = 0,
    texts: int = 1,
    costs: Costs = COSTS,
) -> MatvecLaunch:
    """As many programs as the device runs at a time, so that no multiprocessor has more to read.

    Of tiles that share the rows equally well the largest: more is on its way at a time.

    Args:
        rows: Of a matrix.
        matrices: With the same vector.
        heads: Vectors.
        inner: Elements of a vector.
        itemsize: Bytes of a weight.
        processors: Multiprocessors.
        operations: Of an element of the vector.
        texts: Vectors of a head.
        costs: What a program may have.
    """
    block = 1 << (inner - 1).bit_length()
    least, most_warps = costs.matvec_warps
    few = operations >= costs.matvec_operations
    of_a_warp = costs.matvec_elements_of_a_costly_warp if few else costs.matvec_elements_of_a_warp
    warps = min(most_warps, max(least, block // of_a_warp))
    most = max(1, processors * costs.matvec_threads // (32 * warps) // heads)
    timed = itemsize == 2 and block <= warps * of_a_warp
    *limits, most_registers = costs.matvec_registers[texts - 1]

    def launch(height: int) -> MatvecLaunch:
        programs = min(-(-rows // height) * matrices, most)
        tiles = -(-(-(-rows // height) * matrices) // programs)
        ahead = costs.matvec_ahead * 32 * warps // (height * block * itemsize)
        ahead = max(1, min(ahead, costs.matvec_most_ahead, tiles))
        group = 2 if timed and texts == 1 and 1 < tiles <= costs.matvec_grouped else 1
        registers = most_registers
        if timed and tiles <= costs.matvec_grouped:
            registers = limits[0 if few else 1 if tiles == 1 else 2]
        return MatvecLaunch(programs, height, block, warps, tiles, ahead, group, registers)

    def longest(launch: MatvecLaunch) -> int:
        tiles = -(-rows // launch.rows) * matrices
        programs = -(-launch.programs * heads // processors)
        return programs * -(-tiles // launch.programs) * launch.rows

    largest = max(1, costs.matvec_tile * 32 * warps // (block * itemsize))
    return min((launch(largest >> i) for i in range(largest.bit_length())), key=longest)


def kept_width(size: int) -> int:
    """Channels of a program that keeps the weights of a group: a power of two, as Triton has it."""
    return max(TILE, 1 << (size - 1).bit_length())


def keeps_weights(weights: int, width: int, itemsize: int, costs: Costs = COSTS) -> bool:
    """Whether a program keeps the weights of a step on the chip, which else are read at every step.

    Args:
        weights: Blocks of weights, each width x width.
        width: Channels of a program.
        itemsize: Bytes of an element.
        costs: What the chip holds.
    """
    return weights * width**2 * itemsize <= costs.rows_weights


def rows_warps(weights: int, width: int, itemsize: int, costs: Costs = COSTS) -> int:
    """Warps of a program that keeps so many weights; arguments as for `keeps_weights`."""
    of_a_warp = 4 * 32 * costs.rows_registers  # bytes
    wanted = max(1, -(-weights * width**2 * itemsize // of_a_warp))
    most = min(costs.rows_warps, width * 4 // 32)  # four threads a sum
    return min(most, 1 << (wanted - 1).bit_length())


@dataclass(frozen=True)
class WideLaunch:
    """How the kernel is launched that reads weights at every step, see `triton.wide`.

    Attributes:
        rows: Rows of a program.
        parts: Programs that share the channels of a group, for the same rows.
        block: Channels that a program computes at a time.
        inner: Channels that it multiplies at a time.
        width: Channels of a group with those that fill up the last blocks.
        stages: Blocks of `inner` channels that are on their way at a time.
        warps: Warps of a program.
    """

    rows: int
    parts: int
    block: int
    inner: int
    width: int
    stages: int
    warps: int


def plan_wide(
    size: int,
    groups: int,
    rows: int,
    products: int,
    factors: int,
    itemsize: int,
    processors: int,
    shared: int,
    costs: Costs = COSTS,
) -> WideLaunch:
    """As many programs as the device runs at the same time share the channels of all rows.

    For programs that share channels wait for each other at every step.

    Args:
        size: Channels of a group.
        groups: Groups.
        rows: Chunks of all sequences.
        products: Of the level that has most.
        factors: Vectors that are multiplied or that these are computed from, likewise.
        itemsize: Bytes of an element.
        processors: Multiprocessors.
        shared: Bytes of shared memory that a program may have.
        costs: What a multiprocessor holds.
    """
    widest = costs.wide_rows[-1] * 4 // itemsize  # of rows in float32, as many bytes
    allowed = [r for r in costs.wide_rows if r <= widest]
    together = next(
        (r for r in allowed if -(-rows // r) * groups * 2 <= processors),
        allowed[-1],
    )
    share = max(1, processors // (-(-rows // together) * groups))
    block, most = costs.wide_block
    most = min(most, costs.wide_sums // (products * together * itemsize // 4))
    while block * 2 <= most and -(-size // block) > share:
        block *= 2
    blocks = -(-size // block)
    parts = -(-blocks // -(-blocks // share))
    inner, one = costs.wide_inner, (products * block + factors * together) * itemsize
    ahead = min(costs.wide_ahead, shared)
    while inner > TILE and (costs.wide_stages - 1) * inner * one > ahead:
        inner //= 2
    whole = max(block, inner)
    width = -(-size // whole) * whole
    warps = costs.wide_warps[block * together > costs.wide_small]
    return WideLaunch(together, parts, block, inner, width, costs.wide_stages, warps)


@dataclass(frozen=True)
class SpreadLaunch:
    """How the kernel is launched whose programs share weights and keep them, see `triton.spread`.

    Attributes:
        rows: Rows of a program.
        parts: Programs that share the channels of a group, for the same rows.
        block: Channels of a program.
        warps: Warps of a program.
    """

    rows: int
    parts: int
    block: int
    warps: int


def plan_spread(
    size: int,
    groups: int,
    rows: int,
    itemsize: int,
    processors: int,
    sizes: Callable[[int], tuple[int, int] | None],
    costs: Costs = COSTS,
) -> SpreadLaunch | None:
    """As few rows of a program as the device has room for, and as few rounds as weights allow.

    Args:
        size: Channels of a group.
        groups: Groups.
        rows: Chunks of all sequences.
        itemsize: Bytes of an element.
        processors: Multiprocessors.
        sizes: Of programs with so many channels, how often they wait in a step, and how many
            numbers of weights each keeps; None if there are no such programs.
        costs: What a multiprocessor holds.

    Returns:
        None if the weights do not fit, or there are too many rows.
    """
    blocks = _spread_blocks(size, itemsize, sizes, costs)
    for own in costs.spread_rows:
        share = processors // (-(-rows // own) * groups)
        found = [(waits, block, parts) for waits, block, parts in blocks if parts <= share]
        if found:
            _, block, parts = min(found)
            return SpreadLaunch(own, parts, block, costs.spread_warps)
    return None


def most_spread_rows(
    size: int,
    groups: int,
    itemsize: int,
    processors: int,
    sizes: Callable[[int], tuple[int, int] | None],
    costs: Costs = COSTS,
) -> int:
    """The most rows for which `plan_spread`, with these arguments, finds a launch."""
    parts = min((parts for *_, parts in _spread_blocks(size, itemsize, sizes, costs)), default=0)
    return costs.spread_rows[-1] * (processors // (parts * groups)) if parts else 0


def _spread_blocks(
    size: int,
    itemsize: int,
    sizes: Callable[[int], tuple[int, int] | None],
    costs: Costs,
) -> list[tuple[int, int, int]]:
    """For each number of channels that a program may have: waits, channels, programs."""
    found = []
    for n in range((-(-size // TILE) - 1).bit_length() + 1):
        block, known = TILE << n, sizes(TILE << n)
        if known is not None and known[1] * itemsize <= costs.spread_weights:
            found.append((known[0], block, -(-size // block)))
    return found


def computes_late(lanes: int, costs: Costs = COSTS) -> bool:
    """Whether programs that multiply a vector which needs a sum compute it themselves, as a whole.

    Else each program computes its channels once all have the sum, and all wait once more.

    Args:
        lanes: Channels that are multiplied for one of the result.
        costs: How many are fewer than a round is worth.
    """
    return lanes <= costs.wide_late


def wide_precision(rounds: bool, itemsize: int) -> str:
    """How tensor cores multiply: in full precision, unless products of matrices may round.

    Args:
        rounds: Whether they may.
        itemsize: Bytes of an element.
    """
    if itemsize > 4:
        return "ieee"
    return "tf32" if rounds else "tf32x3"


@dataclass(frozen=True)
class TileSizes:
    """What launches of kernels of tiles depend on, of a step.

    Attributes:
        programs: Indices of the axes along which nothing mixes.
        rows: Rows of a tile.
        columns: Columns.
        split: The axis that may be cut into parts: 0, 1 or None.
        multiplied: Whether rows and whether columns take part in products of matrices.
        tensors: Tensors in the state.
        weights: Weights of which each entry has one of its own.
        tangents: Columns of the Jacobian that each entry has alone, see `tracing.tangents`; 0 if
            entries reach each other.
    """

    programs: int
    rows: int
    columns: int
    split: int | None
    multiplied: tuple[bool, bool]
    tensors: int = 1
    weights: int = 0
    tangents: int = 0


@dataclass(frozen=True)
class TileLaunch:
    """How a kernel of tiles is launched.

    Attributes:
        sizes: Of the step.
        parts: Programs that share a tile.
        warps: Warps of a program.
        warps_alone: The same where chunks of time are run one after another.
        registers: Of a thread, at most.
        spills: Numbers that a thread may spill for that; with more it has all that there are.
    """

    sizes: TileSizes
    parts: int
    warps: int
    warps_alone: int
    registers: int
    spills: int

    def block_of(self, size: int, axis: int, whole: bool) -> int:
        """Entries that a program has of an axis.

        Args:
            size: Of the axis.
            axis: 0 for rows, 1 for columns.
            whole: Whether it is not cut, as that of a weight.
        """
        if size == 1:
            return 1
        own = (self.sizes.rows, self.sizes.columns)[axis]
        if axis == self.sizes.split and not whole and size == own:
            size = -(-size // self.parts)
        block = 1 << (size - 1).bit_length()
        return max(TILE, block) if self.sizes.multiplied[axis] else block

    def widens(self, rows: int, columns: int) -> bool:
        """Whether a value without rows is loaded once for each row of the tile.

        A thread then has what it needs, and nothing goes through shared memory. Triton loads fewer
        entries than a warp has threads so by itself. Products of matrices have layouts of their
        own.
        """
        return rows == 1 and columns >= 32 and not any(self.sizes.multiplied)

    @property
    def narrows(self) -> bool:
        """Whether one row is left of such a value when it has been loaded.

        One warp just leaves the others out. Of several, each would have to hand its rows to others.
        """
        return self.warps == 1


def segment_of_tiles(costs: Costs = COSTS) -> int:
    """Steps that a backward pass runs again from one state that was kept."""
    return costs.tile_segment


@dataclass(frozen=True)
class TileCut:
    """How time is cut for kernels of tiles.

    Attributes:
        chunk: Steps per chunk, whole segments if there are several.
        chunks: Chunks of time.
        warm: Steps before a chunk that its first guess looks back, whole segments.
        because: The reason, in words.
    """

    chunk: int
    chunks: int
    warm: int
    because: str


def cut_tiles(
    sizes: TileSizes,
    batch: int,
    time: int,
    tolerance: float,
    processors: int,
    backward: bool,
    costs: Costs = COSTS,
) -> TileCut:
    """Cut time where tiles alone leave most of the device idle, and chunks are long.

    Args:
        sizes: Of the step.
        batch: Sequences.
        time: Steps.
        tolerance: Of gaps between chunks.
        processors: Multiprocessors.
        backward: Whether it is the backward direction.
        costs: What is wanted.
    """
    half, single, double = costs.tile_warm_up
    warm = half if tolerance > 1e-4 else single if tolerance > 1e-8 else double
    segment = costs.tile_segment
    warps = sizes.programs * -(-sizes.rows * sizes.columns // costs.tile_entries)
    most = costs.tile_full[backward] * processors // (batch * warps)
    chunks = min(most, time // (costs.tile_chunk * warm))
    if chunks < costs.tile_least_chunks:
        why = f"{counted(batch * warps, 'warp')} and {counted(time, 'step')}: "
        why += "chunks would not be worth their warm-up"
        return TileCut(time, 1, 0, why)
    chunk = -(-time // (chunks * segment)) * segment
    chunks = -(-time // chunk)
    why = f"{counted(batch * warps, 'warp')} would leave most of {processors} multiprocessors idle"
    return TileCut(chunk, chunks, warm, why)


def plan_tiles(
    sizes: TileSizes,
    batch: int,
    chunks: int,
    processors: int,
    backward: bool,
    costs: Costs = COSTS,
    half: bool = False,
) -> TileLaunch:
    """Few enough entries per warp, and programs enough for the device where a tile may be cut.

    Args:
        sizes: Of the step.
        batch: Sequences.
        chunks: Chunks of time.
        processors: Multiprocessors.
        backward: Whether it is the backward kernel.
        costs: What is wanted.
        half: Whether results are in half precision.
    """
    parts, wanted = 1, costs.tile_programs[backward] * processors
    if sizes.split is not None:
        size = (sizes.rows, sizes.columns)[sizes.split]
        while size % (2 * parts) == 0 and _may_have(size // (2 * parts), costs):
            many = batch * (1 if backward else chunks) * sizes.programs * parts >= wanted
            if many and sizes.rows * sizes.columns // parts <= costs.tile_entries:
                break
            parts *= 2
    entries = sizes.tensors * sizes.rows * sizes.columns // parts

    def warps(programs: int) -> int:
        found = 1
        while found < costs.tile_warps:
            few = not backward and programs * found < wanted
            if entries <= found * (costs.tile_least_entries if few else costs.tile_entries):
                break
            found *= 2
        return found

    alone = batch * sizes.programs * parts
    own = warps(chunks * alone)
    registers = costs.tile_most_registers
    if not backward or (half and not sizes.weights):
        together = -(-chunks * alone * own // (processors * costs.schedulers))
        room = costs.scheduler_registers // (32 * together) // 8 * 8
        # a step back needs more beside its entries: smaller tiles have as many as whole ones
        each = max(entries // own, costs.tile_entries if backward else 0)
        needed = int(costs.tile_registers * each) // 32
        registers = min(max(room, needed), registers)
    return TileLaunch(sizes, parts, own, warps(alone), registers, costs.tile_spills)


def _may_have(entries: int, costs: Costs) -> bool:
    """Whether a part of a tile may have so many rows or columns."""
    return entries >= costs.tile_least and entries & (entries - 1) == 0


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
