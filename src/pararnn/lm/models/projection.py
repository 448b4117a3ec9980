"""The projection at the end of every branch of a block."""

from torch import nn


class ResidualProjection(nn.Linear):
    """Projects back to the residual stream; a deeper model initialises it with smaller weights."""
