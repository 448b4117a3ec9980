"""`pararnn data prepare` and `pararnn data check`."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pararnn.cli.arguments import parse
from pararnn.cli.output import Output
from pararnn.lm.data import PrepareConfig, TokenDataset, open_tokens, prepare
from pararnn.lm.data.config import OnError
from pararnn.lm.data.words import show


@dataclass(kw_only=True)
class PrepareArguments(Output):
    """Write the tokens of texts as checksummed shards. Call it again to continue a stopped run."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE...")]
    """Text files, folders of them, files of JSON rows (.jsonl, .ndjson, .json), all of these also
    as .gz, .bz2, .xz or .zst; datasets:NAME[:CONFIG]; slimpajama-no-books; or
    python-standard-library."""
    out: Path
    """Folder to write: new, or one of an earlier call with the same settings."""
    tokenizer: str = PrepareConfig.tokenizer
    """bytes, train:VOCAB_SIZE to train a byte-level BPE on the sources, or a folder or name that
    AutoTokenizer.from_pretrained takes."""
    held_out: float = PrepareConfig.held_out
    """Share of the documents kept for validation; of the lines, if there is one text file only."""
    text_field: str = PrepareConfig.text_field
    """Field of JSON rows and datasets that holds the text."""
    on_error: OnError = PrepareConfig.on_error
    """What to do with a line without a text, and with a file in a folder that cannot be read:
    stop, or skip to leave it out and count it."""
    workers: int | None = None
    """Processes; None for one per core."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be >= 1.")
        self.config()

    def config(self) -> PrepareConfig:
        """The settings that decide the result."""
        return PrepareConfig(
            sources=self.sources,
            tokenizer=self.tokenizer,
            held_out=self.held_out,
            text_field=self.text_field,
            on_error=self.on_error,
        )


@dataclass(kw_only=True)
class CheckArguments:
    """Compare prepared data with its checksums and print its contents."""

    folder: tyro.conf.Positional[Path]
    """Folder that `pararnn data prepare` wrote."""


@dataclass(kw_only=True)
class DataArguments:
    """Prepare token data for training, or check it."""

    command: Annotated[
        Annotated[PrepareArguments, tyro.conf.subcommand("prepare")]
        | Annotated[CheckArguments, tyro.conf.subcommand("check")],
        tyro.conf.arg(name=""),
    ]


def run(arguments: list[str]) -> int:
    """Prepare or check. Returns 0, or 128 plus the number of the signal that stopped it."""
    command = parse(DataArguments, "data", arguments).command
    if isinstance(command, CheckArguments):
        show(_describe(open_tokens(command.folder)))
        return 0
    with command.messages():
        stopped_by = prepare(command.config(), command.out, command.workers)
    if stopped_by is not None:
        name = signal.Signals(stopped_by).name
        show(f"Stopped by {name}; what is prepared is kept. Continue with the same command.")
        return 128 + stopped_by
    show(_describe(open_tokens(command.out)))
    return 0


def _describe(data: TokenDataset) -> str:
    lines = [f"{data.folder}: vocabulary of {data.vocab_size:,} tokens; all checksums match"]
    for name, split in (("train", data.train), ("validation", data.validation)):
        lines.append(
            f"  {name}: {split.num_tokens:,} tokens; documents: {split.num_documents:,}; bytes of "
            f"text: {split.num_bytes:,}; shards: {len(split.shards):,}"
        )
    lines += [f"  skipped: {line}" for line in data.skipped.describe()]
    return "\n".join(lines)
