"""What one process makes of one block: a file of its tokens, from which shards are written."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pararnn.data.documents import Block
from pararnn.data.files import write_atomically
from pararnn.data.tokenization import Tokenization, load_tokenizer


@dataclass(frozen=True)
class Part:
    """The documents of a block.

    Attributes:
        positions: Per document, from 0 to 1; below the share, it is held out.
        num_tokens: Per document, with its separator.
        num_bytes: Per document, of its text.
        num_skipped: Documents left out because they are not text or hold the separator.
        source_bytes: Size of the block in the source.
        next: Where the reader of the source goes on.
    """

    positions: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    num_skipped: int
    source_bytes: int
    next: Any


def write_part(path: Path, block: Block, tokenizer: Path | None) -> None:
    """Tokenize a block; the file appears when it is whole.

    Args:
        path: File to write.
        block: What to tokenize.
        tokenizer: Folder of the tokenizer; None for bytes.
    """
    tokenization = load_tokenizer(tokenizer)
    dtype = smallest_dtype(tokenization)
    pieces, rows, num_skipped = [np.empty(0, dtype)], [], 0
    for position, tokens, num_bytes in _encoded(block, tokenization):
        if tokens is None:
            num_skipped += 1
        else:
            rows.append((position, len(tokens) + 1, num_bytes))
            pieces += [np.array([tokenization.separator], dtype), tokens.astype(dtype)]
    facts = {"num_skipped": num_skipped, "source_bytes": block.num_bytes, "next": block.next}
    content = io.BytesIO()
    np.savez(
        content,
        tokens=np.concatenate(pieces),
        positions=np.array([row[0] for row in rows], dtype=np.float64),
        num_tokens=np.array([row[1] for row in rows], dtype=np.int64),
        num_bytes=np.array([row[2] for row in rows], dtype=np.int64),
        facts=np.array(json.dumps(facts)),
    )
    write_atomically(path, content.getvalue())


def smallest_dtype(tokenization: Tokenization) -> np.dtype:
    """The smallest unsigned integers that hold every token."""
    return np.min_scalar_type(tokenization.vocab_size - 1)


def _encoded(
    block: Block, tokenization: Tokenization
) -> Iterator[tuple[float, np.ndarray | None, int]]:
    """Position, tokens and bytes of documents that are not empty; no tokens for those to skip."""
    for document in block.content.documents():
        if document.text is None:
            yield document.position, None, 0
        elif document.text:
            tokens = tokenization.encode(document.text)
            usable = not (tokens == tokenization.separator).any()
            yield document.position, tokens if usable else None, len(document.text)


def read_part(path: Path) -> Part:
    """All of a part but its tokens."""
    with np.load(path) as stored:
        facts = json.loads(str(stored["facts"]))
        return Part(stored["positions"], stored["num_tokens"], stored["num_bytes"], **facts)


def read_tokens(path: Path) -> np.ndarray:
    """The tokens of a part, document after document, each with its separator before it."""
    with np.load(path) as stored:
        return stored["tokens"]
