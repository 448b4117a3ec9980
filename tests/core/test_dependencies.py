"""Which channels are proved apart: rules of single operations, and sizes of groups."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pararnn import RNN
from pararnn.tracing.dependencies import group_size

HEADS = 3


class Body(nn.Module):
    """h' = tanh(x + body(h)), with three heads of four channels."""

    input_size = hidden_size = 12
    num_components = 1

    def __init__(self, body):
        super().__init__()
        self.body = body
        self.weight = nn.Parameter(torch.zeros(12))
        self.blocks = nn.Parameter(torch.zeros(HEADS, 4, 4))
        self.pairs = nn.Parameter(torch.zeros(2, 2))

    def forward(self, x, h):
        return torch.tanh(x + self.body(self, h))


def heads(h):
    return h.unflatten(-1, (HEADS, 4))


SIZES = {
    "product over heads": (lambda s, h: (heads(h).mT @ s.blocks[:, :3, 0]).flatten(1), 12),
    "product in heads": (lambda s, h: (heads(h).unsqueeze(-2) @ s.blocks).flatten(1), 4),
    "shared product": (lambda s, h: (heads(h) @ s.blocks[0]).flatten(1), 4),
    "pairs": (lambda s, h: (h.unflatten(-1, (6, 2)) @ s.pairs).flatten(1), 2),
    "pairs and heads": (
        lambda s, h: (
            (h.unflatten(-1, (6, 2)) @ s.pairs).flatten(1) + (heads(h) @ s.blocks[0]).flatten(1)
        ),
        4,
    ),
    "pairs and triples": (
        lambda s, h: (
            h.unflatten(-1, (6, 2)).sum(-1).repeat_interleave(2, -1)
            + h.unflatten(-1, (4, 3)).amax(-1).repeat_interleave(3, -1)
        ),
        6,
    ),
    "group norm": (lambda s, h: F.group_norm(h, HEADS, s.weight, s.weight), 4),
    "layer norm": (lambda s, h: F.layer_norm(h, (12,), s.weight), 12),
    "softmax in heads": (lambda s, h: torch.softmax(heads(h), -1).flatten(1), 4),
    "softmax over heads": (lambda s, h: torch.softmax(heads(h), 1).flatten(1), 12),
    "variance in heads": (lambda s, h: (heads(h) / heads(h).std(-1, keepdim=True)).flatten(1), 4),
    "choice by a head": (
        lambda s, h: torch.where(heads(h).sum(-1, keepdim=True) > 9, heads(h), 0).flatten(1),
        4,
    ),
    "choice by all": (lambda s, h: torch.where(h.amax(-1, keepdim=True) > 9, h, -h), 12),
    "largest of a head": (lambda s, h: h - heads(h).max(-1)[0].repeat_interleave(4, -1), 4),
    "each alone": (lambda s, h: torch.stack([h, s.weight * h]).sum(0), 1),
    "shift in heads": (lambda s, h: F.pad(heads(h)[..., 1:], (0, 1)).flatten(1), 4),
    "complex numbers": (
        lambda s, h: torch.view_as_real(
            torch.view_as_complex(h.unflatten(-1, (6, 2)))
            * torch.complex(s.weight[:6], s.weight[6:])
        ).flatten(1),
        2,
    ),
    "rare shift": (lambda s, h: torch.relu(torch.roll(h, 1, -1) - 1e3) * h, 12),
    "times zero": (lambda s, h: h + 0 * torch.roll(h, 1, -1), 12),
    "operation without a rule": (
        lambda s, h: torch.fft.rfft(h, dim=-1).abs().sum(-1, True) * h,
        12,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_size_of_groups(name):
    body, size = SIZES[name]
    parts = RNN(Body(body), backend="torch").runner().traced.parts
    assert group_size(parts) == size


def test_components_reach_each_other():
    class Pair(nn.Module):
        input_size = hidden_size = 6
        num_components = 2

        def forward(self, x, state):
            a, b = state
            return torch.tanh(x + b.unflatten(-1, (2, 3)).cumsum(-1).flatten(1)), a

    assert RNN(Pair()).runner().traced.structure == "heads (size 3)"


def test_large_sizes_are_fast():
    traced = RNN(nn.LSTMCell(2, 2048)).runner().traced
    start = time.perf_counter()
    assert traced.structure == "dense"
    assert time.perf_counter() - start < 2
