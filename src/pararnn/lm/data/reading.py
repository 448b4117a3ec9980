"""Read the files of a source: their kind, their decompressed content, and UTF-8 text."""

import bz2
import codecs
import enum
import gzip
import io
import json
import lzma
import zlib
from pathlib import Path
from typing import Any

from pararnn.lm.data.errors import RunError

DOCUMENT = 0
"""The byte before every document; as a token it also ends generated text."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
LINES = (".jsonl", ".ndjson", ".jsonlines")
ARCHIVES = (
    *(".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"),
    *(".z", ".lz4", ".lzma", ".lz", ".br", ".sz", ".zstd"),
)
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx")
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""The errors that reading or decompressing a file raises."""


class Kind(enum.Enum):
    """The content of a file, by its name."""

    TEXT = enum.auto()
    LINES = enum.auto()
    JSON = enum.auto()
    ARCHIVE = enum.auto()
    TABLE = enum.auto()


class UnusableError(RunError):
    """Raised for a file that cannot be used as a source.

    Args:
        message: What is wrong and what to do.
        reason: A few words; files that are left out are counted under them.
        by_kind: The file is not text, and a folder may hold it beside texts. Otherwise it is
            damaged or cannot be read now.
    """

    def __init__(self, message: str, reason: str, by_kind: bool) -> None:
        super().__init__(message, reason, by_kind)
        self.reason, self.by_kind = reason, by_kind

    def __str__(self) -> str:
        return self.args[0]


def kind_of(name: str) -> Kind:
    """The kind of a file by its name, in upper or lower case, compressed or not.

    Raises:
        UnusableError: The library does not read this kind.
    """
    bare = uncompressed(name).lower()
    if bare.endswith(ARCHIVES):
        raise UnusableError(
            f"{name} is an archive, or compressed in an unknown way; unpack it. Files may be "
            f"compressed as {', '.join(COMPRESSED)}.",
            "archive or compression that is not read",
            by_kind=True,
        )
    if bare.endswith(TABLES):
        raise UnusableError(
            f"{name} is a table, which is not read; write its rows as JSON lines, or name its "
            "folder as datasets:FOLDER.",
            "table that is not read",
            by_kind=True,
        )
    if bare.endswith(LINES):
        return Kind.LINES
    return Kind.JSON if bare.endswith(".json") else Kind.TEXT


def uncompressed(name: str) -> str:
    """A name without its suffix of a compression."""
    for suffix in COMPRESSED:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def open_content(path: Path) -> io.BufferedIOBase:
    """The content of a file, decompressed.

    Raises:
        OSError: The file cannot be opened. Reading it raises one of `READ_ERRORS`.
        UnusableError: A package for its compression is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return path.open("rb")
    if path.stat().st_size == 0:
        raise EOFError("it has the name of a compressed file, but is empty")
    if suffix == ".zst":
        return io.BufferedReader(_Zstandard(path), 1 << 20)
    opener: Any = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix]
    return io.BufferedReader(opener(path), 1 << 20)


def unreadable(path: Path, error: Exception, where: str = "") -> UnusableError:
    """The error for a file whose reading raised one of `READ_ERRORS`."""
    if isinstance(error, PermissionError):
        return UnusableError(
            f"cannot read {path}{where}: {error.strerror}; make it readable for you.",
            "no permission to read",
            by_kind=False,
        )
    if isinstance(error, OSError) and error.errno is not None:
        return UnusableError(
            f"cannot read {path}{where}: {error.strerror}; copy it anew or check the disk.",
            "cannot be read",
            by_kind=False,
        )
    return UnusableError(
        f"cannot read {path}{where}: {error}. Its compression is damaged or cut off; copy it anew.",
        "damaged compression",
        by_kind=False,
    )


def read_text(path: Path) -> bytes:
    """The bytes of a UTF-8 text file, decompressed, without a byte order mark.

    Raises:
        UnusableError: The file is not UTF-8 text, or cannot be read.
    """
    try:
        with open_content(path) as file:
            content = file.read()
    except READ_ERRORS as error:
        raise unreadable(path, error) from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _no_text(path, "is UTF-16 text; convert it: iconv -f utf-16 -t utf-8.", "not UTF-8")
    zero = content.find(DOCUMENT)
    if zero >= 0:
        how = f"is a binary file (zero byte at offset {zero}); give UTF-8 text."
        raise _no_text(path, how, "binary")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        how = (
            f"is not UTF-8 text (byte 0x{content[error.start]:02x} at offset {error.start}); "
            "convert it, for example: iconv -f latin1 -t utf-8."
        )
        raise _no_text(path, how, "not UTF-8") from error
    return content.removeprefix(codecs.BOM_UTF8)


def refuse_rows(path: Path, text: bytes, field: str) -> None:
    """Refuse a text that begins with a JSON object with the text field.

    Raises:
        UnusableError: The text begins so.
    """
    if text.lstrip()[:1] not in (b"{", b"["):
        return
    try:
        row, _ = json.JSONDecoder().raw_decode(text.decode().lstrip("[ \t\r\n"))
    except (ValueError, RecursionError):
        return
    if isinstance(row, dict) and field in row:
        raise UnusableError(
            f"{path} looks like rows of JSON with a field {field!r}; name it .jsonl (a row per "
            "line) or .json (a list), so that the texts are read without what is around them.",
            "rows under the name of a text",
            by_kind=False,
        )


def _no_text(path: Path, how: str, reason: str) -> UnusableError:
    return UnusableError(f"{path} {how}", reason, by_kind=True)


class _Zstandard(io.RawIOBase):
    """A file of one or more zstd frames. If the last frame is cut off, its end raises EOFError."""

    def __init__(self, path: Path) -> None:
        try:
            import zstandard
        except ModuleNotFoundError as error:
            if error.name != "zstandard":
                raise
            raise UnusableError(
                f"{path} needs the package zstandard, which is not installed; install the extra: "
                'pip install "pararnn[train,data]"',
                "compressed by zstd, for which the package zstandard is not installed",
                by_kind=False,
            ) from error
        self._file, self._error = path.open("rb"), zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._compressed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as decompressed content is at hand; return the number of bytes."""
        while not self._content and self._fetch():
            pass
        count = min(len(buffer), len(self._content))
        buffer[:count], self._content = self._content[:count], self._content[count:]
        return count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()

    def _fetch(self) -> bool:
        """Decompress the next piece; False at the end."""
        piece = self._compressed or self._file.read(1 << 17)
        if not piece:
            if self._frame is not None:
                raise EOFError("the file ends within a frame of zstd")
            return False
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._content = memoryview(self._frame.decompress(piece))
        except self._error as error:
            raise EOFError(str(error)) from error
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
        return True
