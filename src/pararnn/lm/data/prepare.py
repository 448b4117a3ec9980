"""Prepare token data: from sources to shards, in parallel; a stopped run can continue.

The sources are cut into units at places that depend on the settings alone. Each process writes
the tokens of a unit as a part. After every N units their parts are merged into one shard of each
split and deleted. So the result does not depend on the number of processes or on interruptions.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from pararnn._whole import check_whole
from pararnn.lm.data.config import PrepareConfig, settings_of
from pararnn.lm.data.documents import Document
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import alone_in
from pararnn.lm.data.index import TOKENIZER, Index, shard_name, write_index
from pararnn.lm.data.parts import encode_block, smallest_dtype
from pararnn.lm.data.progress import Progress, is_finished, remove_work, start_or_continue
from pararnn.lm.data.shards import TokenSplit, stored_dtype, write_shard
from pararnn.lm.data.skipped import Skipped
from pararnn.lm.data.sources import Reader, find_readers, is_path
from pararnn.lm.data.tokenization import BYTES, check_files, digests, load_tokenizer, save_tokenizer
from pararnn.lm.data.units import Units
from pararnn.lm.data.words import say

SAMPLE_BYTES = 64 << 20
"""Bytes of text to train a tokenizer on, in equal shares from all readers."""


def prepare(
    config: PrepareConfig, folder: str | os.PathLike[str], workers: int | None = None
) -> int | None:
    """Write token data that `open_tokens` reads, or continue where an earlier call stopped.

    Args:
        config: What to prepare.
        folder: Where to write: new, empty, or of an earlier call with the same settings.
        workers: Processes; None for one per core. They import the main module, so a script that
            calls this needs `if __name__ == "__main__":`.

    Returns:
        None, or the number of the signal that stopped the work.

    Raises:
        TypeError: workers is no whole number.
        ValueError: It is less than 1.
        RunError: A source cannot be read, or the folder cannot be written or has other content.
    """
    if workers is not None:
        check_whole(workers=workers)
        if workers < 1:
            raise ValueError(f"workers is {workers}; it must be at least 1.")
    folder = Path(folder)
    _check_apart(config, folder)
    try:
        return _prepare(config, folder, workers or _num_cores())
    except MemoryError as error:
        raise RunError(
            "out of memory: a document or a list of JSON is held in memory as a whole. Cut it, or "
            "continue with the same command and fewer --workers."
        ) from error
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process was killed, perhaps because memory ran out; continue with the same "
            "command and fewer --workers."
        ) from error
    except OSError as error:
        raise RunError(
            f"cannot prepare {folder}: {error}. When the cause is removed, continue with the same "
            "command."
        ) from error


def write_split(data: Path, tokenizer: Path | None, folder: Path) -> tuple[TokenSplit, Skipped]:
    """Write all texts of a file or folder as one split, to evaluate a model on.

    Args:
        data: File or folder.
        tokenizer: Folder of the tokenizer; None for bytes.
        folder: Where to write.

    Returns:
        The split, and what is left out of it.

    Raises:
        RunError: There is no text, or a file cannot be read.
    """
    readers, skipped = find_readers((str(data.absolute()),), PrepareConfig.text_field)
    tokenization = load_tokenizer(tokenizer)
    pieces, num_bytes, num_documents = [], 0, 0
    for reader in readers:
        for block in reader.blocks(None, PrepareConfig.unit_bytes):
            part, tokens = encode_block(block, tokenization)
            pieces.append(tokens)
            num_bytes += int(part.num_bytes.sum())
            num_documents += len(part.num_bytes)
            skipped.update(part.skipped)
    if not num_documents:
        raise RunError(f"there is no text in {data}. Skipped: {'; '.join(skipped.describe())}.")
    dtype = smallest_dtype(tokenization)
    pieces.append(np.array([tokenization.separator], dtype))
    shard = write_shard(folder / shard_name("validation", 0), pieces, num_bytes, num_documents)
    return TokenSplit(folder, [shard], stored_dtype(dtype.name)), skipped


def _prepare(config: PrepareConfig, folder: Path, workers: int) -> int | None:
    readers, skipped = find_readers(
        config.sources,
        config.text_field,
        held_out=config.held_out,
        skip_errors=config.skip_errors,
    )
    fingerprint = json.dumps([reader.fingerprint() for reader in readers])
    source_sha256 = hashlib.sha256(fingerprint.encode()).hexdigest()
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        start = Progress(settings_of(config), source_sha256, skipped=skipped)
        return _write(config, folder, workers, readers, start)


def _write(
    config: PrepareConfig, folder: Path, workers: int, readers: list[Reader], start: Progress
) -> int | None:
    if is_finished(folder, start):
        say(f"{folder} is finished already; nothing to do.")
        remove_work(folder)
        return None
    progress = start_or_continue(folder, start)
    tokenizer = _tokenizer_folder(config, folder, readers, progress)
    units = Units(config, folder, readers, progress, tokenizer)
    stopped_by = units.tokenize(workers)
    if stopped_by is not None:
        return stopped_by
    units.finish()
    _write_index(folder, config, progress, tokenizer)
    remove_work(folder)
    return None


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_apart(config: PrepareConfig, folder: Path) -> None:
    for source in config.sources:
        if is_path(source) and folder.resolve().is_relative_to(Path(source).resolve()):
            raise RunError(
                f"{folder} lies within the source {source}, which would then read its own result; "
                "name a folder elsewhere with --out."
            )


def _tokenizer_folder(
    config: PrepareConfig, folder: Path, readers: list[Reader], progress: Progress
) -> Path | None:
    """The folder of the tokenizer, made if it is missing; None for bytes."""
    if config.tokenizer == BYTES:
        return None
    path = folder / TOKENIZER
    if not progress.tokenizer_files:
        say(f"Tokenizer: {config.tokenizer}, saved as {path}")
        shutil.rmtree(path, ignore_errors=True)
        save_tokenizer(config.tokenizer, _sample(config, readers), path)
        progress.tokenizer_files = digests(path)
        progress.save(folder)
    check_files(path, progress.tokenizer_files)
    return path


def _sample(config: PrepareConfig, readers: list[Reader]) -> Iterator[str]:
    """Texts to train a tokenizer on, none of them held out."""
    share = max(SAMPLE_BYTES // len(readers), 1)
    for reader in readers:
        left = share
        for text in _texts(reader, config.held_out, min(share, config.unit_bytes)):
            yield text.decode()
            left -= len(text)
            if left <= 0:
                break


def _texts(reader: Reader, held_out: float, unit_bytes: int) -> Iterator[bytes]:
    for block in reader.blocks(None, unit_bytes):
        for document in block.content.documents():
            if isinstance(document, Document) and document.position >= held_out:
                yield document.text


def _write_index(
    folder: Path, config: PrepareConfig, progress: Progress, tokenizer: Path | None
) -> None:
    tokenization = load_tokenizer(tokenizer)
    index = Index(
        tokenizer=config.tokenizer,
        tokenizer_files=progress.tokenizer_files,
        vocab_size=tokenization.vocab_size,
        separator=tokenization.separator,
        dtype=smallest_dtype(tokenization).name,
        splits=progress.shards,
        skipped=progress.skipped,
        settings=progress.settings,
        source_sha256=progress.source_sha256,
    )
    write_index(folder, index)
