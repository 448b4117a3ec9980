"""How fast `pararnn train` is for whoever types it: its first step, and the steps after it.

    python benchmarks/train_command.py cold     first step with empty caches of compiled kernels
    python benchmarks/train_command.py warm     first step with the caches that `cold` left
    python benchmarks/train_command.py bench    the same model in `pararnn bench train`

Each part takes one to two minutes on one H200. The model is a preset that reads bytes, with the
preset's sequences per forward pass; what else is given goes to `pararnn train`. A run is ended once
it has done its steps, without a last checkpoint and report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "PARARNN_CACHE": "pararnn",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("cold", "warm", "bench"))
    parser.add_argument("--size", default="400m")
    parser.add_argument("--model", default="paragru")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=Path("runs/train-command"))
    options, others = parser.parse_known_args()
    caches = options.folder.resolve() / "caches"
    if options.part == "cold":
        shutil.rmtree(caches, ignore_errors=True)
    environment = {**os.environ, **{name: str(caches / sub) for name, sub in CACHES.items()}}
    if options.part == "bench":
        bench(options, others, environment)
    else:
        train(options, others, environment)


def bench(options: argparse.Namespace, others: list[str], environment: dict[str, str]) -> None:
    words = ["bench", "train", "--preset", options.size, "--architectures", options.model]
    words += ["--vocab-size", "256", "--out", str(options.folder / "bench"), *others]
    subprocess.run([sys.executable, "-m", "pararnn.cli", *words], env=environment, check=True)


def train(options: argparse.Namespace, others: list[str], environment: dict[str, str]) -> None:
    options.folder.mkdir(parents=True, exist_ok=True)
    run = Path(tempfile.mkdtemp(dir=options.folder)) / "run"
    words = ["train", "--size", options.size, "--model", options.model, "--out", str(run)]
    words += ["--validate-every", "0", *others]
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "pararnn.cli", *words], env=environment)
    try:
        records = wait(run / "metrics.jsonl", 1, process)
        first_line = time.perf_counter() - begin
        records = wait(run / "metrics.jsonl", options.steps, process)
    finally:
        process.kill()
        process.wait()
    settings = json.loads((run / "config.json").read_text())["text"]
    tokens = settings["global_batch_size"] * settings["sequence_length"]
    speeds = [record["tokens_per_second"] for record in records]
    print(
        f"{options.part}: first step {tokens / speeds[0]:.1f} s; its line in metrics.jsonl "
        f"{first_line:.1f} s after the command, which is once the second step is started; then "
        f"{statistics.median(speeds[2:] or speeds):,.0f} tokens per second (median)"
    )
    shutil.rmtree(run.parent, ignore_errors=True)


def wait(metrics: Path, count: int, process: subprocess.Popen[bytes]) -> list[dict[str, float]]:
    """The records of a run once there are so many."""
    while True:
        lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
        if len(whole) >= count:
            return whole
        if process.poll() is not None:
            raise SystemExit(f"the run ended with status {process.returncode}")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
