"""Figures of the README and of the page that compares, from the tables of the docs.

No figure is written twice. Writes the tables into README.md and docs/comparison.md, and draws the
README's plot; with `--table` no plot, which needs matplotlib.
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
    """A row of a table.

    Attributes:
        what: What is measured, in words.
        ours: Our figure.
        theirs: The best other one.
        by: Whose that is.
        unit: Of both.
        on: Device and number type.
        more_is_better: Whether it is a rate.
        with_: Versions and date.
    """

    what: str
    ours: Figure
    theirs: Figure
    by: str
    unit: str
    on: str
    more_is_better: bool = False
    with_: str = "torch 2.11, November 2026"

    @property
    def ratio(self) -> float:
        """How many times as fast ours is, or as good."""
        ratio = self.theirs.value / self.ours.value
        return 1 / ratio if self.more_is_better else ratio


GPU, CPU = "results/gpu.md", "results/cpu.md"
MIXING, MEMORIES = "results/mixing-cells.md", "results/matrix-memory.md"
MODELS, QUALITY = "results/language-models.md", "results/quality.md"
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
        Figure(MEMORIES, ("32", "2048", "84"), "xma forward"),
        "its authors' kernels",
        "ms",
        "H200 each, bfloat16",
        with_="torch 2.11, December 2026",
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
        with_="torch 2.13, November 2026",
    ),
    Comparison(
        "`RNN(nn.RNNCell)`, one step, forward alone",
        Figure(MIXING, STEP, "RNN, ms"),
        Figure(MIXING, STEP, "loop, ms"),
        "the cell",
        "ms",
        "1 CPU core, float32",
        with_="torch 2.13, November 2026",
    ),
)


STACK = ("`paragru+gated-deltanet`, 128 keys, 192 values",)
TRANSFORMER = ("Transformer", "7 x 512", "24,125,824", "7,340,032")
ATTENDS = ("attention in the fourth block, ParaGRU in the others",)
ALONE = ("ParaGRU", "23,712,768", "0.005", "0.844")
MORE = (  # on the page that compares, besides those of the README
    Comparison(
        "ParaGRU layer, 32 x 2,048 steps, 2,048 channels",
        Figure(GPU, LAYER, "ParaGRU", 1),
        Figure(GPU, LAYER, "cuDNN `nn.GRU`", 1),
        "cuDNN's `nn.GRU`, which is another cell",
        "ms",
        "H200, bfloat16",
    ),
    Comparison(
        "`RNN(nn.GRUCell)`, 256 x 512 steps, 256 channels, from Python",
        Figure(MIXING, ("`nn.GRUCell`", "256", "512", "256"), "generated", 1),
        Figure(MIXING, ("`nn.GRUCell`", "256", "512", "256"), "cuDNN", 1),
        "cuDNN's `nn.GRU`, the same cell",
        "ms",
        "H200, float32",
    ),
    Comparison(
        "M2RNN, 36 heads of 64 x 16, 8 x 2,048 steps",
        Figure(MEMORIES, ("M2RNN", "8", "2048", "36"), "both"),
        Figure(MEMORIES, ("8", "2048", "36"), "xma both"),
        "its authors' kernels",
        "ms",
        "H200 each, bfloat16",
        with_="torch 2.11, December 2026",
    ),
    Comparison(
        "one text from a 1B model, after 32,768 tokens",
        Figure(MODELS, ("ParaGRU", "any"), "tokens/s"),
        Figure(MODELS, ("Transformer", "32,768"), "tokens/s"),
        "Transformer",
        "tokens/s",
        "H100, bfloat16",
        more_is_better=True,
    ),
    Comparison(
        "held-out books, ParaGRU and gated delta in turn, 5 blocks",
        Figure(QUALITY, ("books", *STACK), "held out"),
        Figure(QUALITY, ("books", *TRANSFORMER, "0.001"), "held out"),
        "Transformer",
        "bits per byte",
        "H200, bfloat16",
        with_="torch 2.11, December 2026",
    ),
    Comparison(
        "held-out source code, the same",
        Figure(QUALITY, ("code", *STACK), "held out"),
        Figure(QUALITY, ("code", *TRANSFORMER, "0.001"), "held out"),
        "Transformer",
        "bits per byte",
        "H200, bfloat16",
        with_="torch 2.11, December 2026",
    ),
    Comparison(
        "train step, the same",
        Figure(QUALITY, STACK, "ms"),
        Figure(QUALITY, TRANSFORMER[:2], "ms"),
        "Transformer",
        "ms",
        "H200, bfloat16",
        with_="torch 2.11, December 2026",
    ),
    Comparison(
        "held-out source code, one attention block of seven",
        Figure(QUALITY, ATTENDS, "held out"),
        Figure(QUALITY, ("code", *TRANSFORMER, "0.001"), "held out"),
        "Transformer",
        "bits per byte",
        "H200, bfloat16",
        with_="torch 2.11, December 2026",
    ),
    Comparison(
        "held-out source code, ParaGRU alone",
        Figure(QUALITY, ALONE, "held out"),
        Figure(QUALITY, ("Transformer, `--learning-rate 0.0015`",), "held out"),
        "Transformer",
        "bits per byte",
        "H100, bfloat16",
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


def table(rows: tuple[Comparison, ...], to_docs: str, dated: bool) -> str:
    """The table of a page, from where the docs are at `to_docs`; dated with versions."""
    titles = ["what", "ParaRNN", "other", "ratio" if dated else "times as fast", "on"]
    titles += ["measured with"] if dated else []
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        ours = f"[{shown(row.ours.value)} {row.unit}]({to_docs}{row.ours.page})"
        theirs = f"{shown(row.theirs.value)} {row.unit}, {row.by}"
        digits = 3 if 0.95 < row.ratio < 1.05 else 2
        cells = [row.what, ours, theirs, f"{row.ratio:.{digits}g}", row.on]
        lines.append(f"| {' | '.join([*cells, *([row.with_] if dated else [])])} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, made: str) -> str:
    """A page with the table of today."""
    before, rest = (ROOT / page).read_text().split(BEGIN)
    return before + BEGIN + made + END + rest.split(END)[1]


def pages() -> dict[str, str]:
    """All pages with such a table, by their path."""
    return {
        "README.md": with_table("README.md", table(COMPARISONS, "docs/", dated=False)),
        "docs/comparison.md": with_table(
            "docs/comparison.md", table((*COMPARISONS, *MORE), "", dated=True)
        ),
    }


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
    for path, text in pages().items():
        (ROOT / path).write_text(text)
    if not options.table:
        plot()
