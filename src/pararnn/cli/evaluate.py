"""`pararnn eval`."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from pararnn.cli.arguments import parse
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.words import show
from pararnn.lm.training.run_folder import RunFolder

if TYPE_CHECKING:
    from pararnn.lm.data import TokenSplit
    from pararnn.lm.training.text import Codec

_TASK_BATCH = 8  # requests side by side; all their logits are in memory


@dataclass(kw_only=True)
class EvalArguments:
    """Measure a model in bits per byte, or by tasks of the lm-eval harness."""

    run: tyro.conf.Positional[Path]
    """Folder that `pararnn train` wrote, or one of its checkpoints; with --tasks also one that
    `save_pretrained` wrote."""
    data: Path | None = None
    """File or folder of texts; None for all held-out bytes of the run."""
    tasks: str | None = None
    """Tasks of the harness instead of a text, separated by commas."""
    task_folder: Path | None = None
    """Folder of further tasks, as YAML files of the harness."""
    num_fewshot: int | None = None
    """Solved examples before each question; None for the number of the task."""
    limit: int | None = None
    """Questions per task; None for all."""
    device: str = "auto"
    """A torch device; auto for CUDA when there is one, else the CPU."""

    def __post_init__(self) -> None:
        if self.tasks is None:
            for name in ("task_folder", "num_fewshot", "limit"):
                if getattr(self, name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} needs --tasks.")
            return
        if self.data is not None:
            raise ValueError("--data does not work with --tasks; a task has its own data.")
        if not all(self.task_names):
            raise ValueError(f"--tasks {self.tasks!r} has an empty name.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num-fewshot is {self.num_fewshot}; it must be >= 0.")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; it must be >= 1.")

    @property
    def task_names(self) -> list[str]:
        """The names in `tasks`."""
        return [name.strip() for name in (self.tasks or "").split(",")]


def run(arguments: list[str]) -> int:
    """Print bits per byte, or the table of the harness."""
    parsed = parse(EvalArguments, "eval", arguments)
    if parsed.tasks is not None:
        return _run_tasks(parsed)
    found = RunFolder.find(parsed.run)
    from pararnn.lm.training import evaluate
    from pararnn.lm.training.advice import explained
    from pararnn.lm.training.config import TextConfig
    from pararnn.lm.training.parallel import choose_device
    from pararnn.lm.training.runs import identity_of
    from pararnn.lm.training.text import open_text
    from pararnn.lm.training.trained import Trained

    trained = Trained(*found)
    run, codec, owner = trained.run, trained.codec, None
    with explained(run, training=False), tempfile.TemporaryDirectory() as temporary:
        config = None if run is None else run.read_config()
        if parsed.data is not None:
            split = _split(parsed.data.expanduser(), codec, Path(temporary))
        elif run is None or config is None:
            raise RunError(f"{parsed.run} lies away from the text of its run; give --data.")
        else:
            text = open_text(config, run)
            split, owner = text.validation, identity_of(config, text)
        model = trained.load(choose_device(parsed.device), owner)
        chunk = (TextConfig() if config is None else config.text).sequence_length
        result = evaluate(model, split, codec, chunk=chunk)
    source = f"held-out {codec.unit}" if parsed.data is None else f"{codec.unit} of {parsed.data}"
    show(
        f"{result.bits_per_byte:.4f} bits per byte ({result.loss:.4f} nats, perplexity "
        f"{result.perplexity:.4f} per {codec.unit[:-1]}) on {result.num_tokens:,} {source}"
    )
    return 0


def _run_tasks(parsed: EvalArguments) -> int:
    try:
        from pararnn.lm.evaluation import HarnessModel, run_tasks
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pararnn"):
            raise
        raise RunError(str(error)) from error
    from lm_eval.utils import make_table

    model = HarnessModel(parsed.run, device=parsed.device, batch_size=_TASK_BATCH)
    results = run_tasks(
        model,
        parsed.task_names,
        task_folder=parsed.task_folder,
        num_fewshot=parsed.num_fewshot,
        limit=parsed.limit,
    )
    show(make_table(results))
    if results.get("groups"):
        show(make_table(results, "groups"))
    return 0


def _split(data: Path, codec: Codec, folder: Path) -> TokenSplit:
    """The documents under a path, written into a folder as tokens."""
    from pararnn.lm.data.prepare import write_split

    split, skipped = write_split(data, codec.tokenizer, folder)
    for line in skipped.describe():
        show(f"skipped: {line}")
    return split
