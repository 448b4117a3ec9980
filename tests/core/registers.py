"""What the kernels become for an H100, without one: registers, spills, shared memory, instructions.

    python -m tests.core.registers                      a table of all kernels
    python -m tests.core.registers --write new.json     and a file of it, or new rows in one
    python -m tests.core.registers --compare old.json   only what is not as in a file
    python -m tests.core.registers --only "gru half"    cases with all of these words

Layers are called as a user calls them, on a GPU that is not there (see `pretend_gpu`), so any tree
can be measured by the same file: PYTHONPATH says which. Kernels are numbered in the order in which
a call launches them first, and may be called anything.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "pararnn-registers"))

import torch
import triton
from torch import nn
from triton.runtime.jit import JITFunction

from pararnn import RNN, Newton
from pararnn.cells import (
    BlockGRUCell,
    DeltaMemoryCell,
    LayerNormLSTMCell,
    M2RNNCell,
    OuterMemoryCell,
    ParaGRUCell,
    ParaLSTMCell,
    SLSTMCell,
)

from .pretend_gpu import Driver, pretend_gpu

GOLDEN = Path(__file__).parents[1] / "golden" / "registers.json"
INPUT, HIDDEN = 16, 128
DTYPES = {"half": torch.bfloat16, "single": torch.float32}
SASS = "LDG STG LDL STL LDS STS FFMA FADD FMUL DFMA MUFU SHFL BAR HMMA".split()
PTX = {
    "load": r"ld\.global",
    "store": r"st\.global",
    "fma": r"fma\.",
    "tanh": r"tanh\.",
    "ex2": r"ex2\.",
    "divide": r"(div|rcp)\.",
    "shuffle": r"shfl\.",
    "barrier": r"bar(rier)?\.",
    "prefetch": r"prefetch",
}


class Heads(nn.Module):
    """A GRU whose recurrent weights are a block per head."""

    def __init__(self, input_size: int, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.num_components = input_size, hidden_size, 1
        size = hidden_size // heads
        self.input = nn.Linear(input_size, 3 * hidden_size)
        self.blocks = nn.Parameter(torch.randn(heads, size, 3 * size) / size)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        heads = h.unflatten(1, (len(self.blocks), -1))
        mixed = torch.einsum("nhi,hij->nhj", heads, self.blocks)
        mixed = mixed.unflatten(2, (3, -1)).transpose(1, 2).flatten(2)
        u_z, u_r, u_c = self.input(x).unflatten(1, (3, -1)).unbind(1)
        m_z, m_r, m_c = mixed.unbind(1)
        z, r = torch.sigmoid(u_z + m_z), torch.sigmoid(u_r + m_r)
        return (1 - z) * h + z * torch.tanh(u_c + r * m_c)


ELEMENTWISE = {"gru": ParaGRUCell, "lstm": ParaLSTMCell, "slstm": SLSTMCell}
MIXING = {
    "heads": functools.partial(Heads, INPUT, HIDDEN, 4),
    "small_heads": functools.partial(Heads, INPUT, HIDDEN, 32),
    "dense_gru": functools.partial(nn.GRUCell, INPUT, 64),
    "dense_lstm": functools.partial(nn.LSTMCell, INPUT, 32),
}
NORMED_CELLS = {  # whose weights are read at every step too
    "block_gru": functools.partial(BlockGRUCell, INPUT, 512),
    "layer_norm_lstm": functools.partial(LayerNormLSTMCell, INPUT, 256),
}
MEMORIES = {"m2rnn": M2RNNCell, "delta": DeltaMemoryCell, "outer": OuterMemoryCell}
NORMED = json.dumps(  # a vector that is normed and scaled, as a saved program has it
    {
        "leaves": [[0, 1024, 1024, 1024]] * 2,
        "nodes": [
            ["drive", 0],
            ["mul", [0], [0]],
            ["mean", [1]],
            ["add", [2], 1e-5],
            ["rsqrt", [3]],
            ["mul", [0], [4]],
            ["drive", 1],
            ["mul", [5], [6]],
        ],
        "roots": [[7]],
    }
)


class Recorder:
    """Collects the kernels that are launched, by case, direction and number."""

    def __init__(self) -> None:
        self.kernels: dict[str, list[Any]] = {}
        self.place = ""
        self._run = JITFunction.run
        recorder = self

        def run(function: Any, *args: Any, warmup: bool, **kwargs: Any) -> Any:
            kernel = recorder._run(function, *args, warmup=warmup, **kwargs)
            if not warmup:
                known = recorder.kernels.setdefault(recorder.place, [])
                if all(k is not kernel for _, k in known):
                    known.append((function.__name__, kernel))
            return kernel

        JITFunction.run = run


def call(
    recorder: Recorder,
    name: str,
    make: Callable[[], nn.Module],
    solver: Newton | None,
    size: tuple[int, int],
    starts: str = "none",
    kind: torch.dtype = torch.float32,
) -> None:
    """A layer forwards and backwards, on so many sequences of so many steps."""
    torch.manual_seed(0)
    rnn = RNN(make(), solver=solver).to(kind)
    batch, time = size
    x, more = torch.randn(batch, time, INPUT).to(kind), {}
    if starts == "resets":
        more = {"resets": torch.zeros(batch, time, dtype=torch.bool)}
    if starts == "packed":
        x = x.flatten(0, 1).unsqueeze(0)
        more = {"cu_seqlens": torch.arange(0, batch * time + 1, time)}
    recorder.place = f"{name} forward"
    y, _ = rnn(x, **more)
    recorder.place = f"{name} adjoint"
    y.backward(torch.ones_like(y))


def product(recorder: Recorder, name: str, kind: torch.dtype, texts: int = 1) -> None:
    """Two matrices and one vector, of one or of several texts."""
    from pararnn.kernels import matvec  # noqa: F401  # which defines the operator

    recorder.place = name
    leaves = [torch.randn(1024 * texts).to(kind) for _ in range(2)]
    matrices = [torch.randn(1, 2048, 1024).to(kind) for _ in range(2)]
    of_products = [str(kind).removeprefix("torch.")]
    torch.ops.pararnn.matvec(leaves, matrices, of_products, texts, NORMED)


def cases() -> dict[str, Callable[[Recorder, str], None]]:
    """What is compiled, by name."""
    found: dict[str, Callable[[Recorder, str], None]] = {}
    size, one = (16, 256), Newton(chunk=16 * 256)
    every = itertools.product(ELEMENTWISE, DTYPES, ("many", "one"), ("none", "resets", "packed"))
    for cell, kind, chunks, starts in every:
        if kind == "half" or starts == "none" or (cell, starts) == ("gru", "resets"):
            make = functools.partial(ELEMENTWISE[cell], INPUT, HIDDEN)
            solver = Newton(chunk=32) if chunks == "many" else one
            run = functools.partial(call, make=make, solver=solver, size=size)
            run = functools.partial(run, kind=DTYPES[kind], starts=starts)
            found[f"{cell} {kind} {chunks} {starts}"] = run
    gru = functools.partial(ELEMENTWISE["gru"], INPUT, HIDDEN)
    run = functools.partial(call, make=gru, size=size)
    warns = Newton(chunk=32, damping=0.1, on_failure="warn")
    found["gru half many reports"] = functools.partial(run, solver=warns, kind=torch.bfloat16)
    found["gru double one none"] = functools.partial(run, solver=one, kind=torch.float64)
    methods = {"auto": None, "newton": Newton(chunk=128, max_iterations=1)}
    for cell, starts, method in itertools.product(MIXING, ("none", "resets"), methods):
        run = functools.partial(call, make=MIXING[cell], solver=methods[method])
        found[f"{cell} {method} {starts}"] = functools.partial(run, size=(4, 1024), starts=starts)
    wide = functools.partial(nn.GRUCell, INPUT, 256)  # its weights do not fit on the chip
    found["wide_gru auto none"] = functools.partial(call, make=wide, solver=None, size=(4, 4096))
    for cell, make in NORMED_CELLS.items():
        run = functools.partial(call, make=make, solver=None, size=(16, 512))
        found[f"{cell} auto none"] = run
    for cell, kind in itertools.product(MEMORIES, DTYPES):
        make = functools.partial(MEMORIES[cell], INPUT, 64, 16, num_heads=36)
        run = functools.partial(call, make=make, solver=None, size=(32, 64), kind=DTYPES[kind])
        found[f"{cell} {kind} none"] = run
        found[f"{cell} {kind} chunks"] = functools.partial(run, size=(1, 8192))
    for kind, dtype in DTYPES.items():
        found[f"matvec {kind}"] = functools.partial(product, kind=dtype)
    found["matvec_texts half"] = functools.partial(product, kind=DTYPES["half"], texts=2)
    return found


def measure(kernel: Any) -> dict[str, Any]:
    """What there is to know of a compiled kernel."""
    ptx, sass, usage = kernel.asm["ptx"], *_disassembled(kernel.asm["cubin"])
    steps = [line.split("//")[0].strip() for line in ptx.splitlines()]
    steps = [s for s in steps if s and not s.startswith((".", "{", "}", ")", "(", "$"))]
    names = [re.sub(r"^@!?%\w+\s+", "", s).split()[0].rstrip(";") for s in steps]
    counted = collections.Counter(op.split(".")[0] for op in sass)
    found = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": counted["STL"] + counted["LDL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": len(sass),
        "ptx": len(names),
    }
    found |= {n: sum(bool(re.match(p, o)) for o in names) for n, p in PTX.items()}
    found |= {n: counted[n] for n in SASS if counted[n]}
    return found | {"order": _digest(names), "kinds": _digest(sorted(names))}


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def _disassembled(cubin: bytes) -> tuple[list[str], str]:
    """The operations of the machine, and what cuobjdump says of resources."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = functools.partial(subprocess.check_output, text=True)
        sass = run([tools / "nvdisasm", "-c", file.name])
        usage = run([tools / "cuobjdump", "-res-usage", file.name], stderr=subprocess.STDOUT)
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    return [op for op in found if op != "NOP"], usage


