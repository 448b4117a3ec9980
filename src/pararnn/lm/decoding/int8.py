"""Weights of one byte each, to generate with: half as many to read as in bfloat16.

Every output channel of a product has a scale of its own; numbers are rounded to the nearest of 255
steps, symmetrically about zero. Inputs and sums stay in the model's type. The packages for
quantisation, such as torchao, keep weights as tensors of their own kind, whose products are theirs.
Here the products are what generation is about: for one text they are kernels of this library, which
read bytes as they read other weights (`kernels/matvec.py`).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pararnn.lm.models.modeling import ParaRNNForCausalLM
from pararnn.lm.models.recurrence import initialises_itself

_LARGEST = 127


class Int8Linear(nn.Module):
    """`nn.Linear` without bias, with a weight in int8 and one scale per output channel.

    Args:
        linear: Where the weight comes from.

    Attributes:
        codes: The weight in steps, int8, (outputs, inputs).
        scale: The size of a step, (outputs,).
    """

    codes: Tensor
    scale: Tensor
    _like: Tensor  # of the type of the weight

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        exact = linear.weight.detach()
        exact = exact.to(torch.promote_types(exact.dtype, torch.float32))
        scale = exact.abs().amax(1, keepdim=True).div(_LARGEST)
        scale = torch.where(scale == 0, 1.0, scale)
        self.register_buffer("codes", exact.div(scale).round().to(torch.int8))
        self.register_buffer("scale", scale.squeeze(1))
        self.register_buffer("_like", linear.weight.detach().new_empty(0))

    @property
    def weight(self) -> Tensor:
        """The rounded weight, for losses that read it."""
        return (self.codes * self.scale[:, None]).to(self._like.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x, shape (..., inputs)."""
        return (F.linear(x, self.codes.to(x.dtype)) * self.scale).to(x.dtype)


def int8_weights(model: ParaRNNForCausalLM) -> ParaRNNForCausalLM:
    """A copy of a model for generation, whose projections have int8 weights.

    Embedding, norms, convolutions and the cells' own weights are shared with the model; a head that
    is tied to the embedding gets weights of its own.

    Args:
        model: Any of this library; it stays as it is.

    Raises:
        TypeError: The model is another's, whose modules may rely on their weights.
    """
    if not isinstance(model, ParaRNNForCausalLM):
        raise TypeError(
            f"int8 weights are for ParaRNNForCausalLM, not for {type(model).__name__}; generate "
            "with the model's own weights."
        )
    tensors = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for name, module in list(copied.named_modules()):
        if isinstance(module, nn.Linear) and module.bias is None and not initialises_itself(module):
            copied.set_submodule(name, Int8Linear(module))
    return copied.eval()
