"""Nonlinear RNNs evaluated and trained in parallel over the sequence."""

from typing import TYPE_CHECKING

from pararnn._lazy import contents_of
from pararnn._version import __version__ as __version__

if TYPE_CHECKING:
    from pararnn._public import *  # noqa: F403 # what the name after the next line finds
else:
    __getattr__, __dir__ = contents_of("pararnn._public", __name__)
