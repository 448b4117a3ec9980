"""Errors that a command reports in one message, without a traceback."""


class RunError(Exception):
    """An error that the user can correct; the message says what is wrong and what to do."""


class OtherProcessError(RunError):
    """Raised when another process of the same training has already told the user why."""


class LostConnectionError(RunError):
    """Raised when another process of the same training has ended."""
