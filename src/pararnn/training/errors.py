"""The error a command answers with a message instead of a traceback."""


class RunError(Exception):
    """Something the user can put right; the message says what was wrong and what to do."""
