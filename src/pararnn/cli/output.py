"""Options that say where the messages of a command go."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pararnn.lm.data.words import logged


@dataclass(kw_only=True)
class Output:
    """To be inherited by the arguments of a command."""

    quiet: bool = False
    """Print notes and errors only: no messages, no bars."""
    log_file: Path | None = None
    """Append all messages to this file too, with their times."""

    def messages(self) -> AbstractContextManager[None]:
        """Within it, messages go where the options say."""
        return logged(self.log_file, self.quiet)
