"""From what the user names to readers that cut it into blocks, always at the same places."""

import codecs
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pararnn.data.documents import (
    Block,
    CutText,
    Lines,
    Nothing,
    Rows,
    Texts,
    skip_or_stop,
    stopped,
    text_of,
)
from pararnn.data.errors import RunError
from pararnn.data.finding import SourceFile, find_files
from pararnn.data.reading import (
    READ_ERRORS,
    Kind,
    UnusableError,
    kind_of,
    open_content,
    uncompressed,
    unreadable,
)
from pararnn.data.recipes import RECIPES
from pararnn.data.skipped import Skipped
from pararnn.data.tokenization import first_line

DATASET = "datasets:"


class Reader(Protocol):
    """A part of the sources that is read in order."""

    @property
    def size(self) -> int | None:
        """Its bytes; None when they are not known before it is read."""

    def fingerprint(self) -> list[Any]:
        """What changes when the source does, as JSON values."""

    def blocks(self, start: Any, unit_bytes: int) -> Iterator[Block]:
        """Blocks of about unit_bytes from the `next` of an earlier one; None for the beginning."""


def find_readers(
    sources: tuple[str, ...], text_field: str, held_out: float, skip_errors: bool
) -> tuple[list[Reader], Skipped]:
    """Readers of all sources: first the text files, then rows, then datasets; what is left out.

    Raises:
        RunError: A source is missing or holds no file, or two hold the same one.
    """
    files, skipped = _find(sources, skip_errors)
    kinds = [kind_of(file.name) for file in files]
    texts = [f for f, kind in zip(files, kinds, strict=True) if kind is Kind.TEXT]
    readers: list[Reader] = [TextReader(texts, text_field, skip_errors)] if texts else []
    for file, kind in zip(files, kinds, strict=True):
        if kind is Kind.LINES:
            readers.append(LineReader(file, text_field, skip_errors))
        elif kind is Kind.JSON:
            readers.append(JsonReader(file, text_field, skip_errors))
    datasets = [source for source in sources if is_dataset(source)]
    readers += [DatasetReader(source, text_field, skip_errors) for source in datasets]
    if len(readers) == len(files) == len(texts) == 1:
        return [CutReader(texts[0], text_field, held_out)], skipped
    return readers, skipped


def is_dataset(source: str) -> bool:
    """Whether a source is a dataset and not a path."""
    return source.startswith(DATASET) or source in RECIPES


def _find(sources: tuple[str, ...], skip_errors: bool) -> tuple[list[SourceFile], Skipped]:
    """The files of all sources, none of them twice."""
    files: dict[str, SourceFile] = {}
    skipped = Skipped()
    for source in sources:
        if is_dataset(source):
            continue
        for file in _files(Path(source), skip_errors, skipped):
            other = files.setdefault(os.path.realpath(file.path), file)
            if other is not file:
                raise RunError(
                    f"{file.path} belongs to two of the sources ({other.path} is the same file); "
                    "name it once."
                )
    return list(files.values()), skipped


def _files(path: Path, skip_errors: bool, skipped: Skipped) -> list[SourceFile]:
    if not path.exists():
        raise RunError(
            f"there is no file or folder {path}. A dataset is written datasets:{path}; the recipes "
            f"are {', '.join(RECIPES)}."
        )
    try:
        files, left_out = find_files(path, skip_errors=skip_errors)
    except UnusableError as error:
        raise error if path.is_file() else stopped(error, "such files") from error
    skipped.update(left_out)
    return files


@dataclass(frozen=True)
class TextReader:
    """Files that are one document each."""

    files: list[SourceFile]
    text_field: str
    skip_errors: bool

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
                files = tuple(self.files[first : index + 1])
                yield Block(Texts(files, self.text_field, self.skip_errors), size, index + 1)
                first, size = index + 1, 0


@dataclass(frozen=True)
class CutReader:
    """A single text file, whose last lines are held out."""

    file: SourceFile
    text_field: str
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
            content = CutText(self.file, self.text_field, self.held_out)
            yield Block(content, self.file.size, 1)


@dataclass(frozen=True)
class LineReader:
    """A file of JSON lines."""

    file: SourceFile
    text_field: str
    skip_errors: bool

    @property
    def size(self) -> int | None:
        """Bytes of the file, unless it is compressed."""
        return self.file.size if uncompressed(self.file.name) == self.file.name else None

    def fingerprint(self) -> list[Any]:
        """Name, size and time."""
        return [self.file.name, *_stamp(self.file.path)]

    def blocks(self, start: list[int] | None, unit_bytes: int) -> Iterator[Block]:
        """From a byte and the number of the line there; what can be read of a damaged file."""
        offset, line = start or (0, 1)
        if offset < 0:  # where a damaged file ended
            return
        lines: list[bytes] = []
        size, problem = 0, None
        try:
            with open_content(self.file.path) as file:
                _pass_over(file, offset)
                for content in file:
                    lines.append(content)
                    size += len(content)
                    if size >= unit_bytes:
                        offset += size
                        yield self._block(lines, line, offset)
                        line, lines, size = line + len(lines), [], 0
        except READ_ERRORS as error:
            problem = unreadable(self.file.path, error, f" after line {line + len(lines) - 1}")
        except UnusableError as error:
            problem = error
        if lines:
            yield self._block(lines, line, offset + size)
        if problem is not None:
            yield Block(Nothing(skip_or_stop(self.file, problem, self.skip_errors)), 0, [-1, 0])

    def _block(self, lines: list[bytes], first: int, end: int) -> Block:
        content, name = b"".join(lines), uncompressed(self.file.name)
        documents = Lines(self.file.path, name, first, content, self.text_field, self.skip_errors)
        return Block(documents, len(content), [end, first + len(lines)])


