"""Units: blocks of the sources, which processes tokenize."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from pathlib import Path
from typing import Any

from pararnn.lm.data.config import PrepareConfig
from pararnn.lm.data.documents import Block
from pararnn.lm.data.index import PARTS
from pararnn.lm.data.merging import Merger
from pararnn.lm.data.parts import read_part, write_part
from pararnn.lm.data.progress import Progress
from pararnn.lm.data.signals import StopSignals
from pararnn.lm.data.sources import Reader
from pararnn.lm.data.tokenization import load_tokenizer
from pararnn.lm.data.words import bar as progress_bar
from pararnn.lm.data.workers import Inline, Processes


class Units:
    """The units of a run.

    Args:
        config: Settings.
        folder: Folder of the prepared data; parts go into a folder inside.
        readers: Readers of the sources.
        progress: Is kept up to date.
        tokenizer: Folder of the tokenizer; None for bytes.
    """

    def __init__(
        self,
        config: PrepareConfig,
        folder: Path,
        readers: list[Reader],
        progress: Progress,
        tokenizer: Path | None,
    ) -> None:
        self.config, self.readers = config, readers
        self.progress, self.tokenizer = progress, tokenizer
        self.merger = Merger(config, folder, progress, load_tokenizer(tokenizer))
        self.parts = folder / PARTS
        self.parts.mkdir(exist_ok=True)
        self.finished = {int(path.stem) for path in self.parts.glob("[0-9]" * 8 + ".npz")}
        self.num_found = progress.num_units

    def tokenize(self, workers: int) -> int | None:
        """Write the missing parts, and each shard as soon as its parts are there.

        Returns:
            None, or the number of the signal that stopped the work.
        """
        first, start, done = self._first_missing()
        total = self._total()
        if total is not None:
            workers = min(workers, -(-(total - done) // self.config.unit_bytes))
        pending: dict[Future[Any], tuple[int, int]] = {}
        shown = progress_bar("Preparing", total, "B", initial=done, unit_scale=True)
        with shown as bar, StopSignals() as stop, _executor(workers) as executor:
            try:
                for number, block in enumerate(self._blocks(start), first):
                    self.num_found = number + 1
                    if number in self.finished:
                        bar.update(block.num_bytes)
                    else:
                        path = self._part(number)
                        work = executor.submit(write_part, path, block, self.tokenizer)
                        pending[work] = number, block.num_bytes
                    self._collect(pending, bar, stop, most=2 * workers)
                    if stop.received is not None:
                        break
                self._collect(pending, bar, stop, most=0)
            finally:
                for work in pending:
                    work.cancel()
        return stop.received

    def finish(self) -> None:
        """Write the last shards.

        Raises:
            RunError: There are fewer than two documents.
        """
        self.merger.merge_last([self._part(number) for number in self._next_units()])

    def _total(self) -> int | None:
        total = 0
        for reader in self.readers:
            if reader.size is None:
                return None
            total += reader.size
        return total

    def _first_missing(self) -> tuple[int, Any, int]:
        """The first unit without a part, where it begins, and the source bytes before it."""
        number, start = self.progress.num_units, self.progress.next
        done = self.progress.source_bytes
        while number in self.finished:
            part = read_part(self._part(number))
            number, start, done = number + 1, part.next, done + part.source_bytes
        self.num_found = number
        return number, start, done

    def _blocks(self, start: Any) -> Iterator[Block]:
        first, inner = start or (0, None)
        for index in range(first, len(self.readers)):
            for block in self.readers[index].blocks(inner, self.config.unit_bytes):
                yield dataclasses.replace(block, next=[index, block.next])
            inner = None

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:08d}.npz"

    def _collect(
        self, pending: dict[Future[Any], tuple[int, int]], bar: Any, stop: StopSignals, most: int
    ) -> None:
        """Wait until at most `most` units are in work; write shards whose parts are there."""
        while len(pending) > most and stop.received is None:
            for work in wait(pending, return_when=FIRST_COMPLETED).done:
                number, num_bytes = pending.pop(work)
                work.result()
                self.finished.add(number)
                bar.update(num_bytes)
        while self._is_whole() and stop.received is None:
            self.merger.merge([self._part(number) for number in self._next_units()])

    def _is_whole(self) -> bool:
        """Whether all parts of the next shard are there, and it is not the last shard."""
        is_last = self.num_found <= self.progress.num_units + self.config.units_per_shard
        return not is_last and self.finished.issuperset(self._next_units())

    def _next_units(self) -> range:
        """Numbers of the units of the next shard."""
        first = self.progress.num_units
        return range(first, min(first + self.config.units_per_shard, self.num_found))


def _executor(workers: int) -> Executor:
    return Processes(workers) if workers > 1 else Inline()
