"""Tokenizers: bytes, one trained here, or any that transformers loads."""

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pararnn.data.corpus import DOCUMENT
from pararnn.data.errors import RunError
from pararnn.data.files import sync_file, sync_folder

BYTES, TRAIN = "bytes", "train:"
SEPARATOR = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
"""The bytes and the separator."""


class Tokenization(Protocol):
    """Text to tokens.

    Attributes:
        vocab_size: Tokens are below it.
        separator: Token that begins every document and ends a split.
    """

    vocab_size: int
    separator: int

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of a document of UTF-8 text."""

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, U+FFFD where it is no UTF-8."""


class Bytes:
    """Every byte is a token."""

    vocab_size = 256
    separator = DOCUMENT

    def encode(self, text: bytes) -> np.ndarray:
        """The bytes themselves."""
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, tokens: list[int]) -> str:
        """The bytes as text."""
        return bytes(tokens).decode(errors="replace")


class Transformers:
    """A tokenizer of transformers; names of special tokens inside a text are plain text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.separator = tokenizer.eos_token_id
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of the whole document, however long."""
        encoded = self.tokenizer(
            text.decode(), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; entries of a model's vocabulary beyond the tokenizer's are left out."""
        known = [token for token in tokens if token < self.vocab_size]
        return self.tokenizer.decode(known, clean_up_tokenization_spaces=False)


def vocabulary_to_train(tokenizer: str) -> int | None:
    """The number in train:NUMBER, None for another kind of tokenizer.

    Raises:
        ValueError: What follows is no number, or too small a one.
    """
    if not tokenizer.startswith(TRAIN):
        return None
    size = tokenizer.removeprefix(TRAIN)
    if not size.isdecimal() or int(size) < SMALLEST_VOCABULARY:
        raise ValueError(
            f"tokenizer is {tokenizer!r}; write {TRAIN}VOCAB_SIZE with at least "
            f"{SMALLEST_VOCABULARY}."
        )
    return int(size)


def save_tokenizer(tokenizer: str, sample: Iterator[str], folder: Path) -> None:
    """Train or fetch a tokenizer and write it where `AutoTokenizer` loads it.

    Args:
        tokenizer: train:VOCAB_SIZE, or what `AutoTokenizer` takes.
        sample: Texts to train on; read only for the first kind.
        folder: Where to write; appears when it is whole.

    Raises:
        RunError: It cannot be loaded, or has no token to separate documents with.
    """
    size = vocabulary_to_train(tokenizer)
    made = _from_transformers(tokenizer) if size is None else _train(size, sample)
    if made.eos_token_id is None:
        raise RunError(
            f"tokenizer {tokenizer} has no eos token to separate documents with; set its "
            "eos_token, save it with save_pretrained(FOLDER), and pass --tokenizer FOLDER."
        )
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    made.save_pretrained(temporary)
    for path in temporary.rglob("*"):
        if path.is_file():
            sync_file(path)
    temporary.replace(folder)
    sync_folder(folder.parent)


@functools.lru_cache(maxsize=1)
def load_tokenizer(folder: Path | None) -> Tokenization:
    """The tokenizer of a folder of prepared data; None for bytes."""
    return Bytes() if folder is None else Transformers(_from_transformers(str(folder)))


def first_line(error: Exception) -> str:
    """The beginning of a message that may be long."""
    return str(error).partition("\n")[0]


def _from_transformers(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot load the tokenizer {name}: {first_line(error)} Give {BYTES}, "
            f"{TRAIN}VOCAB_SIZE, or a folder or name that AutoTokenizer.from_pretrained takes."
        ) from error


def _train(vocab_size: int, sample: Iterator[str]) -> Any:
    """A byte-level BPE; the same texts give the same one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SEPARATOR)
