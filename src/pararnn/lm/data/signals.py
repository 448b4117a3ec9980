"""Ctrl-C or SIGTERM asks a loop to stop after its step; a second signal stops at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_STOPPING = b"\nStopping, and keeping what is done; Ctrl-C again stops at once.\n"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Context in which `received` holds the last stop signal, None before it.

    Outside the main thread, which alone may handle signals, there is none.

    Args:
        by_torchrun: This is one of several processes. The same request may then come from the
            terminal, from `torchrun` and from what runs that, so a second signal does not stop at
            once; and signals are noted after the block where one was received or an error ended it,
            for `torchrun` stops all as soon as one ends, maybe before this one could say why.
    """

    def __init__(self, *, by_torchrun: bool = False) -> None:
        self.by_torchrun = by_torchrun
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.by_torchrun or (error is None and self.received is None):
            self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGINT and not self.by_torchrun:
            os.write(2, _STOPPING)  # what print does may just be under way
        if not self.by_torchrun:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
