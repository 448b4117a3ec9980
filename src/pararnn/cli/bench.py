"""`pararnn bench`."""

import sys
from dataclasses import dataclass
from pathlib import Path

from pararnn.bench import measure, save
from pararnn.bench.report import Rows
from pararnn.cli.arguments import parse


@dataclass(kw_only=True)
class BenchArguments:
    """Time the kernels on this GPU, against the copy limit and other implementations."""

    out: Path = Path("benchmarks-gpu")
    """Folder for gpu.json, gpu.md and gpu.png."""
    quick: bool = False
    """Only the recurrence at the sizes of the table."""
    pararnn_torch: Path | None = None
    """Folder that the package pararnn-torch is installed in, to time it too."""


def run(arguments: list[str]) -> int:
    """Measure, print every row as it comes, and store them."""
    parsed = parse(BenchArguments, "bench", arguments)
    rows: Rows = {}
    try:
        for kind, row in measure(parsed.quick, parsed.pararnn_torch):
            rows.setdefault(kind, []).append(row)
            print(kind, *(f"{k}={_short(v)}" for k, v in row.items()), flush=True)
            if "recurrence" not in rows:
                continue
            save(rows, parsed.out, " ".join(["pararnn bench", *arguments]))
    except RuntimeError as error:
        print(f"pararnn: {error}", file=sys.stderr)
        return 1
    print(f"Written to {parsed.out / 'gpu.md'}")
    return 1 if rows.get("wrong") else 0


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
