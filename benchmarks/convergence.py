"""Residual against iteration for sequences of 2^8 to 2^11 steps, as the paper's Figure 4.

    python benchmarks/convergence.py docs/results/convergence.png

Danieli et al. 2025 (arXiv 2510.21450), A: chunks of one step, cells as initialised, width 64,
float64. Some minutes on two cores.
"""

import sys

import torch

import pararnn

WIDTH = 64
LENGTHS = [2**n for n in range(8, 12)]
CELLS = {"ParaGRU": pararnn.cells.ParaGRUCell, "ParaLSTM": pararnn.cells.ParaLSTMCell}


def main(file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, (name, cell) in zip(figure.subplots(1, 2, sharey=True), CELLS.items(), strict=True):
        torch.manual_seed(0)
        rnn = pararnn.RNN(cell(WIDTH, WIDTH))
        for length in LENGTHS:
            found = pararnn.diagnose(rnn, torch.randn(4, length, WIDTH))
            residuals = [max(r, 1e-17) for r in found.residuals[1]]
            axes.semilogy(
                range(1, len(residuals) + 1), residuals, marker="o", label=f"{length} steps"
            )
        axes.set(title=name, xlabel="iteration", ylabel="residual")
        axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1])
