"""Rows of the language-model benchmarks as JSON and a Markdown table."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pararnn
from pararnn.bench.problem import Row


@dataclass(frozen=True)
class Table:
    """What a benchmark shows.

    Attributes:
        name: Of its two files.
        title: Heading.
        text: What was measured and how.
        columns: Key of a row, heading, and format of its values.
    """

    name: str
    title: str
    text: str
    columns: tuple[tuple[str, str, str], ...]


_DECODE = Table(
    "decode",
    "Generation benchmark",
    "One greedy step of generation per token, bfloat16, on a GPU compiled and captured in a CUDA "
    "graph. The limit is the time in which the device copies as many bytes as a step must read and "
    "write: all weights but the embedding, and the recurrent state or the key-value cache of the "
    "context.",
    (
        ("architecture", "model", ""),
        ("weights", "weights", ""),
        ("batch", "texts", ""),
        ("context", "context", ","),
        ("tokens_per_second", "tokens/s", ",.0f"),
        ("token_ms", "ms per step", ".3f"),
        ("limit_ms", "limit, ms", ".3f"),
        ("share_of_limit", "limit / measured", ".0%"),
    ),
)
_TRAIN = Table(
    "train",
    "Training benchmark",
    "One train step: forward and backward in bfloat16 autocast, fused AdamW; on a GPU every block "
    "is compiled. MFU counts 6 operations per token for every parameter outside the embedding, and "
    "attention. Kernels is the time in which a GPU is busy, by a trace: where a step takes longer, "
    "it waits for Python. Recurrence is the share of its kernels in that time.",
    (
        ("architecture", "model", ""),
        ("parameters", "parameters", ","),
        ("batch", "sequences per GPU", ""),
        ("time", "tokens each", ","),
        ("tokens_per_second", "tokens/s", ",.0f"),
        ("step_ms", "ms per step", ",.1f"),
        ("kernels_ms", "kernels, ms", ",.1f"),
        ("mfu", "MFU", ".1%"),
        ("peak_memory_gib", "peak GiB", ".1f"),
        ("checkpointing", "checkpointing", ""),
        ("recurrence_share", "recurrence", ".1%"),
    ),
)
TABLES = {"decode": _DECODE, "train": _TRAIN}


def facts_of(device: torch.device, count: int, size: object, command: str) -> dict[str, Any]:
    """What the rows depend on; `count` devices of a kind."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.machine() + " CPU"
    versions = {"pararnn": pararnn.__version__, "torch": torch.__version__}
    return {"device": name, "devices": count, "size": str(size), "command": command, **versions}


def save_table(table: Table, rows: list[Row], facts: dict[str, Any], folder: Path) -> Path:
    """Write NAME.json and NAME.md; returns the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"facts": facts, "rows": rows}
    (folder / f"{table.name}.json").write_text(json.dumps(stored, indent=1) + "\n")
    path = folder / f"{table.name}.md"
    path.write_text(_markdown(table, rows, facts))
    return path


def _markdown(table: Table, rows: list[Row], facts: dict[str, Any]) -> str:
    device = f"one {facts['device']}"
    if facts["devices"] > 1:
        device = f"{facts['devices']} processes with a {facts['device']} each (FSDP2)"
    lines = [f"# {table.title}", "", f"`{facts['command']}` on {device}, torch "]
    lines[-1] += f"{facts['torch']}; {facts['size']}. {table.text}"
    lines += ["", f"| {' | '.join(heading for _, heading, _ in table.columns)} |"]
    lines += ["|---" * len(table.columns) + "|"]
    measured = [row for row in rows if "skipped" not in row]
    lines += [
        f"| {' | '.join(_cell(row, k, f) for k, _, f in table.columns)} |" for row in measured
    ]
    skipped = [f"{_label(row)}: {row['skipped']}" for row in rows if "skipped" in row]
    notes = sorted({f"{row['architecture']}: {row['note']}" for row in rows if row["note"]})
    lines += [f"\nSkipped: {line}." for line in skipped] + [f"\nNote: {line}." for line in notes]
    return "\n".join(lines) + "\n"


def _label(row: Row) -> str:
    context = f", context {row['context']:,}" if row.get("context") else ""
    return f"{row['architecture']}, batch {row['batch']}{context}"


def _cell(row: Row, key: str, form: str) -> str:
    value = row[key]
    if key == "context" and value is None:
        return "any"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else format(value, form)
