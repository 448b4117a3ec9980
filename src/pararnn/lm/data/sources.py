"""Find the readers of the sources. A reader cuts its source into blocks at fixed places."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pararnn.lm.data.documents import Block, stopped
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.file_readers import JsonReader, LineReader, TextReader
from pararnn.lm.data.finding import SourceFile, find_files, find_standard_library
from pararnn.lm.data.reading import Kind, UnusableError, kind_of
from pararnn.lm.data.recipes import RECIPES, STANDARD_LIBRARY
from pararnn.lm.data.skipped import Skipped
from pararnn.lm.data.streams import DATASET, DatasetReader


class Reader(Protocol):
    """Reads a part of the sources in order."""

    @property
    def size(self) -> int | None:
        """Bytes of the source; None if they are not known before it is read."""

    def fingerprint(self) -> list[Any]:
        """JSON values that change when the source changes."""

    def blocks(self, start: Any, unit_bytes: int) -> Iterator[Block]:
        """Blocks of about unit_bytes each. `start` is the `next` of an earlier block, or None."""


def find_readers(
    sources: tuple[str, ...],
    text_field: str,
    *,
    held_out: float | None = None,
    skip_errors: bool = False,
) -> tuple[list[Reader], Skipped]:
    """Readers of all sources, and what is left out: text files first, then rows, then datasets.

    Args:
        sources: As in `PrepareConfig`.
        text_field: Field of JSON rows and datasets that holds the text.
        held_out: Share to hold out of a text that is the only file; None to leave it whole.
        skip_errors: Leave out what cannot be read.

    Raises:
        RunError: A source is missing or holds no file, or two hold the same one.
    """
    files, skipped = _find(sources, skip_errors)
    kinds = [kind_of(file.name) for file in files]
    texts = [f for f, kind in zip(files, kinds, strict=True) if kind is Kind.TEXT]
    datasets = [source for source in sources if is_dataset(source)]
    cut = held_out if len(texts) == len(files) + len(datasets) == 1 else None
    readers: list[Reader] = [TextReader(texts, text_field, skip_errors, cut)] if texts else []
    for file, kind in zip(files, kinds, strict=True):
        if kind is Kind.LINES:
            readers.append(LineReader(file, text_field, skip_errors))
        elif kind is Kind.JSON:
            readers.append(JsonReader(file, text_field, skip_errors))
    return [*readers, *(DatasetReader(s, text_field, skip_errors) for s in datasets)], skipped


def is_dataset(source: str) -> bool:
    """Whether a source is a dataset."""
    return source.startswith(DATASET) or source in RECIPES


def is_path(source: str) -> bool:
    """Whether a source is the path of a file or folder."""
    return source != STANDARD_LIBRARY and not is_dataset(source)


def _find(sources: tuple[str, ...], skip_errors: bool) -> tuple[list[SourceFile], Skipped]:
    """The files of all sources, none of them twice."""
    files: dict[str, SourceFile] = {}
    skipped = Skipped()
    for source in sources:
        if is_dataset(source):
            continue
        found, left_out = _files(source, skip_errors)
        skipped.update(left_out)
        for file in found:
            other = files.setdefault(os.path.realpath(file.path), file)
            if other is not file:
                raise RunError(
                    f"{file.path} belongs to two of the sources ({other.path} is the same file); "
                    "name it once."
                )
    return list(files.values()), skipped


def _files(source: str, skip_errors: bool) -> tuple[list[SourceFile], Skipped]:
    if source == STANDARD_LIBRARY:
        return find_standard_library(), Skipped()
    try:
        return find_files(Path(source), skip_errors=skip_errors)
    except UnusableError as error:
        if os.path.isdir(source):
            raise stopped(error, "such files") from error
        raise
