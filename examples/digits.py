"""Handwritten digits of 8 x 8 pixels, read as a sequence: pixel by pixel, and row by row.

    python examples/digits.py [--seconds 20] [--layers ParaGRU nn.GRU]

The 1,797 images come with scikit-learn (`load_digits`). This is not MNIST, whose 70,000 images have
28 x 28 pixels: published figures of sequential MNIST do not compare. Needs `pip install -e
".[examples]"`. Measured figures are in docs/results/small-data.md.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from _fit import fit, make_layer, options
from sklearn.datasets import load_digits
from torch import Tensor, nn

WIDTH, NUM_LAYERS, BATCH = 128, 2, 32
READINGS = {"pixels": (64, 1), "rows": (8, 8)}  # steps, inputs of each
Images = tuple[Tensor, Tensor]


class Reader(nn.Module):
    """Logits of the ten digits after the last step."""

    def __init__(self, layer: str, steps: int, input_size: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(input_size, WIDTH)
        self.rnn = make_layer(layer, WIDTH, NUM_LAYERS, memory=steps)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, time, input_size) to (batch, 10)."""
        return self.head(self.dropout(self.rnn(self.inputs(x))[0][:, -1]))


def read(steps: int, input_size: int) -> dict[str, Images]:
    """Three fifths, one fifth and the last fifth of the images.

    They stay in the order of the file: neighbours seem to be by one writer, and shuffled images of
    a writer would be in all three.
    """
    file = load_digits()
    x = torch.tensor(file.images, dtype=torch.float32).reshape(-1, steps, input_size) / 16
    y = torch.tensor(file.target)
    parts = [3 * len(x) // 5, 4 * len(x) // 5]
    train, valid, test = zip(x.tensor_split(parts), y.tensor_split(parts), strict=True)
    return {"train": train, "valid": valid, "test": test}


def batches(images: Images) -> Iterator[Images]:
    """All images once, in random order."""
    x, y = images
    for rows in torch.randperm(len(x)).split(BATCH):
        yield x[rows], y[rows]


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean over the images, in nats."""
    return F.cross_entropy(model(x), y)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of images whose digit is found."""
    x, y = images
    return (model(x).argmax(-1) == y).float().mean().item()


def result(layer: str, data: dict[str, Images], seconds: float, seed: int) -> str:
    """Accuracies of one layer after training."""
    torch.manual_seed(seed)
    model = Reader(layer, *data["train"][0].shape[1:])
    note = fit(
        model,
        lambda: batches(data["train"]),
        cross_entropy,
        lambda model: cross_entropy(model, *data["valid"]).item(),
        seconds=seconds,
        learning_rate=3e-3,
    )
    valid, test = accuracy(model, data["valid"]), accuracy(model, data["test"])
    return f"{layer:19} accuracy: valid {valid:.3f}, test {test:.3f} ({note})"


def main() -> None:
    """Both readings with every layer, one line each."""
    parser = options(seconds=20.0)
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    for reading, (steps, input_size) in READINGS.items():
        data = read(steps, input_size)
        for layer in arguments.layers:
            print(
                f"{reading:6} {result(layer, data, arguments.seconds, arguments.seed)}", flush=True
            )


if __name__ == "__main__":
    main()
