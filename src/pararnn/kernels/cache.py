"""Where compiled kernels are kept, and which of them may be loaded again.

Loading a library runs its code. So a folder is used only if it is a real one, our own and closed to
others, and a library only if it is what was written: a checksum lies beside it.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path | None:
    """Where the user wants them: $PARARNN_CACHE, else in the user's cache folder, if there is one.

    Raises:
        OSError: It is relative to a current folder that does not exist.
    """
    if asked := os.environ.get("PARARNN_CACHE"):
        return _absolute(asked)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return _absolute(base) / "pararnn"
    try:
        home = Path.home()
    except RuntimeError:  # no $HOME, and no such user
        return None
    return home / ".cache" / "pararnn" if home.is_dir() else None


def folders() -> Iterator[Path]:
    """Folders to look for kernels in and to write them to, the best first; the last is new."""
    for place in (cache_folder, _shared_place):
        try:
            folder = place()
            if folder is None:
                continue
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            obstacle = _obstacle(folder)
        except OSError:  # such as one that cannot be made
            continue
        if obstacle is None:
            yield folder
        else:
            _warn_untrusted(folder, obstacle)
    try:
        private = _private_folder(os.getpid())
    except OSError:
        return
    yield private


def keep(file: Path, content: bytes) -> None:
    """Write a file and its checksum; whoever reads at the same time finds the old or the new.

    Raises:
        OSError: It cannot be written.
    """
    write(file, content)
    write(_beside(file), _checksum(file, content))


def is_kept(file: Path) -> bool:
    """Whether the file is there as it was written, by us."""
    content = _read(file)
    return content is not None and _read(_beside(file)) == _checksum(file, content)


def discard(file: Path) -> None:
    """Have the file made anew the next time."""
    _beside(file).unlink(missing_ok=True)


@functools.cache
def _absolute(path: str) -> Path:
    """The folder that a name meant when it was first used."""
    return Path(path).absolute()


def _shared_place() -> Path:
    """Where they are kept from one process to the next if there is no other place."""
    return Path(tempfile.gettempdir()) / f"pararnn-{os.getuid()}"


@functools.lru_cache(maxsize=1)
def _private_folder(process: int) -> Path:
    """A folder of this process, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="pararnn-"))
    atexit.register(_remove, folder, process)
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


def _obstacle(folder: Path) -> str | None:
    """Why a folder is not to be trusted."""
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"is a link; set PARARNN_CACHE to the folder that it leads to, {folder.resolve()}"
    if status.st_uid != os.getuid():
        return f"belongs to user {status.st_uid}; set PARARNN_CACHE to a folder of your own"
    if not _is_ours(status):
        return f"can be written by others; run chmod go-w {folder}"
    return None


def _is_ours(status: os.stat_result) -> bool:
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.lru_cache(maxsize=8)
def _warn_untrusted(folder: Path, obstacle: str) -> None:
    warnings.warn(
        f"pararnn does not load compiled kernels from {folder}, which {obstacle}.", stacklevel=2
    )


def _beside(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _checksum(file: Path, content: bytes) -> bytes:
    """Of the content and the name, so that no other file passes for this one."""
    return hashlib.sha256(os.fsencode(file.name) + b"\0" + content).hexdigest().encode()


def _read(file: Path) -> bytes | None:
    """The content of a regular file of our own; None without one."""
    try:
        number = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(number, "rb") as opened:
            status = os.fstat(number)
            return opened.read() if stat.S_ISREG(status.st_mode) and _is_ours(status) else None
    except OSError:
        return None


def write(file: Path, content: bytes) -> None:
    """Write a file as a whole: what carries its name has all of it, whatever happens."""
    number, name = tempfile.mkstemp(dir=file.parent)
    try:
        with open(number, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(number)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
