"""Text for the user: printed on terminals of any encoding, or as words of a shell."""

import os
import shlex
import sys
from pathlib import Path


def say(text: str) -> None:
    """Print at once. Characters that the terminal does not know are written as escapes."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:  # the reader has ended, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn(text: str) -> None:
    """Print a note that is no result, on the stream of errors."""
    print(text, file=sys.stderr, flush=True)


def shell_word(path: Path) -> str:
    """A path as one word of a shell's command line."""
    return shlex.quote(str(path))
