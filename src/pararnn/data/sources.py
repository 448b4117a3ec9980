"""From what the user names to readers that cut it into blocks, always at the same places."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pararnn.data.corpus import find_sources
from pararnn.data.documents import Block, CutText, Lines, Rows, TextFile, Texts, text_of
from pararnn.data.errors import RunError
from pararnn.data.recipes import RECIPES
from pararnn.data.tokenization import first_line

DATASET = "datasets:"
LINES = (".jsonl", ".jsonl.gz")


class Reader(Protocol):
    """A part of the sources that is read in order."""

    @property
    def size(self) -> int | None:
        """Its bytes; None when they are not known before it is read."""

    def fingerprint(self) -> list[Any]:
        """What changes when the source does, as JSON values."""

    def blocks(self, start: Any, unit_bytes: int) -> Iterator[Block]:
        """Blocks of about unit_bytes from the `next` of an earlier one; None for the beginning."""


def find_readers(sources: tuple[str, ...], text_field: str, held_out: float) -> list[Reader]:
    """Readers of all sources: first the text files, then JSON lines, then datasets.

    Raises:
        RunError: A source is missing or holds no file.
    """
    files = [file for source in sources if not is_dataset(source) for file in _files(Path(source))]
    texts = [file for file in files if not file.name.endswith(LINES)]
    readers: list[Reader] = [TextReader(texts)] if texts else []
    readers += [LineReader(f.path, f.name, text_field) for f in files if f.name.endswith(LINES)]
    readers += [DatasetReader(source, text_field) for source in sources if is_dataset(source)]
    alone = len(texts) == len(files) == 1 and len(readers) == 1
    return [CutReader(texts[0], held_out)] if alone else readers


def is_dataset(source: str) -> bool:
    """Whether a source is a dataset and not a path."""
    return source.startswith(DATASET) or source in RECIPES


def _files(path: Path) -> Iterator[TextFile]:
    if not path.exists():
        raise RunError(
            f"there is no file or folder {path}. A dataset is written datasets:{path}; the recipes "
            f"are {', '.join(RECIPES)}."
        )
    named = path.is_file()
    for source in find_sources(path):
        yield TextFile(source.path, source.name, source.path.stat().st_size, named)


@dataclass(frozen=True)
class TextReader:
    """Files that are one document each."""

    files: list[TextFile]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def fingerprint(self) -> list[Any]:
        """Names, sizes and times."""
        return [[file.name, *_stamp(file.path)] for file in self.files]

    def blocks(self, start: int | None, unit_bytes: int) -> Iterator[Block]:
        """From a file's number."""
        first, size = start or 0, 0
        for index in range(first, len(self.files)):
            size += self.files[index].size
            if size >= unit_bytes or index == len(self.files) - 1:
                yield Block(Texts(tuple(self.files[first : index + 1])), size, index + 1)
                first, size = index + 1, 0


@dataclass(frozen=True)
class CutReader:
    """A single text file, whose last lines are held out."""

    file: TextFile
    held_out: float

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.file.size

    def fingerprint(self) -> list[Any]:
        """Name, size and time."""
        return [self.file.name, *_stamp(self.file.path)]

    def blocks(self, start: int | None, unit_bytes: int) -> Iterator[Block]:
        """The whole file, once."""
        if start is None:
            yield Block(CutText(self.file, self.held_out), self.file.size, 1)


@dataclass(frozen=True)
class LineReader:
    """A file of JSON lines, plain or compressed by gzip."""

    path: Path
    name: str
    text_field: str

    @property
    def size(self) -> int | None:
        """Bytes of the file, unless it is compressed."""
        return None if self.name.endswith(".gz") else self.path.stat().st_size

    def fingerprint(self) -> list[Any]:
        """Name, size and time."""
        return [self.name, *_stamp(self.path)]

    def blocks(self, start: list[int] | None, unit_bytes: int) -> Iterator[Block]:
        """From a byte and the number of the line there."""
        name = self.name.removesuffix(".gz")
        offset, line = start or (0, 1)
        try:
            with self._open() as file:
                file.seek(offset)
                while lines := file.readlines(unit_bytes):
                    content = Lines(self.path, name, line, b"".join(lines), self.text_field)
                    offset, line = offset + len(content.content), line + len(lines)
                    yield Block(content, len(content.content), [offset, line])
        except (OSError, EOFError, zlib.error) as error:
            raise RunError(f"cannot read {self.path} after line {line - 1}: {error}.") from error

    def _open(self) -> io.BufferedReader:
        if self.name.endswith(".gz"):
            return io.BufferedReader(gzip.open(self.path))
        return self.path.open("rb")


@dataclass(frozen=True)
class DatasetReader:
    """The train split of a dataset, streamed by the `datasets` package."""

    source: str
    text_field: str
    size: None = field(default=None, init=False)

    def fingerprint(self) -> list[Any]:
        """The name alone; whether the dataset changes is not known."""
        return [self.source]

    def blocks(self, start: list[Any] | None, unit_bytes: int) -> Iterator[Block]:
        """From a row's number and the state of the stream there."""
        name, keep = self._choice()
        rows = _load(name)
        number, state = start or (0, None)
        if state is not None:
            rows.load_state_dict(state)
        texts: list[tuple[int, str]] = []
        size = 0
        for row in _stream(rows, name):
            if keep(row) and (text := self._text(row, f"row {number} of {name}")):
                texts.append((number, text))
                size += len(text)
            number += 1
            if size >= unit_bytes:
                yield Block(Rows(name, tuple(texts)), size, [number, rows.state_dict()])
                texts, size = [], 0
        if texts:
            yield Block(Rows(name, tuple(texts)), size, [number, rows.state_dict()])

    def _choice(self) -> tuple[str, Callable[[dict[str, Any]], bool]]:
        if self.source in RECIPES:
            recipe = RECIPES[self.source]
            return recipe.dataset, recipe.keep
        return self.source.removeprefix(DATASET), lambda row: True

    def _text(self, row: dict[str, Any], where: str) -> str | None:
        text = text_of(row, self.text_field, where)
        if not isinstance(text, str | None):
            raise RunError(
                f"{where} holds {type(text).__name__} as {self.text_field!r}; name a field of "
                "strings with --text-field."
            )
        return text


def _load(name: str) -> Any:
    try:
        import datasets  # type: ignore[import-untyped] # has none
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise RunError(
            f"{DATASET}{name} needs the package datasets, which is not installed; install the "
            'extra: pip install "pararnn[train,data]"'
        ) from error
    path, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(path, configuration or None, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot load the dataset {name}: {first_line(error)}") from error


def _stream(rows: Any, name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except (OSError, ValueError) as error:
        raise RunError(
            f"reading the dataset {name} failed: {first_line(error)} What is prepared so far is "
            "kept; continue with the same command."
        ) from error


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
