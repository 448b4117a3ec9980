"""Documents, and the blocks of them that one process tokenizes at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pararnn._words import counted
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.finding import SourceFile, position
from pararnn.lm.data.reading import UnusableError, read_text, refuse_rows
from pararnn.lm.data.skipped import Skip

NO_TEXT = "row without a text"


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        name: Where it is, for the user.
        position: From 0 to 1, a hash of the document's name; below the share, it is held out.
        text: UTF-8.
    """

    name: str
    position: float
    text: bytes


class Documents(Protocol):
    """Documents of a block. They are read by the process that tokenizes them."""

    def documents(self) -> Iterator[Document | Skip]:
        """The documents in order, and what is left out in their place."""


@dataclass(frozen=True)
class Block:
    """Part of a source.

    Attributes:
        content: Its documents.
        num_bytes: Its size in the source.
        next: Where the reader continues after it, as JSON values.
    """

    content: Documents
    num_bytes: int
    next: Any


@dataclass(frozen=True)
class Nothing:
    """A block without documents: one thing that is left out."""

    skip: Skip

    def documents(self) -> Iterator[Document | Skip]:
        """No document, only the note of what is left out."""
        yield self.skip


@dataclass(frozen=True)
class Texts:
    """Text files.

    Attributes:
        files: One document each.
        field: Text field of JSON rows, to recognise them under another name.
        skip_errors: Leave out files that cannot be read.
        held_out: Cut an only file in two documents and hold out the second, which has this share
            of the bytes. None: do not cut.
    """

    files: tuple[SourceFile, ...]
    field: str
    skip_errors: bool
    held_out: float | None = None

    def documents(self) -> Iterator[Document | Skip]:
        """One per file, or the two of an only file."""
        for file in self.files:
            try:
                text = read_text(file.path)
                refuse_rows(file.path, text, self.field)
            except UnusableError as error:
                yield skip_or_stop(file, error, self.skip_errors)
                continue
            name = str(file.path)
            if self.held_out is None or not text:
                yield Document(name, file.position, text)
            else:
                cut = _cut(text, self.held_out, name)
                yield Document(name, 1.0, text[:cut])
                yield Document(name, 0.0, text[cut:])


@dataclass(frozen=True)
class Lines:
    """Lines of JSON, each an object with a text field.

    Attributes:
        path: Of the file.
        name: Of the file in its source, without the suffix of a compression.
        first: Number of the first line.
        content: The lines.
        field: Name of the text field.
        skip_errors: Leave out lines without a text.
        unit: Name of a line in messages.
    """

    path: Path
    name: str
    first: int
    content: bytes
    field: str
    skip_errors: bool
    unit: str = "line"

    def documents(self) -> Iterator[Document | Skip]:
        """One per line that is not blank."""
        for number, line in enumerate(self.content.split(b"\n"), self.first):
            if line.strip():
                where = f"{self.path} {self.unit} {number}"
                try:
                    text = self._text(line, where)
                except RunError as error:
                    if not self.skip_errors:
                        raise stopped(error, f"such {self.unit}s") from error
                    yield Skip(where, f"{self.unit} without a text that can be read")
                else:
                    yield _document(text, where, f"{self.name}:{number}")

    def _text(self, line: bytes, where: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:  # also what is not UTF-8
            raise RunError(f"{where} is not JSON ({error}); correct or remove it.") from error
        except RecursionError as error:
            raise RunError(f"{where} is nested too deeply; correct or remove it.") from error
        if not isinstance(row, dict):
            raise RunError(
                f"{where} is not a JSON object; write {{{json.dumps(self.field)}: ...}}."
            )
        text = text_of(row, self.field, where)
        if not isinstance(text, str):
            raise RunError(f"{where} holds {_shown(text)} as {self.field!r}; it must be a string.")
        return text


@dataclass(frozen=True)
class Rows:
    """Rows of a dataset: number and text. A row without a text has None and is left out."""

    name: str
    rows: tuple[tuple[int, str | None], ...]

    def documents(self) -> Iterator[Document | Skip]:
        """One per row."""
        for number, text in self.rows:
            where = f"row {number} of {self.name}"
            yield (
                Skip(where, NO_TEXT)
                if text is None
                else _document(text, where, f"{self.name}:{number}")
            )


def text_of(row: dict[str, Any], field: str, where: str) -> Any:
    """The value of the text field of a row.

    Raises:
        RunError: The row has no such field.
    """
    if field not in row:
        raise RunError(
            f"{where} has no field {field!r}; it has {', '.join(row) or 'none'}. Name the field "
            "that holds the text with --text-field."
        )
    return row[field]


def skip_or_stop(file: SourceFile, error: UnusableError, skip_errors: bool) -> Skip:
    """The note that a file is left out.

    Raises:
        RunError: The user named the file, or it is damaged and errors are not skipped.
    """
    if file.named:
        raise error
    if not (error.by_kind or skip_errors):
        raise stopped(error, "such files") from error
    return Skip(str(file.path), error.reason)


def stopped(error: RunError, what: str) -> RunError:
    """The error, with the option that leaves the cause out."""
    return RunError(f"{error} Or leave out {what}: pararnn data prepare --on-error skip.")


def _cut(text: bytes, held_out: float, name: str) -> int:
    """Where to cut a text: at the end of a line, or at a character if it is a single line."""
    wanted = int(len(text) * (1 - held_out))
    cut = text.rfind(b"\n", 0, wanted) + 1 or text.find(b"\n") + 1
    if not 0 < cut < len(text):
        cut = wanted
        while cut and text[cut] & 0xC0 == 0x80:  # within a character
            cut -= 1
    if not 0 < cut < len(text):
        raise RunError(f"{name} has {counted(len(text), 'byte')}; that is too little to split.")
    return cut


def _document(text: str, where: str, name: str) -> Document | Skip:
    try:
        return Document(where, position(name), text.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return Skip(where, "half of a surrogate pair, which UTF-8 cannot hold")


def _shown(value: Any) -> str:
    """The beginning of a JSON value, or its type if it is nested too deeply."""
    try:
        return json.dumps(value)[:40]
    except RecursionError:
        return type(value).__name__
