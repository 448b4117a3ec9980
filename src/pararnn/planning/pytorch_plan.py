"""Whether PyTorch's own kernel for one of its own cells is faster than what the library has."""

from __future__ import annotations

from dataclasses import dataclass

from pararnn.planning.costs import COSTS, Costs

NAMES = {"cudnn": "cuDNN", "onednn": "oneDNN", "aten": "PyTorch's loop in C++"}


@dataclass(frozen=True)
class Times:
    """Estimates of a call, in milliseconds.

    Attributes:
        ours: Of the library.
        theirs: Of PyTorch's kernel.
    """

    ours: float
    theirs: float


def milliseconds(
    times: tuple[float, ...], weights: float, channels: float, rows: int, steps: int
) -> float:
    """What some steps of some rows take, by the times in `Costs` of one kind of steps.

    Args:
        times: Microseconds, in this order: a call, for each number of the weights, a step, for each
            channel of its gates, for each number of the weights; a row of a step, for each channel
            and for each number of the weights.
        weights: Numbers in the recurrent weights.
        channels: Channels of all gates.
        rows: Rows that step together.
        steps: Steps one after another.
    """
    call, call_weight, step, step_channel, step_weight, row_channel, row_weight = times
    one = step + step_channel * channels + step_weight * weights
    one += rows * (row_channel * channels + row_weight * weights)
    return (call + call_weight * weights + steps * one) / 1e3


def compare(
    library: str,
    steps: str,
    weights: int,
    hidden: int,
    batch: int,
    time: int,
    chunk: int,
    warm_up: int,
    tracked: bool,
    captured: bool,
    costs: Costs = COSTS,
) -> Times | None:
    """Estimates of the library and of PyTorch; None if one was never measured.

    Args:
        library: Of PyTorch: "cudnn", "onednn" or "aten".
        steps: What runs the library's steps: "kept", "spread" or "streamed" (a kernel on a GPU
            where a program keeps the weights, where programs keep parts of them, or where they are
            read at every step), "c", "loop" (the cell itself, or operations one after another), or
            anything else.
        weights: Numbers in the recurrent weights.
        hidden: Channels.
        batch: Sequences.
        time: Steps.
        chunk: Steps of a chunk.
        warm_up: Steps before each chunk.
        tracked: Whether a backward pass may follow.
        captured: Whether the call is part of a CUDA graph of the user's.
        costs: What work costs.
    """
    ours = {
        "kept": costs.kept_sweeps,
        "spread": costs.spread_sweeps,
        "streamed": costs.streamed_sweeps,
        "c": costs.steps_in_c,
        "loop": costs.steps_of_cell,
    }.get(steps)
    channels = weights // hidden
    theirs = {"onednn": costs.onednn, "aten": costs.aten}.get(library, costs.cudnn)
    if library == "cudnn" and hidden <= costs.cudnn_on_chip[channels > hidden]:
        theirs = costs.cudnn_kept
    if ours is None:
        return None
    which = 2 * captured + tracked
    rows = batch * -(-time // chunk)
    return Times(
        milliseconds(ours[which], weights, channels, rows, min(time, chunk + warm_up)),
        milliseconds(theirs[which], weights, channels, batch, time),
    )
