"""Which notes come next? JSB Chorales and Nottingham, the small sets of polyphonic music.

python examples/music.py --data JSB_Chorales.mat [--seconds 60]
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from _fit import LAYERS, fit
from scipy.io import loadmat
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

KEYS = 88
WIDTH, DROPOUT, BATCH = 400, 0.5, 16
Pieces = list[Tensor]


class Player(nn.Module):
    """Logits of the keys of the next frame."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.inputs = nn.Linear(KEYS, WIDTH)
        self.rnn = LAYERS[layer](WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, KEYS)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, frames: Tensor) -> Tensor:
        """From (batch, time, keys) to the same."""
        return self.head(self.dropout(self.rnn(self.dropout(self.inputs(frames)))[0]))


def read(path: str) -> dict[str, Pieces]:
    """Pieces of each split, (time, keys)."""
    file = loadmat(path)
    if "traindata" not in file:
        raise SystemExit(f"{path} has no 'traindata'; give JSB_Chorales.mat or Nottingham.mat.")
    return {
        split: [torch.from_numpy(piece).float() for piece in file[f"{split}data"][0]]
        for split in ("train", "valid", "test")
    }


def batches(pieces: Pieces) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of about one length side by side, in random order; frames after the end are -1."""
    pieces = sorted(pieces, key=len)
    for i in torch.randperm(-(-len(pieces) // BATCH)).tolist():
        padded = pad_sequence(pieces[i * BATCH : (i + 1) * BATCH], True, -1.0)
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
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="JSB_Chorales.mat or Nottingham.mat")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for each layer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = read(arguments.data)
    for layer in LAYERS:
        torch.manual_seed(arguments.seed)
        model = Player(layer)
        note = fit(
            model,
            lambda: batches(data["train"]),
            nats_per_frame,
            lambda model: score(model, data["valid"]),
            seconds=arguments.seconds,
            learning_rate=3e-3,
        )
        valid, test = score(model, data["valid"]), score(model, data["test"])
        print(f"{layer:19} nats per frame: valid {valid:.3f}, test {test:.3f} ({note})", flush=True)


if __name__ == "__main__":
    main()
