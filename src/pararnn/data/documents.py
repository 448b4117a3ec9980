"""Documents, and the blocks of them that one process tokenizes at a time."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pararnn.data.corpus import read_text
from pararnn.data.errors import RunError


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        position: From 0 to 1, a hash of the document's name; below the share, it is held out.
        text: UTF-8; None when the document is not UTF-8 text.
    """

    position: float
    text: bytes | None


class Documents(Protocol):
    """Documents of a block, read where they are tokenized."""

    def documents(self) -> Iterator[Document]:
        """The documents in their order."""


@dataclass(frozen=True)
class Block:
    """Part of a source.

    Attributes:
        content: Its documents.
        num_bytes: Its size in the source.
        next: Where its reader goes on after it, as JSON values.
    """

    content: Documents
    num_bytes: int
    next: Any


@dataclass(frozen=True)
class TextFile:
    """A file that is one document; one that the user named must be text."""

    path: Path
    name: str
    size: int
    named: bool


@dataclass(frozen=True)
class Texts:
    """Text files."""

    files: tuple[TextFile, ...]

    def documents(self) -> Iterator[Document]:
        """One per file."""
        for file in self.files:
            try:
                text = read_text(file.path)
            except RunError:
                if file.named:
                    raise
                yield Document(position(file.name), None)
            else:
                yield Document(position(file.name), text)


@dataclass(frozen=True)
class CutText:
    """The only file of all sources: its last lines are held out."""

    file: TextFile
    held_out: float

    def documents(self) -> Iterator[Document]:
        """The first lines and the last."""
        text = read_text(self.file.path)
        if not text:
            return
        cut = int(len(text) * (1 - self.held_out))
        cut = text.rfind(b"\n", 0, cut) + 1 or text.find(b"\n") + 1
        if not 0 < cut < len(text):
            raise RunError(
                f"{self.file.path} has a single line, so nothing can be held out; give more text."
            )
        yield Document(1.0, text[:cut])
        yield Document(0.0, text[cut:])


@dataclass(frozen=True)
class Lines:
    """Lines of JSON, each an object with a text field."""

    path: Path
    name: str
    first: int
    content: bytes
    field: str

    def documents(self) -> Iterator[Document]:
        """One per line that is not blank."""
        for number, line in enumerate(self.content.split(b"\n"), self.first):
            if line.strip():
                text = self._text(line, f"{self.path} line {number}")
                yield Document(position(f"{self.name}:{number}"), _utf8(text))

    def _text(self, line: bytes, where: str) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:  # also what is not UTF-8
            raise RunError(f"{where} is not JSON ({error}); correct or remove it.") from error
        if not isinstance(row, dict):
            raise RunError(
                f"{where} is not a JSON object; write {{{json.dumps(self.field)}: ...}}."
            )
        text = text_of(row, self.field, where)
        if not isinstance(text, str):
            raise RunError(
                f"{where} holds {json.dumps(text)[:40]} as {self.field!r}; it must be a string."
            )
        return text


@dataclass(frozen=True)
class Rows:
    """Rows of a dataset: number and text."""

    name: str
    rows: tuple[tuple[int, str], ...]

    def documents(self) -> Iterator[Document]:
        """One per row."""
        for number, text in self.rows:
            yield Document(position(f"{self.name}:{number}"), _utf8(text))


def position(name: str) -> float:
    """A number from 0 to 1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def text_of(row: dict[str, Any], field: str, where: str) -> Any:
    """The text field of a row.

    Raises:
        RunError: The row has no such field.
    """
    if field not in row:
        raise RunError(
            f"{where} has no field {field!r}; it has {', '.join(row) or 'none'}. Name the one "
            "that holds the text with --text-field."
        )
    return row[field]


def _utf8(text: str) -> bytes | None:
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold
        return None
