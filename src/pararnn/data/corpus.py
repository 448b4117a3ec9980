"""From files to two flat byte files, one to train on and one held out.

Every document is stored as a zero byte and its UTF-8 bytes, and a last zero byte ends the file.
Text holds no zero byte, so this one is free to say "a document begins". Files are ordered and
split by a hash of their path within the folder: a file keeps its side when others come and go, and
the beginning of the held-out bytes is a sample of all of them.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from pararnn.data.errors import RunError
from pararnn.data.files import digest, write_atomically

DOCUMENT = 0
"""The byte before every document, and the token that ends generated text."""
SPLITS = ("train", "validation")
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Prepared data of a run.

    Attributes:
        train: Flat file of bytes to train on.
        validation: Flat file of held-out bytes.
        num_train_bytes: Text bytes of `train`, without the separators.
        num_validation_bytes: The same of `validation`.
        num_files: Files used.
        num_skipped: Files of the folder that are not UTF-8 text.
        sha256: Digest of both files together.
    """

    train: Path
    validation: Path
    num_train_bytes: int
    num_validation_bytes: int
    num_files: int
    num_skipped: int
    sha256: str


@dataclass(frozen=True)
class _Source:
    """One file of the source, with its name inside it."""

    path: Path
    name: str

    @property
    def position(self) -> float:
        """A number from 0 to 1 that depends on the name alone."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big") / 2**64


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
        sources = find_sources(data)
        folder.mkdir(parents=True, exist_ok=True)
        _write_corpus(sources, folder, held_out, single=data is not None and data.is_file())
    stored = json.loads(index.read_text())["corpus"]
    paths = {name: folder / stored.pop(name) for name in SPLITS}
    if _digest(folder) != stored["sha256"]:
        raise RunError(
            f"the prepared text in {folder} was changed or damaged; restore it from a copy, or "
            "train anew with another --out."
        )
    return Corpus(**paths, **stored)


def find_sources(data: Path | None) -> list[_Source]:
    """The files of a data path in the order of their hash.

    Raises:
        RunError: The path is missing or holds no file.
    """
    if data is None:
        root = Path(sysconfig.get_path("stdlib"))
        sources = [s for s in _walk(root) if s.path.suffix == ".py"]
        if not sources:
            raise RunError(f"no Python source in {root}; name a text file with --data PATH.")
    elif data.is_file():
        sources = [_Source(data, data.name)]
    elif data.is_dir():
        sources = list(_walk(data))
        if not sources:
            raise RunError(f"data folder {data} holds no files; put text files into it.")
    else:
        raise RunError(f"data path {data} does not exist; give a text file or a folder.")
    return sorted(sources, key=lambda source: (source.position, source.name))


def _walk(root: Path) -> Iterator[_Source]:
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith(".")]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield _Source(path, path.relative_to(root).as_posix())


def read_text(path: Path) -> bytes:
    """The bytes of a UTF-8 text file.

    Raises:
        RunError: It is not text, or may not be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}.") from error
    zero = content.find(DOCUMENT)
    if zero >= 0:
        raise RunError(f"{path} is a binary file (zero byte at offset {zero}); give UTF-8 text.")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise RunError(
            f"{path} is not UTF-8 text (byte 0x{content[error.start]:02x} at offset "
            f"{error.start}); convert it, for example: iconv -f latin1 -t utf-8."
        ) from error
    return content


def read_documents(data: Path) -> list[bytes]:
    """The texts of all files under a path.

    Raises:
        RunError: The path is missing, empty or not text.
    """
    texts, _ = _read_all(find_sources(data), strict=data.is_file())
    return [text for _, text in texts]


def _read_all(sources: list[_Source], strict: bool) -> tuple[list[tuple[_Source, bytes]], int]:
    """Texts that are not empty, and how many files were not text; strict raises for those."""
    texts, skipped, first_error = [], 0, None
    for source in sources:
        try:
            text = read_text(source.path)
        except RunError as error:
            if strict:
                raise
            skipped, first_error = skipped + 1, first_error or error
        else:
            texts += [(source, text)] if text else []
    if not texts:
        reason = first_error or "every file is empty"
        where = sources[0].path if len(sources) == 1 else sources[0].path.parent
        raise RunError(f"no text in {where}: {reason}. Give a UTF-8 text file with some content.")
    return texts, skipped


def _write_corpus(sources: list[_Source], folder: Path, held_out: float, single: bool) -> None:
    texts, skipped = _read_all(sources, strict=single)
    split = _split_bytes(texts[0], held_out) if len(texts) == 1 else _split_files(texts, held_out)
    for name, part in zip(SPLITS, split, strict=True):
        flat = b"".join(_document(text) for _, text in part) + bytes([DOCUMENT])
        write_atomically(folder / f"{name}.bin", flat)
    corpus = Corpus(
        train=Path("train.bin"),
        validation=Path("validation.bin"),
        num_train_bytes=sum(len(text) for _, text in split[0]),
        num_validation_bytes=sum(len(text) for _, text in split[1]),
        num_files=len(texts),
        num_skipped=skipped,
        sha256=_digest(folder),
    )
    listing = {
        name: [source.name for source, _ in part] for name, part in zip(SPLITS, split, strict=True)
    }
    content = json.dumps({"corpus": asdict(corpus), **listing}, indent=1, default=str)
    write_atomically(folder / "files.json", content.encode())


def _digest(folder: Path) -> str:
    digests = [digest(folder / f"{name}.bin") for name in SPLITS]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _document(text: bytes) -> bytes:
    return bytes([DOCUMENT]) + text


_Texts = list[tuple[_Source, bytes]]


def _split_files(texts: _Texts, held_out: float) -> tuple[_Texts, _Texts]:
    """Files below the share by their hash are held out; at least one is, and one is not."""
    count = sum(source.position < held_out for source, _ in texts)
    count = min(max(count, 1), len(texts) - 1)
    return texts[count:], texts[:count]


def _split_bytes(text: tuple[_Source, bytes], held_out: float) -> tuple[_Texts, _Texts]:
    """The last lines of a single file are held out."""
    source, content = text
    cut = int(len(content) * (1 - held_out))
    line = content.rfind(b"\n", 0, cut) + 1
    cut = line or cut
    if not 0 < cut < len(content):
        raise RunError(f"{source.path} has {len(content)} bytes; that is too little to split.")
    return [(source, content[:cut])], [(source, content[cut:])]
