"""What the examples on real data share: layers to compare, and training within a given time."""

import argparse
import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

import pararnn

Batch = tuple[Any, Tensor]  # inputs, in the form that the model takes, and targets


LAYERS = ("ParaGRU", "ParaLSTM", "parallelize(nn.GRU)", "nn.GRU")


def make_layer(
    name: str, width: int, num_layers: int = 1, memory: float | None = None
) -> nn.Module:
    """One of `LAYERS`; `memory`: in steps, the longest that the paper's cells begin with."""
    if name in ("ParaGRU", "ParaLSTM"):
        layer = getattr(pararnn, name)
        return layer(width, width, num_layers, batch_first=True, max_timescale=memory)
    gru = nn.GRU(width, width, num_layers, batch_first=True)
    return gru if name == "nn.GRU" else pararnn.parallelize(gru)


def options(seconds: float) -> argparse.ArgumentParser:
    """What all of these examples can be asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=seconds, help="of training, for each line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--device", help="that tensors are made on, such as cuda")
    return parser


def fit(
    model: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    loss: Callable[[nn.Module, Any, Tensor], Tensor],
    validate: Callable[[nn.Module], float],
    *,
    seconds: float,
    learning_rate: float,
) -> str:
    """Train until the time is over or nothing improves; the weights are then the best validated.

    The rate is divided by 3 after 3 rounds without a better validation, and training ends at a
    thirtieth of it. What happens in a round follows from the seed; how many fit into the time, from
    the machine. The time is the processor's, of all threads together, so that other programs do not
    count: with one thread, the wall-clock time on a machine that does nothing else.

    Args:
        model: Is changed.
        batches: The batches of one round, pairs of inputs and targets.
        loss: What the optimiser lowers.
        validate: Lower is better; its time does not count.
        seconds: For training.
        learning_rate: Of AdamW, at the beginning.

    Returns:
        A note on how long it took.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=1 / 3, patience=3)
    best, best_round, weights = float("inf"), 0, model.state_dict()
    used, rounds = 0.0, 0
    while used < seconds and schedule.get_last_lr()[0] > learning_rate / 30:
        model.train()
        used += train_round(model, batches(), loss, optimizer, seconds - used)
        rounds += 1
        model.eval()
        with torch.no_grad():
            value = validate(model)
        if value < best:
            best, best_round, weights = value, rounds, copy.deepcopy(model.state_dict())
        schedule.step(value)
    model.load_state_dict(weights)
    return f"round {best_round} of {rounds}, {used:.0f} s"


def train_round(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Callable[[nn.Module, Any, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    seconds: float,
) -> float:
    """One step per batch, as long as there is time; the seconds that it took."""
    begin = time.process_time()
    for x, y in batches:
        optimizer.zero_grad()
        loss(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if time.process_time() - begin >= seconds:
            break
    return time.process_time() - begin
