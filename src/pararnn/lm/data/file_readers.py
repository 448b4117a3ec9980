"""Readers of files: texts, lines of JSON, and lists of rows."""

import codecs
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pararnn.lm.data.documents import Block, Lines, Nothing, Texts, skip_or_stop
from pararnn.lm.data.finding import SourceFile
from pararnn.lm.data.reading import (
    READ_ERRORS,
    UnusableError,
    open_content,
    uncompressed,
    unreadable,
)
from pararnn.lm.data.skipped import EMPTY, Skip


@dataclass(frozen=True)
class TextReader:
    """Files that are one document each; an only file is cut in two if a share is held out."""

    files: list[SourceFile]
    text_field: str
    skip_errors: bool
    held_out: float | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def fingerprint(self) -> list[Any]:
        """Names, sizes and times."""
        return [[file.name, *_stamp(file.path)] for file in self.files]

    def blocks(self, start: int | None, unit_bytes: int) -> Iterator[Block]:
        """Blocks from the number of a file."""
        first, size = start or 0, 0
        for index in range(first, len(self.files)):
            size += self.files[index].size
            if size >= unit_bytes or index == len(self.files) - 1:
                files = tuple(self.files[first : index + 1])
                texts = Texts(files, self.text_field, self.skip_errors, self.held_out)
                yield Block(texts, size, index + 1)
                first, size = index + 1, 0


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
        """Blocks from [byte, number of the line there]; of a damaged file, what can be read.

        A file of a folder is left out if its first block does not hold the name of the field.
        """
        for number, block in enumerate(self._blocks(start, unit_bytes)):
            if number == 0 and start is None and self._holds_other_rows(block):
                skip = Skip(str(self.file.path), _no_field(self.text_field))
                yield Block(Nothing(skip), self.size or 0, [-1, 0])
                return
            yield block

    def _holds_other_rows(self, block: Block) -> bool:
        if self.file.named or not isinstance(block.content, Lines):
            return False
        names = {f'"{self.text_field}"', json.dumps(self.text_field)}
        return not any(name.encode() in block.content.content for name in names)

    def _blocks(self, start: list[int] | None, unit_bytes: int) -> Iterator[Block]:
        offset, line = start or (0, 1)
        if offset < 0:  # the end of a file that is left out or damaged
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
        elif offset == 0 and problem is None:
            yield Block(Nothing(Skip(str(self.file.path), EMPTY)), 0, [-1, 0])
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
        """Bytes of the file, unless it is compressed."""
        return self._lines.size

    def fingerprint(self) -> list[Any]:
        """Name, size and time."""
        return self._lines.fingerprint()

    def blocks(self, start: Any, unit_bytes: int) -> Iterator[Block]:
        """Blocks from the number of a row, or as `LineReader` does for lines."""
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
        """Whether the file has several lines, and one of the first two is an object."""
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
        """The rows of a file that holds one JSON value.

        Raises:
            UnusableError: The file is damaged, or has no row with the text field.
        """
        path, field = self.file.path, f'"{self.text_field}"'
        try:
            with open_content(path) as file:
                content = file.read()
        except READ_ERRORS as error:
            raise unreadable(path, error) from error
        value = _parsed(content)
        if value is None and field.encode() in content:
            raise UnusableError(
                f"{path} is neither a list of rows in JSON nor a row in every line; correct it.",
                "damaged JSON",
                by_kind=False,
            )
        rows = value if isinstance(value, list) else [value]
        if not any(isinstance(row, dict) and self.text_field in row for row in rows):
            raise UnusableError(
                f"{path} holds no row with a field {field}; name the field that holds the text "
                "with --text-field.",
                _no_field(self.text_field),
                by_kind=True,
            )
        return rows

    def _blocks(self, rows: list[Any], first: int, unit_bytes: int) -> Iterator[Block]:
        """Blocks of rows, each row written as a line."""
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


def _no_field(name: str) -> str:
    """The reason for leaving out a file without the text field."""
    return f'JSON without a field "{name}"'


def _parsed(content: bytes) -> Any:
    """The value of a JSON text; None if it is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _pass_over(file: io.BufferedIOBase, count: int) -> None:
    """Move to a byte, by reading if the file cannot seek."""
    if file.seekable():
        file.seek(count)
        return
    while count:
        count -= len(file.read(min(count, 1 << 20))) or count


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
