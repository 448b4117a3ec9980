"""What to do when it does not converge: a chaotic cell, seen beforehand, and made to forget.

    python examples/not_converging.py [--time N]

Expected, in 5 seconds on two shared cores of a CPU: an exponent of +0.56 nats per step and about as
many iterations as steps, damped or not; with recurrent weights within 0.9, -0.36 and 6 iterations.
For a cell whose channels mix, +0.21 becomes -0.77 by a bound on the norm of its recurrent matrix.
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import pararnn
from pararnn import RNN, Newton


class Wave(nn.Module):
    """h' = sin(a * h + B x): chaotic when a is large."""

    def __init__(self, input_size: int, hidden_size: int, gain: float) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.project = nn.Linear(input_size, hidden_size)
        self.a = nn.Parameter(torch.full((hidden_size,), gain))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """One step."""
        return torch.sin(self.a * state + self.project(x))


class Bounded(nn.Module):
    """Keeps the largest singular value of a weight, or every entry of a vector, within a bound."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the cell sees."""
        if weight.dim() == 1:
            return self.bound * torch.tanh(weight / self.bound)
        norm = torch.linalg.matrix_norm(weight, 2)
        return weight * (self.bound / torch.clamp(norm, min=self.bound))


def main() -> None:
    """Look, try the settings, then change the cell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--time", type=int, default=400)
    time = parser.parse_args().time
    torch.manual_seed(0)
    x = torch.randn(2, time, 4)
    cell = Wave(4, 32, gain=3.0)

    print("1. Before training, ask. An exponent above 0: small differences grow.")
    pararnn.diagnose(RNN(cell), x[:, :100])

    print(
        "   100 steps multiply a difference by e^(100 x exponent), that of rounding as well: no two"
    )
    print("   evaluations of such a sequence agree, not even two loops that round differently.")
    print("2. Settings do not change that; they decide what an evaluation costs.")
    show(cell, x, chunk=1)
    show(cell, x, chunk=1, damping=0.5)
    show(cell, x, chunk=1, max_iterations=10)
    show(cell, x, chunk=50)
    show(cell, x, chunk=time)

    print("3. Bound the recurrent weights: |cos| <= 1, so steps contract by 0.9 and it forgets.")
    parametrize.register_parametrization(cell, "a", Bounded(0.9))
    pararnn.diagnose(RNN(cell), x[:, :100])
    show(cell, x, chunk=1)

    print("4. The same for a cell whose channels mix: the norm of its recurrent matrix.")
    mixing = nn.RNNCell(4, 32)
    nn.init.normal_(mixing.weight_hh, std=0.5)
    before = pararnn.diagnose(RNN(mixing), x[:, :100]).lyapunov_exponent
    parametrize.register_parametrization(mixing, "weight_hh", Bounded(0.9))
    after = pararnn.diagnose(RNN(mixing), x[:, :100]).lyapunov_exponent
    print(f"exponent {before:+.2f} before, {after:+.2f} after")


def show(cell: nn.Module, x: Tensor, **settings: Any) -> None:
    """How a solve goes."""
    rnn = RNN(cell, solver=Newton(**settings))
    rnn(x)
    print(f"  {settings}: {rnn.report}")


if __name__ == "__main__":
    main()
