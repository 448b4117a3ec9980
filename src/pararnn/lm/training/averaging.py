"""An exponential moving average of the weights: what is validated and saved instead of the last."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class AverageWeights:
    """The mean of a model's weights over its steps, with weights that decay.

    The first steps count less than the decay says, or the initial weights would stay in it for
    long: the mean after n steps moves by at least 9 / (10 + n).

    Args:
        model: Trained; parts of its parameters are averaged in the process that holds them.
        decay: Of the mean, per step.

    Attributes:
        tensors: The mean, by the names of the parameters.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(self, step: int) -> None:
        """Take in the weights after a step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        mean, now = self._pairs()
        torch._foreach_lerp_(mean, now, 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the model the mean, until the end of the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for mean, now in zip(*self._pairs(), strict=True):
            kept = now.clone()
            now.copy_(mean)
            mean.copy_(kept)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        parameters = dict(self.model.named_parameters())
        means = [_own(tensor) for tensor in self.tensors.values()]
        return means, [_own(parameters[name].detach()) for name in self.tensors]


def _own(tensor: Tensor) -> Tensor:
    """The part that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
