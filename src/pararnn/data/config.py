"""Settings of `pararnn data prepare`, and comparing them with those of a folder."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pararnn.data.sources import is_dataset
from pararnn.data.tokenization import BYTES, vocabulary_to_train


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What decides the prepared data, to the last bit."""

    sources: tuple[str, ...]
    """Text files, folders, .jsonl or .jsonl.gz files, datasets:NAME[:CONFIG], or recipes."""
    tokenizer: str = BYTES
    """bytes, train:VOCAB_SIZE, or a folder or name that `AutoTokenizer.from_pretrained` takes."""
    held_out: float = 0.005
    """Share of the documents kept for validation; of the lines, when there is one file only."""
    text_field: str = "text"
    """Field of JSON lines and datasets that holds the text."""
    unit_bytes: int = 4 << 20
    """Source bytes that a process tokenizes at a time; what is whole survives a stop."""
    units_per_shard: int = 256
    """Units in a shard."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("no source is given; name a text file, a folder or a dataset.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; it must be between 0 and 1.")
        if self.unit_bytes < 1 or self.units_per_shard < 1:
            raise ValueError("unit_bytes and units_per_shard must be >= 1.")
        vocabulary_to_train(self.tokenizer)


def settings_of(config: PrepareConfig) -> dict[str, Any]:
    """The settings as JSON values; paths of sources do not depend on the current folder."""
    sources = [s if is_dataset(s) else str(Path(s).resolve()) for s in config.sources]
    return {**dataclasses.asdict(config), "sources": sources}


def changes(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The settings that differ, in words."""
    return [
        f"{name} from {stored.get(name)} to {value}"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
