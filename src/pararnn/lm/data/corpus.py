"""From files to two flat byte files, one to train on and one held out.

Every document is stored as a zero byte and its UTF-8 bytes, and a last zero byte ends the file.
Text holds no zero byte, so this one is free to say "a document begins". Files are ordered and
split by a hash of their path within the folder: a file keeps its side when others come and go, and
the beginning of the held-out bytes is a sample of all of them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import digest, read_json, write_atomically
from pararnn.lm.data.finding import SourceFile, find_files, find_standard_library
from pararnn.lm.data.index import stored_skipped
from pararnn.lm.data.reading import (
    DOCUMENT,
    Kind,
    UnusableError,
    kind_of,
    read_text,
    refuse_rows,
)
from pararnn.lm.data.skipped import EMPTY, Skip, Skipped

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Corpus:
    """Prepared data of a run.

    Attributes:
        train: Flat file of bytes to train on.
        validation: Flat file of held-out bytes.
        num_train_bytes: Text bytes of `train`, without the separators.
        num_validation_bytes: The same of `validation`.
        num_files: Files used.
        num_skipped: Files of the folder that are left out, but for hidden and empty ones.
        sha256: Digest of both files together.
        skipped: Why they are, as `Skipped` has it.
    """

    train: Path
    validation: Path
    num_train_bytes: int
    num_validation_bytes: int
    num_files: int
    num_skipped: int
    sha256: str
    skipped: dict[str, Any] = field(default_factory=dict)


def prepare_corpus(data: Path | None, folder: Path, held_out: float) -> Corpus:
    """Write `train.bin`, `validation.bin` and `files.json` into folder, or read what is there.

    Args:
        data: Text file or folder; None for the source of the standard library.
        folder: Where to write.
        held_out: Share of the files, or of the bytes of a single file.

    Raises:
        RunError: Nothing to read, or nothing but unreadable files.
    """
    index = folder / "files.json"
    if not index.exists():
        files, skipped = (find_standard_library(), Skipped()) if data is None else find_files(data)
        folder.mkdir(parents=True, exist_ok=True)
        _write_corpus(_read_all(data, files, skipped), skipped, folder, held_out)
    try:
        stored = read_json(index)["corpus"]
        paths = {name: folder / f"{name}.bin" for name in SPLITS}
        corpus = Corpus(**{**stored, **paths})
        stored_skipped(corpus.skipped)
    except (ValueError, KeyError, TypeError) as error:
        raise _changed(index, "is damaged") from error
    except OSError as error:
        raise _changed(index, f"cannot be read: {error.strerror}") from error
    if not all(type(v) is int for name, v in vars(corpus).items() if name.startswith("num_")):
        raise _changed(index, "is damaged")
    if _digest(folder) != corpus.sha256:
        raise _changed(
            f"{folder}: train.bin, validation.bin or files.json", "was changed or damaged"
        )
    return corpus


def _changed(path: Path | str, how: str) -> RunError:
    return RunError(f"{path} {how}; restore it from a copy, or train anew with another --out.")


def read_documents(data: Path) -> tuple[list[bytes], Skipped]:
    """The texts of all files under a path, and what is left out of it.

    Raises:
        RunError: The path is missing, empty or not text.
    """
    files, skipped = find_files(data)
    return [text for _, text in _read_all(data, files, skipped)], skipped


def _read_all(data: Path | None, files: list[SourceFile], skipped: Skipped) -> "_Texts":
    """Texts that are not empty; the other files are counted, or raise when the user named them."""
    texts, first_error = [], None
    for file in files:
        name = file.name if data is None else str(file.path)
        try:
            text = _read(file.path)
        except UnusableError as error:
            if file.named or not error.by_kind:
                raise
            first_error = first_error or error
            skipped.add(Skip(name, error.reason))
        else:
            if text:
                texts.append((file, text))
            else:
                skipped.add(Skip(name, EMPTY))
    if not texts:
        only_empty = set(skipped.reasons) == {EMPTY}
        counted = "every file is empty" if only_empty else "; ".join(skipped.describe())
        raise RunError(
            f"no text in {data}: {first_error or counted}. Give a UTF-8 text file with some "
            "content."
        )
    return texts


def _read(path: Path) -> bytes:
    """The text of a file.

    Raises:
        UnusableError: It is none, or rows of texts.
    """
    if kind_of(path.name) is not Kind.TEXT:
        raise UnusableError(
            f"{path} holds rows of JSON; prepare their texts first: pararnn data prepare {path} "
            "--out FOLDER, and name that folder",
            "JSON, which pararnn data prepare reads",
            by_kind=True,
        )
    text = read_text(path)
    refuse_rows(path, text, "text")
    return text


def _write_corpus(texts: "_Texts", skipped: Skipped, folder: Path, held_out: float) -> None:
    split = _split_bytes(texts[0], held_out) if len(texts) == 1 else _split_files(texts, held_out)
    for name, part in zip(SPLITS, split, strict=True):
        flat = b"".join(_document(text) for _, text in part) + bytes([DOCUMENT])
        path = folder / f"{name}.bin"
        if path.exists() and path.read_bytes() != flat:
            raise _changed(folder / "files.json", f"is missing, and {path} holds another text")
        write_atomically(path, flat)
    corpus = Corpus(
        train=Path("train.bin"),
        validation=Path("validation.bin"),
        num_train_bytes=sum(len(text) for _, text in split[0]),
        num_validation_bytes=sum(len(text) for _, text in split[1]),
        num_files=len(texts),
        num_skipped=skipped.lost.total,
        sha256=_digest(folder),
        skipped=skipped.reasons,
    )
    listing = {
        name: [source.name for source, _ in part] for name, part in zip(SPLITS, split, strict=True)
    }
    content = json.dumps({"corpus": asdict(corpus), **listing}, indent=1, default=str)
    write_atomically(folder / "files.json", content.encode())


def _digest(folder: Path) -> str:
    digests = []
    for path in (folder / f"{name}.bin" for name in SPLITS):
        try:
            digests.append(digest(path))
        except FileNotFoundError as error:
            raise _changed(path, "is missing") from error
        except OSError as error:
            raise _changed(path, f"cannot be read: {error.strerror}") from error
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _document(text: bytes) -> bytes:
    return bytes([DOCUMENT]) + text


_Texts = list[tuple[SourceFile, bytes]]


def _split_files(texts: _Texts, held_out: float) -> tuple[_Texts, _Texts]:
    """Files below the share by their hash are held out; at least one is, and one is not."""
    count = sum(source.position < held_out for source, _ in texts)
    count = min(max(count, 1), len(texts) - 1)
    return texts[count:], texts[:count]


def _split_bytes(text: tuple[SourceFile, bytes], held_out: float) -> tuple[_Texts, _Texts]:
    """The last lines of a single file are held out."""
    source, content = text
    cut = int(len(content) * (1 - held_out))
    line = content.rfind(b"\n", 0, cut) + 1
    cut = line or cut
    if not 0 < cut < len(content):
        raise RunError(f"{source.path} has {len(content)} bytes; that is too little to split.")
    return [(source, content[:cut])], [(source, content[cut:])]
