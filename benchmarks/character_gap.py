"""Which part of ParaGRU costs what on characters: docs/results/small-data.md has the figures.

    python benchmarks/character_gap.py alice29.txt [--runs paragru no-bound] [--seeds 0 1 2]

The state is carried on from batch to batch. Canterbury's texts are at
https://corpus.canterbury.ac.nz/descriptions/. A minute or more a run on one core.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pararnn.cells import ParaGRUCell, ParaLSTMCell
from pararnn.layers.stacked import ParaRNNStack

WIDTH, LAYERS, BATCH, TIME, RATE = 128, 3, 8, 128, 3e-3


class GatedGRUCell(ParaGRUCell):
    """ParaGRU with an output gate that x alone decides, a fourth projection."""

    num_gates = 4

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        h = state
        x_z, x_r, x_c, _ = self.inputs(x)
        a_z, a_r, a_c = self.diagonal
        z, r = torch.sigmoid(a_z * h + x_z), torch.sigmoid(a_r * h + x_r)
        return (1 - z) * h + z * torch.tanh(a_c * (h * r) + x_c)

    def readout(self, x: Tensor, state: Tensor) -> Tensor:
        return torch.sigmoid(self.inputs(x)[3]) * state


class OpenLSTMCell(ParaLSTMCell):
    """ParaLSTM whose output gate is always open; its weights are there, and idle."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h, c = state
        x_f, x_z, x_o = self.inputs(x)
        a_f, a_z, a_o = self.diagonal
        p_f, p_o = self.peephole
        f = torch.sigmoid(a_f * h + x_f + p_f * c)
        c = f * c + (1 - f) * torch.tanh(a_z * h + x_z)
        return torch.tanh(c) + 0 * torch.sigmoid(a_o * h + x_o + p_o * c), c


def stack(cell: Callable[..., nn.Module], **options: float | None) -> nn.Module:
    made = type("Stack", (ParaRNNStack,), {"make_cell": cell})
    return made(WIDTH, WIDTH, LAYERS, batch_first=True, **options)


RUNS: dict[str, Callable[[], nn.Module]] = {
    "paragru": lambda: stack(ParaGRUCell),
    "bound-1": lambda: stack(ParaGRUCell, max_recurrent_weight=1.0),
    "no-bound": lambda: stack(ParaGRUCell, max_recurrent_weight=None),
    "memory-100": lambda: stack(ParaGRUCell, max_timescale=100.0),
    "output-gate": lambda: stack(GatedGRUCell),
    "paralstm": lambda: stack(ParaLSTMCell),
    "paralstm-open": lambda: stack(OpenLSTMCell),
    "nn.GRU": lambda: nn.GRU(WIDTH, WIDTH, LAYERS, batch_first=True),
}


class Model(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, WIDTH)
        nn.init.normal_(self.embed.weight)  # once more, as when the figures were measured
        self.rnn, self.head = make(), nn.Linear(WIDTH, symbols)

    def forward(self, x: Tensor, y: Tensor, state):
        """Mean nats, and the state at the end, cut off from the graph."""
        out, state = self.rnn(self.embed(x), state)
        loss = F.cross_entropy(self.head(out).flatten(0, 1), y.flatten())
        cut = isinstance(state, tuple)
        return loss, tuple(s.detach() for s in state) if cut else state.detach()


def read(paths: list[str], held_out: float) -> tuple[Tensor, Tensor, int]:
    """Codes of the first part of every text and of the last, and the number of symbols."""
    texts = [Path(path).read_bytes().replace(b"\r", b"") for path in paths]
    codes = torch.full((256,), -1)
    symbols = sorted(set(b"".join(texts)))
    codes[symbols] = torch.arange(len(symbols))
    cuts = [int((1 - held_out) * len(text)) for text in texts]
    parts = [[t[:c] for t, c in zip(texts, cuts, strict=True)]]
    parts.append([t[c:] for t, c in zip(texts, cuts, strict=True)])
    first, last = (codes[torch.tensor(list(b"".join(part)))] for part in parts)
    return first, last, len(symbols)


def in_rows(text: Tensor, rows: int) -> Tensor:
    return text[: len(text) // rows * rows].view(rows, -1)


@torch.no_grad()
def held_out_bits(model: Model, text: Tensor) -> float:
    rows, state, nats, count = in_rows(text, 8), None, 0.0, 0
    for at in range(0, rows.shape[1] - 1, 1024):
        y = rows[:, at + 1 : at + 1025]
        loss, state = model(rows[:, at : at + y.shape[1]], y, state)
        nats, count = nats + loss.item() * y.numel(), count + y.numel()
    return nats / count / math.log(2)


def train(name: str, seed: int, data: tuple[Tensor, Tensor, int], options) -> None:
    torch.manual_seed(seed)
    text, held_out, symbols = data
    model = Model(RUNS[name], symbols)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: (
            min(1, (i + 1) / 50)
            * (0.525 + 0.475 * math.cos(math.pi * i / options.steps) if options.cosine else 1)
        ),
    )
    rows, at, state, losses, curve = in_rows(text, BATCH), 0, None, [], []
    for step in range(1, options.steps + 1):
        if at + TIME + 1 > rows.shape[1]:
            at, state = int(torch.randint(TIME, ())), None
        loss, state = model(rows[:, at : at + TIME], rows[:, at + 1 : at + TIME + 1], state)
        at += TIME
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item() / math.log(2))
        if step % max(1, options.steps // 8) == 0:
            curve.append(f"{held_out_bits(model, held_out):.3f}")
    last = losses[-100:]
    weights = [
        [f"{row:.2f}" for row in weight.abs().mean(1).tolist()]
        for key, weight in model.named_parameters()
        if key.endswith("diagonal")
    ]
    print(f"{name:14} seed {seed}: held out {' '.join(curve)}, train {sum(last) / len(last):.3f}")
    print(f"  means of recurrent weights: {weights}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--cosine", action="store_true", help="to a twentieth of the rate")
    parser.add_argument("--held-out", type=float, default=0.1, help="share of every text")
    options = parser.parse_args()
    data = read(options.files, options.held_out)
    for seed in options.seeds:
        for name in options.runs:
            train(name, seed, data, options)


if __name__ == "__main__":
    main()
