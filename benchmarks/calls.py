"""How long Python takes to call a small layer, and to trace a cell.

    python benchmarks/calls.py [cuda]

On a CPU the times are those of the processor, which other programs change little; on a GPU they are
of the clock. Every time is the least of several rounds. To compare two versions run both in turn,
with `PYTHONPATH` on the one or the other.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pararnn

BATCH, INPUT, HIDDEN, ROUNDS = 2, 3, 4, 10


class Leaky(nn.Module):
    """A user's cell."""

    def __init__(self) -> None:
        super().__init__()
        self.input_size, self.hidden_size = INPUT, HIDDEN
        self.project = nn.Linear(INPUT, 2 * HIDDEN)
        self.decay = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """One step."""
        gate, value = self.project(x).chunk(2, -1)
        gate = torch.sigmoid(gate + self.decay * state)
        return gate * state + (1 - gate) * torch.tanh(value)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "RNN(Leaky)": lambda: pararnn.RNN(Leaky()),
    "ParaGRU": lambda: pararnn.ParaGRU(INPUT, HIDDEN, batch_first=True),
    "ParaLSTM, 2 layers": lambda: pararnn.ParaLSTM(INPUT, HIDDEN, num_layers=2, batch_first=True),
    "RNN(nn.GRUCell)": lambda: pararnn.RNN(nn.GRUCell(INPUT, HIDDEN)),
    "parallelize(nn.GRU)": lambda: pararnn.parallelize(nn.GRU(INPUT, HIDDEN, batch_first=True)),
}


def microseconds(call: Callable[[], object], clock: Callable[[], float], calls: int) -> float:
    """The least time of one call."""
    for _ in range(20):
        call()
    times = []
    for _ in range(ROUNDS):
        start = clock()
        for _ in range(calls):
            call()
        times.append((clock() - start) / calls * 1e6)
    return min(times)


def main(device: str) -> None:
    torch.set_num_threads(1)
    clock = time.process_time if device == "cpu" else time.perf_counter
    print(
        f"{'layer':20s} {'made ms':>8s} {'T=1 us':>8s} {'T=16 us':>8s} {'T=64 both ways us':>18s}"
    )
    for name, make in LAYERS.items():
        start = clock()
        layer = make().to(device)
        made = (clock() - start) * 1e3
        row = []
        for steps in (1, 16):
            x = torch.randn(BATCH, steps, INPUT, device=device)
            with torch.no_grad():
                row.append(microseconds(lambda x=x, layer=layer: layer(x), clock, 200))
        x = torch.randn(BATCH, 64, INPUT, device=device)
        row.append(microseconds(lambda x=x, r=layer: r(x)[0].sum().backward(), clock, 50))
        print(f"{name:20s} {made:8.1f} {row[0]:8.1f} {row[1]:8.1f} {row[2]:18.1f}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cpu")
