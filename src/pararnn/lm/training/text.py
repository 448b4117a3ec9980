"""The training data of a run: prepared tokens, or texts that it prepares itself."""

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pararnn._words import counted
from pararnn.lm.data import PrepareConfig, TokenDataset, TokenSplit, open_tokens, prepare
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.index import INDEX, TOKENIZER, is_prepared
from pararnn.lm.data.recipes import STANDARD_LIBRARY
from pararnn.lm.data.tokenization import (
    TOKENIZER_FILES,
    Tokenization,
    check_files,
    copy_tokenizer,
    digests,
    is_byte_tokenizer,
    load_tokenizer,
)
from pararnn.lm.training.checkpoints import Checkpoint
from pararnn.lm.training.config import TrainConfig
from pararnn.lm.training.run_folder import RunFolder

VOCABULARY_MULTIPLE = 256
_NO_CHARACTER = "\ufffd"  # where a text ends within a character


@dataclass(frozen=True)
class Text:
    """Tokens to train on and tokens held out.

    Attributes:
        train: To train on.
        validation: Held out.
        codec: Between text and tokens.
        sha256: Digest of both.
        description: What it is, in words.
    """

    train: TokenSplit
    validation: TokenSplit
    codec: "Codec"
    sha256: str
    description: str


@dataclass(frozen=True)
class Codec:
    """Converts text to the tokens of a run and back; `tokenizer` is a folder, None for bytes."""

    tokenizer: Path | None = None

    @property
    def tokenization(self) -> Tokenization:
        """The encoder."""
        return load_tokenizer(self.tokenizer)

    @property
    def separator(self) -> int:
        """The token before every document, which also ends generated text."""
        return self.tokenization.separator

    @property
    def vocab_size(self) -> int:
        """Entries of the model's embedding: those of the tokenizer, rounded up."""
        size = self.tokenization.vocab_size
        return -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def unit(self) -> str:
        """The name of a token in messages."""
        return "bytes" if self.tokenizer is None else "tokens"

    def tokens_per_byte(self, split: TokenSplit) -> float:
        """Of a split; 1 where tokens are bytes, separators counted like all others."""
        return 1.0 if self.tokenizer is None else split.num_tokens / split.num_bytes

    def encode(self, text: str) -> Tensor:
        """Tokens of a document that begins with text: shape (1, tokens + 1)."""
        tokens = self.tokenization.encode(text.encode())
        return torch.tensor([[self.separator, *tokens.tolist()]])

    def decode(self, tokens: Tensor) -> str:
        """Text of tokens, shape (time,): without separators, U+FFFD where it is no UTF-8."""
        return self.tokenization.decode([t for t in tokens.tolist() if t != self.separator])

    def decode_stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The same text piece by piece, each as soon as its last character is whole.

        Pieces are decoded together with the piece before, on which spaces may depend.
        """
        before: list[int] = []
        piece: list[int] = []
        decode = self.tokenization.decode
        for token in tokens:
            if token == self.separator:
                continue
            piece.append(token)
            text = decode(before + piece)
            if not text.endswith(_NO_CHARACTER):
                yield text[len(decode(before)) :]
                before, piece = piece, []
        if piece:
            yield decode(before + piece)[len(decode(before)) :]


def open_text(config: TrainConfig, run: RunFolder) -> Text:
    """The text of a run: prepared data, or texts that are prepared as bytes in its folder.

    Raises:
        RunError: There is nothing to read, or something is damaged.
    """
    folder = config.data
    if folder is None or not is_prepared(folder):
        folder = run.data
        if not (folder / INDEX).exists():
            _prepare(config, folder)
    dataset = open_tokens(folder)
    codec = _copied_codec(dataset, run)
    return Text(
        dataset.train, dataset.validation, codec, dataset.sha256, _describe(config, dataset)
    )


def _prepare(config: TrainConfig, folder: Path) -> None:
    source = STANDARD_LIBRARY if config.data is None else str(config.data)
    settings = PrepareConfig(sources=(source,), held_out=config.text.held_out)
    stopped_by = prepare(settings, folder, workers=1)
    if stopped_by is not None:
        signal.raise_signal(stopped_by)


def _describe(config: TrainConfig, dataset: TokenDataset) -> str:
    source = "Python's standard library" if config.data is None else str(config.data)
    lost = dataset.skipped.lost.describe()
    skipped = f" (skipped: {'; '.join(lost)})" if lost else ""
    train, held_out = dataset.train, dataset.validation
    unit = "bytes" if dataset.tokenizer is None else "tokens"
    return (
        f"{source}: {counted(train.num_documents + held_out.num_documents, 'document')}{skipped}, "
        f"{train.num_tokens:,} {unit} to train on, {held_out.num_tokens:,} held out"
    )


def _copied_codec(dataset: TokenDataset, run: RunFolder) -> Codec:
    """The tokenizer of prepared data, copied into a run; of a run that has one, compared."""
    if dataset.tokenizer is not None:
        folder = run.data / TOKENIZER
        if not folder.exists():
            run.data.mkdir(parents=True, exist_ok=True)
            copy_tokenizer(dataset.tokenizer, folder)
        check_files(folder, dataset.tokenizer_files)
    return open_codec(run)


def open_codec(run: RunFolder) -> Codec:
    """The tokenizer of a run."""
    folder = run.data / TOKENIZER
    return Codec(folder if folder.is_dir() else None)


def check_tokenizer(codec: Codec, checkpoint: Checkpoint) -> None:
    """Compare a run's tokenizer with the one that lies beside a model.

    Raises:
        RunError: A file is missing, too many, or another one.
    """
    of_bytes = is_byte_tokenizer(checkpoint.path)  # a run of bytes has no tokenizer itself
    files = {} if of_bytes else checkpoint.files
    expected = {name: value for name, value in files.items() if name in TOKENIZER_FILES}
    found = {} if codec.tokenizer is None else digests(codec.tokenizer)
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            there = checkpoint.path / name
            remedy = f"restore it from {there}" if name in expected else "move it away"
            raise RunError(
                f"{checkpoint.path.parents[1] / 'data' / TOKENIZER / name} is not what the model "
                f"was trained with; {remedy}."
            )
