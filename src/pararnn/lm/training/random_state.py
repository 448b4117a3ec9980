"""The random numbers of a process: their state, to be kept and put back."""

import torch
from torch import Tensor


def random_state(device: torch.device, rank: int = 0) -> dict[str, Tensor]:
    """The states of a process's generators, under names of its own."""
    state = {f"cpu-{rank}": torch.get_rng_state()}
    if device.type == "cuda":
        state[f"cuda-{rank}"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: dict[str, Tensor]) -> None:
    """Go on from what `random_state` returned."""
    for name, value in state.items():
        if name.startswith("cuda"):
            torch.cuda.set_rng_state(value, device)
        else:
            torch.set_rng_state(value)
