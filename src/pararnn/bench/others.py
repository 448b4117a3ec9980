"""Whole layers and other implementations: timed, not compared."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pararnn
from pararnn.bench.problem import Row, Size
from pararnn.bench.timing import milliseconds


def _forward_backward(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    inputs = [x, *module.parameters()]

    def call() -> Any:
        y = module(x)[0]
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    return call


def layer_row(size: Size) -> Row:
    """Whole layers with their projections beside cuDNN's `nn.GRU` and `nn.LSTM`, bfloat16."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(size.batch, size.time, size.hidden, requires_grad=True, **options)
    row: Row = {"size": str(size)}
    widths = (size.hidden, size.hidden)
    layers: dict[str, nn.Module] = {
        "paragru": pararnn.RNN(pararnn.cells.ParaGRUCell(*widths, **options)),
        "paralstm": pararnn.RNN(pararnn.cells.ParaLSTMCell(*widths, **options)),
    }
    if size.time <= 2048:  # cuDNN takes seconds for longer ones
        for name, kind in (("cudnn_gru", nn.GRU), ("cudnn_lstm", nn.LSTM)):
            layer = kind(*widths, batch_first=True, **options)
            layer.flatten_parameters()
            layers[name] = layer
    for name, module in layers.items():
        with torch.no_grad():
            row[f"{name}_forward_ms"] = milliseconds(functools.partial(module, x))
        both = _forward_backward(module, x)
        row[f"{name}_both_ms"] = milliseconds(both, budget_ms=500.0)
    return row


def hgrn_row(size: Size) -> Row:
    """flash-linear-attention's linear recurrence `chunk_hgrn` of the same width."""
    from fla.ops.hgrn import chunk_hgrn

    shape = (size.batch, size.time, size.hidden)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = nn.functional.logsigmoid(torch.randn_like(x)).detach().requires_grad_()
    cotangent = torch.randn_like(x)

    def both() -> Any:
        return torch.autograd.grad(chunk_hgrn(x, g)[0], [x, g], cotangent)

    with torch.no_grad():
        forward_ms = milliseconds(lambda: chunk_hgrn(x, g))
    return {"size": str(size), "hgrn_forward_ms": forward_ms, "hgrn_both_ms": milliseconds(both)}


def pararnn_torch_rows(folder: str | Path, sizes: Iterable[Size]) -> list[Row]:
    """Layers of the package pararnn-torch, which is imported under the same name as this one.

    Args:
        folder: Where it was installed: `pip install --no-deps --target FOLDER pararnn-torch`.
        sizes: Those to time; one that does not fit the device's memory is left out.

    Raises:
        RuntimeError: It is not there, or failed.
    """
    script = Path(__file__).with_name("pararnn_torch.py")
    given = json.dumps([(str(s), s.batch, s.time, s.hidden) for s in sizes])
    environment = os.environ | {"PYTHONPATH": str(Path(folder).resolve())}
    command = [sys.executable, str(script), given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pararnn-torch in {folder} does not run: {done.stderr.strip()[-500:]}")
    rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
    return rows
