"""A cell for irregular times where times are regular."""

from typing import Any

import torch
from torch import Tensor

from pararnn import cells


class EvenTimes(cells.ClosedFormContinuousCell):
    """A closed-form continuous-time cell whose steps are one unit of time apart."""

    def __init__(self, input_size: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(input_size, *args, **kwargs)
        self.input_size = input_size

    def forward(self, x: Tensor, state: Tensor) -> Tensor:  # noqa: D102
        return super().forward(torch.cat([x, torch.ones_like(x[:, :1])], 1), state)
