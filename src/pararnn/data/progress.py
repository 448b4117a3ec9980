"""What is prepared so far, stored so that a stopped run goes on where it was."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pararnn.data.config import changes
from pararnn.data.shards import INDEX, SPLITS, Shard, read_index
from pararnn.training.errors import RunError
from pararnn.training.files import write_atomically

PROGRESS = "progress.json"


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
    _compare(folder, index.get("settings", {}), index.get("source_sha256"), settings, source_sha256)
    return True


def start_or_continue(folder: Path, settings: dict[str, Any], source_sha256: str) -> Progress:
    """The progress in a folder, or its beginning in a new one.

    Raises:
        RunError: The folder holds something else, or progress with other settings or sources.
    """
    path = folder / PROGRESS
    if path.exists():
        progress = _read(path)
        _compare(folder, progress.settings, progress.source_sha256, settings, source_sha256)
        return progress
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(
            f"{folder} is a file or a folder with other content; name a new folder with --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(settings, source_sha256)
    progress.save(folder)
    return progress


def _read(path: Path) -> Progress:
    try:
        stored = json.loads(path.read_bytes())
        shards = {name: [Shard(**s) for s in stored["shards"][name]] for name in SPLITS}
        return Progress(**{**stored, "shards": shards})
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{path} is damaged; delete {path.parent} and start anew.") from error


def _compare(
    folder: Path, old: dict[str, Any], old_source: Any, new: dict[str, Any], new_source: str
) -> None:
    changed = changes(old, new)
    if changed:
        raise RunError(
            f"{folder} was begun with other settings; this would change {', '.join(changed)}. "
            "Leave them as they were, or name another folder with --out."
        )
    if old_source != new_source:
        raise RunError(
            f"the source files were changed since {folder} was begun; to prepare them anew, delete "
            "it, or name another folder with --out."
        )
