"""Tokenizers: bytes, one trained here, or any that transformers loads."""

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import digest, sync_file, sync_folder
from pararnn.lm.data.reading import DOCUMENT

BYTES, TRAIN = "bytes", "train:"
SEPARATOR = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
"""The 256 bytes and the separator."""
LARGEST_VOCABULARY = 1 << 20
TOKENIZER_FILES = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "chat_template.jinja", "normalizer.json"),
        *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "tiktoken.model"),
        *("spiece.model", "spm.model", "sentencepiece.model", "sentencepiece.bpe.model"),
    }
)
"""The files of a tokenizer of transformers. No other file is taken from its folder."""


class Tokenization(Protocol):
    """Converts text to tokens and back.

    Attributes:
        vocab_size: Number of tokens; each token is below it.
        separator: Token before every document and at the end of a split.
    """

    vocab_size: int
    separator: int

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of a document of UTF-8 text."""

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, with U+FFFD where they are not UTF-8."""


class Bytes:
    """Each byte is a token."""

    vocab_size = 256
    separator = DOCUMENT

    def encode(self, text: bytes) -> np.ndarray:
        """The bytes themselves."""
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, tokens: list[int]) -> str:
        """The bytes as text."""
        return bytes(tokens).decode(errors="replace")


class Transformers:
    """A tokenizer of transformers. The name of a special token inside a text is plain text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.separator = tokenizer.eos_token_id
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)

    def encode(self, text: bytes) -> np.ndarray:
        """Tokens of the whole document, however long."""
        encoded = self.tokenizer(
            text.decode(), add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, without those that the model has but the tokenizer has not."""
        known = [token for token in tokens if token < self.vocab_size]
        return self.tokenizer.decode(known, clean_up_tokenization_spaces=False)


def vocabulary_to_train(tokenizer: str) -> int | None:
    """The size in train:VOCAB_SIZE; None for another kind of tokenizer.

    Raises:
        ValueError: The size is not a number, or is out of range.
    """
    if not tokenizer.startswith(TRAIN):
        return None
    size = tokenizer.removeprefix(TRAIN)
    fits = size.isdecimal() and len(size) < 10
    if not fits or not SMALLEST_VOCABULARY <= int(size) <= LARGEST_VOCABULARY:
        raise ValueError(
            f"tokenizer is {tokenizer[:40]!r}; write {TRAIN}VOCAB_SIZE with at least "
            f"{SMALLEST_VOCABULARY} and at most {LARGEST_VOCABULARY:,}."
        )
    return int(size)


def save_tokenizer(tokenizer: str, sample: Iterator[str], folder: Path) -> None:
    """Train or fetch a tokenizer and write it where `AutoTokenizer` loads it.

    Args:
        tokenizer: train:VOCAB_SIZE, or what `AutoTokenizer` takes.
        sample: Texts to train on; read for train:VOCAB_SIZE only.
        folder: Where to write. It appears when it is whole.

    Raises:
        RunError: The tokenizer cannot be loaded, or has no token to separate documents.
    """
    size = vocabulary_to_train(tokenizer)
    made = _from_transformers(tokenizer) if size is None else _train(size, sample)
    if made.eos_token_id is None:
        raise RunError(
            f"tokenizer {tokenizer} has no eos token to separate documents with; set its "
            "eos_token, save it with save_pretrained(FOLDER), and pass --tokenizer FOLDER."
        )
    vocab_size = Transformers(made).vocab_size
    if vocab_size > LARGEST_VOCABULARY:
        raise RunError(
            f"tokenizer {tokenizer} has a vocabulary of {vocab_size:,} tokens; at most "
            f"{LARGEST_VOCABULARY:,} can be used."
        )
    with tempfile.TemporaryDirectory() as temporary:
        made.save_pretrained(temporary)
        names = {path.name for path in Path(temporary).iterdir() if path.is_file()}
        if unknown := sorted(names - TOKENIZER_FILES):
            raise RunError(
                f"tokenizer {tokenizer} has files that the library does not know "
                f"({', '.join(unknown)}); give a tokenizer that has a tokenizer.json."
            )
        copy_tokenizer(Path(temporary), folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, and no others beside them, into a new folder.

    The folder appears when it is whole.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    add_tokenizer(source, temporary)
    sync_folder(temporary)
    temporary.replace(folder)
    sync_folder(folder.parent)


def add_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer, and no others beside them, into a folder.

    Raises:
        FileExistsError: The folder has a file of that name.
    """
    for name in _files_in(source):
        with (source / name).open("rb") as content, (folder / name).open("xb") as copy:
            shutil.copyfileobj(content, copy)
        sync_file(folder / name)


def add_byte_tokenizer(folder: Path) -> None:
    """Write what `Bytes` does as a tokenizer that transformers loads, into a folder.

    It begins a text with the separator, as documents in training begin.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, Bytes.separator)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        split_special_tokens=True,  # the name of the separator in a text is plain text
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def is_byte_tokenizer(folder: Path) -> bool:
    """Whether the tokenizer in a folder is that of `add_byte_tokenizer`."""
    try:
        stored = json.loads((folder / "tokenizer.json").read_bytes())
        return bool(stored["model"]["vocab"] == _byte_vocabulary())
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _byte_vocabulary() -> dict[str, int]:
    """The names of bytes in a byte-level tokenizer: printable characters; the separator is 0."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    names = {byte: chr(byte) for byte in printable}
    names |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    names[Bytes.separator] = SEPARATOR
    return {names[byte]: byte for byte in range(256)}


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of the files of a tokenizer, by name."""
    return {name: digest(folder / name) for name in _files_in(folder)}


def check_files(folder: Path, expected: dict[str, str]) -> None:
    """Compare the files of a tokenizer with their digests.

    Raises:
        RunError: A file is missing, was added or was changed.
    """
    found = digests(folder)
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            how = "does not have its checksum" if name in found else "is missing or not a file"
            raise RunError(
                f"{folder / name} {how if name in expected else 'was added to the tokenizer'}; "
                f"{'restore it from a copy' if name in expected else 'remove it'}, or prepare the "
                "data anew."
            )


def load_tokenizer(folder: Path | None) -> Tokenization:
    """The tokenizer in a folder; for None, bytes."""
    return Bytes() if folder is None else _load(folder, _stamps(folder))


@functools.lru_cache(maxsize=2)
def _load(folder: Path, stamps: tuple[Any, ...]) -> Tokenization:
    """Load once per state of the files."""
    return Transformers(_from_transformers(str(folder)))


def _stamps(folder: Path) -> tuple[Any, ...]:
    status = [(folder / name).stat() for name in _files_in(folder)]
    return tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in status)


def _files_in(folder: Path) -> list[str]:
    """The names of the files of a tokenizer in a folder."""
    return [name for name in sorted(TOKENIZER_FILES) if (folder / name).is_file()]


def first_line(error: BaseException) -> str:
    """The first line of the message of an error, or its type."""
    return str(error).partition("\n")[0] or type(error).__name__


def _from_transformers(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower for a damaged file
        raise RunError(
            f"cannot load the tokenizer {name}: {first_line(error)} Give {BYTES}, "
            f"{TRAIN}VOCAB_SIZE, or a folder or name that AutoTokenizer.from_pretrained takes."
        ) from error


def _train(vocab_size: int, sample: Iterator[str]) -> Any:
    """A byte-level BPE; the same texts give the same tokenizer."""
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
