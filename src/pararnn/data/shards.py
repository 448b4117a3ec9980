"""Token data on disk: flat files of integers, an index with their checksums, and reading them.

Every document is stored as the separator and its tokens, and one last separator ends a split.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pararnn.data.errors import RunError
from pararnn.data.files import digest, sync_folder

FORMAT, VERSION = "pararnn-tokens", 1
SPLITS = ("train", "validation")
INDEX, TOKENIZER = "index.json", "tokenizer"


@dataclass(frozen=True)
class Shard:
    """One flat file.

    Attributes:
        file: Its name in the folder.
        num_tokens: Tokens in it, with separators.
        num_bytes: Bytes of the text that they stand for.
        num_documents: Documents in it.
        sha256: Digest of the file.
    """

    file: str
    num_tokens: int
    num_bytes: int
    num_documents: int
    sha256: str


class TokenSplit:
    """Tokens of one split, mapped from its shards as one sequence.

    Args:
        folder: Where the shards are.
        shards: In the order of their tokens.
        dtype: As they are stored.

    Attributes:
        num_tokens: Tokens, with a separator before every document and one at the end.
        num_bytes: Bytes of UTF-8 text that they stand for, for bits per byte.
        num_documents: Documents.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype) -> None:
        self.folder, self.shards, self.dtype = folder, tuple(shards), dtype
        self._ends = np.cumsum([shard.num_tokens for shard in shards])
        self.num_tokens = sum(shard.num_tokens for shard in shards)
        self.num_bytes = sum(shard.num_bytes for shard in shards)
        self.num_documents = sum(shard.num_documents for shard in shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start to stop, int64.

        Raises:
            IndexError: They are not within the split.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a split of {self.num_tokens} tokens")
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
        folder: Where it is.
        vocab_size: Tokens are below it.
        separator: Token before every document and at the end of a split.
        tokenizer: Folder for `AutoTokenizer.from_pretrained`; None when tokens are bytes.
        sha256: Digest of all shards together.
        train: Tokens to train on.
        validation: Held-out tokens.
    """

    folder: Path
    vocab_size: int
    separator: int
    tokenizer: Path | None
    sha256: str
    train: TokenSplit
    validation: TokenSplit


def open_tokens(folder: Path) -> TokenDataset:
    """Open prepared data, after comparing every shard with its checksum.

    Raises:
        RunError: There is none, it is not finished, or a shard is damaged or missing.
    """
    index = read_index(folder)
    try:
        splits = {name: [Shard(**shard) for shard in index["splits"][name]] for name in SPLITS}
        dtype = stored_dtype(index["dtype"])
        tokenizer = None if index["tokenizer"] == "bytes" else folder / TOKENIZER
        vocab_size, separator = int(index["vocab_size"]), int(index["separator"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged_index(folder) from error
    shards = [shard for name in SPLITS for shard in splits[name]]
    _verify(folder, shards, dtype)
    return TokenDataset(
        folder=folder,
        vocab_size=vocab_size,
        separator=separator,
        tokenizer=tokenizer,
        sha256=hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest(),
        **{name: TokenSplit(folder, splits[name], dtype) for name in SPLITS},
    )


def read_index(folder: Path) -> dict[str, Any]:
    """The content of `index.json`.

    Raises:
        RunError: It is missing, damaged or of another version.
    """
    path = folder / INDEX
    if not path.is_file():
        raise RunError(
            f"{folder} holds no prepared data (no {INDEX}); prepare it with: pararnn data prepare "
            f"SOURCE --out {folder}"
        )
    try:
        index = json.loads(path.read_bytes())
        kind, version = index["format"], index["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged_index(folder) from error
    if (kind, version) != (FORMAT, VERSION):
        raise RunError(
            f"{path} is of format {kind} {version}, but this version of pararnn reads {FORMAT} "
            f"{VERSION}; prepare the data anew."
        )
    return index


def write_shard(
    path: Path, pieces: Iterable[np.ndarray], num_bytes: int, num_documents: int
) -> Shard:
    """Write tokens piece by piece; the file appears when it is whole."""
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


def _verify(folder: Path, shards: list[Shard], dtype: np.dtype) -> None:
    def check(shard: Shard) -> None:
        path = folder / shard.file
        expected = shard.num_tokens * dtype.itemsize
        try:
            size = path.stat().st_size
            if size != expected:
                raise _damaged(path, f"has {size} bytes instead of {expected}")
            if digest(path) != shard.sha256:
                raise _damaged(path, f"does not have the checksum that {INDEX} states")
        except FileNotFoundError as error:
            raise _damaged(path, "is missing") from error
        except OSError as error:
            raise RunError(f"cannot read {path}: {error.strerror}.") from error

    with ThreadPoolExecutor() as pool:
        list(pool.map(check, shards))


def _damaged(path: Path, how: str) -> RunError:
    return RunError(f"{path} {how}; restore it from a copy, or prepare the data anew.")


def _damaged_index(folder: Path) -> RunError:
    return _damaged(folder / INDEX, "is damaged")
