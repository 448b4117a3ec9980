"""Training of language models: data, loop, checkpoints, evaluation."""

from typing import TYPE_CHECKING

from pararnn._lazy import contents_of

if TYPE_CHECKING:
    from pararnn.lm.training._public import *  # noqa: F403 # what the name after the next line finds
else:
    __getattr__, __dir__ = contents_of("pararnn.lm.training._public", __name__)
