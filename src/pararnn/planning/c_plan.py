"""How generated C is called: chunks, threads and blocks from sizes and threads."""

from __future__ import annotations

from dataclasses import dataclass

from pararnn.planning.costs import COSTS, Costs


@dataclass(frozen=True)
class Cut:
    """How a problem is cut.

    Attributes:
        chunk: Steps per chunk.
        chunks: Chunks of time.
        threads: Threads that share the work.
        block: Channels that one of them carries at a time.
        because: The reason for the chunks, in words.
    """

    chunk: int
    chunks: int
    threads: int
    block: int
    because: str


def plan_c(
    batch: int, time: int, hidden: int, chunk: int | None, threads: int, costs: Costs = COSTS
) -> Cut:
    """One chunk, unless rows and channels are too few to give every thread its own.

    Args:
        batch: Rows.
        time: Steps.
        hidden: Channels.
        chunk: Steps per chunk if they are given.
        threads: Threads of the machine.
        costs: What work costs.
    """
    lanes = batch * -(-hidden // costs.c_vector)
    if chunk is None:
        wanted = -(-threads // lanes)
        chunk = -(-time // max(1, min(wanted, time // costs.c_shortest_chunk)))
    chunks = -(-time // chunk)
    used = 1 if batch * time * hidden < costs.c_small else threads
    per_row = -(-used // (batch * chunks))
    share = -(-hidden // per_row)
    block = -(-share // costs.c_vector) * costs.c_vector
    if lanes >= threads:
        because = "channels keep all threads busy"
    elif chunks > 1:
        because = "channels alone are too few for all threads"
    else:
        because = "channels are too few for all threads, and steps too few to cut"
    because += f" (blocks of channels: {lanes}, threads: {threads})"
    return Cut(chunk, chunks, used, min(costs.c_block, block), because)
