"""Merge the parts of consecutive units into a shard of each split."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pararnn.lm.data.config import PrepareConfig
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.index import SPLITS, shard_name
from pararnn.lm.data.parts import Part, read_part, read_tokens, smallest_dtype
from pararnn.lm.data.progress import Progress
from pararnn.lm.data.shards import write_shard
from pararnn.lm.data.skipped import Skipped
from pararnn.lm.data.tokenization import Tokenization


class Merger:
    """Writes shards.

    Args:
        config: Settings.
        folder: Where to write the shards.
        progress: Is kept up to date in memory and, until the last shards, in the folder.
        tokenization: The tokenizer of the parts.
    """

    def __init__(
        self, config: PrepareConfig, folder: Path, progress: Progress, tokenization: Tokenization
    ) -> None:
        self.config, self.folder = config, folder
        self.progress, self.tokenization = progress, tokenization

    def merge(self, paths: list[Path]) -> None:
        """Write the next shards and delete their parts."""
        parts = [read_part(path) for path in paths]
        positions = _positions(parts)
        self._write(paths, parts, positions < self.config.held_out, last=False)
        self.progress.save(self.folder)
        for path in paths:
            path.unlink()

    def merge_last(self, paths: list[Path]) -> None:
        """Write the last shards. The parts stay, so that this can be repeated.

        Raises:
            RunError: There are not two documents, one for each split.
        """
        parts = [read_part(path) for path in paths]
        positions = _positions(parts)
        held_out = positions < self.config.held_out
        self._check_enough(parts)
        self._use_both_splits(positions, held_out)
        self._write(paths, parts, held_out, last=True)

    def _write(
        self, paths: list[Path], parts: list[Part], held_out: np.ndarray, last: bool
    ) -> None:
        masks = np.split(held_out, np.cumsum([len(part.positions) for part in parts])[:-1])
        for split, side in zip(SPLITS, (False, True), strict=True):
            self._write_shard(split, paths, parts, [mask == side for mask in masks], last)
        self.progress.num_units += len(parts)
        self.progress.next = parts[-1].next
        self.progress.source_bytes += sum(part.source_bytes for part in parts)
        for part in parts:
            self.progress.skipped.update(part.skipped)

    def _write_shard(
        self, split: str, paths: list[Path], parts: list[Part], masks: list[np.ndarray], last: bool
    ) -> None:
        """Write a shard of a split, unless it has no documents and is not the last one."""
        num_documents = int(sum(np.sum(mask) for mask in masks))
        if num_documents or last:
            num_bytes = sum(part.num_bytes[m].sum() for part, m in zip(parts, masks, strict=True))
            shards = self.progress.shards[split]
            path = self.folder / shard_name(split, len(shards))
            pieces = self._pieces(paths, parts, masks, last)
            shards.append(write_shard(path, pieces, int(num_bytes), num_documents))

    def _pieces(
        self, paths: list[Path], parts: list[Part], masks: list[np.ndarray], last: bool
    ) -> Iterator[np.ndarray]:
        for path, part, mask in zip(paths, parts, masks, strict=True):
            yield read_tokens(path)[np.repeat(mask, part.num_tokens)]
        if last:
            yield np.array([self.tokenization.separator], smallest_dtype(self.tokenization))

    def _use_both_splits(self, positions: np.ndarray, held_out: np.ndarray) -> None:
        """Change `held_out` where a split would have no document."""
        shards = self.progress.shards
        num_train, num_held_out = (sum(s.num_documents for s in shards[name]) for name in SPLITS)
        if len(positions) and num_train + np.sum(~held_out) == 0:
            held_out[np.argmax(positions)] = False
        if len(positions) and num_held_out + np.sum(held_out) == 0:
            held_out[np.argmin(positions)] = True
        for name, num_here in zip(SPLITS, (np.sum(~held_out), np.sum(held_out)), strict=True):
            if num_here + sum(s.num_documents for s in shards[name]) == 0:
                raise RunError(
                    f"with --held-out {self.config.held_out} no document is left for {name}; "
                    "choose another share, and another folder with --out."
                )

    def _check_enough(self, parts: list[Part]) -> None:
        """Raise RunError if there are fewer than two documents."""
        count = sum(len(part.positions) for part in parts)
        count += sum(
            shard.num_documents for split in SPLITS for shard in self.progress.shards[split]
        )
        if count >= 2:
            return
        skipped = Skipped()
        for more in (self.progress.skipped, *(part.skipped for part in parts)):
            skipped.update(more)
        sources = ", ".join(self.config.sources)
        found = (
            f"there is only one document in {sources}; at least two are needed, one of them held "
            "out. A single text must be the only file, so that its last lines can be held out."
            if count
            else f"there is no text in {sources}."
        )
        left_out = f" Skipped: {'; '.join(skipped.describe())}." if skipped.reasons else ""
        raise RunError(
            f"{found}{left_out} Name other sources or more of them, and another folder with --out."
        )


def _positions(parts: list[Part]) -> np.ndarray:
    return np.concatenate([np.empty(0), *(part.positions for part in parts)])
