"""`progress.json`: what is prepared so far, so that a stopped run can continue."""

import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pararnn.lm.data.config import changes
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.index import (
    INDEX,
    PARTS,
    PROGRESS,
    SPLITS,
    TOKENIZER,
    Shard,
    check_seal,
    damaged,
    digest_of,
    is_prepared,
    natural,
    read_index,
    read_sealed,
    stored_files,
    stored_shards,
    stored_skipped,
    typed,
    write_sealed,
)
from pararnn.lm.data.skipped import Skipped


@dataclass
class Progress:
    """Content of `progress.json`.

    Attributes:
        settings: Settings of the run.
        source_sha256: Digest of the names, sizes and times of the source files.
        num_units: Units that are in shards.
        next: Where reading continues after these units.
        source_bytes: Bytes of the source in these units.
        skipped: What is left out of the folders and of these units.
        tokenizer_files: SHA-256 of the files of the tokenizer, by name; empty before it is made.
        shards: Shards of each split.
    """

    settings: dict[str, Any]
    source_sha256: str
    num_units: int = 0
    next: Any = None
    source_bytes: int = 0
    skipped: Skipped = field(default_factory=Skipped)
    tokenizer_files: dict[str, str] = field(default_factory=dict)
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {name: [] for name in SPLITS})

    def save(self, folder: Path) -> None:
        """Replace the stored progress."""
        write_sealed(
            folder / PROGRESS, {**dataclasses.asdict(self), "skipped": self.skipped.reasons}
        )


def is_finished(folder: Path, wanted: Progress) -> bool:
    """Whether the folder already holds the whole result.

    Raises:
        RunError: It holds the result of other settings or sources.
    """
    if not (folder / INDEX).exists():
        return False
    index = read_index(folder)
    stored = Progress(index.settings, index.source_sha256)
    if difference := _difference(folder, stored, wanted):
        raise RunError(difference)
    return True


def start_or_continue(folder: Path, wanted: Progress) -> Progress:
    """The progress in a folder; `wanted`, if nothing has been prepared there yet.

    Raises:
        RunError: The folder has other content, or progress with other settings or sources.
    """
    path = folder / PROGRESS
    if path.exists():
        progress = _read(path)
        difference = _difference(folder, progress, wanted)
        if not difference:
            return progress
        if progress.num_units or any(folder.glob(f"{PARTS}/*.npz")):
            raise RunError(difference)
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    elif (folder / PARTS).exists() or is_prepared(folder):
        raise RunError(
            f"{folder} holds token data, but neither {INDEX} nor {PROGRESS}; restore one of them "
            "from a copy, or name a new folder with --out."
        )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            f"{folder} is a file or a folder with other content; name a new folder with --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    wanted.save(folder)
    return wanted


def remove_work(folder: Path) -> None:
    """Delete the files that a finished folder does not need."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    (folder / PROGRESS).unlink(missing_ok=True)


def _read(path: Path) -> Progress:
    values = read_sealed(path)
    try:
        splits = typed(values.get("shards"), dict, "shards")
        progress = Progress(
            settings=typed(values.get("settings"), dict, "settings"),
            source_sha256=digest_of(values.get("source_sha256"), "source_sha256"),
            num_units=natural(values.get("num_units"), "num_units"),
            next=values.get("next"),
            source_bytes=natural(values.get("source_bytes"), "source_bytes"),
            skipped=stored_skipped(values.get("skipped")),
            tokenizer_files=stored_files(values.get("tokenizer_files")),
            shards={name: stored_shards(splits.get(name), name) for name in SPLITS},
        )
        check_seal(values)
    except ValueError as error:
        raise damaged(path, f"is damaged ({error})") from error
    return progress


def _difference(folder: Path, stored: Progress, wanted: Progress) -> str | None:
    """Why a run cannot continue in a folder; None if it can."""
    if changed := changes(stored.settings, wanted.settings):
        return (
            f"{folder} was begun with other settings; this would change {', '.join(changed)}. "
            "Leave them as they were, or name another folder with --out."
        )
    if stored.source_sha256 != wanted.source_sha256:
        return (
            f"the source files were changed since {folder} was begun; to prepare them anew, delete "
            "it, or name another folder with --out."
        )
    return None
