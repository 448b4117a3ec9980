"""Plots of reports from their JSON; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_STYLES: dict[str, dict[str, Any]] = {
    "measured": {"linestyle": "-", "marker": "o", "markersize": 4},
    "quoted": {"linestyle": "none", "marker": "*", "markersize": 11, "markeredgecolor": "black"},
    "estimated": {"linestyle": ":", "marker": "x"},
}
_HATCHES = {"measured": "", "quoted": "//", "estimated": ".."}


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the panels of a report.

    Args:
        report: As `report.write` stores it.
        path: Of the image; its ending gives the format.
    """
    panels = report["panels"]
    columns = max(1, min(report["columns"], len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(5.2 * columns, 4.5 * rows), layout="constrained")
    pictures = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, panel in zip(pictures, panels, strict=False):
        _draw(axes, panel)
    for axes in pictures[len(panels) :]:
        axes.set_visible(False)
    devices = ", ".join(dict.fromkeys(run["device"] for run in report["runs"]))
    figure.suptitle(f"{report['title']} ({devices or 'nothing measured'})", fontsize=10)
    figure.savefig(path, dpi=120)


def _draw(axes: Axes, panel: dict[str, Any]) -> None:
    if panel["names"] is not None:
        _draw_bars(axes, panel)
    else:
        for line in panel["lines"]:
            _draw_line(axes, line)
    if panel["log_x"]:
        axes.set_xscale("log", base=2)
    if panel["log_y"]:
        axes.set_yscale("log")
    if panel["names"] is None and not panel["log_x"]:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=panel["title"], xlabel=panel["x_label"], ylabel=panel["y_label"])
    if panel["lines"]:  # below, where no curve is
        place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2}
        axes.legend(fontsize=7, handlelength=3, frameon=False, **place)


def _draw_line(axes: Axes, line: dict[str, Any]) -> None:
    points = [(x, y) for x, y in zip(line["x"], line["y"], strict=True) if y is not None]
    style = dict(_STYLES[line["origin"]])
    if line["dashed"]:
        style["linestyle"] = "--"
    axes.plot(
        [x for x, _ in points],
        [y for _, y in points],
        color=f"C{line['color'] % 10}",
        label=f"{line['name']} ({line['origin']})",
        **style,
    )


def _draw_bars(axes: Axes, panel: dict[str, Any]) -> None:
    names, lines = panel["names"], panel["lines"]
    width = 0.8 / max(1, len(lines))
    for number, line in enumerate(lines):
        places = [i + (number - (len(lines) - 1) / 2) * width for i in range(len(names))]
        axes.bar(
            places,
            [float("nan") if y is None else y for y in line["y"]],
            width,
            color=f"C{line['color'] % 10}",
            hatch=_HATCHES[line["origin"]],
            label=f"{line['name']} ({line['origin']})",
        )
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
