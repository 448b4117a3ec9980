"""One long sequence on one GPU and split over several: time and memory, forward and backward.

    torchrun --nproc-per-node 2 benchmarks/sequence_parallel.py

All processes split the sequence; the first one alone is the comparison. Every row is checked on a
shorter sequence in float64 first. `--time`, `--width` and `--device cpu` make it smaller. Gradients
of the weights are not added up over the processes: in training FSDP does that beside other work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import pararnn
from pararnn.distributed import sequence_parallel

TIMESCALES = {"forgets": None, "slow gates, to 1,024 steps": 1024.0}  # of a new ParaGRU, in steps
NEVER = "forgets nothing"


def make(kind, width, dtype, device):
    """A layer whose gates forget as a row says."""
    torch.manual_seed(0)
    timescale = TIMESCALES.get(kind)
    cell = pararnn.cells.ParaGRUCell(
        width, width, max_timescale=timescale, device=device, dtype=dtype
    )
    return pararnn.RNN(Remembers(width, dtype, device) if kind == NEVER else cell)


class Remembers(torch.nn.Module):
    """A gated sum: what was added stays, so that no warm-up is long enough."""

    def __init__(self, width, dtype, device):
        super().__init__()
        self.input_size = self.hidden_size = width
        self.num_components = 1
        self.input = torch.nn.Linear(width, width, device=device, dtype=dtype)
        self.diagonal = torch.nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def forward(self, x, h):
        return h + 1e-3 * torch.tanh(self.input(x) - 0.1 * self.diagonal * torch.tanh(h))


def step(layer, x, grad):
    layer.zero_grad(set_to_none=True)
    x.grad = None
    y, _ = layer(x)
    y.backward(grad)
    return y.detach()


def check(kind, group, device):
    """Equal to one process, in float64."""
    ranks, rank, steps, width = dist.get_world_size(), dist.get_rank(), 256, 8
    layer = make(kind, width, torch.float64, device)
    torch.manual_seed(1)
    x, grad = torch.randn(2, 1, steps * ranks, width, dtype=torch.float64, device=device)
    whole = x.clone().requires_grad_()
    expected = step(layer, whole, grad)
    part = slice(rank * steps, (rank + 1) * steps)
    own = x[:, part].clone().requires_grad_()
    found = step(sequence_parallel(layer, group), own, grad[:, part])
    for a, b in ((found, expected[:, part]), (own.grad, whole.grad[:, part])):
        error = float((a - b).abs().max() / b.abs().max())
        assert error < 1e-10, f"{kind}: {error:.1e}"


def seconds(layer, x, grad, repeats, device, together):
    """Median time of a forward and backward pass, and peak memory in GiB."""
    on_gpu = device.type == "cuda"
    times = []
    for repeat in range(repeats + 2):
        if on_gpu:
            torch.cuda.synchronize()
            if repeat == 2:
                torch.cuda.reset_peak_memory_stats()
        if together:
            dist.barrier()
        begin = time.perf_counter()
        step(layer, x, grad)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else float("nan")
    return statistics.median(times[2:]), memory


def measure(kind, group, settings, device):
    """A row of the table."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    dtype, width = getattr(torch, settings.dtype), settings.width
    layer = make(kind, width, dtype, device)
    alone, memory = float("nan"), float("nan")

    def inputs(steps):
        x = torch.randn(1, steps, width, device=device, dtype=dtype)
        return x.requires_grad_(), torch.randn_like(x)

    if rank == 0 and not settings.no_comparison:
        alone, memory = seconds(layer, *inputs(settings.time), settings.repeats, device, False)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dist.barrier()
    sequence_parallel(layer, group)
    part = inputs(settings.time // ranks)
    shared, own = seconds(layer, *part, settings.repeats, device, True)
    report = layer.report
    return kind, report.iterations, alone, shared, alone / shared, memory, own


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--time", type=int, default=2**20)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--no-comparison", action="store_true", help="where one GPU is too small")
    settings = parser.parse_args()
    device = torch.device(settings.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rows = []
    for kind in (*TIMESCALES, NEVER):
        check(kind, mesh, device)
        rows.append(measure(kind, mesh, settings, device))
    if dist.get_rank() == 0:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        print(
            f"B1 T{settings.time:,} D{settings.width:,} {settings.dtype}, forward and backward, "
            f"{dist.get_world_size()} x {name}, PyTorch {torch.__version__}, "
            f"pararnn {pararnn.__version__}\n"
        )
        print("| cell | iterations | one, ms | split, ms | times | GiB on one | GiB on each |")
        print("|---|---|---|---|---|---|---|")
        for kind, iterations, one, split, ratio, memory, own in rows:
            print(
                f"| {kind} | {iterations} | {one * 1e3:.1f} | {split * 1e3:.1f} | {ratio:.2f} | "
                f"{memory:.2f} | {own:.2f} |"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
