"""Synthetic tasks: what a recurrence can keep, count and look up."""

from typing import TYPE_CHECKING

from pararnn._lazy import contents_of

if TYPE_CHECKING:
    from pararnn.tasks._public import *  # noqa: F403 # what the name after the next line finds
else:
    __getattr__, __dir__ = contents_of("pararnn.tasks._public", __name__)
