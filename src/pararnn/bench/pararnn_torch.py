"""Times pararnn-torch: a script for a process in which `pararnn` is that package.

Its argument is a JSON list of [name, batch, steps, channels]; it prints one list of rows.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch


def rows(sizes: list[tuple[str, int, int, int]]) -> list[dict[str, Any]]:
    """Forward, and forward and backward, of both its layers."""
    theirs = importlib.import_module("pararnn")
    if not hasattr(theirs, "ParaRNN"):
        sys.exit(f"the package pararnn in {theirs.__file__} is not pararnn-torch")
    milliseconds = runpy.run_path(str(Path(__file__).with_name("timing.py")))["milliseconds"]
    found = []
    for name, batch, time, hidden in sizes:
        row: dict[str, Any] = {"size": name}
        for key, cell in (("paragru", theirs.ParaGRU), ("paralstm", theirs.ParaLSTM)):
            options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
            x = torch.randn(batch, time, hidden, requires_grad=True, **options)
            layer = theirs.ParaRNN(cell(hidden, hidden, **options), solver="newton")
            inputs = [x, *layer.parameters()]

            def forward(layer: Any = layer, x: Any = x) -> Any:
                with torch.no_grad():
                    return layer(x)

            def both(layer: Any = layer, x: Any = x, inputs: Any = inputs) -> Any:
                y = layer(x)
                return torch.autograd.grad(y, inputs, torch.ones_like(y))

            try:
                row[f"{key}_forward_ms"] = milliseconds(forward)
                row[f"{key}_both_ms"] = milliseconds(both, budget_ms=500.0)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        found.append(row)
    return found


if __name__ == "__main__":
    print(json.dumps(rows(json.loads(sys.argv[1]))))
