"""Table 3: times of whole train steps of the paper's language models, on one GPU."""

from __future__ import annotations

import functools

from pararnn.lm.bench.models import ModelSize
from pararnn.lm.bench.train import train_rows
from pararnn.lm.models.architectures import missing_kernels
from pararnn.lm.models.presets import preset
from pararnn.lm.training.parallel import Processes, join_processes
from pararnn.reproduce import quoted
from pararnn.reproduce.points import Session, Values
from pararnn.reproduce.report import Column, Line, Panel, Report, Table

NAMES = {
    "paragru": "ParaGRU",
    "transformer": "Transformer",
    "paralstm": "ParaLSTM",
    "mamba2": "Mamba2",
}
"""In the order of measurement: after the first two there is a ratio."""
_GPUS = 8  # of a node of the paper
_PEAK = 989e12  # of an H100 in dense bfloat16 operations per second, by its maker
_LINK_BYTES_PER_SECOND = 450e9  # NVLink of an H100 or H200 in one direction, by its maker
# per parameter: weights gathered twice in bfloat16, gradients reduced in float32
_TRAFFIC_BYTES = 2 + 2 + 4


def measure(session: Session) -> None:
    """Steps that are missing, from small models to large ones."""
    with join_processes(str(session.place)) as processes:
        for size in session.preset.train_sizes:
            for architecture in NAMES:
                session.point(
                    _name(size, architecture),
                    functools.partial(_time, session, size, architecture, processes),
                )


def _name(size: str, architecture: str) -> str:
    return f"train/{size}/{architecture}"


def _time(session: Session, size: str, architecture: str, processes: Processes) -> Values:
    if missing := missing_kernels(architecture):
        return {"left_out": missing}  # the slow path would say nothing about the model
    chosen = session.preset
    model = ModelSize(name=size, **chosen.train_model)
    (row,) = train_rows(model, [architecture], chosen.train_batch, chosen.train_time, processes)
    return {"left_out": row["skipped"]} if "skipped" in row else row


def report(session: Session) -> Report:
    """Table 3 from the points that there are."""
    rows, names = [], []
    measured: list[float | None] = []
    said: list[float | None] = []
    for size in session.preset.train_sizes:
        for architecture, words in NAMES.items():
            values = session.points.measured(_name(size, architecture)) or {}
            ratios = _over_transformer(session, size, architecture)
            estimate = _estimate(values, size, architecture) if _is_paper(session) else None
            rows.append(
                (
                    *(size, words, values.get("parameters"), quoted.PARAMETERS[size, architecture]),
                    *(values.get("batch"), values.get("step_ms"), estimate),
                    quoted.STEP_MS[size, architecture] or quoted.NOT_QUOTED,
                    *ratios,
                )
            )
            names.append(f"{size} {words}")
            measured.append(ratios[0])
            said.append(ratios[1])
    columns = (
        *(Column("size"), Column("model")),
        *(Column("parameters", "measured", ","), Column("parameters", "quoted")),
        *(Column("sequences", None), Column("ms per step, one GPU", "measured", ",.1f")),
        *(Column(f"ms per step, {_GPUS} GPUs", "estimated"), Column("ms per step", "quoted", ",g")),
        Column("over the Transformer", "measured", ".3f"),
        Column("over the Transformer", "quoted", ".3f"),
    )
    lines = [
        Line("one GPU", "measured", None, measured, 0),
        Line("the paper", "quoted", None, said, 1),
    ]
    panel = Panel("Time of a train step", "", "over the Transformer's", lines, names)
    table = Table("Train steps", columns, rows)
    return Report(
        "table-3",
        "Table 3: train steps of language models",
        [table],
        [panel],
        quoted.TABLE_3,
        _notes(session),
        columns=1,
    )


def _over_transformer(
    session: Session, size: str, architecture: str
) -> tuple[float | None, float | None]:
    """Time over the Transformer's: measured per sequence, and quoted per step."""
    found = [session.points.measured(_name(size, a)) for a in (architecture, "transformer")]
    per_sequence = [v["step_ms"] / v["batch"] for v in found if v is not None]
    said = [quoted.STEP_MS[size, a] for a in (architecture, "transformer")]
    return (
        per_sequence[0] / per_sequence[1] if len(per_sequence) == 2 else None,
        said[0] / said[1] if said[0] and said[1] else None,
    )


def _is_paper(session: Session) -> bool:
    """Whether the models are the paper's; others have no estimate."""
    return not session.preset.train_model


def _estimate(values: Values, size: str, architecture: str) -> str | None:
    """Milliseconds of a step of the paper's batch on one node, from and to; None without any."""
    if not values or quoted.NODES[size] > 1:
        return None
    least = values["step_ms"] * preset(architecture, size).batch_size / values["batch"]
    traffic = values["parameters"] * _TRAFFIC_BYTES * (_GPUS - 1) / _GPUS
    return f"{least:,.0f} to {least + 1e3 * traffic / _LINK_BYTES_PER_SECOND:,.0f}"


def _notes(session: Session) -> list[str]:
    ms, tokens, parameters = quoted.STEP_MS["400m", "paragru"], 32 * 2048, 406e6
    assert ms is not None
    rate = 6 * parameters * tokens / (ms / 1e3)
    notes = [
        "Measured as `pararnn bench train` does: forward and backward in bfloat16 autocast, "
        "float32 weights, fused AdamW; the paper keeps weights in bfloat16. Where a model does "
        "not fit with the paper's sequences per GPU, it has half of them, then recomputes "
        "activations.",
        f"Estimated for one node of {_GPUS} GPUs, each with the paper's sequences: the time on "
        "one, scaled to them, if all communication is hidden behind it, to that time and "
        f"{_TRAFFIC_BYTES} bytes per parameter over NVLink at "
        f"{_LINK_BYTES_PER_SECOND / 1e9:.0f} GB/s, if none is. More nodes: not estimated.",
        f"A step of 32 sequences of 2,048 tokens in {ms:g} ms would be {rate:.1e} "
        "operations per second and GPU (estimated: 6 per parameter and token, 406M parameters); "
        f"the peak of an H100 is {_PEAK:.1e}. So the timed step of the paper has fewer tokens; how "
        "many is not quoted. What compares is the time over the Transformer's.",
    ]
    for size in session.preset.train_sizes:
        for architecture, words in NAMES.items():
            values = session.points.measured(_name(size, architecture))
            if values is not None and values["checkpointing"]:
                notes.append(f"{size} {words}: activations are recomputed.")
            if values is not None and values["note"]:
                notes.append(f"{size} {words}: {values['note']}.")
    notes += [
        f"Left out: {name.removeprefix('train/')}: {reason}."
        for name, reason in session.points.left_out("train/").items()
    ]
    return notes
