"""Read datasets of the `datasets` package as a stream."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pararnn.lm.data.documents import Block, Rows, stopped, text_of
from pararnn.lm.data.errors import RunError
from pararnn.lm.data.recipes import RECIPES
from pararnn.lm.data.tokenization import first_line

DATASET = "datasets:"


@dataclass(frozen=True)
class DatasetReader:
    """The train split of a dataset, streamed by the `datasets` package."""

    source: str
    text_field: str
    skip_errors: bool = False
    size: None = field(default=None, init=False)

    def fingerprint(self) -> list[Any]:
        """The name alone; the library cannot know whether the dataset has changed."""
        return [self.source]

    def blocks(self, start: list[Any] | None, unit_bytes: int) -> Iterator[Block]:
        """Blocks from [number of a row, state of the stream there]."""
        name, keep = self._choice()
        rows = _load(name)
        number, state = start or (0, None)
        if state is not None:
            rows.load_state_dict(state)
        texts: list[tuple[int, str | None]] = []
        size = 0
        for row in _stream(rows, name):
            if keep(row):
                text = self._text(row, f"row {number} of {name}")
                texts.append((number, text))
                size += len(text or "")
            number += 1
            if size >= unit_bytes:
                yield Block(Rows(name, tuple(texts)), size, [number, rows.state_dict()])
                texts, size = [], 0
        if texts:
            yield Block(Rows(name, tuple(texts)), size, [number, rows.state_dict()])

    def _choice(self) -> tuple[str, Callable[[dict[str, Any]], bool]]:
        if self.source in RECIPES:
            recipe = RECIPES[self.source]
            return recipe.dataset, recipe.keep
        return self.source.removeprefix(DATASET), lambda row: True

    def _text(self, row: dict[str, Any], where: str) -> str | None:
        """The text of a row; None if it has no text."""
        text = text_of(row, self.text_field, where)
        if isinstance(text, str | None) or self.skip_errors:
            return text if isinstance(text, str) else None
        error = RunError(
            f"{where} holds {type(text).__name__} as {self.text_field!r}; name a field of strings "
            "with --text-field."
        )
        raise stopped(error, "such rows")


def _load(name: str) -> Any:
    try:
        import datasets  # type: ignore[import-untyped] # has none
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise RunError(
            f"{DATASET}{name} needs the package datasets, which is not installed; install the "
            'extra: pip install "pararnn[train,data]"'
        ) from error
    path, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(path, configuration or None, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise RunError(f"cannot load the dataset {name}: {first_line(error)}") from error


def _stream(rows: Any, name: str) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except (OSError, ValueError) as error:
        raise RunError(
            f"reading the dataset {name} failed: {first_line(error)} What is prepared so far is "
            "kept; continue with the same command."
        ) from error
