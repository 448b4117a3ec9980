"""`pararnn eval`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from pararnn.cli.arguments import parse
from pararnn.training import RunFolder, evaluate, load_trained
from pararnn.training.corpus import prepare_corpus, read_documents
from pararnn.training.data import map_bytes
from pararnn.training.parallel import choose_device


@dataclass(kw_only=True)
class EvalArguments:
    """Measure the model of a run in bits per byte."""

    run: tyro.conf.Positional[Path]
    """Folder that `pararnn train` wrote."""
    data: Path | None = None
    """Text file or folder; None for all held-out bytes of the run."""
    device: str = "auto"
    """A torch device; auto for CUDA when there is one, else the CPU."""


def run(arguments: list[str]) -> int:
    """Print bits per byte."""
    parsed = parse(EvalArguments, "eval", arguments)
    folder = RunFolder.open(parsed.run)
    flat = _held_out(folder) if parsed.data is None else _text(parsed.data)
    model = load_trained(folder, choose_device(parsed.device))
    result = evaluate(model, flat, chunk=folder.read_config().text.sequence_length)
    source = "held-out bytes" if parsed.data is None else f"bytes of {parsed.data}"
    print(
        f"{result.bits_per_byte:.4f} bits per byte ({result.loss:.4f} nats) on "
        f"{result.num_bytes:,} {source}"
    )
    return 0


def _held_out(folder: RunFolder) -> np.ndarray:
    config = folder.read_config()
    return map_bytes(prepare_corpus(config.data, folder.data, config.text.held_out).validation)


def _text(path: Path) -> np.ndarray:
    return np.frombuffer(read_documents(path.expanduser()), dtype=np.uint8)
