"""English character by character: which comes next?

    python examples/characters.py --data input.txt [more.txt ...] [--seconds 120]

Any text in UTF-8 does; tinyshakespeare is 1.1 million characters, at
https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt. Its first
nine tenths train, as elsewhere; the rest is halved into validation and test. Measured figures are
in docs/results/small-data.md.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from _fit import fit, make_layer, options
from torch import Tensor, nn

WIDTH, NUM_LAYERS = 256, 2
BATCH, TIME, STEPS = 16, 128, 100  # of training: windows, characters in each, batches of a round
ROWS = 8  # of text to evaluate, side by side


class Reader(nn.Module):
    """Logits of the next character."""

    def __init__(self, layer: str, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, WIDTH)
        self.rnn = make_layer(layer, WIDTH, NUM_LAYERS)
        self.head = nn.Linear(WIDTH, symbols)

    def forward(self, text: Tensor) -> Tensor:
        """From (batch, time) to (batch, time, symbols)."""
        return self.head(self.rnn(self.embed(text))[0])


def read(paths: list[str]) -> tuple[dict[str, Tensor], int]:
    """The first nine tenths of the text, a twentieth, the last twentieth; number of symbols."""
    text = "".join(Path(path).read_text(encoding="utf-8") for path in paths)
    number = {symbol: i for i, symbol in enumerate(sorted(set(text)))}
    if len(text) < 20 * (TIME + 1):
        raise SystemExit(f"{len(text)} characters are too few; give {20 * (TIME + 1)} or more.")
    codes = torch.tensor([number[symbol] for symbol in text])
    splits = zip(
        ("train", "valid", "test"),
        codes.tensor_split([len(codes) * 90 // 100, len(codes) * 95 // 100]),
        strict=True,
    )
    return dict(splits), len(number)


def windows(text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of windows anywhere in the text, and the characters after each of theirs."""
    for _ in range(STEPS):
        starts = torch.randint(len(text) - TIME, (BATCH, 1))
        both = text[starts + torch.arange(TIME + 1)]
        yield both[:, :-1], both[:, 1:]


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Nats per character."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


@torch.no_grad()
def bits_per_character(model: nn.Module, text: Tensor) -> float:
    """Of a text cut into rows, each read in one go."""
    rows = text[: len(text) // ROWS * ROWS].reshape(ROWS, -1)
    return cross_entropy(model, rows[:, :-1], rows[:, 1:]).item() / math.log(2)


def main() -> None:
    """Every layer, one line each."""
    parser = options(seconds=120.0)
    parser.add_argument("--data", nargs="+", required=True, help="text files")
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    data, symbols = read(arguments.data)
    for layer in arguments.layers:
        torch.manual_seed(arguments.seed)
        model = Reader(layer, symbols)
        note = fit(
            model,
            lambda: windows(data["train"]),
            cross_entropy,
            lambda model: bits_per_character(model, data["valid"]),
            seconds=arguments.seconds,
            learning_rate=3e-3,
        )
        valid, test = (bits_per_character(model, data[split]) for split in ("valid", "test"))
        print(
            f"{layer:19} bits per character: valid {valid:.3f}, test {test:.3f} ({note})",
            flush=True,
        )


if __name__ == "__main__":
    main()
