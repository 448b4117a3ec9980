"""Errors that a command answers with a message instead of a traceback."""


class RunError(Exception):
    """Something the user can put right; the message says what was wrong and what to do."""


class OtherProcessError(RunError):
    """Raised where another of the processes that train together has told the user why."""


class LostConnectionError(RunError):
    """Raised where another of the processes that train together is gone."""
