"""Plots of a suite's results; needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.figure import Figure

from pararnn.tasks.report import Result, accuracies, grouped, percent

_COLUMNS = 4


def plot_heat_map(results: list[Result], path: Path) -> None:
    """Best accuracy by architecture and task: at the length of training, and at the longest."""
    groups = grouped(results)
    tasks = list(dict.fromkeys(r["task"] for r in results))
    names = list(dict.fromkeys(name for name, _ in groups))
    lengths = [int(length) for length in results[0]["tests"]]
    size = (2 * (2.5 + 0.6 * len(tasks)), 3 + 0.35 * len(names))
    figure = Figure(figsize=size, layout="constrained")
    titles = ("length of training", f"{lengths[-1] // lengths[0]} times the length")
    for axes, place, title in zip(figure.subplots(1, 2), (0, -1), titles, strict=True):
        values = [
            [max(accuracies(groups[n, t], place)) if (n, t) in groups else math.nan for t in tasks]
            for n in names
        ]
        image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        for row, numbers in enumerate(values):
            for column, value in enumerate(numbers):
                if not math.isnan(value):
                    color = "black" if value > 60 else "white"
                    text = percent(value)
                    axes.text(column, row, text, ha="center", va="center", color=color, size=7)
        axes.set_xticks(range(len(tasks)), tasks, rotation=60, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title)
    figure.suptitle("Best of the seeds")
    figure.colorbar(image, ax=figure.axes, label="accuracy in %")
    figure.savefig(path, dpi=120)


def plot_lengths(results: list[Result], path: Path) -> None:
    """Accuracy against length, one picture for each task: best of the seeds, and their range."""
    groups = grouped(results)
    tasks = list(dict.fromkeys(r["task"] for r in results))
    names = list(dict.fromkeys(name for name, _ in groups))
    columns = min(_COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.4 * columns + 1.5, 2.8 * rows + 0.5), layout="constrained")
    pictures = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, task in zip(pictures, tasks, strict=False):
        for number, name in enumerate(names):
            group = groups.get((name, task))
            if group:
                lengths = [int(length) for length in group[0]["tests"]]
                found = [accuracies(group, place) for place in range(len(lengths))]
                color = f"C{number % 10}"
                axes.plot(
                    lengths,
                    [max(values) for values in found],
                    marker="os^dv"[number // 10 % 5],
                    color=color,
                    label=name,
                )
                axes.fill_between(
                    lengths,
                    [min(v) for v in found],
                    [max(v) for v in found],
                    alpha=0.12,
                    color=color,
                )
                constant = [100 * t["constant_answer"] for t in group[0]["tests"].values()]
        axes.plot(lengths, constant, "--", color="gray", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set(title=task, ylim=(0, 104), xlabel="tokens", ylabel="accuracy in %")
    for axes in pictures[len(tasks) :]:
        axes.set_visible(False)
    handles = {
        label: handle
        for axes in pictures
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper")
    figure.savefig(path, dpi=120)
