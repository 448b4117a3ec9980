"""Figure 4: residuals of Newton's iterations, at initialisation and after training."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pararnn import RNN, Newton
from pararnn.lm.data.errors import RunError
from pararnn.lm.training import RunFolder, TrainConfig, load_trained, train
from pararnn.lm.training.config import ArchitectureConfig, OptimizerConfig, TextConfig
from pararnn.lm.training.language_model import build_model, to_device
from pararnn.lm.training.text import open_codec, open_text
from pararnn.reproduce import quoted
from pararnn.reproduce.newton import residuals
from pararnn.reproduce.points import Session, Stopped, Values
from pararnn.reproduce.report import Column, Line, Panel, Report, Table

MODELS = {"paragru": "ParaGRU", "paralstm": "ParaLSTM"}
STAGES = {"initial": "at initialisation", "trained": "after training"}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
_ROUNDINGS = 16  # a residual of so many spacings at 1 counts as machine precision
_SHOWN = 4  # iterations of the table
_QUOTED = {("paragru", "initial"): "2", ("paragru", "trained"): "3"}
_PARTS: dict[str, Any] = {
    "architecture": ArchitectureConfig,
    "text": TextConfig,
    "optimizer": OptimizerConfig,
}


def measure(session: Session) -> None:
    """Residuals of all models and stages that are missing."""
    for model in MODELS:
        for source in _sources(session, model):
            names = [_name(model, source, *rest) for rest in _combinations(session)]
            if all(session.points.measured(name) for name in names):
                continue
            session.check()
            _measure(session, model, source)


def _sources(session: Session, model: str) -> list[Path | None]:
    """Run folders of a model that were given; [None] for one that is trained here."""
    if not session.config.runs:
        return [None]
    given = [path for path in session.config.runs if _model_of(path) == model]
    return list(given)


def _model_of(path: Path) -> str:
    model = RunFolder.open(path).read_config().model
    if model not in MODELS:
        raise RunError(
            f"{path} has trained {model}; Figure 4 has {' and '.join(MODELS)}. Leave it out."
        )
    return model


def _combinations(session: Session) -> Iterator[tuple[str, int, str]]:
    for stage in STAGES:
        for length in session.preset.residual_lengths:
            for dtype in DTYPES:
                yield stage, length, dtype


def _name(model: str, source: Path | None, stage: str, length: int, dtype: str) -> str:
    where = "trained here" if source is None else source.resolve().as_posix()
    return f"residual/{model}/{stage}/T{length}/{dtype}/{where}"


def _measure(session: Session, model: str, source: Path | None) -> None:
    folder = RunFolder.open(source) if source is not None else _trained(session, model)
    config, device = folder.read_config(), session.place
    tokens = _windows(session, config, folder).to(device)
    for stage in STAGES:
        whole = (
            to_device(build_model(config, open_codec(folder)), device)
            if stage == "initial"
            else load_trained(folder, device)
        )
        cell, x = _last_cell(whole, tokens)
        for length in session.preset.residual_lengths:
            for dtype in DTYPES:
                session.point(
                    _name(model, source, stage, length, dtype),
                    functools.partial(_residuals, session, cell, x[:, :length], DTYPES[dtype]),
                )


def _trained(session: Session, model: str) -> RunFolder:
    """The run folder of a model that is trained here, to its end.

    Raises:
        Stopped: A signal ended the training; its checkpoint is kept.
    """
    folder = session.config.out / "figure-4" / model
    fields = {
        name: _PARTS[name](**value) if name in _PARTS else value
        for name, value in session.preset.training.items()
    }
    config = TrainConfig(model=model, out=folder, device=str(session.place), **fields)
    folder.parent.mkdir(parents=True, exist_ok=True)
    result = train(config, resume=(folder / "config.json").exists())
    if result.stopped_by is not None:
        raise Stopped(result.stopped_by)
    return RunFolder.open(folder)


def _windows(session: Session, config: TrainConfig, folder: RunFolder) -> Tensor:
    """Sequences of held-out tokens, spread evenly: (batch, longest length).

    Raises:
        RunError: There are too few tokens.
    """
    longest, batch = max(session.preset.residual_lengths), session.preset.residual_batch
    split = open_text(config, folder).validation
    room = split.num_tokens - longest
    if room < 0:
        raise RunError(
            f"{folder.path} has {split.num_tokens:,} held-out tokens; Figure 4 needs at least "
            f"{longest:,}. Name a run with more of them."
        )
    starts = [room * i // max(1, batch - 1) for i in range(batch)]
    return torch.stack([torch.from_numpy(split.read(s, s + longest)) for s in starts])


def _last_cell(model: nn.Module, tokens: Tensor) -> tuple[nn.Module, Tensor]:
    """The cell of the last layer, and its inputs (batch, time, features)."""
    rnn = [module for module in model.modules() if isinstance(module, RNN)][-1]
    seen: list[Tensor] = []
    handle = rnn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        with torch.no_grad():
            model.eval()(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    return rnn.cell, seen[0].float()


def _residuals(session: Session, cell: nn.Module, x: Tensor, dtype: torch.dtype) -> Values:
    """Residuals of the paper's iteration, and the iterations that the library takes."""
    cell, x = copy.deepcopy(cell).to(dtype), x.to(dtype)
    found = residuals(cell, x, session.preset.residual_iterations)
    precise = _ROUNDINGS * torch.finfo(dtype).eps
    layer = RNN(cell, backend="torch", solver=Newton(chunk=1))
    with torch.no_grad():
        layer(x)
    assert layer.report is not None
    return {
        "residuals": found,
        "iterations": next((k for k, r in enumerate(found) if r <= precise), None),
        "library_iterations": layer.report.iterations,
    }


