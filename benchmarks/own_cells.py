"""PyTorch's own cells: what the library generates, beside PyTorch's own kernel (cuDNN on a GPU).

    python benchmarks/own_cells.py [--seconds 170] [--batch N ...] [--time N ...] [--hidden N ...]
    OMP_NUM_THREADS=1 python benchmarks/own_cells.py --device cpu --cells GRUCell LSTMCell RNNCell

Both get through `RNN(cell)`, which is made to take the one or the other. Float32, TF32 off, forward
alone and with a backward pass; on a GPU called from Python and as one CUDA graph. Sizes in an order
that covers the range early; after `--seconds` the rest is left out. Printed are

1. the constants of `pararnn/planning/costs.py` that the times give: least squares of the relative
   error, none below zero, for each kind of steps (`planning/pytorch_plan.py` has the formula);
2. what a choice by these loses against the faster of the two;
3. the table: milliseconds of ours / theirs, and "P" where these constants take PyTorch's.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import pararnn
from pararnn.kernels import facts
from pararnn.kernels.graphs import captured
from pararnn.layers import pytorch_kernels
from pararnn.planning.costs import COSTS
from pararnn.planning.plan import decide, kind_of_kernel
from pararnn.testing import assert_close

CELLS = {"GRUCell": nn.GRUCell, "LSTMCell": nn.LSTMCell, "RNNCell": nn.RNNCell}
KINDS = ("forward", "both", "forward in a graph", "both in a graph")
FREE = ((0.0,) * 7,) * 4
THEIRS = functools.partial(
    decide, costs=replace(COSTS, aten=FREE, onednn=FREE, cudnn=FREE, cudnn_kept=FREE)
)


@dataclass
class Row:
    """Times of one size.

    Attributes:
        cell: Name of the cell's class.
        batch, time, hidden: The size.
        kinds: What `planning/costs.py` calls the kind of ours and of theirs, by kind of call.
        rows, steps: Rows and steps one after another of ours.
        weights, channels: Of the cell, as the formula has them.
        times: Milliseconds of ours and theirs, by kind of call.
    """

    cell: str
    batch: int
    time: int
    hidden: int
    kinds: dict[str, tuple[str, str]]
    rows: int
    steps: int
    weights: int
    channels: int
    times: dict[str, tuple[float, float]]

    def terms(self, theirs: bool) -> list[float]:
        """What the constants of a kind are multiplied with."""
        rows, steps = (self.batch, self.time) if theirs else (self.rows, self.steps)
        channels, weights = float(self.channels), float(self.weights)
        one = [1.0, channels, weights, rows * channels, rows * weights]
        return [1.0, weights, *[steps * term for term in one]]


def milliseconds(run: Callable[[], Any], device: torch.device, budget_s: float) -> float:
    """Median time of one call after two others; on a CPU the least, since it is shared."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    run(), run(), wait()
    while len(times) < 2 or (len(times) < 50 and sum(times) < budget_s):
        begin = time.perf_counter()
        run(), wait()
        times.append(time.perf_counter() - begin)
    return 1e3 * (statistics.median(times) if device.type == "cuda" else min(times))


