"""`pararnn bench kernels`, `decode` and `train`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pararnn._whole import check_whole_fields
from pararnn.cli.arguments import parse, refused
from pararnn.lm.catalogue import BASELINES, check_used, parts, read_options
from pararnn.lm.data.errors import RunError
from pararnn.lm.presets import ARCHITECTURES, SEQUENCE_LENGTH, VOCAB_SIZE, preset

if TYPE_CHECKING:
    from pararnn.bench.problem import Row
    from pararnn.bench.report import Rows
    from pararnn.lm.bench.models import ModelSize
    from pararnn.lm.training.parallel import Processes


@dataclass(kw_only=True)
class BenchArguments:
    """Time the kernels on this GPU, against the copy limit and other implementations.

    bench decode times generation, and bench train whole train steps of language models; each has
    its own --help.
    """

    out: Path = Path("benchmarks-gpu")
    """Folder for gpu.json, gpu.md and gpu.png."""
    quick: bool = False
    """Only the recurrence at the sizes of the table."""
    pararnn_torch: Path | None = None
    """Folder where the package pararnn-torch is installed, to time it too."""


@dataclass(kw_only=True)
class _ModelArguments:
    preset: str = "1b"
    """Size of the paper: 400m, 1b, 2.9b or 7b."""
    architectures: tuple[str, ...] = ARCHITECTURES
    """Models to time, one after the other: of the paper, or stacks such as m2rnn+delta."""
    width: int | None = None
    """Channels; None for those of the preset."""
    layers: int | None = None
    """Blocks; None for those of the preset."""
    memory_options: tuple[str, ...] = ()
    """Arguments of memories, as NAME=VALUE, for the models that have one: key_size, value_size,
    shared_keys, nonlinearity."""
    vocab_size: int = VOCAB_SIZE
    """Number of tokens in the vocabulary."""
    device: str = "auto"
    """A torch device; auto for CUDA when there is one, else the CPU."""
    out: Path = Path("benchmarks-lm")
    """Folder for the table, as JSON and as Markdown."""

    def __post_init__(self) -> None:
        for architecture in self.architectures:
            preset(architecture, self.preset)
        read_options("memory_options", self.memory_options)
        stacks = [parts(name) for name in self.architectures if name not in BASELINES]
        given = {"memory_options": " ".join(self.memory_options)}
        check_used(
            [name for stack in stacks for name in stack], ", ".join(self.architectures), given
        )
        check_whole_fields(self)
        for name, value in vars(self).items():
            if name == "memory_options":  # may be none
                continue
            values = value if isinstance(value, tuple) else (value,)
            if not values:
                raise ValueError(f"{name} is empty; name at least one.")
            if any(isinstance(v, int) and v < 1 for v in values):
                raise ValueError(f"{name.replace('_', '-')} is {value}; it must be >= 1.")

    @property
    def size(self) -> ModelSize:
        """The size of the models."""
        from pararnn.lm.bench.models import ModelSize

        return ModelSize(
            name=self.preset,
            width=self.width,
            num_layers=self.layers,
            vocab_size=self.vocab_size,
            memory_options=read_options("memory_options", self.memory_options),
        )

    def check_models(self) -> None:
        """Raise ValueError if a model cannot be built in this size, or with these options."""
        from pararnn.lm.training.initial import outline

        for architecture in self.architectures:
            try:
                outline(self.size.config(architecture, 1))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{architecture} cannot be built: {error}") from error


@dataclass(kw_only=True)
class DecodeArguments(_ModelArguments):
    """Time single steps of generation against the limit of reading the weights once per token."""

    batch_sizes: tuple[int, ...] = (1, 16)
    """Texts side by side."""
    contexts: tuple[int, ...] = (1024, 4096, 16384, 32768)
    """Numbers of tokens before the generated one; they matter for the cache of the Transformer."""
    weights: tuple[Literal["stored", "int8"], ...] = ("stored",)
    """In bfloat16, or those of projections in int8; the latter for models with cells only."""

    def rows(self, processes: Processes, rate: float) -> Iterator[Row]:
        """Measure."""
        if processes.count > 1:
            raise RunError("bench decode runs in one process; start it without torchrun.")
        from pararnn.lm.bench.decode import decode_rows

        return decode_rows(
            self.size,
            self.architectures,
            self.batch_sizes,
            self.contexts,
            processes.device,
            rate,
            self.weights,
        )


@dataclass(kw_only=True)
class TrainArguments(_ModelArguments):
    """Time train steps of language models, with the same batch for all.

    Under torchrun the processes share every model, as in training.
    """

    batch_size: int | None = None
    """Sequences of one process; None for the number of the paper per GPU."""
    sequence_length: int = SEQUENCE_LENGTH
    """Tokens per sequence."""

    def rows(self, processes: Processes, rate: float) -> Iterator[Row]:
        """Measure."""
        from pararnn.lm.bench.train import train_rows

        return train_rows(
            self.size, self.architectures, self.batch_size, self.sequence_length, processes
        )


MODELS = {"decode": DecodeArguments, "train": TrainArguments}


def run(arguments: list[str]) -> int:
    """Measure, print every row at once, and store all."""
    name, *rest = arguments or ["kernels"]
    if name.startswith("-"):
        name, rest = "kernels", arguments
    if name == "kernels":
        return _kernels(rest)
    if name not in MODELS:
        nearest = difflib.get_close_matches(name, ["kernels", *MODELS], n=1, cutoff=0.0)[0]
        raise RunError(f"there is no benchmark {name!r}; perhaps you meant {nearest!r}.")
    return _models(name, rest)


def _kernels(arguments: list[str]) -> int:
    parsed = parse(BenchArguments, "bench kernels", arguments)
    from pararnn.bench import measure, save

    rows: Rows = {}
    try:
        for kind, row in measure(parsed.quick, parsed.pararnn_torch):
            rows.setdefault(kind, []).append(row)
            _print(kind, row)
            if "recurrence" not in rows:
                continue
            save(rows, parsed.out, " ".join(["pararnn bench kernels", *arguments]))
    except RuntimeError as error:
        print(f"pararnn: {error}", file=sys.stderr)
        return 1
    print(f"Written to {parsed.out / 'gpu.md'}")
    return 1 if rows.get("wrong") else 0


def _models(name: str, arguments: list[str]) -> int:
    parsed: DecodeArguments | TrainArguments = parse(MODELS[name], f"bench {name}", arguments)
    from pararnn.bench.tables import TABLES, facts_of, save_table
    from pararnn.bench.timing import copy_gigabytes_per_second
    from pararnn.lm.training.parallel import join_processes

    with refused(f"bench {name}"):
        parsed.check_models()
    rows: list[Row] = []
    path = None
    with join_processes(parsed.device) as processes:
        command = " ".join(["pararnn bench", name, *arguments])
        facts = facts_of(processes.device, processes.count, parsed.size, command)
        rate = copy_gigabytes_per_second(processes.device)
        for row in parsed.rows(processes, rate):
            if not processes.is_first:
                continue
            rows.append(row)
            _print(name, row)
            path = save_table(
                TABLES[name], rows, facts | {"copy_gigabytes_per_second": rate}, parsed.out
            )
        processes.print(f"Written to {path}")
    return 0


def _print(kind: str, row: Row) -> None:
    print(kind, *(f"{k}={_short(v)}" for k, v in row.items()), flush=True)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
