"""CPU benchmark: the generated C against the plain loop and `nn.GRU`, all in one run.

    python benchmarks/cpu.py [--quick] [--out docs/results/cpu.json]

Correctness first: every row is compared with the loop before it is timed. Times are medians; ratios
are what travels. About ten minutes on two cores, two with --quick.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pararnn
from pararnn.testing import assert_close, loop

SIZES = [(b, t, d) for b in (1, 8, 32) for t in (64, 512, 4096) for d in (16, 128, 1024)]
SIZES += [(8, 512, 64), (8, 512, 256), (8, 512, 512)]
LOOP_BYTES = 60  # the loop keeps about this many bytes per element of batch x time x hidden
MEMORY_LIMIT = 12e9


def milliseconds(run: Callable[[], Any], budget_s: float = 4.0) -> float:
    """Median time of one call after a warm-up, of 3 to 15 calls; 1 of those over 10 s."""
    run()
    times: list[float] = []
    while (
        not times
        or (len(times) < 3 and sum(times) < 10)
        or (len(times) < 15 and sum(times) < budget_s)
    ):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def forward_backward(
    run: Callable[..., Any], x: torch.Tensor, module: nn.Module
) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(*x.shape[:2], module.hidden_size, generator=generator)

    def call() -> list[torch.Tensor]:
        y = run(x)[0]
        gradients = torch.autograd.grad(y, [x, *module.parameters()], cotangent)
        return [y, *gradients]

    return call


def loop_rows(sizes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    rows = []
    for batch, steps, hidden in sizes:
        if batch * steps * hidden * LOOP_BYTES > MEMORY_LIMIT:
            continue
        torch.manual_seed(0)
        cell = pararnn.cells.ParaGRUCell(hidden, hidden)
        rnn = pararnn.RNN(cell, backend="c")
        x = torch.randn(batch, steps, hidden, requires_grad=True)
        state = torch.zeros(batch, hidden)
        ours = forward_backward(rnn, x, rnn)
        plain = forward_backward(lambda x, c=cell, s=state: loop(c, x, s), x, rnn)
        for i, (a, e) in enumerate(zip(ours(), plain(), strict=True)):
            assert_close(f"B{batch} T{steps} D{hidden} tensor {i}", a, e, rtol=1e-4)
        ours_ms = milliseconds(ours)
        loop_ms = milliseconds(plain, 2.0)
        rows.append(
            {"batch": batch, "time": steps, "hidden": hidden, "c_ms": ours_ms, "loop_ms": loop_ms}
        )
        print(
            f"B{batch} T{steps} D{hidden}: {ours_ms:.2f} ms, loop {loop_ms:.1f} ms, "
            f"{loop_ms / ours_ms:.1f} x",
            flush=True,
        )
    return rows


def layer_row(batch: int = 8, steps: int = 512, hidden: int = 256) -> dict[str, Any]:
    ours = pararnn.ParaGRU(hidden, hidden, batch_first=True)
    theirs = nn.GRU(hidden, hidden, batch_first=True)
    x = torch.randn(batch, steps, hidden, requires_grad=True)
    ours_ms = milliseconds(forward_backward(ours, x, ours))
    gru_ms = milliseconds(forward_backward(theirs, x, theirs))
    print(f"layer D{hidden}: {ours_ms:.2f} ms, nn.GRU {gru_ms:.1f} ms, {gru_ms / ours_ms:.1f} x")
    return {"batch": batch, "time": steps, "hidden": hidden, "layer_ms": ours_ms, "gru_ms": gru_ms}


_FIRST_CALL = """
import time, torch
begin = time.perf_counter()
import pararnn
imported = time.perf_counter()
rnn = pararnn.RNN(pararnn.cells.ParaGRUCell(64, 64))
x = torch.randn(2, 32, 64, requires_grad=True)
rnn(x)[0].sum().backward()
print(imported - begin, time.perf_counter() - imported)
"""


def start_up() -> dict[str, float]:
    """Seconds of importing the package beside torch, and of a first call without and with cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"PARARNN_CACHE": cache}
        runs = []
        for _ in range(4):
            done = subprocess.run(
                [sys.executable, "-c", _FIRST_CALL],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            runs.append([float(v) for v in done.stdout.split()])
    result = {
        "import_s": statistics.median(r[0] for r in runs),
        "first_call_s": runs[0][1],
        "later_process_s": statistics.median(r[1] for r in runs[1:]),
    }
    print(result)
    return result


_MEMORY = """
import pathlib, torch, pararnn
B, T, D = 8, 2048, 512
rnn = pararnn.RNN(pararnn.cells.{cell}(D, D), backend="c")
step = rnn.runner().traced.step
count, layout = step.recurrence, step.layout
slots = [1 + max(s for i, s in layout.drives if i == k) for k in range(layout.num_drive_inputs)]
drives = [torch.randn(B, T, k, 1, D, requires_grad=True) for k in slots]
weights = [torch.randn(1 + max(s for i, s in layout.coefficients if i == k), D)
           for k in sorted({i for i, _ in layout.coefficients})]
first = torch.zeros(B, count.num_components, D)
cotangent = torch.randn(B, T, D)
run = lambda u, g: torch.autograd.grad(
    torch.ops.pararnn.solve([*u, *weights], first, None, rnn.runner().request)[0], u, g)
run([torch.randn(B, 64, k, 1, D, requires_grad=True) for k in slots], cotangent[:, :64].clone())
status = pathlib.Path("/proc/self/status")
used = lambda key: int(status.read_text().split(key)[1].split()[0]) * 1024
pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = used("VmRSS:")
run(drives, cotangent)
one = B * T * D * 4
outputs = count.num_components * one
gradients = count.num_drives * one
inputs = (count.num_drives + 1) * one
print((used("VmHWM:") - before - outputs - gradients) / (inputs + outputs + gradients))
"""


def memory(cell: str) -> float:
    """Peak memory of forward+backward beyond inputs, outputs and gradients, relative to those."""
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY.replace("{cell}", cell)],
        capture_output=True,
        text=True,
        check=True,
    )
    extra = float(done.stdout)
    print(f"extra memory {cell}: {100 * extra:.1f} %")
    return extra


