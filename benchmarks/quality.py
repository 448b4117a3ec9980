"""Bits per byte of small language models after the same bytes: ours against the baselines.

    python benchmarks/quality.py [--data FOLDER] [--out FOLDER]

ParaGRU, ParaLSTM, Transformer and Mamba2 with about 24 million parameters, trained by
`pararnn train` on the source of Python's standard library, or on any text, byte by byte, in the
same order: bfloat16, blocks compiled on a GPU. Peak learning rates, weight decay and z-loss are
those of the paper's 400M models (Danieli et al. 2025, C.1). --max-timescale 0 gives ours the
paper's gates of zero bias as well.
Held-out text is evaluated in pieces of a sequence's length, each from its beginning, for all
models; ours also with the state carried along.

What is done is kept in --out: a model found there is not trained again, and a run that was stopped
goes on. --learning-rate, --max-timescale and --attention-every are for trying another rate, other
gates at the start, or hybrid stacks, with some --architectures in another --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from pararnn.lm.bench.models import release
from pararnn.lm.models.architectures import missing_kernels
from pararnn.lm.models.presets import ARCHITECTURES, preset
from pararnn.lm.training import RunError, RunFolder, TrainConfig, load_trained, train
from pararnn.lm.training.config import (
    ArchitectureConfig,
    ExecutionConfig,
    OptimizerConfig,
    ScheduleConfig,
    TextConfig,
)
from pararnn.lm.training.evaluation import evaluate
from pararnn.lm.training.metrics import read_metrics
from pararnn.lm.training.parallel import choose_device
from pararnn.lm.training.text import open_text

HEAD = 64  # channels, of attention and of Mamba2
COLUMNS = {
    "architecture": ("model", ""),
    "parameters": ("parameters", ","),
    "learning_rate": ("peak rate", "g"),
    "tokens": ("bytes trained on", ","),
    "seconds": ("seconds, compiling included", ".0f"),
    "tokens_per_second": ("bytes/s", ",.0f"),
    "train": ("training, bits per byte", ".3f"),
    "validation": ("held out, bits per byte", ".3f"),
    "carried": ("with the state carried", ".3f"),
}


def settings(architecture: str, options: argparse.Namespace) -> TrainConfig:
    """What differs between architectures is their depth, heads and the paper's peak rate."""
    theirs = preset(architecture, "400m")
    inside = 2 * options.width if architecture == "mamba2" else options.width
    baseline = architecture in ("transformer", "mamba2")
    return TrainConfig(
        data=options.data,
        model=architecture,
        out=options.out / architecture,
        steps=options.steps,
        checkpoint_every=options.steps,
        device=options.device,
        architecture=ArchitectureConfig(
            width=options.width,
            num_layers=options.layers * (2 if architecture == "mamba2" else 1),
            num_heads=max(1, inside // HEAD) if baseline else theirs.num_heads,
            initializer_std=0.02,
            attention_every=0 if baseline else options.attention_every,
            max_timescale=options.max_timescale or None,
        ),
        text=TextConfig(
            sequence_length=options.sequence_length,
            batch_size=options.batch_size,
            validation_tokens=options.validation_tokens,
        ),
        optimizer=OptimizerConfig(
            learning_rate=options.learning_rate or theirs.learning_rate,
            weight_decay=theirs.weight_decay,
            z_loss_weight=theirs.z_loss_weight,
            precision="bfloat16",
        ),
        schedule=ScheduleConfig(length=options.steps),
        execution=ExecutionConfig(compile=choose_device(options.device).type == "cuda"),
    )


def trained(config: TrainConfig) -> RunFolder:
    """A finished run; with its blocks as they are where the compiler cannot take them."""
    assert config.out is not None
    run = RunFolder(config.out)
    try:
        result = train(config, resume=run.config.exists())
    except RunError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if run.validation.exists():  # what is measured here is there
            print(f"{config.model} wrote no sample: {reason}", flush=True)
            return run
        if not config.execution.compile:
            raise
        print(f"{config.model} does not compile: {reason}", flush=True)
    else:
        if result.stopped_by is not None:
            raise SystemExit(128 + result.stopped_by)
        return run
    release()
    return trained(dataclasses.replace(config, execution=ExecutionConfig()))


def row(config: TrainConfig) -> dict[str, Any]:
    run = trained(config)
    stored = run.read_config()
    records = read_metrics(run.metrics)
    device = choose_device(stored.device)
    model, text = load_trained(run, device), open_text(stored, run)
    limit, chunk = stored.text.validation_tokens, stored.text.sequence_length

    def bits_per_byte(carry: bool) -> float:
        found = evaluate(model, text.validation, text.codec, limit=limit, chunk=chunk, carry=carry)
        return found.bits_per_byte

    last = [record["bits_per_byte"] for record in records[-max(1, len(records) // 20) :]]
    every = config.architecture.attention_every
    carries = config.model.startswith("para") and not every
    return {
        "architecture": config.model + (f" + attention every {every}" if every else ""),
        "parameters": sum(p.numel() for p in model.parameters()),
        "learning_rate": config.optimizer.learning_rate,
        "tokens": stored.steps * stored.text.batch_size * chunk,
        "seconds": json.loads(run.validation.read_text().splitlines()[-1])["train_seconds"],
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in records),
        "train": statistics.mean(last),
        "validation": bits_per_byte(carry=False),
        "carried": bits_per_byte(carry=True) if carries else None,
        "text": text.description,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "compiled": stored.execution.compile,
    }


def table(rows: list[dict[str, Any]], skipped: list[str]) -> str:
    """Markdown."""

    def cell(row: dict[str, Any], key: str) -> str:
        return "" if row[key] is None else format(row[key], COLUMNS[key][1])

    lines = [f"{rows[0]['device']}, torch {torch.__version__}; {rows[0]['text']}.", ""]
    lines.append(f"| {' | '.join(heading for heading, _ in COLUMNS.values())} |")
    lines.append("|---" * len(COLUMNS) + "|")
    lines += [f"| {' | '.join(cell(row, key) for key in COLUMNS)} |" for row in rows]
    bits = {row["architecture"]: row["validation"] for row in rows}
    ours = {name: value for name, value in bits.items() if name.startswith("para")}
    if ours and "transformer" in bits:
        better = min(ours, key=ours.__getitem__)
        ratio = ours[better] / bits["transformer"]
        lines += ["", f"{better} / transformer: {ratio:.3f} of its bits per byte held out."]
    eager = [row["architecture"] for row in rows if row["device"] != "CPU" and not row["compiled"]]
    lines += [f"{name}: blocks not compiled." for name in eager]
    return "\n".join([*lines, *skipped])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="text; else the standard library")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder of the runs")
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=7, help="blocks; Mamba2 has twice as many")
    parser.add_argument("--learning-rate", type=float, help="peak, instead of the paper's")
    parser.add_argument(
        "--max-timescale",
        type=float,
        default=ArchitectureConfig.max_timescale,
        help="steps over which ours forget at first; 0: biases of zero, as in the paper",
    )
    parser.add_argument("--attention-every", type=int, default=0, help="blocks, of ours; 0: none")
    parser.add_argument("--validation-tokens", type=int, default=1_048_576)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / "results.json"
    rows = json.loads(results.read_text()) if results.exists() else []
    skipped = []
    for architecture in options.architectures:
        missing = missing_kernels(architecture)
        if missing and choose_device(options.device).type == "cuda":
            skipped.append(f"{architecture}: not trained ({missing}).")
        elif architecture not in {row["architecture"].split()[0] for row in rows}:
            release()
            rows.append(row(settings(architecture, options)))
            results.write_text(json.dumps(rows, indent=1) + "\n")
            print(table(rows[-1:], []), flush=True)
    if rows:
        print(f"\n{table(rows, skipped)}")


if __name__ == "__main__":
    main()
