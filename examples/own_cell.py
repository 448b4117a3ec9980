"""A cell of one's own, trained to remember: 30 lines of it, nothing about time in any of them.

    python examples/own_cell.py [--steps N]

The task: say which of 8 symbols came first, 64 steps ago. Expected:
accuracy 1.000 (chance 0.125), in 7 seconds on two cores of a CPU.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pararnn

SYMBOLS, TIME = 8, 64


class Keeper(nn.Module):
    """A slow and a fast memory; the slow one's gate sees the fast one."""

    num_components = 2

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.project = nn.Linear(input_size, 3 * hidden_size)
        self.coupling = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """One step."""
        slow, fast = state
        gate, value, quick = self.project(x).chunk(3, -1)
        fast = 0.5 * fast + torch.tanh(quick)
        keep = torch.sigmoid(gate + self.coupling * fast + 3.0)
        slow = keep * slow + (1 - keep) * torch.tanh(value)
        return slow, fast


def batch(rows: int) -> tuple[Tensor, Tensor]:
    """Sequences whose first symbol is the answer, and the answers."""
    symbols = torch.randint(SYMBOLS, (rows, TIME))
    x = F.one_hot(symbols, SYMBOLS).float()
    first = torch.zeros(rows, TIME, 1)
    first[:, 0] = 1.0
    return torch.cat([x, first], -1), symbols[:, 0]


def main() -> None:
    """Check, explain, train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    print("largest error:", max(pararnn.testing.check_cell(Keeper(4, 6)).errors.values()))
    rnn, head = pararnn.RNN(Keeper(SYMBOLS + 1, 64)), nn.Linear(64, SYMBOLS)
    pararnn.explain(rnn)
    optimizer = torch.optim.AdamW([*rnn.parameters(), *head.parameters()], lr=1e-2)
    for step in range(1, steps + 1):
        x, answer = batch(64)
        y, _ = rnn(x)
        loss = F.cross_entropy(head(y[:, -1]), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}")
    x, answer = batch(1000)
    right = (head(rnn(x)[0][:, -1]).argmax(-1) == answer).float().mean()
    print(f"accuracy {right.item():.3f} (chance {1 / SYMBOLS:.3f})")


if __name__ == "__main__":
    main()