def measured(words: list[str]) -> dict[str, dict[str, Any]]:
    """What there is to know of all kernels of the cases with all of these words."""
    triton.runtime.driver.set_active(Driver())
    recorder = Recorder()
    found = {}
    with pretend_gpu(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about a GPU
        for name, case in cases().items():
            if not set(words) <= set(name.split()):
                continue
            recorder.kernels.clear()
            case(recorder, name)
            for place, kernels in recorder.kernels.items():
                for i, (function, kernel) in enumerate(kernels):
                    row = {"kernel": function, **measure(kernel)}
                    found[f"{place} {i}"] = row
                    print(f"{place} {i}".ljust(36), *_shown(row), flush=True)
    return found


def _shown(row: dict[str, Any]) -> list[str]:
    numbers = [f"{n} {v}" for n, v in row.items() if isinstance(v, int) and v]
    return [row["kernel"].ljust(8), ", ".join(numbers)]


def differences(
    old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]], words: list[str]
) -> Iterator[str]:
    """What is not the same in two measurements, in words."""
    for name in dict.fromkeys((*old, *new)):
        if not set(words) <= set(name.split()):
            continue
        if name not in old or name not in new:
            yield f"{name}: only in the {'old' if name in old else 'new'}"
            continue
        before, after = old[name], new[name]
        if before == after:
            continue
        numbers = [k for k in (*before, *after) if k not in ("order", "kinds")]
        changes = [
            f"{k} {before.get(k, 0)} -> {after.get(k, 0)}"
            for k in dict.fromkeys(numbers)
            if before.get(k, 0) != after.get(k, 0)
        ]
        if before["kinds"] == after["kinds"]:
            changes.append(
                "the same instructions"
                + ("" if before["order"] == after["order"] else " in another order")
            )
        yield f"{name}: {', '.join(changes)}"