def measure(
    name: str, batch: int, steps: int, hidden: int, device: torch.device, budget_s: float
) -> Row:
    """Compare and time one size."""
    torch.manual_seed(0)
    cell = CELLS[name](hidden, hidden).to(device)
    x = torch.randn(batch, steps, hidden, device=device, requires_grad=True)
    cotangent = torch.randn(batch, steps, hidden, device=device)
    rnn = pararnn.RNN(cell)

    def both() -> list[Tensor]:
        y = rnn(x)[0]
        return [y.detach(), *torch.autograd.grad(y, [x, *cell.parameters()], cotangent)]

    def forward() -> Tensor:
        with torch.no_grad():
            return rnn(x)[0]

    results, times = [], defaultdict(list)
    ours = mock.patch.object(pytorch_kernels, "library_of", return_value=None)
    for way in (ours, mock.patch.object(facts, "decide", THEIRS)):
        with way:
            results.append(both())
            plan = rnn.plan(x.shape)
            if way is ours:
                kinds, cut = kinds_of(rnn, x, device), plan
            assert (plan.path == "pytorch") == (way is not ours), plan
            for kind in KINDS[: 4 if device.type == "cuda" else 2]:
                run: Callable[[], Any] = forward if kind.startswith("forward") else both
                if "graph" in kind:
                    run = captured(run)
                times[kind].append(milliseconds(run, device, budget_s))
                del run
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert_close(f"{name} {batch} {steps} {hidden}, {i}", actual, expected, rtol=1e-4)
    chunk = min(int(cut.forward.solver.chunk), steps) if cut.path == "rows" else steps
    work = rnn.runner().traced.step.work
    return Row(
        *(name, batch, steps, hidden, kinds),
        rows=batch * -(-steps // chunk),
        steps=min(steps, chunk + cut.forward.warm_up),
        weights=work,
        channels=work // hidden,
        times={kind: (found[0], found[1]) for kind, found in times.items()},
    )


def kinds_of(rnn: pararnn.RNN, x: Tensor, device: torch.device) -> dict[str, tuple[str, str]]:
    """The fields of `Costs` that hold the times of ours and of PyTorch's."""
    found = {}
    own = rnn.runner().facts
    for kind in KINDS:
        with torch.set_grad_enabled(kind.startswith("both")):
            plan = rnn.plan(x.shape)
        if device.type == "cuda":
            gates = own.work > rnn.hidden_size**2
            on_chip = rnn.hidden_size <= COSTS.cudnn_on_chip[gates]
            rows = x.shape[0] * -(-x.shape[1] // int(plan.forward.solver.chunk))
            found[kind] = (
                f"{kind_of_kernel(own, rows)}_sweeps",
                "cudnn_kept" if on_chip else "cudnn",
            )
        else:
            in_c = plan.path == "rows" and plan.forward.steps == "kernel"
            lstm = isinstance(rnn.cell, nn.LSTMCell)
            ours = "steps_in_c" if in_c else "steps_of_cell"
            found[kind] = ours, "onednn" if lstm else "aten"
    return found


def fit(terms: list[list[float]], times: list[float]) -> Tensor:
    """Constants of the least relative error, none below zero: the best of all sets of terms."""
    wanted = torch.tensor(times, dtype=torch.float64)
    given = torch.tensor(terms, dtype=torch.float64) / wanted.unsqueeze(1)
    scale = given.abs().amax(0)
    given, ones = given / scale, torch.ones_like(wanted)
    best, least = torch.zeros(given.shape[1], dtype=torch.float64), float("inf")
    for count in range(1, given.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(given.shape[1]), count)):
            found = torch.linalg.lstsq(given[:, chosen], ones, driver="gelsd").solution
            error = float((given[:, chosen] @ found - ones).norm())
            if bool((found >= 0).all()) and error < least - 1e-9:
                best = torch.zeros_like(best)
                best[chosen], least = found, error
    return best / scale


def constants(rows: list[Row], kinds: tuple[str, ...]) -> dict[tuple[str, str], Tensor]:
    """What the times give for each field of `Costs` and kind of call, in microseconds."""
    terms, times = defaultdict(list), defaultdict(list)
    for row, kind, theirs in itertools.product(rows, kinds, (0, 1)):
        name = row.kinds[kind][theirs], kind
        terms[name].append(row.terms(bool(theirs)))
        times[name].append(1e3 * row.times[kind][theirs])
    return {name: fit(terms[name], times[name]) for name in terms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cells", nargs="+", default=["GRUCell", "LSTMCell"], choices=CELLS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 64, 256])
    parser.add_argument("--time", nargs="+", type=int, default=[64, 512, 4096])
    parser.add_argument("--hidden", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--gib", type=float, default=4.0, help="skip sizes that need more")
    parser.add_argument("--seconds", type=float, default=170.0, help="for everything")
    parser.add_argument("--budget", type=float, default=0.05, help="seconds per measurement")
    options = parser.parse_args()
    device, begin = torch.device(options.device), time.perf_counter()
    torch.backends.cudnn.allow_tf32 = False
    sizes = list(itertools.product(options.cells, options.batch, options.time, options.hidden))
    # x, outputs, their gradients, gates and what the library keeps: a dozen tensors like x
    sizes = [s for s in sizes if 12 * 4 * s[1] * s[2] * s[3] <= options.gib * 2**30]
    random.Random(0).shuffle(sizes)
    rows: list[Row] = []
    for size in sizes:
        if time.perf_counter() - begin > options.seconds:
            break
        rows.append(measure(*size, device, options.budget))
    on = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{on}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32")
    print(f"{len(rows)} of {len(sizes)} sizes in {time.perf_counter() - begin:.0f} s\n")
    kinds = KINDS[: 4 if device.type == "cuda" else 2]
    found = constants(rows, kinds)
    for name in dict.fromkeys(name for name, _ in found):
        print(f"    {name} = (")
        for kind in kinds:
            given = found.get((name, kind))
            shown = "# not measured" if given is None else ", ".join(f"{v:.2e}" for v in given)
            print(f"        ({shown}),  # {kind}" if given is not None else f"        {shown}")
        print("    )")
    print(f"\nof {len(rows)} sizes, where what is taken is slower than the faster of the two:")
    taken, order = {}, sorted(rows, key=lambda r: (r.cell, r.hidden, r.batch, r.time))
    for kind in kinds:
        losses = []
        for row in order:
            by = [
                float(found[row.kinds[kind][i], kind] @ torch.tensor(row.terms(bool(i))).double())
                for i in (0, 1)
            ]
            taken[id(row), kind] = by[0] > COSTS.faster[0] * by[1]
            times = row.times[kind]
            losses.append(times[taken[id(row), kind]] / min(times))
        many = sum(loss > COSTS.faster[0] for loss in losses)
        share = sum(taken[id(row), kind] for row in order)
        print(
            f"{kind:18s}  {many} by more than {COSTS.faster[0]:.2f} x, worst {max(losses):.2f} x; "
            f"PyTorch's taken {share} times"
        )
    print(f"\n{'cell':8s} {'hidden':>6s} {'batch':>5s} {'time':>5s}  " + "  ".join(kinds))
    for row in order:
        shown = [
            f"{row.times[k][0]:.3g}/{row.times[k][1]:.3g}{'P' if taken[id(row), k] else ''}"
            for k in kinds
        ]
        print(f"{row.cell:8s} {row.hidden:6d} {row.batch:5d} {row.time:5d}  " + "  ".join(shown))


if __name__ == "__main__":
    main()
