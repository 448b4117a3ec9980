"""Memories with a matrix state on a GPU: the recurrence alone, from queries, keys, values, gates.

    python benchmarks/memories.py [--sizes 32,1024,36 ...] [--gates new] [--solver one ...]

Sizes are batch, time, heads. Inputs are bfloat16; a step makes a gate of each head's number. Gates
are random in every step, or with `--gates new` those of new cells, whose heads forget within 1 to
1,000 steps. `--solver one` leaves
time whole where the plan would cut it. Times are milliseconds: the median
of rounds of calls that follow each other without waiting. "extra" is the memory that forward and
backward take beside the inputs; outputs and gradients are part of it. Every row is compared with
the float64 loop on its first steps before it is timed. Where the package `xma` of the authors of
M2RNN is installed, its kernels are timed as well.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import pararnn

SIZES = ["32,1024,36", "8,2048,36", "32,2048,84", "1,16384,84"]
CHECKED = 24  # steps that are compared with the loop
SOLVERS = {"plan": None, "one": pararnn.Sequential()}


def gate(f: Tensor) -> Tensor:
    return torch.sigmoid(f)[:, :, None, None]


def m2rnn(h: Tensor, q: Tensor, k: Tensor, v: Tensor, f: Tensor, w: Tensor) -> Tensor:
    f = gate(f)
    new = torch.tanh(torch.einsum("nhkv,hvw->nhkw", h, w) + k.unsqueeze(-1) * v.unsqueeze(-2))
    return (f * h + (1 - f) * new).to(h.dtype)


def delta(h: Tensor, q: Tensor, k: Tensor, v: Tensor, f: Tensor, w: Tensor) -> Tensor:
    missing = v - torch.einsum("nhkv,nhk->nhv", h, k)
    update = k.unsqueeze(-1) * missing.unsqueeze(-2)
    return torch.tanh(gate(f) * h + update).to(h.dtype)


def outer(h: Tensor, q: Tensor, k: Tensor, v: Tensor, f: Tensor, w: Tensor) -> Tensor:
    f = gate(f)
    new = torch.tanh(w * h + k.unsqueeze(-1) * v.unsqueeze(-2))
    return (f * h + (1 - f) * new).to(h.dtype)


def invented(h: Tensor, q: Tensor, k: Tensor, v: Tensor, f: Tensor, w: Tensor) -> Tensor:
    """A memory that nobody has: an M2RNN whose rows are divided by their norms."""
    f = gate(f)
    mixed = torch.einsum("nhkv,hvw->nhkw", h, w) + k.unsqueeze(-1) * v.unsqueeze(-2)
    new = mixed / (1 + mixed.square().mean(-1, keepdim=True)).sqrt()
    return (f * h + (1 - f) * new).to(h.dtype)


def read(h: Tensor, q: Tensor, k: Tensor, v: Tensor, f: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("nhkv,nhk->nhv", h, q)


STEPS = {"m2rnn": m2rnn, "delta": delta, "outer": outer, "invented": invented}


def inputs(
    name: str, batch: int, time: int, heads: int, keys: int, values: int, gates: str = "random"
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Drives, weight and initial state."""
    torch.manual_seed(0)
    q, k = (torch.randn(batch, time, heads, keys, device="cuda") for _ in range(2))
    if name == "delta":
        q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    v = torch.randn(batch, time, heads, values, device="cuda")
    f = torch.rand(batch, time, heads, device="cuda").logit()
    if gates == "new":
        place = (torch.arange(heads, device="cuda") + 0.5) / heads
        f = torch.exp(-(1000.0**-place)).logit().expand_as(f)
    shape = (heads, keys, values) if name == "outer" else (heads, values, values)
    w = torch.rand(shape, device="cuda") - 0.5
    if name != "outer":
        w = torch.eye(values, device="cuda") + 0.1 * w
    h = torch.zeros(batch, heads, keys, values, device="cuda")
    half = [t.bfloat16().contiguous() for t in (q, k, v, f, w, h)]
    return half[:4], half[4], half[5]


