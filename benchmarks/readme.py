"""The README's table and plot, from the tables of the docs: no figure is written twice.

Writes the table into README.md and draws the plot; with `--table` no plot, which needs matplotlib.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured -->\n", "<!-- end -->\n"
PLOT = ROOT / "docs/results/readme.png"


@dataclass(frozen=True)
class Figure:
    """A number in a table of a page.

    Attributes:
        page: Below docs/.
        row: How the row begins: its first cells.
        column: The header of its column.
        part: Which of the numbers in the cell.
    """

    page: str
    row: tuple[str, ...]
    column: str
    part: int = 0

    @property
    def value(self) -> float:
        """The number.

        Raises:
            LookupError: The page has no such row, or several with different numbers.
        """
        found = set()
        for header, cells in tables(self.page):
            if self.column in header and tuple(cells[: len(self.row)]) == self.row:
                numbers = re.findall(r"\d[\d,]*\.?\d*", cells[header.index(self.column)])
                found.add(float(numbers[self.part].replace(",", "")))
        if len(found) != 1:
            raise LookupError(f"{self.page}: {len(found)} figures for {self.row}, {self.column}")
        return found.pop()


@dataclass(frozen=True)
class Comparison:
    """A row of the README's table.

    Attributes:
        what: What is measured, in words.
        ours: Our figure.
        theirs: The best other one.
        by: Whose that is.
        unit: Of both.
        on: Device and number type.
        more_is_better: Whether it is a rate.
    """

    what: str
    ours: Figure
    theirs: Figure
    by: str
    unit: str
    on: str
    more_is_better: bool = False

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        ratio = self.theirs.value / self.ours.value
        return 1 / ratio if self.more_is_better else ratio


GPU, CPU = "results/gpu.md", "results/cpu.md"
MIXING, MEMORIES = "results/mixing-cells.md", "results/matrix-memory.md"
MODELS = "results/language-models.md"
LAYER, STEP = ("B32 T2048 D2048",), ("1", "77 of 144")
GRU, M2RNN = ("4", "4096", "64"), ("M2RNN", "32", "2048", "84")
IN_GRAPH = "in a graph: RNN, nn.GRU"

COMPARISONS = (
    Comparison(
        "ParaGRU layer, 32 x 2,048 steps, 2,048 channels",
        Figure(GPU, LAYER, "ParaGRU", 1),
        Figure(GPU, LAYER, "pararnn-torch's ParaGRU", 1),
        "pararnn-torch 0.17, another library",
        "ms",
        "H200, bfloat16",
    ),
    Comparison(
        "`RNN(nn.GRUCell)`, 4 x 4,096 steps, 512 channels, as a CUDA graph",
        Figure(MIXING, ("4", "4096", "512"), IN_GRAPH),
        Figure(MIXING, ("4", "4096", "512"), IN_GRAPH, 1),
        "cuDNN's `nn.GRU`, the same cell",
        "ms",
        "H200, float32",
    ),
    Comparison(
        "M2RNN, 84 heads of 64 x 16, 32 x 2,048 steps, forward alone",
        Figure(MEMORIES, M2RNN, "forward"),
        Figure(MEMORIES, M2RNN[1:], "xma forward"),
        "its authors' kernels",
        "ms",
        "H200 each, bfloat16",
    ),
    Comparison(
        "train step of a 400M language model",
        Figure(MODELS, ("H200", "ParaGRU"), "ms per step"),
        Figure(MODELS, ("H200", "Transformer"), "ms per step"),
        "Transformer",
        "ms",
        "H200, bfloat16",
    ),
    Comparison(
        "one text from a 1B model, after 1,024 tokens",
        Figure(MODELS, ("ParaGRU", "any"), "tokens/s"),
        Figure(MODELS, ("Transformer", "1,024"), "tokens/s"),
        "Transformer",
        "tokens/s",
        "H100, bfloat16",
        more_is_better=True,
    ),
    Comparison(
        "ParaGRU recurrence, 8 x 512 steps, 256 channels",
        Figure(CPU, ("8", "512", "256"), "generated C, ms"),
        Figure(CPU, ("8", "512", "256"), "plain loop, ms"),
        "loop in PyTorch",
        "ms",
        "2 CPU cores, float32",
    ),
    Comparison(
        "`RNN(nn.RNNCell)`, one step, forward alone",
        Figure(MIXING, STEP, "RNN, ms"),
        Figure(MIXING, STEP, "loop, ms"),
        "the cell",
        "ms",
        "1 CPU core, float32",
    ),
)


def tables(page: str) -> Iterator[tuple[list[str], list[str]]]:
    """All rows of the tables of a page, each with the header of its table."""
    header: list[str] = []
    for line in (ROOT / "docs" / page).read_text().splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            header = []
        elif not header:
            header = cells
        elif not set(line) <= set("|-: "):
            yield header, cells


def shown(value: float) -> str:
    """A figure, with three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table() -> str:
    """The README's table."""
    lines = ["| what | ParaRNN | other | times as fast | on |", "|---|---|---|---|---|"]
    for row in COMPARISONS:
        ours = f"[{shown(row.ours.value)} {row.unit}](docs/{row.ours.page})"
        theirs = f"{shown(row.theirs.value)} {row.unit}, {row.by}"
        lines.append(f"| {row.what} | {ours} | {theirs} | {row.ratio:.2g} | {row.on} |")
    return "\n".join(lines) + "\n"


def readme() -> str:
    """The README with the table of today."""
    text = (ROOT / "README.md").read_text()
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def plot() -> None:
    """Draw time against length: the loop and ours, on a GPU and on a CPU."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    panels = (
        (
            axes[0],
            "H200, 1,024 channels",
            [(n, f"B1 T{n} D1024") for n in (64, 128, 256, 512, 1024)],
        ),
        (axes[1], "2 CPU cores, 128 channels", [(n, str(n)) for n in (64, 512, 4096)]),
    )
    for axis, title, points in panels:
        for name, color in (("loop", "tab:gray"), ("ParaRNN", "tab:orange")):
            on_gpu = axis is axes[0]
            row = (lambda p: (p,)) if on_gpu else (lambda p: ("1", p, "128"))
            page, columns = (GPU, ("loop", "ours")) if on_gpu else (CPU, ("plain loop, ms", ""))
            column = columns[0] if name == "loop" else columns[1] or "generated C, ms"
            times = [Figure(page, row(p), column).value for _, p in points]
            axis.loglog([n for n, _ in points], times, "o-", color=color, label=name)
        axis.set(title=title, xlabel="steps")
        axis.grid(which="major", alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend(loc="center left")
    figure.suptitle("One sequence through a ParaGRU, forward and backward")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="no plot")
    options = parser.parse_args()
    (ROOT / "README.md").write_text(readme())
    if not options.table:
        plot()
