"""Parts: the tokens of one block in a file, which one process writes. Shards are made of them."""

import contextlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pararnn.lm.data.documents import Block, Document
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import write_atomically
from pararnn.lm.data.skipped import EMPTY, Skip, Skipped
from pararnn.lm.data.tokenization import Tokenization, first_line, load_tokenizer

DAMAGE = (
    *(ValueError, TypeError, KeyError, AttributeError, EOFError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error),
)
"""The errors that a damaged part raises when it is read."""


@dataclass(frozen=True)
class Part:
    """The documents of a block.

    Attributes:
        positions: From 0 to 1, per document. A document below the held-out share is held out.
        num_tokens: Tokens per document, with its separator.
        num_bytes: Bytes of text per document.
        skipped: What is left out of the block.
        source_bytes: Size of the block in the source.
        next: Where the reader of the source continues.
    """

    positions: np.ndarray
    num_tokens: np.ndarray
    num_bytes: np.ndarray
    skipped: Skipped
    source_bytes: int
    next: Any


def encode_block(block: Block, tokenization: Tokenization) -> tuple[Part, np.ndarray]:
    """Read and tokenize a block: its part, and its tokens as `read_tokens` returns them."""
    dtype = smallest_dtype(tokenization)
    pieces, rows, skipped = [np.empty(0, dtype)], [], Skipped()
    for document in block.content.documents():
        encoded = _encoded(document, tokenization)
        if isinstance(encoded, Skip):
            skipped.add(encoded)
        else:
            position, tokens, num_bytes = encoded
            rows.append((position, len(tokens) + 1, num_bytes))
            pieces += [np.array([tokenization.separator], dtype), tokens.astype(dtype)]
    part = Part(
        positions=np.array([row[0] for row in rows], dtype=np.float64),
        num_tokens=np.array([row[1] for row in rows], dtype=np.int64),
        num_bytes=np.array([row[2] for row in rows], dtype=np.int64),
        skipped=skipped,
        source_bytes=block.num_bytes,
        next=block.next,
    )
    return part, np.concatenate(pieces)


def write_part(path: Path, block: Block, tokenizer: Path | None) -> None:
    """Tokenize a block; the file appears when it is whole.

    Args:
        path: File to write.
        block: What to tokenize.
        tokenizer: Folder of the tokenizer; None for bytes.
    """
    part, tokens = encode_block(block, load_tokenizer(tokenizer))
    facts = {
        "skipped": part.skipped.reasons,
        "source_bytes": part.source_bytes,
        "next": part.next,
    }
    content = io.BytesIO()
    np.savez(
        content,
        tokens=tokens,
        positions=part.positions,
        num_tokens=part.num_tokens,
        num_bytes=part.num_bytes,
        facts=np.array(json.dumps(facts)),
    )
    write_atomically(path, content.getvalue())


def smallest_dtype(tokenization: Tokenization) -> np.dtype:
    """The smallest unsigned type that holds every token."""
    return np.min_scalar_type(tokenization.vocab_size - 1)


def _encoded(
    document: Document | Skip, tokenization: Tokenization
) -> tuple[float, np.ndarray, int] | Skip:
    """Position, tokens and bytes of text of a document, or why it is left out."""
    if isinstance(document, Skip):
        return document
    if not document.text:
        return Skip(document.name, EMPTY)
    tokens = tokenization.encode(document.text)
    if (tokens == tokenization.separator).any():
        return Skip(document.name, "holds the separator of documents")
    return document.position, tokens, len(document.text)


def read_part(path: Path) -> Part:
    """A part, without its tokens.

    Raises:
        RunError: It is damaged.
    """
    with _opened(path) as stored:
        facts = json.loads(str(stored["facts"]))
        skipped = Skipped(facts.pop("skipped"))
        positions, num_tokens, num_bytes = (
            stored[name] for name in ("positions", "num_tokens", "num_bytes")
        )
        if not len(positions) == len(num_tokens) == len(num_bytes):
            raise ValueError("documents are missing")
        return Part(positions, num_tokens, num_bytes, skipped=skipped, **facts)


def read_tokens(path: Path) -> np.ndarray:
    """The tokens of a part, document after document, each with its separator before it.

    Raises:
        RunError: It is damaged.
    """
    with _opened(path) as stored:
        tokens = stored["tokens"]
        if len(tokens) != stored["num_tokens"].sum():
            raise ValueError("tokens are missing")
        return tokens


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise _damaged(path, "it is not a file")
    try:
        with path.open("rb") as file, np.load(file) as stored:
            yield stored
    except DAMAGE as error:
        raise _damaged(path, first_line(error)) from error


def _damaged(path: Path, how: str) -> RunError:
    return RunError(
        f"{path} is damaged ({how}); delete this file, and the same command writes it again."
    )
