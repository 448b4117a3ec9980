"""Classifying raw waveforms of 4,000 samples: which tones, in which order?

    python examples/long_waveforms.py [--steps N]

Two short tones, each high or low, are hidden in noise, one near the beginning and one near the end,
so that the first must be remembered for thousands of samples.
Expected: accuracy 1.000 (chance 0.250), in 35 seconds on two shared cores of a CPU. The recurrence
alone, forward and backward over 32 waveforms, takes 75 ms; an `nn.GRU` of its size 1,800 to 2,300.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pararnn

SAMPLES, TONE, CLASSES = 4000, 400, 4
PERIODS = torch.tensor([24.0, 9.0])  # samples: low, high


class Listener(nn.Module):
    """Filters of 32 samples, a recurrence over all of them, and a decision at the end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.filters = nn.Conv1d(1, width, 32)
        self.rnn = pararnn.ParaGRU(width, width, batch_first=True)
        self.head = nn.Linear(width, CLASSES)
        with torch.no_grad():  # remember for 1 to SAMPLES steps (Tallec and Ollivier 2018)
            update = self.rnn.get_parameter("layers.0.cell.bias")[0]
            update.copy_(-torch.log(torch.logspace(0, math.log10(SAMPLES), width)))

    def forward(self, wave: Tensor) -> Tensor:
        """Logits from (batch, samples)."""
        features = F.relu(self.filters(F.pad(wave, (31, 0)).unsqueeze(1)))
        y, _ = self.rnn(features.transpose(1, 2))
        return self.head(y[:, -1])


def waves(rows: int) -> tuple[Tensor, Tensor]:
    """Noise with two tones in it, and which they are: 2 * first + second."""
    time = torch.arange(SAMPLES)
    wave = torch.randn(rows, SAMPLES)
    tones = torch.randint(2, (rows, 2))
    for which, earliest in enumerate((0, SAMPLES - 1000)):
        begin = torch.randint(earliest, earliest + 1000 - TONE, (rows, 1))
        phase = torch.rand(rows, 1)
        period = PERIODS[tones[:, which]].unsqueeze(1)
        tone = torch.sin(2 * math.pi * (time / period + phase))
        wave += tone * ((time >= begin) & (time < begin + TONE))
    return wave, 2 * tones[:, 0] + tones[:, 1]


def train_ms(layer: pararnn.ParaGRU | nn.GRU) -> float:
    """Milliseconds of one forward and backward over a batch of whole waveforms."""
    x = torch.randn(32, SAMPLES, layer.input_size)
    layer(x)[0].sum().backward()
    begin = time.perf_counter()
    layer(x)[0].sum().backward()
    return (time.perf_counter() - begin) * 1e3


def main() -> None:
    """Train, and test on new waveforms."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = Listener(32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for step in range(1, steps + 1):
        wave, answer = waves(32)
        loss = F.cross_entropy(model(wave), answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == steps:
            print(f"step {step}: loss {loss.item():.3f}")
    wave, answer = waves(256)
    with torch.no_grad():
        right = (model(wave).argmax(-1) == answer).float().mean().item()
    print(f"accuracy {right:.3f} (chance {1 / CLASSES:.3f})")
    ours_ms, theirs_ms = train_ms(model.rnn), train_ms(nn.GRU(32, 32, batch_first=True))
    print(f"the recurrence alone: ParaGRU {ours_ms:.0f} ms, nn.GRU {theirs_ms:.0f} ms")


if __name__ == "__main__":
    main()
