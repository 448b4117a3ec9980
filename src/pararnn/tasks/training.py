"""One model trained on one task from one seed, and tested at several lengths.

All that is random is a function of the seed and the step, so that a run that was stopped goes on
to the bit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pickle
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pararnn.lm.data.errors import RunError
from pararnn.lm.data.files import read_json, write_atomically
from pararnn.lm.training.checkpoints import quiet_transformers
from pararnn.tasks.catalogue import TASKS
from pararnn.tasks.models import build_model
from pararnn.tasks.settings import MULTIPLES, SOLVED, SOLVED_TWICE, Settings
from pararnn.tasks.task import Batch, Score, Split, Task, chance, draw, score
from pararnn.tasks.train_step import TrainStep

_BLOCK = 50  # steps whose samples are drawn at once: walks cost one operation per token and block
_TOKENS = 1 << 17  # in one pass of an evaluation
_SAVE_EVERY = 20.0  # seconds, at an evaluation
AHEAD = 8
"""Steps that may wait for a GPU before the next is enqueued: 10 ms of work, in which the samples of
another model can be drawn."""

Pieces = Generator[int, None, dict[str, Any] | None]
"""Training in pieces, between which others may work. It yields how many pieces may be unfinished on
the device when the next is asked for, and returns the result, or None if it was stopped."""


@dataclass(frozen=True)
class Unit:
    """What is trained: an architecture on a task, from a seed."""

    task: str
    architecture: str
    seed: int

    def __str__(self) -> str:
        return f"{self.task}-{self.architecture}-{self.seed}"


@dataclass
class _Progress:
    """All of a run that is no tensor."""

    step: int = 0
    decay_from: int | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


class Samples:
    """The training batches of a unit: which one a step takes depends on seed and step alone."""

    def __init__(self, task: Task, settings: Settings, seed: int, device: torch.device) -> None:
        self.task, self.settings, self.seed, self.device = task, settings, seed, device
        self._number = -1
        self._held: Batch | None = None

    def of_step(self, step: int) -> Batch:
        """The batch of a step."""
        if self.settings.train_samples is not None:
            return self._of_fixed_set(step, self.settings.train_samples)
        number, place = divmod(step, _BLOCK)
        size = self.settings.batch_size
        if self._held is None or number != self._number:
            self._held, self._number = self._draw(_BLOCK * size, number), number
        return Batch._make(part[place * size : (place + 1) * size] for part in self._held)

    def _draw(self, size: int, number: int) -> Batch:
        seed = (self.seed << 32) + number
        length = self.settings.length
        return _drawn(self.task, size, length, split="train", seed=seed, device=self.device)

    def _of_fixed_set(self, step: int, count: int) -> Batch:
        """Epochs over the same samples, each in an order of its own; what is left over is left."""
        if self._held is None:
            self._held = self._draw(count, 0)
        size = min(self.settings.batch_size, count)
        epoch, place = divmod(step, count // size)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        rows = order[place * size : (place + 1) * size].to(self.device)
        return Batch._make(part[rows] for part in self._held)


def _drawn(
    task: Task, size: int, length: int, *, split: Split, seed: int, device: torch.device
) -> Batch:
    """As `draw`. A GPU draws on a stream of its own, so that no steps are waited for."""
    if device.type != "cuda":
        return draw(task, size, length, split=split, seed=seed, device=device)
    stream, current = _drawing(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(stream):
        batch = draw(task, size, length, split=split, seed=seed, device=device)
    current.wait_stream(stream)
    for part in batch:
        part.record_stream(current)
    return batch


@functools.cache
def _drawing(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Training:
    """A model in training.

    Args:
        unit: What is trained.
        settings: How.
        folder: Where its checkpoint and result are.
        device: Where.
    """

    def __init__(self, unit: Unit, settings: Settings, folder: Path, device: torch.device) -> None:
        self.unit, self.settings, self.device = unit, settings, device
        self.checkpoint, self.result = folder / "checkpoint.pt", folder / "result.json"
        self.task = TASKS[unit.task]
        self.samples = Samples(self.task, settings, unit.seed, device)
        torch.manual_seed(unit.seed)
        with quiet_transformers():
            self.model = build_model(self.task, unit.architecture, settings).to(device)
        self.step = TrainStep(
            self.model,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
        )
        self.progress = _Progress()
        self._saved = time.perf_counter()

    @property
    def end(self) -> int:
        """The last step, as far as is known: learnt tasks end earlier."""
        settings, since = self.settings, self.progress.decay_from
        return (
            settings.steps if since is None else min(settings.steps, since + settings.decay_steps)
        )

    def run(self, should_stop: Callable[[], bool]) -> dict[str, Any] | None:
        """Train and test.

        Args:
            should_stop: Asked after every step; True saves a checkpoint and ends the run.

        Returns:
            The result, which is also in the folder; None if the run was stopped.
        """
        return finish(self.pieces(should_stop))

    def pieces(self, should_stop: Callable[[], bool]) -> Pieces:
        """As `run`, in pieces: one for each step, and for each pass of an evaluation."""
        if self.checkpoint.exists():
            self._load()
        started, before = time.perf_counter(), self.progress.seconds
        finite = True
        while self.progress.step < self.end and finite:
            loss = self.advance()
            step = self.progress.step
            if step % self.settings.evaluate_every == 0 or step == self.end:
                finite = yield from self._evaluate(loss)
            self.progress.seconds = before + time.perf_counter() - started
            if should_stop():
                self._save()
                return None
            self._save_sometimes()
            yield AHEAD
        return (yield from self._finish(finite))

    def advance(self) -> Tensor:
        """One step; returns its loss."""
        progress = self.progress
        rate = learning_rate(self.settings, progress.step, progress.decay_from)
        loss = self.step(self.samples.of_step(progress.step), rate)
        progress.step += 1
        return loss

    def _evaluate(self, loss: Tensor) -> Generator[int, None, bool]:
        """Note loss and validation accuracy; whether the loss is finite."""
        settings, progress = self.settings, self.progress
        found = yield from self._score("validation", settings.length, settings.validation_samples)
        value = loss.item()
        progress.history.append(
            {"step": progress.step, "loss": value, "accuracy": found[0].accuracy}
        )
        last = progress.history[-SOLVED_TWICE:]
        learnt = len(last) == SOLVED_TWICE and all(h["accuracy"] >= SOLVED for h in last)
        if learnt and progress.decay_from is None:
            progress.decay_from = progress.step
        return math.isfinite(value)

    def _score(
        self, split: Split, length: int, samples: int
    ) -> Generator[int, None, tuple[Score, float]]:
        """The score on a split, and what always the same answer would have."""
        self.model.eval()
        total, always = Score(0, 0, 0, 0), 0.0
        size = min(samples, max(1, _TOKENS // length))
        for number, first in enumerate(range(0, samples, size)):
            count = min(size, samples - first)
            batch = _drawn(self.task, count, length, split=split, seed=number, device=self.device)
            with torch.no_grad():
                logits = self.model(batch.tokens)[..., : self.task.num_classes]
                answers = logits.argmax(-1)
            yield 0  # what is read next is computed then, and reading it keeps nobody waiting
            total = total.plus(score(answers, batch))
            always += chance(batch) * count / samples
        return total, always

    def _finish(self, finite: bool) -> Generator[int, None, dict[str, Any]]:
        """Test, write the result, and delete the checkpoint."""
        started, tests = time.perf_counter(), {}
        for multiple in MULTIPLES:
            length = multiple * self.settings.length
            found, always = yield from self._score("test", length, self.settings.test_samples)
            tests[str(length)] = {
                "accuracy": found.accuracy,
                "sequence_accuracy": found.sequence_accuracy,
                "constant_answer": always,
            }
        learnt = self.progress.decay_from is not None
        result = {
            **dataclasses.asdict(self.unit),
            "settings": dataclasses.asdict(self.settings),
            "task_settings": dataclasses.asdict(self.task),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.progress.step,
            "ended": "learnt" if learnt else "all steps done" if finite else "loss not finite",
            "tests": tests,
            "train_seconds": round(self.progress.seconds, 2),
            "test_seconds": round(time.perf_counter() - started, 2),
            "device": device_name(self.device),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "history": self.progress.history,
        }
        write_atomically(self.result, (json.dumps(result, indent=1) + "\n").encode())
        self.checkpoint.unlink(missing_ok=True)
        return result

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return identity(self.unit, self.settings, self.device)

    def _save_sometimes(self) -> None:
        if (
            self.progress.step % self.settings.evaluate_every == 0
            and time.perf_counter() - self._saved > _SAVE_EVERY
        ):
            self._save()

    def _save(self) -> None:
        state = {
            "identity": self._identity(),
            "progress": dataclasses.asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self.step.optimizer.state_dict(),
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)
        self._saved = time.perf_counter()

    def _load(self) -> None:
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise RunError(
                f"{self.checkpoint} cannot be read; delete it, and the model is trained "
                "from the start."
            ) from error
        check_identity(self.checkpoint, state["identity"], self._identity())
        self.model.load_state_dict(state["model"])
        self.step.optimizer.load_state_dict(state["optimizer"])
        self.progress = _Progress(**state["progress"])


def learning_rate(settings: Settings, step: int, decay_from: int | None) -> float:
    """The rate of the step after `step` others; see `Settings.schedule`."""
    rate = settings.learning_rate * min(1.0, (step + 1) / settings.warmup_steps)
    start: float = math.inf if decay_from is None else decay_from
    if settings.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    else:
        start = min(start, settings.steps - settings.decay_steps)
    return rate * min(1.0, max(0.0, 1 - (step - start) / settings.decay_steps))


def identity(unit: Unit, settings: Settings, device: torch.device) -> dict[str, Any]:
    """All that decides the course of a run, as it is stored."""
    return {
        **dataclasses.asdict(unit),
        "settings": dataclasses.asdict(settings),
        "task_settings": dataclasses.asdict(TASKS[unit.task]),
        "device": device_name(device),
    }


def check_identity(path: Path, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to go on with a run that was begun in another way.

    Raises:
        RunError: It was; the message names what differs.
    """
    pairs = zip(_flat(stored, wanted), _flat(wanted, wanted), strict=True)
    for (name, before), (_, now) in pairs:
        if before != now:
            raise RunError(
                f"{path} was made with {name} {before}, but now it is {now}; name another folder "
                "with --out, or take the same settings."
            )


