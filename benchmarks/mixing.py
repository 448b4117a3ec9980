"""Cells whose channels mix: `RNN(nn.GRUCell)` against `nn.GRU` (cuDNN on a GPU) and the plain loop.

    python benchmarks/mixing.py [--device cuda] [--sizes 4,4096,64 ...] [--no-loop]
    python benchmarks/mixing.py --cells block_gru layer_norm_lstm [--sizes 16,512,512 ...]

With `--cells`, cells with norms inside the step, against the loop in float64. Else the three share
their weights (default initialisation, which forgets) and are compared before they are timed. Times
are medians, float32; sizes are batch, time, hidden. On a GPU TF32 is off for all, and forward and
backward are also timed as one CUDA graph, without Python.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import pararnn
from pararnn.cells import BlockGRUCell, LayerNormLSTMCell
from pararnn.kernels.graphs import captured
from pararnn.testing import assert_close, loop

CELLS = {"block_gru": BlockGRUCell, "layer_norm_lstm": LayerNormLSTMCell}
NORMED_SIZES = ["16,512,512"]
CPU_SIZES = ["4,4096,64", "1,4096,16", "1,1024,64", "16,1024,64", "64,512,64", "4,512,512"]
GPU_SIZES = ["4,4096,64", "1,4096,64", "4,4096,256", "32,2048,64", "1,16384,64"]
RTOL = 1e-4  # of sums over thousands of steps in another order


def milliseconds(run: Callable[[], Any], device: torch.device, budget_s: float = 3.0) -> float:
    """Median time of one call after two others."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[float] = []
    run(), run(), wait()
    while len(times) < 3 or (len(times) < 30 and sum(times) < budget_s):
        begin = time.perf_counter()
        run(), wait()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def with_weights_of(cell: nn.GRUCell) -> nn.GRU:
    theirs = nn.GRU(cell.input_size, cell.hidden_size, batch_first=True).to(cell.weight_ih.device)
    theirs.load_state_dict({f"{name}_l0": p for name, p in cell.state_dict().items()})
    return theirs


def row(batch: int, steps: int, hidden: int, device: torch.device, with_loop: bool) -> str:
    torch.manual_seed(0)
    cell = nn.GRUCell(hidden, hidden).to(device)
    x = torch.randn(batch, steps, hidden, device=device, requires_grad=True)
    cotangent = torch.randn(batch, steps, hidden, device=device)
    zeros = torch.zeros(batch, hidden, device=device)
    rnn, theirs = pararnn.RNN(cell), with_weights_of(cell)
    runs = {"RNN": (rnn, cell), "nn.GRU": (theirs, theirs)}
    if with_loop:
        runs["loop"] = (lambda x: loop(cell, x, zeros), cell)

    def forward_backward(run: Callable[..., Any], module: nn.Module) -> list[torch.Tensor]:
        y = run(x)[0]
        grads = torch.autograd.grad(y, [x, *module.parameters()], cotangent)
        return [y.detach(), *grads]  # a graph of autograd kept alive cannot be captured

    reference = forward_backward(*runs["nn.GRU"])
    for name, arguments in runs.items():
        for i, (a, e) in enumerate(zip(forward_backward(*arguments), reference, strict=True)):
            assert_close(f"{name}, tensor {i}", a, e, rtol=RTOL)
    forward, both = {}, {}
    for name, (run, module) in runs.items():
        with torch.no_grad():
            forward[name] = milliseconds(lambda run=run: run(x), device)
        both[name] = milliseconds(lambda a=(run, module): forward_backward(*a), device)
    report = rnn.report  # of a call from Python
    in_graph = {}
    for name, arguments in runs.items() if device.type == "cuda" else ():
        replay = captured(lambda a=arguments: forward_backward(*a))
        in_graph[name] = milliseconds(replay, device)
    cells = [f"{batch} | {steps} | {hidden}"]
    cells += [f"{forward[n]:.2f} / {both[n]:.2f}" if n in both else "-" for n in ("RNN", "nn.GRU")]
    cells.append(f"{forward['loop']:.0f} / {both['loop']:.0f}" if with_loop else "-")
    cells.append(f"{both['nn.GRU'] / both['RNN']:.1f} x")
    if in_graph:
        cells.append(f"{in_graph['RNN']:.2f}, {in_graph['nn.GRU']:.2f}")
        cells.append(f"{in_graph['nn.GRU'] / in_graph['RNN']:.1f} x")
    cells.append(f"{both['loop'] / both['RNN']:.1f} x" if with_loop else "-")
    cells.append(f"{report.chunks} | {report.iterations} | {report.residual:.0e}")
    return "| " + " | ".join(cells) + " |"


