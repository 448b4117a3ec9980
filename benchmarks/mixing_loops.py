"""`RNN(cell)` against the plain loop over the cell on a CPU: heads, blocks, norms, chaotic cells.

    OMP_NUM_THREADS=1 python benchmarks/mixing_loops.py [--cells CELL ...]

Times are those of the process, so that others who compute hardly matter: the least of some calls,
without gradients and with a backward pass, taken in turn.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pararnn
from pararnn.cells import BlockGRUCell, LayerNormLSTMCell
from pararnn.testing import loop

INPUT, CALLS, LAST = 16, 3, 20
SHAPES = ((1, 512), (1, 2048), (4, 2048), (8, 512), (16, 1024), (32, 512))


class Heads(nn.Module):
    """`tanh(W h + x)` with a block of W per head, as a batched product or within a whole matrix."""

    input_size, num_components = INPUT, 1

    def __init__(self, heads: int, size: int, whole: bool) -> None:
        super().__init__()
        self.hidden_size, self.heads, self.whole = heads * size, heads, whole
        self.input = nn.Linear(INPUT, heads * size)
        self.blocks = nn.Parameter(torch.randn(heads, size, size) / (2 * size**0.5))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """One step."""
        if self.whole:
            mixed = h @ torch.block_diag(*self.blocks.unbind(0))
        else:
            heads = h.unflatten(-1, (self.heads, -1))
            mixed = torch.einsum("bhi,hij->bhj", heads, self.blocks).flatten(1)
        return torch.tanh(mixed + self.input(x))


def chaotic(cell: nn.RNNCellBase, factor: float) -> nn.RNNCellBase:
    """The cell with larger recurrent weights."""
    with torch.no_grad():
        cell.weight_hh.mul_(factor)
    return cell


CELLS: dict[str, Callable[[], nn.Module]] = {
    "heads 32 x 32": lambda: Heads(32, 32, whole=False),
    "heads 8 x 16": lambda: Heads(8, 16, whole=False),
    "block-diagonal 8 x 16": lambda: Heads(8, 16, whole=True),
    "nn.GRUCell 64": lambda: nn.GRUCell(INPUT, 64),
    "nn.LSTMCell 64": lambda: nn.LSTMCell(INPUT, 64),
    "block GRU 64": lambda: BlockGRUCell(INPUT, 64),
    "block GRU 256": lambda: BlockGRUCell(INPUT, 256),
    "LSTM with layer norms 64": lambda: LayerNormLSTMCell(INPUT, 64),
    "LSTM with layer norms 256": lambda: LayerNormLSTMCell(INPUT, 256),
    "chaotic nn.GRUCell 64": lambda: chaotic(nn.GRUCell(INPUT, 64), 10.0),
    "chaotic nn.RNNCell 64": lambda: chaotic(nn.RNNCell(INPUT, 64), 6.0),
}


def least(runs: list[Callable[[], Any]]) -> list[float]:
    """Least milliseconds of processor time of each, called in turn."""
    best = [float("inf")] * len(runs)
    for call in range(CALLS + 1):
        for i, run in enumerate(runs):
            start = time.process_time()
            run()
            if call:  # the first compiles
                best[i] = min(best[i], 1e3 * (time.process_time() - start))
    return best


def row(name: str, batch: int, steps: int) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    cell = CELLS[name]()
    rnn, x = pararnn.RNN(cell), torch.randn(batch, steps, INPUT)
    zeros = torch.zeros(batch, rnn.hidden_size)
    state = (zeros, zeros) if rnn.num_components == 2 else zeros

    def both(run: Callable[..., Any]) -> None:
        y = run(x, state)[0][:, -LAST:]  # gradients of chaotic cells grow without bound
        torch.autograd.grad(y.square().mean(), list(cell.parameters()))

    plain = functools.partial(loop, cell)
    ours, theirs = least([lambda: both(rnn), lambda: both(plain)])
    with torch.no_grad():
        ours_forward, theirs_forward = least([lambda: rnn(x, state), lambda: plain(x, state)])
    return (
        f"| {name} | {batch} | {steps} | {ours_forward:.0f} / {ours:.0f} | {theirs_forward:.0f} / "
        f"{theirs:.0f} | {theirs_forward / ours_forward:.1f} x / {theirs / ours:.1f} x | "
        f"{rnn.report.chunks} | {rnn.report.status} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    print("| cell | batch | time | RNN, ms | loop, ms | against the loop | chunks | status |")
    print("|---|---|---|---|---|---|---|---|")
    for name in parser.parse_args().cells:
        for shape in SHAPES:
            print(row(name, *shape), flush=True)


if __name__ == "__main__":
    main()
