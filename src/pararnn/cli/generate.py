"""`pararnn generate`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from pararnn.cli.arguments import parse
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.words import show
from pararnn.lm.training.run_folder import RunFolder


@dataclass(kw_only=True)
class GenerateArguments:
    """Continue a text with the model of a run."""

    run: tyro.conf.Positional[Path]
    """Folder that `pararnn train` wrote, or one of its checkpoints."""
    prompt: str = ""
    """Beginning of the text."""
    num_tokens: int = 300
    """Most tokens to add, bytes for a run without tokenizer; the model may end the text before."""
    temperature: float = 0.8
    """Of the sampling; 0 takes the most probable token."""
    seed: int = 0
    """Of the sampling."""
    weights: Literal["stored", "int8"] = "stored"
    """As they are stored, or those of projections rounded to one byte each: less to read."""
    device: str = "auto"
    """A torch device; auto for CUDA when there is one, else the CPU."""

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"num-tokens is {self.num_tokens}; it must be >= 1.")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be >= 0, and finite.")


def run(arguments: list[str]) -> int:
    """Print the prompt and its continuation, as it comes."""
    parsed = parse(GenerateArguments, "generate", arguments)
    if "\0" in parsed.prompt:
        raise RunError("the prompt holds a zero byte; a text has none.")
    found = RunFolder.find(parsed.run)
    from pararnn.lm.training.advice import explained
    from pararnn.lm.training.language_model import stream_text
    from pararnn.lm.training.parallel import choose_device
    from pararnn.lm.training.trained import Trained

    trained = Trained(*found)
    with explained(trained.run, training=False):
        model = trained.load(choose_device(parsed.device))
        if parsed.weights == "int8":
            model = _with_int8_weights(model)
        pieces = stream_text(
            model,
            trained.codec,
            parsed.prompt,
            num_tokens=parsed.num_tokens,
            temperature=parsed.temperature,
            seed=parsed.seed,
        )
        for piece in pieces:
            show(piece, end="")
    show("")
    return 0


def _with_int8_weights(model: Any) -> Any:
    from pararnn.lm.decoding import int8_weights

    try:
        return int8_weights(model)
    except TypeError as error:
        raise RunError(f"--weights int8: {error}") from error
