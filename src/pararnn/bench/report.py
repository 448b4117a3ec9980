"""Rows of a benchmark as JSON, a Markdown table, and a plot."""

from __future__ import annotations

import importlib.util
import json
import platform
from pathlib import Path
from typing import Any

import torch

import pararnn

Rows = dict[str, list[dict[str, Any]]]
_LAYERS = {
    "paragru": "ParaGRU",
    "cudnn_gru": "cuDNN `nn.GRU`",
    "pararnn_torch_paragru": "pararnn-torch's ParaGRU",
    "paralstm": "ParaLSTM",
    "cudnn_lstm": "cuDNN `nn.LSTM`",
    "pararnn_torch_paralstm": "pararnn-torch's ParaLSTM",
    "hgrn": "`chunk_hgrn`, a linear recurrence alone",
}


def save(rows: Rows, folder: str | Path, command: str) -> None:
    """Write `gpu.json`, `gpu.md` and, where matplotlib is, `gpu.png`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"pararnn": pararnn.__version__, "torch": torch.__version__, "command": command}
    facts |= {"python": platform.python_version()}
    (folder / "gpu.json").write_text(json.dumps({"facts": facts, **rows}, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(rows, facts))
    if rows.get("length") and importlib.util.find_spec("matplotlib"):
        plot(rows, folder / "gpu.png")


def markdown(rows: Rows, facts: dict[str, str]) -> str:
    """The tables."""
    device = rows["device"][0]
    lines = [
        "# GPU benchmark",
        "",
        f"`{facts['command']}` on one {device['name']}, which copies "
        f"{device['copy_gigabytes_per_second']:,.0f} GB/s; torch {facts['torch']}. bfloat16, "
        "medians in milliseconds from cold caches; x is the time relative to the limit, in which "
        "the device copies what must be read and written.",
        "",
        "| cell | size | gates | forward | x | backward | x | one chunk, forward / backward | "
        "chunks | iterations | extra memory | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_recurrence_line(r) for r in rows.get("recurrence", [])]
    if rows.get("loop"):
        lines += [
            "",
            "Forward and backward of the recurrence in a CUDA graph, against a plain loop:",
            "",
        ]
        lines += ["| size | ours | loop | times as fast |", "|---|---|---|---|"]
        lines += [
            f"| {r['size']} | {r['ours_ms']:.3f} | {r['loop_ms']:.0f} | "
            f"{r['loop_ms'] / r['ours_ms']:,.0f} |"
            for r in rows["loop"]
        ]
    if rows.get("layer"):
        lines += ["", "Whole layers, launched from Python, forward / forward and backward:", ""]
        lines += [f"| size | {' | '.join(_LAYERS.values())} |", "|---" * (len(_LAYERS) + 1) + "|"]
        by_size = {r["size"]: dict(r) for r in rows["layer"]}
        for r in rows.get("pararnn_torch", []):
            by_size[r["size"]] |= {f"pararnn_torch_{k}": v for k, v in r.items()}
        for r in rows.get("hgrn", []):
            by_size[r["size"]] |= r
        lines += [
            f"| {size} | {' | '.join(_pair(r, name) for name in _LAYERS)} |"
            for size, r in by_size.items()
        ]
    if rows.get("length"):
        lines += ["", "One row of the batch, by length:", ""]
        lines += ["| size | forward | x | backward | x |", "|---|---|---|---|---|"]
        lines += [
            f"| {r['size']} | {r['forward_ms']:.4f} | {_ratio(r, 'forward')} | "
            f"{r['backward_ms']:.4f} | {_ratio(r, 'backward')} |"
            for r in rows["length"]
        ]
    for kind in ("wrong", "skipped"):
        lines += [f"\n{kind.capitalize()}: {r['what']}." for r in rows.get(kind, [])]
    if rows.get("length"):
        lines += ["", "![Time against length; speed-up over the loop](gpu.png)"]
    return "\n".join(lines) + "\n"


def _recurrence_line(r: dict[str, Any]) -> str:
    sequential = (
        f"{r['sequential_forward_ms']:.3f} / {r['sequential_backward_ms']:.3f}"
        if "sequential_forward_ms" in r
        else ""
    )
    return (
        f"| {r['cell']} | {r['size']} | {'slow' if r['slow'] else ''} | {r['forward_ms']:.4f} | "
        f"{_ratio(r, 'forward')} | {r['backward_ms']:.4f} | {_ratio(r, 'backward')} | "
        f"{sequential} | {r['chunks']} | {r['iterations']} | {r['extra_memory']:.1%} | "
        f"{r['error']:.0e} |"
    )


def _ratio(r: dict[str, Any], way: str) -> str:
    return f"{r[f'{way}_ms'] / r[f'limit_{way}_ms']:.2f}"


def _pair(r: dict[str, Any], name: str) -> str:
    if f"{name}_both_ms" not in r:
        return ""
    return f"{r[f'{name}_forward_ms']:.3f} / {r[f'{name}_both_ms']:.3f}"


def plot(rows: Rows, file: Path) -> None:
    """Time against length, and speed-up over the loop."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for hidden in ("D64", "D1024"):
        chosen = [r for r in rows["length"] if r["size"].endswith(f" {hidden}")]
        times = [int(r["size"].split()[1][1:]) for r in chosen]
        for way, style in (("forward", "-"), ("backward", "--")):
            label = f"{way}, {hidden[1:]} channels"
            left.loglog(times, [r[f"{way}_ms"] for r in chosen], style, marker="o", label=label)
    left.set(xlabel="steps", ylabel="milliseconds", title="ParaGRU, one sequence, bfloat16")
    left.legend()
    loop = [r for r in rows.get("loop", []) if r["size"].startswith("B1 ")]
    if loop:
        right.loglog(
            [r["time"] for r in loop], [r["loop_ms"] / r["ours_ms"] for r in loop], marker="o"
        )
    right.set(xlabel="steps", ylabel="times as fast", title="Against the loop, 1,024 channels")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
