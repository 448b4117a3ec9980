"""Ctrl-C and SIGTERM ask a loop to stop after its step; a second one stops at once."""

import signal
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Context in which `received` holds the first stop signal, None before it.

    Args:
        after_errors: Go on noting it after an error has ended the block: for one of several
            processes, which `torchrun` stops as soon as another has failed, maybe before this one
            could say what it failed of.
    """

    def __init__(self, *, after_errors: bool = False) -> None:
        self.after_errors = after_errors
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or not self.after_errors:
            self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