def run(
    step: Callable[..., Tensor],
    drives: Sequence[Tensor],
    w: Tensor,
    h: Tensor,
    solver: pararnn.Solver | None = None,
) -> Tensor:
    y, _ = pararnn.scan(step, h, tuple(drives), (w,), readout=read, solver=solver)
    return y


def check(step: Callable[..., Tensor], drives: Sequence[Tensor], w: Tensor, h: Tensor) -> float:
    """The largest error of outputs and gradients on the first steps, relative to the largest."""
    found, expected = [], []
    for double in (False, True):
        cast = torch.Tensor.double if double else torch.Tensor.clone
        given = [cast(t[:2, :CHECKED].detach()).requires_grad_() for t in drives]
        weight = cast(w.detach()).requires_grad_()
        state = cast(h[:2].detach())
        if double:
            outputs = []
            for t in range(CHECKED):
                now = [d[:, t] for d in given]
                state = step(state, *now, weight)
                outputs.append(read(state, *now, weight))
            y = torch.stack(outputs, 1)
        else:
            y = run(step, given, weight, state)
        torch.manual_seed(1)
        cotangent = torch.randn(y.shape, device="cuda").to(y.dtype)
        wanted = [*given, weight]
        gradients = torch.autograd.grad(
            y, wanted, cotangent, allow_unused=True, materialize_grads=True
        )
        (expected if double else found).extend([y.detach(), *gradients])
    errors = [
        (a.double() - e).abs().max() / e.abs().max().clamp_min(1e-9)
        for a, e in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).max())


def milliseconds(call: Callable[[], Any], calls: int = 10, rounds: int = 5) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def theirs() -> Callable[..., Tensor] | None:
    """The recurrence of the authors' package, if it is installed."""
    try:
        from xma import m2rnn as recurrence  # type: ignore[import-not-found]
    except ImportError:
        return None
    return lambda drives, w, h: recurrence(*drives[:3], w, drives[3].sigmoid(), h)[0]


def row(
    name: str, sizes: Sequence[int], call: Callable[..., Tensor], given: Any, error: str
) -> str:
    drives, w, h = given
    tensors = [t.requires_grad_() for t in (*drives, w)]
    with torch.no_grad():
        forward = milliseconds(lambda: call(drives, w, h))
    cotangent = torch.randn_like(call(drives, w, h))
    both = lambda: torch.autograd.grad(  # noqa: E731
        call(drives, w, h), tensors, cotangent, allow_unused=True
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**30
    results = sum(t.numel() * t.element_size() for t in (*tensors, cotangent)) / 2**30
    shown = " | ".join(map(str, sizes))
    times = f"{forward:.2f} | {milliseconds(both):.2f}"
    return f"| {name} | {shown} | {times} | {extra:.2f} | {extra - results:.2f} | {error} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--keys", type=int, default=64)
    parser.add_argument("--values", type=int, default=16)
    parser.add_argument("--memories", nargs="+", default=list(STEPS))
    parser.add_argument("--gates", default="random", choices=["random", "new"])
    parser.add_argument("--solver", nargs="+", default=["plan"], choices=list(SOLVERS))
    options = parser.parse_args()
    print("| memory | batch | time | heads | forward | both | extra, GiB | but results | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    peer = theirs()
    for text in options.sizes:
        sizes = tuple(map(int, text.split(",")))
        for name in options.memories:
            given = inputs(name, *sizes, options.keys, options.values, options.gates)
            error = f"{check(STEPS[name], *given):.0e}"
            for solver in options.solver:
                ours = functools.partial(run, STEPS[name], solver=SOLVERS[solver])
                shown = name if len(options.solver) == 1 else f"{name}, {solver}"
                print(row(shown, sizes, ours, given, error), flush=True)
            if name == "m2rnn" and peer is not None:
                print(row("m2rnn, xma", sizes, peer, given, "-"), flush=True)


if __name__ == "__main__":
    main()
