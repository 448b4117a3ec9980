"""What the paper says: Danieli et al. 2025, arXiv 2510.21450, version 2 of 3 November 2025.

Every number is printed in its text or tables. Nothing is read off a curve.
"""

from __future__ import annotations

from dataclasses import dataclass

from pararnn.tasks.catalogue import TASKS
from pararnn.tasks.settings import PAPER_TASKS

PAPER = "Danieli et al. 2025, arXiv 2510.21450v2"
NOT_QUOTED = "not quoted"


@dataclass(frozen=True)
class Quoted:
    """A statement of the paper.

    Attributes:
        what: Its subject.
        says: A number with its unit, or words.
        where: Place in the paper.
    """

    what: str
    says: str
    where: str


SPEED_UPS = (665.0, 447.0)
"""Figure 1, printed in the plot: of two cells, "more than"; which is which is not said."""
SPEED_UP_LENGTH = 2**9

OVER_MAMBA = {
    ("ParaGRU", "reduction in CUDA"): 1.2,
    ("ParaLSTM", "reduction in CUDA"): 0.5,
    ("ParaGRU", "fused"): 2.6,
    ("ParaLSTM", "fused"): 1.5,
}
"""Forward pass, Mamba's time over the cell's, at 2^9 steps (section 5.1)."""

_SETUP = (
    Quoted("device", "one A100; CUDA events", "B"),
    Quoted("calls", "20 before, 100 timed, the fastest counts", "B"),
    Quoted("Newton's iterations", "3", "B"),
    Quoted("implementations in PyTorch, Mamba", "with torch.compile", "B"),
    Quoted("Mamba", "without its gate and convolution", "B"),
    Quoted("batch, channels, number type", NOT_QUOTED, ""),
)
FIGURE_1 = (
    Quoted(
        "as fast as one step after another, forward",
        "more than 665 times one of the two cells, more than 447 times the other",
        "Figure 1; the times are those of Figure 5 (B.1)",
    ),
    Quoted("which of the two cells has 665", NOT_QUOTED, ""),
    Quoted("lengths", "2^2 to 2^9 steps", "axis of Figure 1"),
    Quoted("times themselves", NOT_QUOTED, "they are drawn only"),
    *_SETUP,
)
_FASTER = tuple(
    Quoted(f"{cell}, {way}, forward, 2^9 steps", f"{value:g} times as fast as Mamba", "5.1")
    for (cell, way), value in OVER_MAMBA.items()
)
FIGURE_5 = (
    *_FASTER,
    Quoted("ParaGRU beyond 2^12 steps", "reduction in CUDA is faster than fused", "B.1"),
    Quoted("lengths", "2^2 to 2^17 steps", "axis of Figure 5"),
    Quoted("times themselves", NOT_QUOTED, "they are drawn only"),
    *_SETUP,
)
FIGURE_6 = (
    Quoted("loss", "sum of the squares of the states", "B.1"),
    Quoted("fused, against Mamba", "faster at every length, both cells", "B"),
    Quoted("times and ratios", NOT_QUOTED, "they are drawn only"),
    Quoted("lengths", "2^2 to 2^17 steps", "axis of Figure 6"),
    *_SETUP,
)
FIGURE_4 = (
    Quoted("residual", "largest |h_l - f(h_l-1, x_l)| of 8 sequences", "Figure 4"),
    Quoted("first guess", "h_l = f(0, x_l)", "A.1"),
    Quoted("lengths", "2^8, 2^9, 2^10, 2^11", "Figure 4"),
    Quoted("both cells, both stages", "machine precision after 3 to 4 iterations", "A"),
    Quoted("ParaGRU at initialisation", "2 iterations suffice", "A"),
    Quoted("ParaGRU after training", "3 iterations", "A"),
    Quoted("ParaLSTM at initialisation", "the first iteration raises the residual", "A"),
    Quoted("cells", "of the last layer of the 400M models", "Figure 4"),
    Quoted("residuals themselves, number type", NOT_QUOTED, "they are drawn only"),
)

PERPLEXITY = {
    "1B": {"Mamba2": 12.26, "ParaLSTM": 13.11, "ParaGRU": 13.20, "Transformer": 12.90},
    "2.9B": {"Mamba2": 10.13, "ParaLSTM": 10.87, "ParaGRU": 10.92, "Transformer": 10.97},
    "7B": {"Mamba2": 8.62, "ParaLSTM": 9.16, "ParaGRU": 9.19, "Transformer": 9.55},
}
"""Right half of Figure 1, and Table 5."""

STEP_MS: dict[tuple[str, str], float | None] = {
    ("400m", "paragru"): 95.7,
    ("400m", "paralstm"): 116.0,
    ("400m", "mamba2"): 115.0,
    ("400m", "transformer"): 81.0,
    ("1b", "paragru"): 192.0,
    ("1b", "paralstm"): 235.0,
    ("1b", "mamba2"): 221.0,
    ("1b", "transformer"): 157.0,
    ("2.9b", "paragru"): 326.0,
    ("2.9b", "paralstm"): 400.0,
    ("2.9b", "mamba2"): 393.0,
    ("2.9b", "transformer"): 267.0,
    ("7b", "paragru"): 613.0,
    ("7b", "paralstm"): 715.0,
    ("7b", "mamba2"): None,
    ("7b", "transformer"): 520.0,
}
"""Table 3, milliseconds per step; None where the paper has none."""
PARAMETERS = {
    ("400m", "paragru"): "406M",
    ("400m", "paralstm"): "406M",
    ("400m", "mamba2"): "409M",
    ("400m", "transformer"): "412M",
    ("1b", "paragru"): "1.42B",
    ("1b", "paralstm"): "1.42B",
    ("1b", "mamba2"): "1.43B",
    ("1b", "transformer"): "1.44B",
    ("2.9b", "paragru"): "2.90B",
    ("2.9b", "paralstm"): "2.90B",
    ("2.9b", "mamba2"): "2.83B",
    ("2.9b", "transformer"): "2.80B",
    ("7b", "paragru"): "6.76B",
    ("7b", "paralstm"): "6.76B",
    ("7b", "mamba2"): "6.96B",
    ("7b", "transformer"): "6.89B",
}
NODES = {"400m": 1, "1b": 1, "2.9b": 4, "7b": 32}
"""Table 4: nodes of 8 H100."""
TABLE_3 = (
    Quoted("time", "average of one step on H100", "Table 3"),
    Quoted("GPUs", "nodes of 8 H100, FSDP, weights in bfloat16, gradients in float32", "C.1"),
    Quoted("nodes of 400M, 1B, 2.9B, 7B", "1, 1, 4, 32", "Table 4"),
    Quoted("sequences per GPU", "32, 32, 16, 8, of 2,048 tokens", "Table 4"),
    Quoted("tokens in the step that was timed", NOT_QUOTED, ""),
)
TABLE_6 = (
    Quoted("models", "one layer, width 64, 4 heads", "C.2"),
    Quoted("training", "100 tokens, 10,000 samples, up to 3,000 epochs in batches of 16", "C.2"),
    Quoted("accuracy", "on 100,000 samples, the best of 3 seeds", "C.2"),
)


def task_accuracy() -> dict[tuple[str, str], float]:
    """Table 6, in per cent, by task and architecture."""
    return {(task, k.architecture): k.accuracy for task in PAPER_TASKS for k in TASKS[task].known}
