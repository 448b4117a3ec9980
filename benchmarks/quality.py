"""Which language model is best at one size: a search over mixers, learning rates, seeds and texts.

    python benchmarks/quality.py [--text code --text prose=FOLDER] [--models ...] [--minutes M]
    python benchmarks/quality.py --times [--models ...]

Models of about 24 million parameters are trained on the same bytes in the same order, by what
`pararnn train` does: bfloat16, blocks compiled on a GPU, weight decay and z-loss of the paper's
400M models (Danieli et al. 2025, C.1). Several train side by side, each in a process of its own.
--models takes `transformer`, `mamba2` and stacks as `pararnn train --model` does, with options of
their memories behind a colon: `m2rnn+delta:key_size=128` or `m2rnn:nonlinearity=linear`. `all` is
the whole search: cells and memories alone, ParaGRU and linear memories in turn, memories in turn
with more keys, 1 to 3 memories among ParaGRU blocks, memories that are linear or squashed,
attention in one block.
Every model has every rate of --rates. Those whose best is within --close of the best of their kind,
with or without attention, get --seeds seeds at that rate.

What is done is kept in --out: the same command goes on where it was stopped, by a signal or by
--minutes. After a signal the exit status is 128 plus its number. `table.md` and, with matplotlib,
`curves.png` are written at every end. Held-out text is evaluated in pieces of a sequence's length,
for stacks without attention also with the state carried along. Steps of models that share a GPU
take longer, so --times measures every model alone; it trains nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pararnn.lm.bench.models import release
from pararnn.lm.bench.train import measure_model
from pararnn.lm.catalogue import ATTENTION, BASELINES, LINEAR, MEMORIES, OwnName
from pararnn.lm.data import PrepareConfig, prepare
from pararnn.lm.data.recipes import STANDARD_LIBRARY
from pararnn.lm.models import ParaRNNForCausalLM
from pararnn.lm.models.architectures import missing_kernels
from pararnn.lm.models.causal_loss import CausalLoss
from pararnn.lm.models.presets import preset
from pararnn.lm.training import RunError, RunFolder, TrainConfig, load_trained, train
from pararnn.lm.training.config import (
    ArchitectureConfig,
    ExecutionConfig,
    OptimizerConfig,
    ScheduleConfig,
    TextConfig,
    check_new,
)
from pararnn.lm.training.evaluation import carries_state, evaluate
from pararnn.lm.training.language_model import build_model, outline_model
from pararnn.lm.training.metrics import read_metrics
from pararnn.lm.training.parallel import Processes, choose_device
from pararnn.lm.training.text import Codec, open_text

HEAD = 64  # channels, of attention, of Mamba2 and of linear memories
LOOK_EVERY = 0.5  # seconds between looks at the processes
SHOWN = 2.0  # bits per byte, the most that curves show
GRACE = 120.0  # seconds in which a process that is stopped writes its checkpoint
STOPPED = "Stopped; the same command goes on."
COLUMNS = {
    "text": ("text", ""),
    "model": ("model", ""),
    "parameters": ("parameters", ","),
    "state": ("numbers of state", ","),
    "rate": ("best rate", "g"),
    "seeds": ("seeds", ""),
    "loss": ("held out, nats per byte", ".4f"),
    "bits": ("held out, bits per byte", ".4f"),
    "ratio": ("bits / Transformer's", ".3f"),
    "carried": ("bits, state carried", ".4f"),
    "train": ("bits in training", ".4f"),
    "step_ms": ("ms per step, alone", ".1f"),
    "kernels_ms": ("of it kernels", ".1f"),
    "time_ratio": ("time / Transformer's", ".2f"),
}


@dataclass(frozen=True)
class Unit:
    """One model on one text, from one seed at one peak rate."""

    text: str
    model: str
    rate: float
    seed: int

    def folder(self, out: Path) -> Path:
        """Where its run is."""
        name = f"{self.model.replace(':', '-').replace('=', '-')}-{self.rate:g}-{self.seed}"
        return out / "runs" / self.text / name


def stack(memory: str, count: int, blocks: int, base: str = "paragru") -> str:
    """A few blocks of a memory, spread evenly among others: `3xparagru+m2rnn+3xparagru`."""
    places = {round((i + 1) * (blocks + 1) / (count + 1)) - 1 for i in range(count)}
    names = [memory if i in places else base for i in range(blocks)]
    runs = ((name, len(list(same))) for name, same in itertools.groupby(names))
    return "+".join(name if times == 1 else f"{times}x{name}" for name, times in runs)


def all_models(blocks: int) -> list[str]:
    """The whole search, what tells most first."""
    memories = ["1xmamba2" if name in BASELINES else name for name in MEMORIES]
    some = [stack(name, count, blocks) for count in (2, 1, 3) for name in MEMORIES]
    other = {"tanh": "linear", "linear": "tanh"}
    published = (getattr(MEMORIES[name], "published", "tanh") for name in MEMORIES)
    squashed = [f"{m}:nonlinearity={other[p]}" for m, p in zip(memories, published, strict=True)]
    attention = [stack(ATTENTION, 1, blocks, base) for base in ("paragru", *MEMORIES)]
    keys = [f"m2rnn+delta:key_size={size}" for size in (64, 128, 256)]
    turns = [
        f"paragru+{name}:key_size={size},value_size={HEAD}"
        for size in (128, 256)
        for name in LINEAR
    ]
    first = ["transformer", "paragru", "paralstm", *turns, *keys]
    return [*first, *memories, *some, *attention, *squashed, "mamba2"]


def settings(unit: Unit, options: argparse.Namespace) -> TrainConfig:
    """What differs between baselines is their depth and heads."""
    name, colon, memory = unit.model.partition(":")
    mamba2, baseline = name == "mamba2", name in BASELINES
    theirs = preset(name if baseline else "paragru", "400m")
    inside = 2 * options.width if mamba2 else options.width
    return TrainConfig(
        data=options.out / "data" / unit.text,
        model=name,
        memory_options=tuple(memory.split(",")) if colon else (),
        out=unit.folder(options.out),
        seed=unit.seed,
        steps=options.steps,
        checkpoint_every=options.steps,
        validate_every=0,  # only the end counts
        device=options.device,
        architecture=ArchitectureConfig(
            width=options.width,
            num_layers=options.layers * (2 if mamba2 else 1),
            num_heads=max(1, inside // HEAD) if baseline else theirs.num_heads,
            initializer_std=0.02,
            max_timescale=options.max_timescale or None,
        ),
        text=TextConfig(
            sequence_length=options.sequence_length,
            batch_size=options.batch_size,
            validation_tokens=options.validation_tokens,
        ),
        optimizer=OptimizerConfig(
            learning_rate=unit.rate,
            weight_decay=theirs.weight_decay,
            z_loss_weight=theirs.z_loss_weight,
            precision="bfloat16",
        ),
        schedule=ScheduleConfig(length=options.steps),
        execution=execution(options),
    )


def execution(options: argparse.Namespace) -> ExecutionConfig:
    on_gpu = choose_device(options.device).type == "cuda"
    return ExecutionConfig(compile=on_gpu and not options.eager)


# One unit, in a process of its own


def run_unit(unit: Unit, options: argparse.Namespace) -> int:
    """Train, or go on; write the result. Returns 128 plus the signal that stopped it."""
    config = settings(unit, options)
    assert config.out is not None
    run = RunFolder(config.out)
    while True:
        try:
            stopped_by = train(config, resume=run.config.exists()).stopped_by
        except RunError:
            raise
        except Exception as error:
            if run.validation.exists():  # what is measured is there; the sample is not
                break
            if not config.execution.compile:
                raise
            print(f"does not compile: {type(error).__name__}: {error}", flush=True)
            config = dataclasses.replace(config, execution=ExecutionConfig())
            release()
            continue
        if stopped_by is not None:
            return 128 + stopped_by
        break
    row = result(unit, config, run) | {"settings": stored_settings(options)}
    (run.path / "result.json").write_text(json.dumps(row, indent=1) + "\n")
    return 0


def result(unit: Unit, config: TrainConfig, run: RunFolder) -> dict[str, Any]:
    device = choose_device(config.device)
    model, text = load_trained(run, device), open_text(config, run)
    limit, chunk = config.text.validation_tokens, config.text.sequence_length
    measured = json.loads(run.validation.read_text().splitlines()[-1])
    loss, bits, carried = measured["loss"], measured["bits_per_byte"], None
    if carries_state(model):  # the run's own validation does, but not all models can
        carried = bits
        alike = evaluate(model, text.validation, text.codec, limit=limit, chunk=chunk, carry=False)
        loss, bits = alike.loss, alike.bits_per_byte
    records = read_metrics(run.metrics)
    last = [record["bits_per_byte"] for record in records[-max(1, len(records) // 20) :]]
    return dataclasses.asdict(unit) | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "state": state_numbers(model, chunk),
        "bytes": config.steps * config.text.batch_size * chunk,
        "seconds": measured["train_seconds"],
        "train": statistics.mean(last),
        "loss": loss,
        "bits": bits,
        "carried": carried,
        "description": text.description,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "compiled": config.execution.compile,
    }


@torch.no_grad()
def state_numbers(model: Any, length: int) -> int:
    """What a model remembers of `length` tokens, in numbers, without windows of convolutions."""
    config = model.config
    if isinstance(model, ParaRNNForCausalLM):
        token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        total = 0
        for layer in model.eval()(token, use_cache=True).cache_params.layers:
            grows = hasattr(layer, "keys")
            kept = (layer.keys, layer.values) if grows else layer.recurrent
            tensors = (kept,) if isinstance(kept, torch.Tensor) else kept
            total += sum(t.numel() for t in tensors) * (length if grows else 1)
        return total
    if config.model_type == "mamba2":
        return config.num_hidden_layers * config.num_heads * config.head_dim * config.state_size
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * length


# All units


def stored_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What must be the same for all results that are compared."""
    names = ("steps", "batch_size", "sequence_length", "width", "layers", "max_timescale")
    names += ("validation_tokens",)
    return {name: getattr(options, name) for name in names}


