"""What is prepared so far, stored so that a stopped run goes on where it was."""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pararnn.data.config import changes
from pararnn.data.errors import RunError
from pararnn.data.files import write_atomically
from pararnn.data.shards import INDEX, SPLITS, TOKENIZER, Shard, read_index

PROGRESS, PARTS = "progress.json", "parts"


@dataclass
class Progress:
    """Content of `progress.json`.

    Attributes:
        settings: Of the run.
        source_sha256: Digest of the names, sizes and times of the source files.
        num_units: Units that are in shards.
        next: Where reading goes on after them.
        source_bytes: Bytes of the source in them.
        num_skipped: Documents of them that were left out.
        shards: Shards of each split.
    """

    settings: dict[str, Any]
    source_sha256: str
    num_units: int = 0
    next: Any = None
    source_bytes: int = 0
    num_skipped: int = 0
    shards: dict[str, list[Shard]] = field(default_factory=lambda: {name: [] for name in SPLITS})

    def save(self, folder: Path) -> None:
        """Replace the stored one."""
        content = json.dumps(dataclasses.asdict(self), indent=1)
        write_atomically(folder / PROGRESS, content.encode())


def is_finished(folder: Path, settings: dict[str, Any], source_sha256: str) -> bool:
    """Whether the folder holds the whole result already.

    Raises:
        RunError: It holds that of other settings or sources.
    """
    if not (folder / INDEX).exists():
        return False
    index = read_index(folder)
    stored = Progress(index.get("settings", {}), index.get("source_sha256", ""))
    if difference := _difference(folder, stored, Progress(settings, source_sha256)):
        raise RunError(difference)
    return True


def start_or_continue(folder: Path, settings: dict[str, Any], source_sha256: str) -> Progress:
    """The progress in a folder, or its beginning in a new one or one where nothing is made yet.

    Raises:
        RunError: The folder holds something else, or progress with other settings or sources.
    """
    path = folder / PROGRESS
    wanted = Progress(settings, source_sha256)
    if path.exists():
        progress = _read(path)
        difference = _difference(folder, progress, wanted)
        if not difference:
            return progress
        if progress.num_units or any(folder.glob(f"{PARTS}/*.npz")):
            raise RunError(difference)
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            f"{folder} is a file or a folder with other content; name a new folder with --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    wanted.save(folder)
    return wanted


def remove_work(folder: Path) -> None:
    """Delete what a finished folder does not need."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)
    (folder / PROGRESS).unlink(missing_ok=True)


def _read(path: Path) -> Progress:
    try:
        stored = json.loads(path.read_bytes())
        shards = {name: [Shard(**s) for s in stored["shards"][name]] for name in SPLITS}
        return Progress(**{**stored, "shards": shards})
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is damaged; delete {path.parent} and start anew.") from error


def _difference(folder: Path, stored: Progress, wanted: Progress) -> str | None:
    """Why a run may not go on in a folder."""
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
