"""The projection that ends every branch of a block."""

from torch import nn


class ResidualProjection(nn.Linear):
    """Projects back to the residual stream; initialised smaller the more of them add up."""
