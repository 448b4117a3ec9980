"""Find the files of a source, and note what is left out of a folder."""

import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.index import is_prepared
from pararnn.lm.data.reading import UnusableError, kind_of, unreadable
from pararnn.lm.data.recipes import RECIPES, STANDARD_LIBRARY
from pararnn.lm.data.skipped import HIDDEN, Skip, Skipped

PYTHONS_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class SourceFile:
    """A file of a source.

    Attributes:
        path: Path of the file.
        name: Path within the source, with / between folders.
        size: Bytes.
        named: The user named the file itself and not its folder, so it must be usable.
    """

    path: Path
    name: str
    size: int
    named: bool

    @property
    def position(self) -> float:
        """A number from 0 to 1, a hash of the name."""
        return position(self.name)


def position(name: str) -> float:
    """A number from 0 to 1, a hash of the name."""
    digits = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digits[:8], "big") / 2**64


def find_standard_library() -> list[SourceFile]:
    """The source files of the standard library, in the order of their hash.

    Raises:
        RunError: This Python has no such files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in _walk(root, Skipped(), True) if file.path.suffix == ".py"]
    if not files:
        raise RunError(f"there is no Python source in {root}; name a text file or a folder.")
    return _in_order(files)


def find_files(data: Path, *, skip_errors: bool = False) -> tuple[list[SourceFile], Skipped]:
    """The files of a source in the order of their hash, and what of a folder is left out.

    Args:
        data: File or folder.
        skip_errors: Also leave out what cannot be read.

    Raises:
        RunError: The path is missing, is prepared data or holds no file, or cannot be read.
    """
    skipped = Skipped()
    if stat.S_ISDIR(_status(data).st_mode):
        files = list(_walk(data, skipped, skip_errors))
        if not files and not skipped.reasons:
            raise RunError(f"the folder {data} holds no files; put text files into it.")
    else:
        files = [_named(data)]
    return _in_order(files), skipped


def _in_order(files: list[SourceFile]) -> list[SourceFile]:
    return sorted(files, key=lambda file: (file.position, file.name))


def _status(data: Path) -> os.stat_result:
    try:
        status = data.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise RunError(
            f"there is no file or folder {data}. Besides these, pararnn data prepare takes "
            f"datasets:NAME, {', '.join(RECIPES)} and {STANDARD_LIBRARY}."
        ) from error
    except OSError as error:
        raise unreadable(data, error) from error
    if stat.S_ISDIR(status.st_mode) and is_prepared(data):
        raise RunError(f"{data} holds prepared tokens, not texts; name the folder of the texts.")
    return status


def _named(data: Path) -> SourceFile:
    """The file that the user named."""
    status = _status(data)
    if not stat.S_ISREG(status.st_mode):
        raise RunError(f"{data} is neither a file nor a folder; give one of them.")
    kind_of(data.name)
    return SourceFile(data, data.name, status.st_size, True)


def _walk(root: Path, skipped: Skipped, skip_errors: bool) -> Iterator[SourceFile]:
    """Files of a folder. Links come last, so that a file is read under its own name."""
    top = os.path.realpath(root)
    links: list[SourceFile] = []
    seen: set[str] = set()
    for path, error in _entries(root, top, skipped):
        try:
            if error is not None:
                raise unreadable(path, error)
            file = _usable(root, path, top)
        except UnusableError as problem:
            if not (problem.by_kind or skip_errors):
                raise
            skipped.add(Skip(str(path), problem.reason))
            continue
        if path.is_symlink():
            links.append(file)
        else:
            seen.add(os.path.realpath(path))
            yield file
    for file in links:
        target = os.path.realpath(file.path)
        if target in seen:
            skipped.add(Skip(str(file.path), "link to another of the files"))
        else:
            seen.add(target)
            yield file


def _entries(root: Path, top: str, skipped: Skipped) -> Iterator[tuple[Path, OSError | None]]:
    """Paths of everything but folders; folders that cannot be read, with the error."""
    errors: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=errors.append):
        yield from ((Path(error.filename), error) for error in errors)
        errors.clear()
        kept = []
        for name in sorted(folders):
            reason = _folder_to_skip(Path(folder, name), top)
            if reason is None:
                kept.append(name)
            else:
                skipped.add(Skip(f"{Path(folder, name)}/", reason))
        folders[:] = kept
        yield from ((Path(folder, name), None) for name in sorted(files))
    yield from ((Path(error.filename), error) for error in errors)


def _folder_to_skip(path: Path, top: str) -> str | None:
    """Why a folder is not entered; None if it is."""
    if path.name.startswith("."):
        return HIDDEN
    if path.name in PYTHONS_FOLDERS:
        return "installed packages or compiled files of Python"
    if path.is_symlink():
        return "link to a folder" if _is_within(path, top) else "link that leaves the folder"
    return "prepared tokens" if is_prepared(path) else None


def _usable(root: Path, path: Path, top: str) -> SourceFile:
    """The file behind a path.

    Raises:
        UnusableError: There is no file, or it is not one that is read.
    """
    if path.name.startswith("."):
        raise _other(path, HIDDEN)
    if path.is_symlink() and not _is_within(path, top):
        raise _other(path, "link that leaves the folder")
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink():
            raise _other(path, "broken link") from error
        raise unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise _other(path, "pipe, socket or device")
    kind_of(path.name)
    return SourceFile(path, path.relative_to(root).as_posix(), status.st_size, False)


def _is_within(path: Path, top: str) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(top)


def _other(path: Path, reason: str) -> UnusableError:
    return UnusableError(f"{path} is left out: {reason}.", reason, by_kind=True)
