"""Reading the files of a source: which kind they are, compressed or not, and as UTF-8 text."""

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
"""The byte before every document, and the token that ends generated text."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
LINES = (".jsonl", ".ndjson", ".jsonlines")
ARCHIVES = (
    *(".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"),
    *(".z", ".lz4", ".lzma", ".lz", ".br", ".sz", ".zstd"),
)
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".orc", ".avro", ".xls", ".xlsx")
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a file raises, or decompressing it."""


class Kind(enum.Enum):
    """What a file holds, by its name."""

    TEXT = enum.auto()
    LINES = enum.auto()
    JSON = enum.auto()
    ARCHIVE = enum.auto()
    TABLE = enum.auto()


class UnusableError(RunError):
    """A file that is no source.

    Args:
        message: What was wrong and what to do.
        reason: A few words that files of its kind are counted under.
        by_kind: It is something else than text, which a folder may hold beside it; else it is
            damaged, or cannot be read here and now.
    """

    def __init__(self, message: str, reason: str, by_kind: bool) -> None:
        super().__init__(message, reason, by_kind)
        self.reason, self.by_kind = reason, by_kind

    def __str__(self) -> str:
        return self.args[0]


def kind_of(name: str) -> Kind:
    """The kind of file that a name stands for, in capital letters or small ones, compressed or not.

    Raises:
        UnusableError: It is one that is not read.
    """
    bare = uncompressed(name).lower()
    if bare.endswith(ARCHIVES):
        raise UnusableError(
            f"{name} is an archive, or compressed in a way that is not read; unpack it. Files may "
            f"be compressed as {', '.join(COMPRESSED)}.",
            "archive or compression that is not read",
            by_kind=True,
        )
    if bare.endswith(TABLES):
        raise UnusableError(
            f"{name} holds rows of a kind that is not read from a file; write them as JSON lines, "
            "or name its folder as datasets:FOLDER.",
            "table that is not read",
            by_kind=True,
        )
    if bare.endswith(LINES):
        return Kind.LINES
    return Kind.JSON if bare.endswith(".json") else Kind.TEXT


def uncompressed(name: str) -> str:
    """A name without the suffix of a compression."""
    for suffix in COMPRESSED:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def open_content(path: Path) -> io.BufferedIOBase:
    """The content of a file, decompressed.

    Raises:
        OSError: It cannot be read. What reading it raises is among `READ_ERRORS`.
        UnusableError: It needs a package that is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return path.open("rb")
    if path.stat().st_size == 0:
        raise EOFError("it is compressed, but empty")
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
        UnusableError: It is not text, or cannot be read.
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
    """Raise where a text begins with a JSON object that has the field of the texts.

    Raises:
        UnusableError: It does.
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
    """A file compressed by zstd, in one frame or more; the end of a cut one raises."""

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
        """Fill a buffer, or as much of it as there is at hand."""
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