@dataclass(frozen=True)
class JsonReader:
    """A file of JSON: objects line by line, or a list of objects, or one object.

    A list is read whole.
    """

    file: SourceFile
    text_field: str
    skip_errors: bool

    @property
    def size(self) -> int | None:
        """As that of lines."""
        return self._lines.size

    def fingerprint(self) -> list[Any]:
        """Name, size and time."""
        return self._lines.fingerprint()

    def blocks(self, start: Any, unit_bytes: int) -> Iterator[Block]:
        """From a row's number, or as `LineReader` has it."""
        try:
            if self._is_lines():
                yield from self._lines.blocks(start, unit_bytes)
                return
            rows = self._rows()
        except UnusableError as error:
            if start is None:
                yield Block(Nothing(skip_or_stop(self.file, error, self.skip_errors)), 0, 0)
            return
        yield from self._blocks(rows, start or 0, unit_bytes)

    @property
    def _lines(self) -> LineReader:
        return LineReader(self.file, self.text_field, self.skip_errors)

    def _is_lines(self) -> bool:
        """Whether there are several lines, and one of the first two is an object."""
        try:
            with open_content(self.file.path) as file:
                lines = filter(bytes.strip, file)
                first = next(lines, b"").removeprefix(codecs.BOM_UTF8)
                if not first.lstrip().startswith(b"{"):
                    return False
                second = next(lines, b"")
        except READ_ERRORS as error:
            raise unreadable(self.file.path, error) from error
        return bool(second) and any(isinstance(_parsed(line), dict) for line in (first, second))

    def _rows(self) -> list[Any]:
        """The rows of a file that holds one value.

        Raises:
            UnusableError: It holds something else.
        """
        path, field = self.file.path, f'"{self.text_field}"'
        try:
            with open_content(path) as file:
                content = file.read()
        except READ_ERRORS as error:
            raise unreadable(path, error) from error
        if field.encode() not in content and json.dumps(self.text_field).encode() not in content:
            raise UnusableError(
                f"{path} holds no row with a field {field}; name the one that holds the text with "
                "--text-field.",
                f"JSON without a field {field}",
                by_kind=True,
            )
        value = _parsed(content)
        if value is None:
            raise UnusableError(
                f"{path} is neither a list of rows in JSON nor a row in every line; correct it.",
                "damaged JSON",
                by_kind=False,
            )
        return value if isinstance(value, list) else [value]

    def _blocks(self, rows: list[Any], first: int, unit_bytes: int) -> Iterator[Block]:
        """The rows as lines."""
        name, size = uncompressed(self.file.name), 0
        lines: list[bytes] = []
        for number, row in enumerate(rows[first:], first + 1):
            lines.append(json.dumps(row).encode())
            size += len(lines[-1])
            if size >= unit_bytes or number == len(rows):
                content = Lines(
                    self.file.path,
                    name,
                    number - len(lines) + 1,
                    b"\n".join(lines),
                    self.text_field,
                    self.skip_errors,
                    unit="row",
                )
                yield Block(content, size, number)
                lines, size = [], 0


def _parsed(content: bytes) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _pass_over(file: io.BufferedIOBase, count: int) -> None:
    """Go to a byte."""
    if file.seekable():
        file.seek(count)
        return
    while count:
        count -= len(file.read(min(count, 1 << 20))) or count


@dataclass(frozen=True)
class DatasetReader:
    """The train split of a dataset, streamed by the `datasets` package."""

    source: str
    text_field: str
    skip_errors: bool
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
        texts: list[tuple[int, str | None]] = []
        size = 0
        for row in _stream(rows, name):
            if keep(row):
                text = self._text(row, f"row {number} of {name}")
                texts.append((number, text))
                size += len(text or "")
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
        """The text; None for a row without one."""
        text = text_of(row, self.text_field, where)
        if isinstance(text, str | None) or self.skip_errors:
            return text if isinstance(text, str) else None
        raise RunError(
            f"{where} holds {type(text).__name__} as {self.text_field!r}; name a field of strings "
            "with --text-field. Or leave out such rows with --on-error skip."
        )


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
