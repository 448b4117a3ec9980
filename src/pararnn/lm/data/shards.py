"""Token data on disk: write and read flat files of integers.

Every document is stored as the separator and its tokens. One last separator ends a split.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pararnn._words import counted
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import sync_folder
from pararnn.lm.data.index import INDEX, SPLITS, TOKENIZER, Index, Shard, damaged, read_index
from pararnn.lm.data.skipped import Skipped
from pararnn.lm.data.tokenization import BYTES, check_files, load_tokenizer


class TokenSplit:
    """Tokens of one split: its shards as one sequence, read through memory maps.

    Args:
        folder: Folder of the shards.
        shards: Shards in order.
        dtype: Type of the stored tokens.

    Attributes:
        num_tokens: Tokens, with a separator before every document and one at the end.
        num_bytes: Bytes of UTF-8 text of these tokens, for bits per byte.
        num_documents: Documents.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype) -> None:
        self.folder, self.shards, self.dtype = folder, tuple(shards), dtype
        self._ends = np.cumsum([shard.num_tokens for shard in shards])
        self.num_tokens = sum(shard.num_tokens for shard in shards)
        self.num_bytes = sum(shard.num_bytes for shard in shards)
        self.num_documents = sum(shard.num_documents for shard in shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`: shape (stop - start,), int64.

        Raises:
            IndexError: The range is not within the split.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(
                f"tokens {start} to {stop} of a split of {counted(self.num_tokens, 'token')}"
            )
        tokens = np.empty(stop - start, dtype=np.int64)
        index = int(np.searchsorted(self._ends, start, side="right"))
        filled = 0
        while filled < len(tokens):
            shard = self.shards[index]
            first = start + filled - (int(self._ends[index]) - shard.num_tokens)
            stored = np.memmap(self.folder / shard.file, dtype=self.dtype, mode="r")
            piece = stored[first : first + len(tokens) - filled]
            tokens[filled : filled + len(piece)] = piece
            filled, index = filled + len(piece), index + 1
        return tokens


@dataclass(frozen=True)
class TokenDataset:
    """Token data that `pararnn data prepare` wrote.

    Attributes:
        folder: Where the data is.
        vocab_size: Number of tokens; each token is below it.
        separator: Token before every document and at the end of a split.
        tokenizer: Folder for `AutoTokenizer.from_pretrained`; None when tokens are bytes.
        tokenizer_files: SHA-256 of its files, by name.
        sha256: Digest of all shards together.
        train: Tokens to train on.
        validation: Held-out tokens.
        skipped: What is left out of the sources.
    """

    folder: Path
    vocab_size: int
    separator: int
    tokenizer: Path | None
    tokenizer_files: dict[str, str]
    sha256: str
    train: TokenSplit
    validation: TokenSplit
    skipped: Skipped


def open_tokens(folder: str | os.PathLike[str]) -> TokenDataset:
    """Open prepared data, after comparing every file with its checksum and with the index.

    Raises:
        RunError: The folder holds no prepared data or is not finished, or a file is damaged or
            missing.
    """
    folder = Path(folder)
    index = read_index(folder)
    dtype = stored_dtype(index.dtype)
    _verify(folder, index, dtype)
    tokenizer = None if index.tokenizer == BYTES else folder / TOKENIZER
    if tokenizer is not None:
        check_files(tokenizer, index.tokenizer_files)
    _compare_with_tokenizer(folder, index, tokenizer)
    digests = [shard.sha256 for name in SPLITS for shard in index.splits[name]]
    return TokenDataset(
        folder=folder,
        vocab_size=index.vocab_size,
        separator=index.separator,
        tokenizer=tokenizer,
        tokenizer_files=index.tokenizer_files,
        sha256=hashlib.sha256("".join(digests).encode()).hexdigest(),
        skipped=index.skipped,
        **{name: TokenSplit(folder, index.splits[name], dtype) for name in SPLITS},
    )


def write_shard(
    path: Path, pieces: Iterable[np.ndarray], num_bytes: int, num_documents: int
) -> Shard:
    """Write tokens piece by piece. The file appears when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    sha256, num_tokens = hashlib.sha256(), 0
    with temporary.open("wb") as file:
        for tokens in pieces:
            content = tokens.astype(stored_dtype(tokens.dtype.name)).tobytes()
            file.write(content)
            sha256.update(content)
            num_tokens += len(tokens)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)
    return Shard(path.name, num_tokens, num_bytes, num_documents, sha256.hexdigest())


def stored_dtype(name: str) -> np.dtype:
    """The type of stored tokens: little-endian on every machine."""
    return np.dtype(name).newbyteorder("<")


def _verify(folder: Path, index: Index, dtype: np.dtype) -> None:
    def check(shard: Shard, ends_split: bool) -> None:
        path = folder / shard.file
        try:
            _check_shard(path, shard, index, dtype, ends_split)
        except FileNotFoundError as error:
            raise damaged(path, "is missing") from error
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}.") from error

    with ThreadPoolExecutor() as pool:
        for shards in index.splits.values():
            list(pool.map(check, shards, [shard is shards[-1] for shard in shards]))


def _check_shard(path: Path, shard: Shard, index: Index, dtype: np.dtype, ends_split: bool) -> None:
    """Compare a shard with the index: its size, checksum, tokens and documents."""
    expected = shard.num_tokens * dtype.itemsize
    size = path.stat().st_size
    if not path.is_file():
        raise damaged(path, "is not a file")
    if size != expected:
        raise damaged(path, f"has {size} bytes instead of {expected}")
    sha256, largest, separators = hashlib.sha256(), 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            tokens = np.frombuffer(block, dtype)
            largest = max(largest, int(tokens.max()))
            separators += int(np.count_nonzero(tokens == index.separator))
    if sha256.hexdigest() != shard.sha256:
        raise damaged(path, f"does not have the checksum that {INDEX} states")
    if largest >= index.vocab_size:
        raise damaged(path, f"holds token {largest} of a vocabulary of {index.vocab_size}")
    if separators != shard.num_documents + ends_split:
        raise damaged(
            path,
            f"holds {counted(separators, 'separator')} (token {index.separator}), which does not "
            "match the "
            f"{counted(shard.num_documents, 'document')} that {INDEX} states",
        )


def _compare_with_tokenizer(folder: Path, index: Index, tokenizer: Path | None) -> None:
    tokenization = load_tokenizer(tokenizer)
    for name in ("vocab_size", "separator"):
        stated, found = getattr(index, name), getattr(tokenization, name)
        if stated != found:
            raise damaged(
                folder / INDEX, f"states {name} {stated}, but that of the tokenizer is {found}"
            )
