"""Settings of `pararnn data prepare`, and their comparison with those of a folder."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pararnn._whole import check_whole_fields
from pararnn.lm.data.sources import is_path
from pararnn.lm.data.tokenization import BYTES, digests, vocabulary_to_train

OnError = Literal["stop", "skip"]


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The settings that decide the prepared data, bit for bit."""

    sources: tuple[str, ...]
    """Text files, folders, files of JSON rows, datasets:NAME[:CONFIG], recipes, or
    python-standard-library. May also be a path, or a list of them."""
    tokenizer: str = BYTES
    """bytes, train:VOCAB_SIZE, or a folder or name that `AutoTokenizer.from_pretrained` takes."""
    held_out: float = 0.005
    """Share of the documents kept for validation; of the lines, if there is one text file only."""
    text_field: str = "text"
    """Field of JSON lines and datasets that holds the text."""
    on_error: OnError = "stop"
    """What to do with a line without a text, and with a file in a folder that cannot be read:
    "stop", or "skip" to leave it out and count it. May change when a stopped run continues."""
    unit_bytes: int = 4 << 20
    """Source bytes that a process tokenizes at a time. Finished units survive a stop."""
    units_per_shard: int = 256
    """Units in a shard."""

    def __post_init__(self) -> None:
        given: Any = self.sources
        sources = (given,) if isinstance(given, str | os.PathLike) else given
        object.__setattr__(self, "sources", tuple(os.fspath(source) for source in sources))
        if not self.sources:
            raise ValueError("no source is given; name a text file, a folder or a dataset.")
        for source in self.sources:
            if self.sources.count(source) > 1:
                raise ValueError(f"the source {source} is named twice; name it once.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be between 0 and 1.")
        check_whole_fields(self)
        if self.unit_bytes < 1 or self.units_per_shard < 1:
            raise ValueError("unit_bytes and units_per_shard must be >= 1.")
        if self.on_error not in get_args(OnError):
            raise ValueError(f'on_error is {self.on_error!r}; it must be "stop" or "skip".')
        object.__setattr__(self, "tokenizer", os.fspath(self.tokenizer))
        vocabulary_to_train(self.tokenizer)

    @property
    def skip_errors(self) -> bool:
        """Whether `on_error` is "skip"."""
        return self.on_error == "skip"


def settings_of(config: PrepareConfig) -> dict[str, Any]:
    """The settings that must not change, as JSON values. Paths are absolute."""
    sources = [str(Path(s).resolve()) if is_path(s) else s for s in config.sources]
    settings = {**dataclasses.asdict(config), "sources": sources}
    del settings["on_error"]
    if Path(config.tokenizer).is_dir():
        settings["files of the tokenizer"] = digests(Path(config.tokenizer))
    return settings


def changes(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The settings that differ, as text."""
    return [
        f"{name} from {_short(stored.get(name))} to {_short(value)}"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]


def _short(value: Any) -> str:
    """The value as text, cut if it is long."""
    return str(value) if len(str(value)) < 200 else f"{str(value)[:200]}..."