def normed_row(name: str, batch: int, steps: int, hidden: int, device: torch.device) -> str:
    """A cell with norms inside; all states and gradients are compared with the float64 loop."""
    torch.manual_seed(0)
    cell = CELLS[name](hidden, hidden).to(device)
    rnn = pararnn.RNN(cell)
    x = torch.randn(batch, steps, hidden, device=device, requires_grad=True)
    cotangent = torch.randn(batch, steps, hidden, device=device)

    def forward_backward() -> list[torch.Tensor]:
        y, _ = rnn(x)
        return [y.detach(), *torch.autograd.grad(y, [x, *cell.parameters()], cotangent)]

    found, report = forward_backward(), rnn.report
    exact = copy.deepcopy(cell).double()
    x64 = x.detach().double().requires_grad_()
    zeros = torch.zeros(batch, hidden, device=device, dtype=torch.float64)
    state = zeros if rnn.num_components == 1 else (zeros,) * rnn.num_components
    y, _ = loop(exact, x64, state)
    grads = torch.autograd.grad(y, [x64, *exact.parameters()], cotangent.double())
    errors = [
        float((a.double() - e).abs().max() / e.abs().max())
        for a, e in zip(found, [y.detach(), *grads], strict=True)
    ]
    with torch.no_grad():
        forward = milliseconds(lambda: rnn(x), device)
    both = milliseconds(forward_backward, device)
    cells = [name, batch, steps, hidden, f"{forward:.2f} / {both:.2f}"]
    if device.type == "cuda":
        cells.append(f"{milliseconds(captured(forward_backward), device):.2f}")
    cells += [f"{max(errors):.0e}", report.chunks, report.status]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", help="batch,time,hidden")
    parser.add_argument("--cells", nargs="+", choices=CELLS, help="cells with norms inside")
    parser.add_argument("--no-loop", action="store_true", help="the plain loop takes long")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.backends.cudnn.allow_tf32 = False
    on = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{on}, torch {torch.__version__}, {torch.get_num_threads()} threads, float32,")
    print("forward / forward+backward in milliseconds.\n")
    if options.cells:
        graph = "in a CUDA graph | " if device.type == "cuda" else ""
        header = f"| cell | batch | time | hidden | RNN | {graph}worst error | chunks | status |"
        print(header + "\n|" + "---|" * (header.count("|") - 1))
        for name, size in itertools.product(options.cells, options.sizes or NORMED_SIZES):
            print(normed_row(name, *map(int, size.split(",")), device), flush=True)
        return
    graph = "in a CUDA graph: RNN, nn.GRU | against nn.GRU | " if device.type == "cuda" else ""
    header = (
        "| batch | time | hidden | RNN(nn.GRUCell) | nn.GRU | plain loop | against nn.GRU | "
        f"{graph}against the loop | chunks | iterations | residual |"
    )
    print(header)
    print("|" + "---|" * (header.count("|") - 1))
    for size in options.sizes or (GPU_SIZES if device.type == "cuda" else CPU_SIZES):
        batch, steps, hidden = map(int, size.split(","))
        print(row(batch, steps, hidden, device, not options.no_loop), flush=True)


if __name__ == "__main__":
    main()
