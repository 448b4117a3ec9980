"""`RNN(cell)` against the plain loop over the cell on a CPU, for cells whose channels mix.

    OMP_NUM_THREADS=1 python benchmarks/mixing_sweep.py [--batch N ...] [--time N ...] [...]

Every combination of cell, batch, time and hidden size is timed without gradients (a single step
also by `rnn.step`) and with a backward pass, the two in turn; the least of some calls each counts.
Shown are the combinations where `RNN` comes off worst, and how many are above 1.2 times the loop.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import pararnn
from pararnn.testing import loop

CELLS = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)
LIMIT = 1.2


def least(runs: list[Callable[[], Any]], budget_s: float) -> list[float]:
    """Least seconds of each, called in turn."""
    for run in runs:
        run()
    best, begin, rounds = [float("inf")] * len(runs), time.perf_counter(), 0
    while rounds < 5 or (rounds < 200 and time.perf_counter() - begin < budget_s):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
        rounds += 1
    return best


def rows(
    cell: nn.RNNCellBase, rnn: pararnn.RNN, batch: int, steps: int, budget_s: float
) -> list[tuple[float, str]]:
    hidden = cell.hidden_size
    x = torch.randn(batch, steps, hidden)
    zeros = torch.zeros(batch, hidden)
    state = (zeros, zeros) if isinstance(cell, nn.LSTMCell) else zeros
    cotangent = torch.randn(batch, steps, hidden)

    def gradients(y: torch.Tensor) -> None:
        torch.autograd.grad(y, list(cell.parameters()), cotangent)

    kinds = {
        "forward": [lambda: rnn(x, state), lambda: loop(cell, x, state)],
        "both": [
            lambda: gradients(rnn(x, state)[0]),
            lambda: gradients(loop(cell, x, state)[0]),
        ],
    }
    if steps == 1:
        kinds["step"] = [lambda: rnn.step(x[:, 0], state), lambda: cell(x[:, 0], state)]
    found = []
    for kind, runs in kinds.items():
        with torch.set_grad_enabled(kind == "both"):
            ours, theirs = (1e3 * s for s in least(runs, budget_s))
        line = (
            f"| {type(cell).__name__} | {kind} | {batch} | {steps} | {hidden} | {ours:.3f} | "
            f"{theirs:.3f} | {ours / theirs:.2f} x | {rnn.report.chunks} |"
        )
        found.append((ours / theirs, line))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--time", nargs="+", type=int, default=[1, 8, 32, 128, 512])
    parser.add_argument("--hidden", nargs="+", type=int, default=[8, 64, 256, 512])
    parser.add_argument("--largest", type=int, default=1 << 20, help="batch x time x hidden")
    parser.add_argument("--budget", type=float, default=0.25, help="seconds per measurement")
    parser.add_argument("--show", type=int, default=5, help="worst of every length")
    options = parser.parse_args()
    torch.manual_seed(0)
    found: dict[int, list[tuple[float, str]]] = {steps: [] for steps in options.time}
    for kind, hidden in itertools.product(CELLS, options.hidden):
        cell = kind(hidden, hidden)
        rnn = pararnn.RNN(cell)
        for batch, steps in itertools.product(options.batch, options.time):
            if batch * steps * hidden <= options.largest:
                found[steps] += rows(cell, rnn, batch, steps, options.budget)
    print("| cell | what | batch | time | hidden | RNN, ms | loop, ms | ratio | chunks |")
    print("|" + "---|" * 9)
    for all_rows in found.values():
        for _, line in sorted(all_rows, reverse=True)[: options.show]:
            print(line)
    for steps, all_rows in found.items():
        above = sum(ratio > LIMIT for ratio, _ in all_rows)
        print(f"\n{steps} steps: {above} of {len(all_rows)} above {LIMIT} times the loop", end="")
    print()


if __name__ == "__main__":
    main()