def _flat(values: dict[str, Any], like: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names and values in the order of `like`, those of dictionaries in it as well."""
    found: list[tuple[str, Any]] = []
    for name, value in like.items():
        own = values.get(name)
        if isinstance(value, dict):
            found += _flat(own if isinstance(own, dict) else {}, value)
        else:
            found.append((name, own))
    return found


def stored_result(unit: Unit, settings: Settings, folder: Path, device: torch.device) -> Any:
    """The result of a unit that was trained before, or None.

    Raises:
        RunError: It was trained in another way, or the file is damaged.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    try:
        result = read_json(path)
        check_identity(path, result, identity(unit, settings, device))
    except (ValueError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error}); delete it to train anew.") from error
    return result


def train_unit(
    unit: Unit,
    settings: Settings,
    folder: Path,
    device: torch.device,
    should_stop: Callable[[], bool],
) -> Pieces:
    """The result of a unit: read, or trained from where it was stopped; None if it was again.

    Args:
        unit: What is trained.
        settings: How.
        folder: Of this unit alone.
        device: Where; on a GPU on the stream that is current whenever a piece is asked for, which
            must be the same for all of them.
        should_stop: Asked after every step.

    Returns:
        The pieces; `finish` runs them.

    Raises:
        RunError: The folder holds a run of other settings, or a file that cannot be read.
    """
    result = stored_result(unit, settings, folder, device)
    if result is not None:
        return result
    folder.mkdir(parents=True, exist_ok=True)
    return (yield from Training(unit, settings, folder, device).pieces(should_stop))


def finish(pieces: Pieces) -> dict[str, Any] | None:
    """Run all pieces one after another; returns the result."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            result: dict[str, Any] | None = end.value
            return result


def device_name(device: torch.device) -> str:
    """The name of a GPU, or "CPU"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