def markdown(result: dict[str, Any]) -> str:
    lines = [
        f"{result['machine']}, torch {result['torch']}, {result['threads']} threads, float32, "
        "ParaGRU, forward+backward, medians.",
        "",
        "| batch | time | hidden | generated C, ms | plain loop, ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for r in result["loop"]:
        lines.append(
            f"| {r['batch']} | {r['time']} | {r['hidden']} | {r['c_ms']:.2f} | "
            f"{r['loop_ms']:.0f} | {r['loop_ms'] / r['c_ms']:.1f} x |"
        )
    layer, start = result["layer"], result["start_up"]
    lines += [
        "",
        f"Layer with its projection, B{layer['batch']} T{layer['time']} D{layer['hidden']}: "
        f"{layer['layer_ms']:.1f} ms against {layer['gru_ms']:.1f} ms of `nn.GRU`: "
        f"{layer['gru_ms'] / layer['layer_ms']:.1f} x.",
        "",
        f"Import beside torch {start['import_s']:.2f} s; first call of a new cell "
        f"{start['first_call_s']:.2f} s; in a later process {start['later_process_s']:.2f} s.",
        "",
        "Memory of the recurrence forward+backward beyond inputs, outputs and gradients: "
        + ", ".join(f"{k} {100 * v:.1f} %" for k, v in result["memory"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the sizes of the targets")
    parser.add_argument("--out", type=Path, help="write JSON here and Markdown beside it")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "machine": processor(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "loop": loop_rows(SIZES[-3:] if options.quick else SIZES),
        "layer": layer_row(),
        "start_up": start_up(),
        "memory": {c: memory(c) for c in ("ParaGRUCell", "ParaLSTMCell")},
    }
    text = markdown(result)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
