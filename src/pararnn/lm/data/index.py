"""`index.json`, which describes prepared data: written with its own checksum, checked when read.

A folder may come from anyone, so a file name in it is accepted only if we would write the same.
"""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import write_atomically
from pararnn.lm.data.skipped import Skipped
from pararnn.lm.data.tokenization import BYTES, LARGEST_VOCABULARY, TOKENIZER_FILES

FORMAT, VERSION = "pararnn-tokens", 2
SPLITS = ("train", "validation")
INDEX, PROGRESS, PARTS, TOKENIZER = "index.json", "progress.json", "parts", "tokenizer"


@dataclass(frozen=True)
class Shard:
    """One flat file of tokens.

    Attributes:
        file: Name in the folder.
        num_tokens: Tokens, with separators.
        num_bytes: Bytes of UTF-8 text of these tokens.
        num_documents: Documents.
        sha256: Digest of the file.
    """

    file: str
    num_tokens: int
    num_bytes: int
    num_documents: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """Content of `index.json`.

    Attributes:
        tokenizer: As in `PrepareConfig`.
        tokenizer_files: SHA-256 of the files in the folder of the tokenizer, by name.
        vocab_size: Number of tokens; each token is below it.
        separator: Token before every document and at the end of a split.
        dtype: Type of the stored tokens.
        splits: Shards of each split.
        skipped: What is left out of the sources.
        settings: Settings of the preparation.
        source_sha256: Digest of the names, sizes and times of the source files.
    """

    tokenizer: str
    tokenizer_files: dict[str, str]
    vocab_size: int
    separator: int
    dtype: str
    splits: dict[str, list[Shard]]
    skipped: Skipped = field(default_factory=Skipped)
    settings: dict[str, Any] = field(default_factory=dict)
    source_sha256: str = ""


def write_index(folder: Path, index: Index) -> None:
    """Write `index.json`, which makes the folder finished."""
    values = dataclasses.asdict(index)
    values |= {"skipped": index.skipped.reasons, "num_skipped": index.skipped.lost.total}
    write_sealed(folder / INDEX, values)


def read_index(folder: Path) -> Index:
    """The content of `index.json`.

    Raises:
        RunError: The file is missing, damaged or of another version.
    """
    path = folder / INDEX
    if not path.exists():
        raise _no_index(folder)
    values = read_sealed(path)
    try:
        index = _index(values)
        check_seal(values)
    except ValueError as error:
        raise damaged(path, f"is damaged ({error})") from error
    return index


