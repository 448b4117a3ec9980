"""From what the user names to readers that cut it into blocks, always at the same places."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from pararnn.lm.data.documents import Block, stopped
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.file_readers import CutReader, JsonReader, LineReader, TextReader
from pararnn.lm.data.finding import SourceFile, find_files
from pararnn.lm.data.reading import Kind, UnusableError, kind_of, unreadable
from pararnn.lm.data.recipes import RECIPES
from pararnn.lm.data.skipped import Skipped
from pararnn.lm.data.streams import DATASET, DatasetReader


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
    try:
        path.stat()
        files, left_out = find_files(path, skip_errors=skip_errors)
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise RunError(
            f"there is no file or folder {path}. A dataset is written datasets:{path}; the recipes "
            f"are {', '.join(RECIPES)}."
        ) from error
    except UnusableError as error:
        if os.path.isdir(path):
            raise stopped(error, "such files") from error
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    skipped.update(left_out)
    return files
