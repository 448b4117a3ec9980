"""The functional form: a neuron that fires, written as a function and scanned over time.

    python examples/functional.py [--time N]

A leaky integrate-and-fire neuron with a smooth threshold, fitted to a firing rate through 2,000
steps. Expected: mean rate 0.201, loss 6e-07, in 4 seconds on two cores of a CPU.
"""

import argparse

import torch
from torch import Tensor

import pararnn


def neuron(
    state: tuple[Tensor, Tensor], current: Tensor, leak: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Spike (the output) and voltage after one step."""
    _, voltage = state
    voltage = torch.sigmoid(leak) * voltage + gain * current
    spike = torch.sigmoid(8.0 * (voltage - 1.0))
    return spike, voltage * (1.0 - spike)


def main() -> None:
    """Fit leak and gain."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--time", type=int, default=2000)
    time = parser.parse_args().time
    torch.manual_seed(0)
    current = torch.rand(4, time, 32)
    start = (torch.zeros(4, 32), torch.zeros(4, 32))
    leak, gain = torch.zeros(32, requires_grad=True), torch.full((32,), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([leak, gain], lr=0.05)
    for step in range(101):
        (spikes, _), _ = pararnn.scan(neuron, start, current, (leak, gain))
        loss = (spikes.mean((0, 1)) - 0.2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: mean rate {spikes.mean().item():.3f}, loss {loss.item():.2e}")


if __name__ == "__main__":
    main()
