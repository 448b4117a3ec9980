"""Text for the user: results, messages, progress bars; and words of a shell.

Messages are records of the logger "pararnn", which prints them unless it is told otherwise.
"""

import contextlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger("pararnn")


class _Screen(logging.Handler):
    """Prints messages as they are: notes and what is worse on the stream of errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one at once."""
        _print(record.getMessage(), sys.stderr if record.levelno > logging.INFO else sys.stdout)


_SCREEN = _Screen()
if not LOGGER.handlers:
    LOGGER.addHandler(_SCREEN)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


def say(text: str) -> None:
    """Tell how the work goes on."""
    LOGGER.info("%s", text)


def warn(text: str) -> None:
    """Tell what the user should know beside the results."""
    LOGGER.warning("%s", text)


def show(text: str, end: str = "\n") -> None:
    """Print a result that was asked for, whatever is logged."""
    _print(text, sys.stdout, end)


def _print(text: str, stream: Any, end: str = "\n") -> None:
    """Print at once. Characters that the terminal does not know are written as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        known = text.encode(encoding, "backslashreplace").decode(encoding)
        print(known, file=stream, end=end, flush=True)
    except BrokenPipeError:  # the reader has ended, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def bar(what: str | None, total: int | None, unit: str, **options: Any) -> Any:
    """A progress bar of tqdm on the stream of errors; none where messages are not shown either."""
    from tqdm import tqdm  # type: ignore[import-untyped] # has none

    return tqdm(
        desc=what,
        total=total,
        unit=unit,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
        disable=_SCREEN.level > logging.INFO,
        **options,
    )


@contextlib.contextmanager
def logged(path: Path | None, quiet: bool) -> Iterator[None]:
    """Messages go to a file as well, or only notes and errors to the screen, within the block.

    Warnings of Python and the error that ends the block are in the file too.

    Args:
        path: The file, which is appended to; None for none.
        quiet: Print no messages and no bars.
    """
    with contextlib.ExitStack() as stack:
        if quiet:
            _SCREEN.setLevel(logging.WARNING)
            stack.callback(_SCREEN.setLevel, logging.NOTSET)
        file: logging.Handler = logging.NullHandler()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
            file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            stack.callback(file.close)
            logging.captureWarnings(True)
            stack.callback(logging.captureWarnings, False)
            for logger in (LOGGER, logging.getLogger("py.warnings")):
                logger.addHandler(file)
                stack.callback(logger.removeHandler, file)
            logging.getLogger("py.warnings").addHandler(_SCREEN)
            stack.callback(logging.getLogger("py.warnings").removeHandler, _SCREEN)
        try:
            yield
        except BaseException as error:
            words = str(error) or type(error).__name__
            file.handle(logging.makeLogRecord({"msg": words, "levelname": "ERROR"}))
            raise


def shell_word(path: Path) -> str:
    """A path as one word of a shell's command line."""
    return shlex.quote(str(path))