def write(path: Path, new: dict[str, dict[str, Any]], words: list[str]) -> None:
    """Write a file, or what was measured anew into one that is there."""
    old = json.loads(path.read_text())["kernels"] if path.exists() else {}
    rows = {n: row for n, row in old.items() if not set(words) <= set(n.split())} | new
    lines = ",\n".join(f"  {json.dumps(n)}: {json.dumps(row)}" for n, row in rows.items())
    path.write_text(f'{{"triton": "{triton.__version__}", "kernels": {{\n{lines}\n}}}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="words, all of which a case's name must have")
    parser.add_argument("--write", type=Path, help="a file to write, or to bring up to date")
    parser.add_argument("--compare", type=Path, help="a file that --write wrote")
    options = parser.parse_args()
    words = options.only.split()
    new = measured(words)
    print(f"{len(new)} kernels of {Path(sys.modules['pararnn'].__file__).parents[2]}")
    if options.write:
        write(options.write, new, words)
    if options.compare:
        old = json.loads(options.compare.read_text())
        if old["triton"] != triton.__version__:
            print(f"measured with Triton {old['triton']}, and now with {triton.__version__}")
        found = list(differences(old["kernels"], new, words))
        print("\n".join(found) or "all as before")


if __name__ == "__main__":
    main()