def finished(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("runs/*/*/result.json"))]


def slow_on_a_gpu(model: str, options: argparse.Namespace) -> str:
    """Why a baseline is not trained: its fast kernels are missing; empty if they are not."""
    on_gpu = choose_device(options.device).type == "cuda"
    return missing_kernels(model) if on_gpu and model in BASELINES else ""


def units(options: argparse.Namespace) -> list[Unit]:
    """First seeds of all models at all rates, the middle rate first."""
    middle = sorted(options.rates)[len(options.rates) // 2]
    rates = sorted(options.rates, key=lambda rate: abs(rate - middle))
    texts = [name for name, _ in options.texts]
    models = [model for model in options.models if not slow_on_a_gpu(model, options)]
    combined = itertools.product(rates, texts, models)
    return [Unit(text, model, rate, 0) for rate, text, model in combined]


def close_units(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[Unit]:
    """More seeds of the models that are close to the best of their kind, at their best rate."""
    found = []
    for text, attends in itertools.product([n for n, _ in options.texts], (False, True)):
        best = [
            min(alike, key=lambda row: row["bits"])
            for model in options.models
            if ("transformer" in model or ATTENTION in model) == attends
            and (alike := [r for r in rows if matches(r, text, model) and r["seed"] == 0])
        ]
        limit = (1 + options.close) * min((row["bits"] for row in best), default=0.0)
        for row, seed in itertools.product(best, range(1, options.seeds)):
            if row["bits"] <= limit:
                found.append(Unit(text, row["model"], row["rate"], seed))
    return found


def matches(row: dict[str, Any], text: str, model: str) -> bool:
    return row["text"] == text and row["model"] == model


class Workers:
    """Units side by side, each a process; stopped when the time is over or by a signal.

    Attributes:
        stopped: Whether nothing more is started.
        stopped_by: The signal that asked for it; None for the time, or while it goes on.
        failed: Units that ended by an error, and why.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.end = time.monotonic() + 60 * options.minutes if options.minutes else None
        self.stopped = False
        self.stopped_by: int | None = None
        self.failed: dict[Unit, str] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self.stop(number))

    def stop(self, number: int) -> None:
        """Start nothing more, and end what runs."""
        self.stopped, self.stopped_by = True, number

    def run(self, todo: list[Unit]) -> None:
        """Run all that is not done, or as many as there is time for."""
        waiting = [u for u in todo if not (u.folder(self.options.out) / "result.json").exists()]
        waiting = [u for u in waiting if u not in self.failed]
        running: dict[Unit, subprocess.Popen[bytes]] = {}
        count = len(waiting)
        while (waiting and not self.stopped) or running:
            while waiting and not self.stopped and len(running) < self.options.processes:
                unit = waiting.pop(0)
                running[unit] = self._start(unit)
            time.sleep(LOOK_EVERY)
            if self.end is not None and time.monotonic() > self.end:
                self.stopped = True
            if self.stopped:
                self._end([process for process in running.values() if process.poll() is None])
            for unit in [u for u, process in running.items() if process.poll() is not None]:
                self._note(unit, running.pop(unit), count - len(waiting) - len(running), count)

    def _start(self, unit: Unit) -> subprocess.Popen[bytes]:
        folder = unit.folder(self.options.out)
        folder.parent.mkdir(parents=True, exist_ok=True)
        given = vars(self.options) | {"out": str(self.options.out), "unit": vars(unit)}
        threads = str(max(1, (os.cpu_count() or 1) // self.options.processes))
        names = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
        with folder.with_suffix(f"{folder.suffix}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, __file__, "--unit", json.dumps(given)],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | dict.fromkeys(names, threads),
                start_new_session=True,  # so that Ctrl-C reaches it through us alone
            )

    def _end(self, running: list[subprocess.Popen[bytes]]) -> None:
        """Ask all to write a checkpoint and end."""
        for process in running:
            process.terminate()
        limit = time.monotonic() + GRACE
        for process in running:
            try:
                process.wait(max(0.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _note(self, unit: Unit, process: subprocess.Popen[bytes], done: int, count: int) -> None:
        path = unit.folder(self.options.out) / "result.json"
        words = f"{unit.text} {unit.model} {unit.rate:g} seed {unit.seed}"
        if path.exists():
            bits = json.loads(path.read_text())["bits"]
            print(f"[{done}/{count}] {words}: {bits:.4f} bits per byte held out", flush=True)
        elif self.stopped:
            print(f"{words}: stopped", flush=True)
        else:
            log = unit.folder(self.options.out)
            lines = log.with_suffix(f"{log.suffix}.log").read_text(errors="replace").splitlines()
            self.failed[unit] = (lines or [f"exit status {process.returncode}"])[-1]
            print(f"{words} failed: {self.failed[unit]}", flush=True)


def search(options: argparse.Namespace) -> tuple[dict[Unit, str], int | None]:
    """Train all. Returns what failed, with the reason, and the signal that stopped it, if any."""
    for name, source in options.texts:
        chosen = PrepareConfig(sources=(source,), held_out=TextConfig.held_out)
        try:
            stopped_by = prepare(chosen, options.out / "data" / name, workers=1)
        except RunError as error:
            raise SystemExit(f"--text {name}={source}: {error}") from error
        if stopped_by is not None:
            print(STOPPED, flush=True)
            return {}, stopped_by
    workers = Workers(options)
    workers.run(units(options))
    if not workers.stopped:
        workers.run(close_units(options, finished(options.out)))
    if workers.stopped:
        print(STOPPED, flush=True)
    return workers.failed, workers.stopped_by


def measure_times(options: argparse.Namespace) -> None:
    """Time steps of every model alone."""
    path = options.out / "times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    end = time.monotonic() + 60 * options.minutes if options.minutes else None
    device = choose_device(options.device)
    for model in options.models:
        late = end is not None and time.monotonic() > end
        if model in times or late or slow_on_a_gpu(model, options):
            continue
        release()
        config = settings(Unit("", model, 1e-3, 0), options)
        built = build_model(config, Codec()).to(device)  # type: ignore[arg-type] # transformers' to
        loss = CausalLoss(built, config.optimizer.z_loss_weight)
        sizes = options.batch_size, options.sequence_length
        times[model] = measure_model(loss, *sizes, Processes(0, 1, device), config.execution)
        times[model]["state"] = state_numbers(built, options.sequence_length)
        path.write_text(json.dumps(times, indent=1) + "\n")
        print(f"{model}: {_step_time(times[model])}", flush=True)
        del built, loss


# The table


def summary(rows: list[dict[str, Any]], times: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each model on each text, at its best rate, best ones first."""
    lines = []
    for text, model in dict.fromkeys((row["text"], row["model"]) for row in rows):
        alike = [row for row in rows if matches(row, text, model)]
        best = min((r for r in alike if r["seed"] == 0), key=lambda r: r["bits"], default=None)
        if best is None:
            continue
        seeds = [row for row in alike if row["rate"] == best["rate"]]
        means = {name: statistics.mean(r[name] for r in seeds) for name in ("loss", "bits")}
        step = {name: times.get(model, {}).get(name) for name in ("step_ms", "kernels_ms")}
        lines.append(best | means | step | {"seeds": len(seeds)})
    for line in lines:
        reference = next((x for x in lines if matches(x, line["text"], "transformer")), None)
        both = reference and reference["step_ms"] and line["step_ms"]
        line["ratio"] = line["bits"] / reference["bits"] if reference else None
        line["time_ratio"] = line["step_ms"] / reference["step_ms"] if both else None
    return sorted(lines, key=lambda line: (line["text"], line["bits"]))


def tables(options: argparse.Namespace, failed: dict[Unit, str]) -> str:
    """Markdown: the best of every model, then all runs, and what failed or has not ended."""
    rows = finished(options.out)
    path = options.out / "times.json"
    times = json.loads(path.read_text()) if path.exists() else {}
    (options.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [f"{row['device']}, torch {torch.__version__}" for row in rows[:1]]
    lines += dict.fromkeys(f"{row['text']}: {row['description']}" for row in rows)
    lines += ["", *_markdown(COLUMNS, summary(rows, times)), ""]
    every = ("text", "model", "rate", "seed", "loss", "bits", "train", "seconds", "compiled")
    formats = {"loss": ".4f", "bits": ".4f", "train": ".4f", "seconds": ".0f", "rate": "g"}
    lines += _markdown({name: (name, formats.get(name, "")) for name in every}, rows)
    alone = [model for model in times if not any(row["model"] == model for row in rows)]
    lines += [f"{model}: {_step_time(times[model])}, not trained" for model in alone]
    lines += [*_unfinished(options.out), *(f"failed: {u}: {why}" for u, why in failed.items())]
    for model in options.models:
        if note := missing_kernels(model.partition(":")[0]):
            skipped = slow_on_a_gpu(model, options)
            verb = "is not trained, since it would take" if skipped else "takes"
            lines.append(f"{model} {verb} {note}")
    return "\n".join(lines)


def _step_time(row: dict[str, Any]) -> str:
    kernels = row.get("kernels_ms")
    busy = "" if kernels is None else f", {kernels:.1f} of it kernels"
    return f"{row['step_ms']:.1f} ms per step{busy}"


def _markdown(columns: dict[str, tuple[str, str]], rows: list[dict[str, Any]]) -> Iterator[str]:
    yield f"| {' | '.join(heading for heading, _ in columns.values())} |"
    yield "|---" * len(columns) + "|"
    for row in rows:
        cells = ("" if row[k] is None else format(row[k], f) for k, (_, f) in columns.items())
        yield f"| {' | '.join(cells)} |"


def _unfinished(out: Path) -> Iterator[str]:
    for path in sorted(out.glob("runs/*/*/metrics.jsonl")):
        if not (path.parent / "result.json").exists() and (records := read_metrics(path)):
            last = statistics.mean(record["bits_per_byte"] for record in records[-20:])
            run = f"{path.parent.parent.name} {path.parent.name}"
            yield f"not finished: {run}: {last:.4f} bits per byte in training, step {len(records)}"


def plot_curves(options: argparse.Namespace, smooth: int = 50) -> None:
    """Draw bits per byte in training, means of so many steps; a picture for each text."""
    from matplotlib.figure import Figure

    texts: dict[str, list[Path]] = {}
    for path in sorted(options.out.glob("runs/*/*/metrics.jsonl")):
        texts.setdefault(path.parts[-3], []).append(path)
    if not texts:
        return
    figure = Figure(figsize=(9, 5 * len(texts)), layout="constrained")
    pictures = figure.subplots(len(texts), squeeze=False)[:, 0]
    of_step = options.batch_size * options.sequence_length / 1e6
    for axes, text in zip(pictures, texts, strict=True):
        for path in texts[text]:
            records = read_metrics(path)
            ends = range(smooth, len(records) + 1, smooth)
            means = [
                statistics.mean(r["bits_per_byte"] for r in records[end - smooth : end])
                for end in ends
            ]
            axes.plot([of_step * end for end in ends], means, label=path.parent.name)
        axes.set(title=text, xlabel="million bytes", ylabel="bits per byte in training")
        if axes.get_ylim()[0] < SHOWN:  # else all curves would lie above the picture
            axes.set_ylim(top=SHOWN)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(options.out / "curves.png", dpi=120)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", action="append", help="code (Python's standard library), or NAME=PATH")
    add("--models", nargs="+", default=["all"], help="architectures, or all")
    add("--rates", nargs="+", type=float, default=[1.5e-3, 3e-3, 6e-3], help="peak rates")
    add("--seeds", type=int, default=2, help="of models that are close to the best")
    add("--close", type=float, default=0.01, help="share of the bits per byte that is close")
    add("--processes", type=int, help="models side by side; 4 on a GPU")
    add("--minutes", type=float, help="stop after these; the same command goes on")
    add("--times", action="store_true", help="only measure steps of every model alone")
    add("--eager", action="store_true", help="do not compile blocks")
    add("--out", type=Path, default=Path("quality"), help="folder of all runs")
    add("--steps", type=int, default=1500)
    add("--batch-size", type=int, default=32)
    add("--sequence-length", type=int, default=1024)
    add("--width", type=int, default=512)
    add("--layers", type=int, default=7, help="blocks; the baseline Mamba2 has twice as many")
    add(
        "--max-timescale",
        type=float,
        default=ArchitectureConfig.max_timescale,
        help="steps over which cells forget at first; 0: biases of zero, as in the paper",
    )
    add("--validation-tokens", type=int, default=1_048_576)
    add("--device", default="auto")
    add("--unit", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.unit:
        passed = json.loads(options.unit)
        return argparse.Namespace(**passed | {"out": Path(passed["out"])})
    every = all_models(options.layers)
    options.models = [m for name in options.models for m in (every if name == "all" else [name])]
    for model in options.models:
        if OwnName.of(model):
            parser.error(f"--models {model}: a cell in a file cannot be compared; give a name.")
        try:
            config = settings(Unit("", model, 1e-3, 0), options)
            check_new(config)
            outline_model(config, Codec())
        except (TypeError, ValueError) as error:
            parser.error(f"--models {model}: {error}")
    options.texts = []
    for text in options.text or ["code"]:
        given = f"code={STANDARD_LIBRARY}" if text == "code" else text
        name, _, source = given.partition("=")
        if not name or not source or Path(name).name != name:  # runs are in a folder of that name
            parser.error(f"--text {text}: give code, or a name and a file or folder as NAME=PATH.")
        options.texts.append((name, source))
    on_gpu = choose_device(options.device).type == "cuda"
    options.processes = options.processes or (4 if on_gpu else 1)
    return options


def check_same(options: argparse.Namespace) -> None:
    """Refuse a folder whose results have other settings."""
    for row in finished(options.out):
        wanted = stored_settings(options)
        other = {n: v for n, v in row["settings"].items() if wanted[n] != v}
        if other:
            raise SystemExit(f"{options.out} holds results of {other}; take another --out.")


def main(given: list[str] | None = None) -> int:
    """Returns 0, 1 if a model failed, or 128 plus the signal that stopped it."""
    options = arguments(given)
    if options.unit:
        return run_unit(Unit(**options.unit), options)
    options.out.mkdir(parents=True, exist_ok=True)
    check_same(options)
    failed: dict[Unit, str] = {}
    stopped_by = None
    if options.times:
        measure_times(options)
    else:
        failed, stopped_by = search(options)
    text = tables(options, failed)
    (options.out / "table.md").write_text(text + "\n")
    if importlib.util.find_spec("matplotlib"):
        plot_curves(options)
    print(f"\n{text}")
    if stopped_by is not None:
        return 128 + stopped_by
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