def report(session: Session) -> Report:
    """Figure 4 from the points that there are."""
    rows, panels = [], []
    for model, cell in MODELS.items():
        for stage, words in STAGES.items():
            lines = []
            for source in _sources(session, model):
                for number, length in enumerate(session.preset.residual_lengths):
                    for dtype in DTYPES:
                        values = session.points.measured(_name(model, source, stage, length, dtype))
                        if values is None:
                            continue
                        lines.append(_line(values, length, dtype, number))
                        rows.append(_row(values, (cell, words, length, dtype), model, stage))
            panels.append(
                Panel(
                    f"{cell} {words} (quoted: {_said(model, stage)} iterations)",
                    "iteration",
                    "largest residual",
                    lines,
                    log_y=True,
                )
            )
    shown = [f"after {k}" for k in range(1, _SHOWN + 1)]
    columns = (
        *(Column("cell"), Column("stage"), Column("steps", None, ","), Column("numbers")),
        *(Column(name, "measured", ".0e") for name in ("before", *shown)),
        Column("iterations to machine precision", "measured"),
        Column("the paper", "quoted"),
        Column("of the library, chunks of one step", "measured"),
    )
    table = Table("Largest residual, and iterations", columns, rows)
    return Report(
        "figure-4",
        "Figure 4: residuals of Newton's method",
        [table],
        panels,
        quoted.FIGURE_4,
        _notes(session),
    )


def _line(values: Values, length: int, dtype: str, color: int) -> Line:
    found = [max(r, 1e-17) for r in values["residuals"]]
    name = f"{length:,} steps, {dtype}"
    return Line(name, "measured", list(range(len(found))), found, color, dtype == "float64")


def _row(
    values: Values, key: tuple[str, str, int, str], model: str, stage: str
) -> tuple[str | float | None, ...]:
    found = [*values["residuals"][: _SHOWN + 1]]
    said = _said(model, stage)
    return (*key, *found, values["iterations"], said, values["library_iterations"])


def _said(model: str, stage: str) -> str:
    """Iterations to machine precision, as the paper says."""
    return _QUOTED.get((model, stage), "3 to 4")


def _notes(session: Session) -> list[str]:
    preset = session.preset
    notes = [
        "The paper's iteration: chunks of one step, first guess f(0, x), plain PyTorch; the "
        f"largest of {preset.residual_batch} sequences of held-out tokens, inputs of the last "
        "layer's cell.",
        f"Machine precision: a residual of at most {_ROUNDINGS} spacings of numbers at 1. The "
        "paper does not say its number type.",
        "The library's iterations, to its default tolerance, come after a warm-up.",
    ]
    if session.config.runs:
        paths = ", ".join(map(str, session.config.runs))
        notes.append(f"Trained models: {paths}.")
    else:
        size = preset.training["architecture"]
        text = preset.training["text"]
        notes.append(
            f"Trained models: {preset.training['steps']} steps of {text['batch_size']} sequences "
            f"of {text['sequence_length']:,} bytes of Python's standard library, "
            f"{size['num_layers']} blocks of width {size['width']}. The paper's are of 400M "
            "parameters after 10.5 billion tokens; --runs takes other ones."
        )
    notes += [
        f"Left out: {name}: {reason}."
        for name, reason in session.points.left_out("residual/").items()
    ]
    return notes