def is_prepared(folder: Path) -> bool:
    """Whether `pararnn data prepare` wrote a folder, finished or not, damaged or not.

    False if the folder cannot be entered.
    """
    shards = (folder / shard_name(split, 0) for split in SPLITS)
    return any(os.path.exists(path) for path in shards) or any(
        _is_ours(folder / name) for name in (INDEX, PROGRESS)
    )


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write JSON values with their format, version and checksum."""
    values = {"format": FORMAT, "version": VERSION, **values}
    content = json.dumps({**values, "sha256": _seal(values)}, indent=1)
    write_atomically(path, f"{content}\n".encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """The values of a file that `write_sealed` wrote. Check them, then call `check_seal`.

    Raises:
        RunError: The file is damaged or of another version.
    """
    if not path.is_file():
        raise damaged(path, "is not a file")
    try:
        values = json.loads(path.read_bytes())
        kind, version = values["format"], values["version"]
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(path, f"is damaged ({type(error).__name__}: {error})") from error
    if (kind, version) != (FORMAT, VERSION):
        raise RunError(
            f"{path} is of format {kind} {version}, but this version of pararnn reads {FORMAT} "
            f"{VERSION}; prepare the data anew."
        )
    return values


def check_seal(values: dict[str, Any]) -> None:
    """Compare values with their checksum.

    Raises:
        ValueError: They do not match.
    """
    rest = {name: value for name, value in values.items() if name != "sha256"}
    if _seal(rest) != values.get("sha256"):
        raise ValueError("it does not match its own checksum, so it was changed")


def stored_shards(values: Any, split: str) -> list[Shard]:
    """The shards of a split from JSON values.

    Raises:
        ValueError: The values are not shards.
    """
    shards = []
    for number, row in enumerate(typed(values, list, f"splits.{split}")):
        where = f"splits.{split}[{number}]"
        names = [f.name for f in dataclasses.fields(Shard)]
        if sorted(typed(row, dict, where)) != sorted(names):
            raise ValueError(f"{where} does not have the fields {', '.join(names)}")
        if row["file"] != shard_name(split, number):
            raise ValueError(
                f"{where}.file is {shown(row['file'])}, not {shard_name(split, number)}"
            )
        for name in ("num_tokens", "num_bytes", "num_documents"):
            natural(row[name], f"{where}.{name}")
        digest_of(row["sha256"], f"{where}.sha256")
        shards.append(Shard(**row))
    return shards


def stored_files(values: Any) -> dict[str, str]:
    """Digests of the files of a tokenizer from JSON values.

    Raises:
        ValueError: The values are not digests, or a tokenizer has no file of that name.
    """
    for name, sha256 in typed(values, dict, "tokenizer_files").items():
        if name not in TOKENIZER_FILES:
            raise ValueError(f"tokenizer_files names {shown(name)}, which no tokenizer has")
        digest_of(sha256, f"tokenizer_files[{name!r}]")
    return values


def stored_skipped(values: Any) -> Skipped:
    """What is left out, from JSON values.

    Raises:
        ValueError: The values have another form.
    """
    for reason, entry in typed(values, dict, "skipped").items():
        typed(entry, dict, f"skipped[{reason!r}]")
        natural(entry.get("count"), f"skipped[{reason!r}].count")
        first = typed(entry.get("first"), list, f"skipped[{reason!r}].first")
        if set(entry) != {"count", "first"} or not all(isinstance(name, str) for name in first):
            raise ValueError(f"skipped[{reason!r}] is {shown(entry)}")
    return Skipped(values)


def typed(value: Any, kind: type, name: str) -> Any:
    """The value, if it has this type; else raises ValueError."""
    if type(value) is not kind:
        raise ValueError(f"{name} is {shown(value)}, not of type {kind.__name__}")
    return value


def natural(value: Any, name: str) -> int:
    """The value, if it is an integer >= 0; else raises ValueError."""
    if not 0 <= typed(value, int, name) < 1 << 63:
        raise ValueError(f"{name} is {shown(value)}")
    return value


def digest_of(value: Any, name: str) -> str:
    """The value, if it is a SHA-256; else raises ValueError."""
    if not re.fullmatch("[0-9a-f]{64}", typed(value, str, name)):
        raise ValueError(f"{name} is {shown(value)}, not a SHA-256")
    return value


def damaged(path: Path, how: str) -> RunError:
    """The error for a damaged file of prepared data."""
    anew = "prepare the data anew"
    if path.name == PROGRESS:
        anew = f"delete {path.parent} and start anew"
    return RunError(f"{path} {how}; restore it from a copy, or {anew}.")


def shown(value: Any) -> str:
    """The beginning of a value as text."""
    try:
        return ascii(value)[:40]
    except (ValueError, RecursionError):
        return type(value).__name__


def _index(values: dict[str, Any]) -> Index:
    names = {f.name for f in dataclasses.fields(Index)} | {"format", "version", "sha256"}
    if missing := names - set(values):
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    vocab_size = natural(values["vocab_size"], "vocab_size")
    separator = natural(values["separator"], "separator")
    if not 0 < vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}, not from 1 to {LARGEST_VOCABULARY}")
    if separator >= vocab_size:
        raise ValueError(f"separator is {separator}, beyond the vocabulary of {vocab_size}")
    if values["dtype"] != np.min_scalar_type(vocab_size - 1).name:
        raise ValueError(f"dtype is {shown(values['dtype'])} for a vocabulary of {vocab_size}")
    splits = typed(values["splits"], dict, "splits")
    if sorted(splits) != sorted(SPLITS):
        raise ValueError(f"splits are {shown(sorted(splits))}, not {' and '.join(SPLITS)}")
    tokenizer = typed(values["tokenizer"], str, "tokenizer")
    files = stored_files(values["tokenizer_files"])
    if bool(files) == (tokenizer == BYTES):
        raise ValueError(f"the tokenizer is {shown(tokenizer)}, but has {len(files)} files")
    shards = {split: stored_shards(splits[split], split) for split in SPLITS}
    if empty := [split for split in SPLITS if not any(s.num_documents for s in shards[split])]:
        raise ValueError(f"it has no documents for {empty[0]}")
    return Index(
        tokenizer=tokenizer,
        tokenizer_files=files,
        vocab_size=vocab_size,
        separator=separator,
        dtype=values["dtype"],
        splits=shards,
        skipped=stored_skipped(values["skipped"]),
        settings=typed(values["settings"], dict, "settings"),
        source_sha256=digest_of(values["source_sha256"], "source_sha256"),
    )


def _no_index(folder: Path) -> RunError:
    if (folder / PROGRESS).exists() or (folder / PARTS).exists():
        return RunError(
            f"{folder} is not finished (no {INDEX}); call the same pararnn data prepare again, "
            "which continues where it stopped."
        )
    if is_prepared(folder):
        return damaged(folder / INDEX, "is missing")
    return RunError(
        f"{folder} holds no prepared data (no {INDEX}); prepare it with: pararnn data prepare "
        f"SOURCE --out {folder}"
    )


def shard_name(split: str, number: int) -> str:
    """The name of a shard's file, numbered from 0."""
    return f"{split}-{number:05d}.bin"


def _is_ours(path: Path) -> bool:
    if not os.path.isfile(path):
        return False
    try:
        with path.open("rb") as file:
            return f'"{FORMAT}"'.encode() in file.read(100)
    except OSError:
        return False


def _seal(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
